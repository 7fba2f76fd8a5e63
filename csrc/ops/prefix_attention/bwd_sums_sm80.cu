// prefix_attention, backward, last launch: adds what blocks of the earlier ones have left, each sum
// in the order of its parts, and rounds once to the gradient's dtype.
//   dprefix = sum over parts of the batch,  dgate = sum over tiles of rows (and heads)
#include "common/type_list.h"
#include "cuda/device.cuh"
#include "ops/prefix_attention/params.h"

namespace pelt::prefix_attention {
namespace {

constexpr int kSumThreads = 256;
constexpr int kMaxSums = 2 * kMaxPrefixes + 1;

// to[i] = sum over j < parts of from[i * element_stride + j * part_stride]
struct Sum {
  const float* from = nullptr;
  ParameterGrad to;
  int64_t size = 0;
  int64_t element_stride = 1;
  int64_t part_stride = 1;
  int64_t parts = 0;
};

struct Sums {
  Sum sum[kMaxSums];
  int count = 0;
  int64_t largest = 0;

  void add(const Sum& one) {
    if (one.to.data == nullptr || one.size == 0) return;
    sum[count++] = one;
    largest = one.size > largest ? one.size : largest;
  }
};

template <class Element>
struct Config {
  using T = Element;
};

template <class C>
__global__ void __launch_bounds__(kSumThreads)
    prefix_attention_bwd_sums_sm80(const __grid_constant__ Sums p) {
  const Sum& sum = p.sum[block_index_y()];
  const int64_t step = static_cast<int64_t>(grid_blocks_x()) * kSumThreads;
  for (int64_t i = static_cast<int64_t>(block_index_x()) * kSumThreads + thread_index();
       i < sum.size; i += step) {
    const float* from = sum.from + i * sum.element_stride;
    float total = 0.0f;
    for (int64_t j = 0; j < sum.parts; ++j) total += from[j * sum.part_stride];
    if (sum.to.is_float32) {
      static_cast<float*>(sum.to.data)[i] = total;
    } else {
      static_cast<typename C::T*>(sum.to.data)[i] = round_to<typename C::T>(total);
    }
  }
}

using Configs = TypeList<Config<bf16>, Config<f16>>;

}  // namespace

void launch_prefix_attention_bwd_sums_sm80(const BackwardParams& p, Stream stream) {
  const Inputs& in = p.in;
  Sums sums;
  for (int i = 0; i < in.prefixes; ++i) {
    const PrefixGrad& grad = p.prefix[i];
    Sum one;
    one.size = static_cast<int64_t>(in.prefix[i].members) * in.prefix[i].length * in.G * in.E;
    one.parts = grad.chunks;
    one.part_stride = one.size;
    one.from = grad.partial_k, one.to = grad.dprefix_k;
    sums.add(one);
    one.from = grad.partial_v, one.to = grad.dprefix_v;
    sums.add(one);
  }
  Sum gate;
  gate.from = p.gate_partial, gate.to = p.dgate;
  gate.parts = in.has_gate_per_head ? p.row_tiles : static_cast<int64_t>(in.H) * p.row_tiles;
  gate.element_stride = gate.parts;
  gate.size = in.has_gate_per_head ? static_cast<int64_t>(in.B) * in.H : in.B;
  sums.add(gate);
  if (sums.count == 0) return;
  constexpr int64_t kMaxBlocks = 1024;
  const int64_t blocks = (sums.largest + kSumThreads - 1) / kSumThreads;
  LaunchShape shape;
  shape.threads = kSumThreads;
  shape.blocks_x = static_cast<int>(blocks < kMaxBlocks ? blocks : kMaxBlocks);
  shape.blocks_y = sums.count;
  run_first_fit(
      Configs{},
      [&](auto tag) { return DTypeOf<typename decltype(tag)::type::T>::value == in.dtype; },
      [&](auto tag) {
        constexpr auto kKernel = prefix_attention_bwd_sums_sm80<typename decltype(tag)::type>;
        launch<kKernel>("prefix_attention_bwd_sums_sm80", shape, stream, sums);
      });
}

}  // namespace pelt::prefix_attention
