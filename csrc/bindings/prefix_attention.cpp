#include "bindings/bind.h"

#if defined(PELT_HAS_CPU_KERNELS)
#include <algorithm>
#include <array>
#include <tuple>
#include <vector>

#include "cpu/isa.h"
#include "ops/prefix_attention/cpu.h"
#endif

namespace pelt::bindings {

namespace {

#if defined(PELT_HAS_CPU_KERNELS)
using namespace pelt::prefix_attention;

// Of a prefix: k, v, index, length, and where its gradients go (0 in forward).
using SegmentArguments = std::tuple<TypedAddress, TypedAddress, Address, int64_t, Address, Address>;

void bind_on_cpu(py::module_& m) {
  auto tensor = [](const TypedAddress& a) { return CpuTensor{at(a.first), a.second}; };

  // What forward and backward of one call have in common; it borrows every address.
  py::class_<CpuInputs>(m, "PrefixAttentionCpuInputs")
      .def(py::init([=](bool is_float32, const std::array<int64_t, 6>& sizes, Address q, Address k,
                        Address v, const std::array<int64_t, 3>& q_strides,
                        const std::array<int64_t, 3>& k_strides,
                        const std::array<int64_t, 3>& v_strides,
                        const std::vector<SegmentArguments>& prefixes, TypedAddress gate,
                        bool has_gate_per_head, Address key_mask, Address lengths,
                        TypedAddress bias, std::pair<int64_t, int64_t> bias_strides, bool is_causal,
                        float scale, float kept, uint32_t threshold, uint64_t seed, int threads) {
             CpuInputs in;
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
           py::arg("threads"));

  m.def(
      "prefix_attention_cpu_fwd",
      [](const CpuInputs& inputs, Address out, Address lse) {
        cpu::with_isa([&](auto isa) {
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
        cpu::with_isa([&](auto isa) { backward_on_cpu<decltype(isa)::value>(inputs, grad); });
      },
      py::kw_only(), py::arg("inputs"), py::arg("dout"), py::arg("out"), py::arg("lse"),
      py::arg("dq"), py::arg("dk"), py::arg("dv"), py::arg("dgate"), py::arg("dbias"),
      py::arg("chunks"), py::call_guard<py::gil_scoped_release>());
}

#endif

}  // namespace

void bind_prefix_attention([[maybe_unused]] py::module_& m) {
#if defined(PELT_HAS_CPU_KERNELS)
  bind_on_cpu(m);
#endif
}

}  // namespace pelt::bindings
