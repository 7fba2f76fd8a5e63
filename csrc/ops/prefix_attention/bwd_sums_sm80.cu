// prefix_attention, backward, last launch: adds the partial sums that the blocks of the earlier
// ones have left in the workspace, each in a fixed order, and rounds once to the gradient's dtype.
//   dprefix = sum over the chunks of the batch,  dgate = sum over tiles of rows (and heads)
//
// A column of blocks (blockIdx.y) takes one sum, a thread one element of it: neighbouring threads
// read neighbouring addresses of a prefix's partial sums, which are nearly all of the bytes.
#include "common/type_list.h"
#include "cuda/device.cuh"
#include "ops/prefix_attention/params.h"

namespace pelt::prefix_attention {
namespace {

constexpr int kSumThreads = 256;
constexpr int kMaxSums = 2 * kMaxPrefixes + 1;  // keys and values of each prefix, and the gate

// to[i] = sum over j < terms of from[i * element_stride + j * term_stride]
struct Sum {
  const float* from = nullptr;
  ParameterGrad to;
  int64_t size = 0;  // elements of `to`
  int64_t element_stride = 1;
  int64_t term_stride = 1;
  int64_t terms = 0;
};

// All sums of a call, as one kernel parameter: a launch for each would cost more than the adding.
struct Sums {
  Sum sum[kMaxSums];
  int count = 0;
  int64_t largest = 0;

  // Leaves out gradients that are not wanted.
  void add(const Sum& one) {
    if (one.to.data == nullptr || one.size == 0) return;
    sum[count++] = one;
    largest = one.size > largest ? one.size : largest;
  }
};

// T is the dtype of gradients that are not float32. No head size: sums are of plain arrays.
template <class Element>
struct Config {
  using T = Element;
};

template <class C>
__global__ void __launch_bounds__(kSumThreads)
    prefix_attention_bwd_sums_sm80(const __grid_constant__ Sums p) {
  const Sum& sum = p.sum[block_index_y()];
  // The grid is sized for the largest sum and bounded, so a thread may take several elements.
  const int64_t step = static_cast<int64_t>(grid_blocks_x()) * kSumThreads;
  for (int64_t i = static_cast<int64_t>(block_index_x()) * kSumThreads + thread_index();
       i < sum.size; i += step) {
    const float* from = sum.from + i * sum.element_stride;
    float total = 0.0f;  // one thread adds all terms, in order: two runs give the same bits
    for (int64_t j = 0; j < sum.terms; ++j) total += from[j * sum.term_stride];
    if (sum.to.is_float32) {
      static_cast<float*>(sum.to.data)[i] = total;
    } else {
      static_cast<typename C::T*>(sum.to.data)[i] = round_to<typename C::T>(total);
    }
  }
}

using Configs = TypeList<Config<bf16>, Config<f16>>;

}  // namespace

void launch_bwd_sums_sm80(const BackwardParams& p) {
  const CudaInputs& in = p.in;
  Sums sums;
  // A prefix without a gradient has no chunks in the workspace, and its null pointers are left out.
  for (int i = 0; i < in.prefixes; ++i) {
    const PrefixGrad& grad = p.prefix[i];
    Sum one;
    one.size = static_cast<int64_t>(in.A_i[i]) * in.P_i[i] * in.G * in.E;
    // [chunks, A_i, P_i, G, E]
    one.terms = grad.chunks;
    one.term_stride = one.size;
    one.from = grad.partial_k, one.to = in.parameter_grad(kPrefixK + i);
    sums.add(one);
    // Values lie as keys do.
    one.from = grad.partial_v, one.to = in.parameter_grad(kPrefixV + i);
    sums.add(one);
  }
  // [B, H, row_tiles]: a gate per sample is the sum over its heads' tiles, which lie in a row.
  Sum gate;
  gate.from = p.gate_partial, gate.to = in.parameter_grad(kGate);
  gate.terms = in.has_gate_per_head() ? p.row_tiles : static_cast<int64_t>(in.H) * p.row_tiles;
  gate.element_stride = gate.terms;
  gate.size = in.has_gate_per_head() ? static_cast<int64_t>(in.B) * in.H : in.B;
  sums.add(gate);
  if (sums.count == 0) return;
  constexpr int64_t kMaxBlocks = 1024;  // several for each multiprocessor of the largest GPU
  const int64_t blocks = (sums.largest + kSumThreads - 1) / kSumThreads;
  const int blocks_x = static_cast<int>(blocks < kMaxBlocks ? blocks : kMaxBlocks);
  const LaunchShape shape{blocks_x, sums.count, 1, kSumThreads};
  run_first_fit(
      Configs{},
      [&](auto tag) { return DTypeOf<typename decltype(tag)::type::T>::value == in.dtype; },
      [&](auto tag) {
        constexpr auto kKernel = prefix_attention_bwd_sums_sm80<typename decltype(tag)::type>;
        launch<kKernel>("prefix_attention_bwd_sums_sm80", shape, in.stream, sums);
      });
}

}  // namespace pelt::prefix_attention
