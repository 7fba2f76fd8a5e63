#include <algorithm>
#include <array>
#include <tuple>
#include <vector>

#include "bindings/bind.h"

#if defined(PELT_HAS_CUDA_KERNELS)
#include "common/check.h"
#include "ops/prefix_attention/params.h"
#endif
#include "cpu/isa.h"
#include "ops/prefix_attention/cpu.h"

namespace pelt::bindings {

namespace {

using namespace pelt::prefix_attention;

#if defined(PELT_HAS_CUDA_KERNELS)
// A call without its tensors: made once for equal calls and kept, because a dozen keywords would
// cost more host time than the launch.
struct Plan {
  Inputs in;
  std::array<bool, 2> is_dbias_shared{};  // by the batch, by heads
};

using Addresses = std::vector<Address>;
using StridesOfTensors = std::vector<std::array<int64_t, 3>>;

Strides strides_of(const std::array<int64_t, 3>& s) { return {s[0], s[1], s[2]}; }

// Addresses in the order q, k, v, gate, key_mask, lengths, bias, then k, v and index of each
// prefix. Strides, three of each: q, k, v, then k and v of each prefix.
Inputs with_tensors(const Plan& plan, const Addresses& tensors, const StridesOfTensors& strides,
                    uint64_t seed) {
  const size_t prefixes = plan.in.prefixes;
  check(tensors.size() == 7 + 3 * prefixes && strides.size() == 3 + 2 * prefixes,
        "prefix_attention: expected ", 7 + 3 * prefixes, " addresses and ", 3 + 2 * prefixes,
        " times three strides for ", prefixes, " prefixes, got ", tensors.size(), " and ",
        strides.size());
  auto tensor = tensors.begin();
  auto stride = strides.begin();
  auto take_strides = [&] { return strides_of(*stride++); };
  Inputs in = plan.in;
  in.q = at(*tensor++), in.k = at(*tensor++), in.v = at(*tensor++);
  in.q_strides = take_strides(), in.k_strides = take_strides(), in.v_strides = take_strides();
  in.gate.data = at(*tensor++);
  in.key_mask = at<const bool>(*tensor++);
  in.lengths = at<const int64_t>(*tensor++);
  in.bias.data = at(*tensor++);
  for (int i = 0; i < in.prefixes; ++i) {
    Prefix& prefix = in.prefix[i];
    prefix.prefix_k.data = at(*tensor++);
    prefix.prefix_v.data = at(*tensor++);
    prefix.prefix_index = at<const int64_t>(*tensor++);
    prefix.k_strides = take_strides();
    prefix.v_strides = take_strides();
  }
  in.dropout.seed = seed;
  in.dropout_keys = PhiloxKeys::of(seed);
  return in;
}

// Where gradients go, null for those that are not wanted: q, k, v, gate, bias, then k and v of each
// prefix.
BackwardParams with_gradients(const Plan& plan, const Addresses& grads) {
  const size_t prefixes = plan.in.prefixes;
  check(grads.size() == 5 + 2 * prefixes, "prefix_attention: expected ", 5 + 2 * prefixes,
        " addresses of gradients for ", prefixes, " prefixes, got ", grads.size());
  BackwardParams params;
  params.in = plan.in;
  params.dq = at(grads[0]), params.dk = at(grads[1]), params.dv = at(grads[2]);
  params.dgate = {at(grads[3]), plan.in.gate.is_float32};
  params.dbias = {at(grads[4]), plan.in.bias.is_float32};
  params.is_dbias_shared_by_batch = plan.is_dbias_shared[0];
  params.is_dbias_shared_by_heads = plan.is_dbias_shared[1];
  for (size_t i = 0; i < prefixes; ++i) {
    const Prefix& prefix = plan.in.prefix[i];
    params.prefix[i].dprefix_k = {at(grads[5 + 2 * i]), prefix.prefix_k.is_float32};
    params.prefix[i].dprefix_v = {at(grads[6 + 2 * i]), prefix.prefix_v.is_float32};
  }
  return params;
}

void bind_on_cuda(py::module_& m) {
  m.def(
      "prefix_attention_why_not",
      [](int dtype, int64_t B, int64_t H, int64_t S, int64_t N, int64_t P, int64_t E) {
        return why_not(static_cast<DType>(dtype), B, H, S, N, P, E);
      },
      py::kw_only(), py::arg("dtype"), py::arg("B"), py::arg("H"), py::arg("S"), py::arg("N"),
      py::arg("P"), py::arg("E"));

  // Of each prefix A_i, P_i, and whether k and v are float32.
  using PrefixArguments = std::tuple<int, int, bool, bool>;
  py::class_<Plan>(m, "PrefixAttention", py::module_local())
      .def(py::init([](int dtype, const std::array<int, 6>& sizes,
                       const std::vector<PrefixArguments>& prefixes, bool is_gate_float32,
                       bool has_gate_per_head, bool is_bias_float32,
                       const std::array<int64_t, 2>& bias_strides,
                       const std::array<bool, 2>& is_dbias_shared, bool is_causal, float scale,
                       double dropout_p) {
             check(prefixes.size() <= kMaxPrefixes, "prefix_attention: expected at most ",
                   kMaxPrefixes, " prefixes, got ", prefixes.size());
             Plan plan;
             Inputs& in = plan.in;
             in.dtype = static_cast<DType>(dtype);
             std::tie(in.B, in.H, in.G, in.S, in.N, in.E) = std::tuple_cat(sizes);
             for (const auto& [members, length, is_k_float32, is_v_float32] : prefixes) {
               Prefix& prefix = in.prefix[in.prefixes++];
               prefix.prefix_k.is_float32 = is_k_float32;
               prefix.prefix_v.is_float32 = is_v_float32;
               prefix.members = members;
               prefix.length = length;
               prefix.first = in.P;
               in.P += length;
             }
             in.gate.is_float32 = is_gate_float32;
             in.has_gate_per_head = has_gate_per_head;
             in.bias.is_float32 = is_bias_float32;
             in.bias_batch_stride = bias_strides[0];
             in.bias_head_stride = bias_strides[1];
             plan.is_dbias_shared = is_dbias_shared;
             in.is_causal = is_causal;
             in.scale = scale;
             in.dropout = Dropout::with_probability(dropout_p, 0);
             return plan;
           }),
           py::kw_only(), py::arg("dtype"), py::arg("sizes"), py::arg("prefixes"),
           py::arg("is_gate_float32"), py::arg("has_gate_per_head"), py::arg("is_bias_float32"),
           py::arg("bias_strides"), py::arg("is_dbias_shared"), py::arg("is_causal"),
           py::arg("scale"), py::arg("dropout_p"))
      .def(
          "forward",
          [](const Plan& plan, const Addresses& tensors, const StridesOfTensors& strides,
             Address out, Address lse, uint64_t seed, Address stream, Address own_out,
             Address own_lse, const std::array<int64_t, 3>& own_out_strides) {
            ForwardParams params;
            params.in = with_tensors(plan, tensors, strides, seed);
            params.out = at(out);
            params.lse = at<float>(lse);
            params.own_out = at(own_out);
            params.own_lse = at<const float>(own_lse);
            params.own_out_strides = strides_of(own_out_strides);
            launch_prefix_attention_fwd(params, at(stream));
          },
          py::kw_only(), py::arg("tensors"), py::arg("strides"), py::arg("out"), py::arg("lse"),
          py::arg("seed"), py::arg("stream"), py::arg("own_out") = 0, py::arg("own_lse") = 0,
          py::arg("own_out_strides") = std::array<int64_t, 3>{},
          py::call_guard<py::gil_scoped_release>())
      .def(
          "backward_workspace_bytes",
          [](const Plan& plan, const Addresses& grads) {
            return backward_workspace_bytes(with_gradients(plan, grads));
          },
          py::kw_only(), py::arg("grads"))
      .def(
          "backward",
          [](const Plan& plan, const Addresses& tensors, const StridesOfTensors& strides,
             const Addresses& grads, Address dout, Address out, Address lse, Address workspace,
             uint64_t seed, Address stream, Address own_dq,
             const std::array<int64_t, 3>& own_dq_strides) {
            BackwardParams params = with_gradients(plan, grads);
            params.in = with_tensors(plan, tensors, strides, seed);
            params.dout = at(dout), params.out = at(out), params.lse = at<const float>(lse);
            params.own_dq = at(own_dq);
            params.own_dq_strides = strides_of(own_dq_strides);
            launch_prefix_attention_bwd(params, at(workspace), at(stream));
          },
          py::kw_only(), py::arg("tensors"), py::arg("strides"), py::arg("grads"), py::arg("dout"),
          py::arg("out"), py::arg("lse"), py::arg("workspace"), py::arg("seed"), py::arg("stream"),
          py::arg("own_dq") = 0, py::arg("own_dq_strides") = std::array<int64_t, 3>{},
          py::call_guard<py::gil_scoped_release>());
}
#endif

// Of a prefix: k, v, index, length, and where its gradients go (0 in forward).
using SegmentArguments = std::tuple<TypedAddress, TypedAddress, Address, int64_t, Address, Address>;

void bind_on_cpu(py::module_& m) {
  auto tensor = [](const TypedAddress& a) { return Parameter{at(a.first), a.second}; };

  // What forward and backward of one call have in common; it borrows every address.
  py::class_<CpuInputs>(m, "PrefixAttentionCpuInputs", py::module_local())
      .def(py::init([=](bool is_float32, const std::array<int64_t, 6>& sizes, Address q, Address k,
                        Address v, const std::array<int64_t, 3>& q_strides,
                        const std::array<int64_t, 3>& k_strides,
                        const std::array<int64_t, 3>& v_strides,
                        const std::vector<SegmentArguments>& prefixes, TypedAddress gate,
                        bool has_gate_per_head, Address key_mask, Address lengths,
                        TypedAddress bias, std::pair<int64_t, int64_t> bias_strides, bool is_causal,
                        float scale, float kept, uint32_t threshold, uint64_t seed, int threads,
                        const std::string& isa) {
             CpuInputs in;
             in.isa = cpu::isa_by_name(isa);
             in.is_float32 = is_float32;
             std::tie(in.B, in.H, in.G, in.S, in.N, in.E) = std::tuple_cat(sizes);
             in.q = at(q), in.k = at(k), in.v = at(v);
             std::copy(q_strides.begin(), q_strides.end(), in.q_strides);
             std::copy(k_strides.begin(), k_strides.end(), in.k_strides);
             std::copy(v_strides.begin(), v_strides.end(), in.v_strides);
             for (const auto& [keys, values, index, length, dk, dv] : prefixes) {
               in.prefix[in.segments++] = {tensor(keys), tensor(values), at<const int64_t>(index),
                                           length,       at<float>(dk),  at<float>(dv)};
             }
             in.gate = tensor(gate);
             in.has_gate_per_head = has_gate_per_head;
             in.key_mask = at<const bool>(key_mask);
             in.lengths = at<const int64_t>(lengths);
             in.bias = tensor(bias);
             in.bias_strides[0] = bias_strides.first;
             in.bias_strides[1] = bias_strides.second;
             in.is_causal = is_causal;
             in.scale = scale;
             in.kept = kept;
             in.threshold = threshold;
             in.seed = seed;
             in.threads = threads;
             return in;
           }),
           py::kw_only(), py::arg("is_float32"), py::arg("sizes"), py::arg("q"), py::arg("k"),
           py::arg("v"), py::arg("q_strides"), py::arg("k_strides"), py::arg("v_strides"),
           py::arg("prefixes"), py::arg("gate"), py::arg("has_gate_per_head"), py::arg("key_mask"),
           py::arg("lengths"), py::arg("bias"), py::arg("bias_strides"), py::arg("is_causal"),
           py::arg("scale"), py::arg("kept"), py::arg("threshold"), py::arg("seed"),
           py::arg("threads"), py::arg("isa"));

  m.def(
      "prefix_attention_cpu_fwd",
      [](const CpuInputs& inputs, Address out, Address lse) {
        cpu::with_isa(inputs.isa, [&](auto isa) {
          forward_on_cpu<decltype(isa)::value>(inputs, at(out), at<float>(lse));
        });
      },
      py::kw_only(), py::arg("inputs"), py::arg("out"), py::arg("lse"),
      py::call_guard<py::gil_scoped_release>());

  m.def(
      "prefix_attention_cpu_bwd",
      [](const CpuInputs& inputs, Address dout, Address out, Address lse, Address dq, Address dk,
         Address dv, Address dgate, Address dbias, int64_t chunks) {
        const CpuBackward grad{at(dout), at(out),          at<const float>(lse), at(dq), at(dk),
                               at(dv),   at<float>(dgate), at<float>(dbias),     chunks};
        cpu::with_isa(inputs.isa,
                      [&](auto isa) { backward_on_cpu<decltype(isa)::value>(inputs, grad); });
      },
      py::kw_only(), py::arg("inputs"), py::arg("dout"), py::arg("out"), py::arg("lse"),
      py::arg("dq"), py::arg("dk"), py::arg("dv"), py::arg("dgate"), py::arg("dbias"),
      py::arg("chunks"), py::call_guard<py::gil_scoped_release>());
}

}  // namespace

void bind_prefix_attention(py::module_& m) {
#if defined(PELT_HAS_CUDA_KERNELS)
  bind_on_cuda(m);
#endif
  bind_on_cpu(m);
}

}  // namespace pelt::bindings
