// lora_linear, backward: the gates' gradients, sums over the rows of a sentence.
//
//   dgate = scale <raw, s>, summed over the sentence if the gate is one for it
//   dlogit = dgate pooling'(t) g_t (1 - g_t)     for each row t, of learned gates
//
// A block takes a sentence. Its threads take every kThreads-th row and add up in a fixed order, so
// two runs give the same bits. A few numbers for each row: what it costs is the launch.
#include "ops/lora_linear/tiles.cuh"

namespace pelt::lora_linear {
namespace {

struct Shared {
  float sums[kWarps];
};

// A value of each row of the sentence, summed by the whole block.
template <class ValueOfRow>
__device__ __forceinline__ float sum_rows(Shared& s, int rows, ValueOfRow&& value) {
  float sum = 0.0f;
  for (int t = thread_index(); t < rows; t += kThreads) sum += value(t);
  sum = warp_sum(sum);
  if (lane_index() == 0) s.sums[warp_index()] = sum;
  sync_threads();
  const float total = (s.sums[0] + s.sums[1]) + (s.sums[2] + s.sums[3]);
  sync_threads();
  return total;
}

// Grid: sentences.
template <class T>
__global__ void __launch_bounds__(kThreads)
    lora_linear_gates_sm80(const __grid_constant__ GatesParams p) {
  auto& s = shared_memory_as<Shared>();
  const Inputs& in = p.in;
  const int b = block_index_x();
  const int64_t all = static_cast<int64_t>(in.B) * in.S, first = static_cast<int64_t>(b) * in.S;
  // A branch's dots may be in parts, one for each block of its ranks.
  auto dot_of = [&](int branch, int t) {
    int part = 0;
    for (int i = 0; i < branch; ++i) {
      part += (in.branch[i].R + p.rank_block - 1) / p.rank_block;
    }
    const int end = part + (in.branch[branch].R + p.rank_block - 1) / p.rank_block;
    float dot = 0.0f;
    for (; part < end; ++part) dot += p.dots[part * all + first + t];
    return in.branch[branch].scale * dot;
  };
  for (int i = 0; i < in.branches; ++i) {
    if (p.dgate[i].data == nullptr) continue;
    if (in.branch[i].has_gate_per_row) {
      for (int t = thread_index(); t < in.S; t += kThreads) {
        store_grad<T>(p.dgate[i], first + t, dot_of(i, t));
      }
    } else {
      const float sum = sum_rows(s, in.S, [&](int t) { return dot_of(i, t); });
      if (thread_index() == 0) store_grad<T>(p.dgate[i], b, sum);
    }
  }
  if (in.gates == 0) return;
  float real = 0.0f;
  if (in.mask != nullptr) {
    real = sum_rows(s, in.S, [&](int t) { return in.mask[first + t] ? 1.0f : 0.0f; });
  }
  for (int g = 0; g < in.gates; ++g) {
    const Gate& gate = in.gate[g];
    const bool is_masked = gate.pooling == Pooling::kMaskedMean;
    const bool is_pooled = gate.pooling != Pooling::kToken;
    const float count = is_masked ? real : is_pooled ? static_cast<float>(in.S) : 1.0f;
    float of_sentence = 0.0f;
    if (is_pooled && gate.branch < 0) {
      of_sentence = p.dvalue[g][b];
    } else if (is_pooled) {
      of_sentence = sum_rows(s, in.S, [&](int t) { return dot_of(gate.branch, t); });
    }
    for (int t = thread_index(); t < in.S; t += kThreads) {
      float dvalue = of_sentence;
      if (!is_pooled) dvalue = gate.branch < 0 ? p.dvalue[g][first + t] : dot_of(gate.branch, t);
      const float value = p.row_gates[g * all + first + t];
      const bool counts = !is_masked || in.mask[first + t];
      p.dlogits[g * all + first + t] =
          counts ? dvalue / fmaxf(count, 1.0f) * value * (1.0f - value) : 0.0f;
    }
  }
}

template <class T>
void launch_typed(const GatesParams& p, Stream stream) {
  LaunchShape shape;
  shape.threads = kThreads;
  shape.shared_bytes = sizeof(Shared);
  shape.blocks_x = p.in.B;
  launch<lora_linear_gates_sm80<T>>("lora_linear_gates_sm80", shape, stream, p);
}

}  // namespace

void launch_gates_sm80(const GatesParams& p, Stream stream) {
  if (p.in.dtype == DType::kBF16) {
    launch_typed<bf16>(p, stream);
  } else {
    launch_typed<f16>(p, stream);
  }
}

}  // namespace pelt::lora_linear
