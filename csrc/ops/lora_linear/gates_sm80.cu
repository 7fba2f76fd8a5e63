// lora_linear, backward: the gates' gradients, sums over the rows of a sentence.
//
//   dgate = scale <raw, s>, summed over the sentence if the gate is one for it
//   dlogit = dgate pooling'(t) g_t (1 - g_t)     for each row t, of learned gates
//
// A block takes a sentence. Its threads take every kThreads-th row and add up in a fixed order, so
// two runs give the same bits. It reads a few numbers for each row: most of its time is the launch.
#include "ops/lora_linear/tiles.cuh"

namespace pelt::lora_linear {
namespace {

struct Shared {
  float sums[kWarps];
};

// A value of each row of the sentence, summed by the whole block; every thread gets the sum.
template <class ValueOfRow>
__device__ __forceinline__ float sum_rows(Shared& s, int rows, ValueOfRow&& value) {
  float sum = 0.0f;
  for (int t = thread_index(); t < rows; t += kThreads) sum += value(t);
  sum = warp_sum(sum);
  if (lane_index() == 0) s.sums[warp_index()] = sum;
  // Every warp's sum is there to be added.
  sync_threads();
  const float total = (s.sums[0] + s.sums[1]) + (s.sums[2] + s.sums[3]);
  // All have read the sums: the next call may write its own.
  sync_threads();
  return total;
}

// <dy B, s> times scale for row t of the sentence that begins at row `first`: the gradient of the
// branch's gate there. The dots may be in parts, one for each block of the branch's ranks.
__device__ __forceinline__ float gate_grad_of(const GatesParams& p, int branch, int64_t first,
                                              int t) {
  const Linear& in = p.in;
  const int64_t all = static_cast<int64_t>(in.B) * in.S;
  // The parts of the branches before it come first.
  int part = 0;
  for (int i = 0; i < branch; ++i) part += (in.branch[i].R + p.rank_block - 1) / p.rank_block;
  const int end = part + (in.branch[branch].R + p.rank_block - 1) / p.rank_block;
  float dot = 0.0f;
  for (; part < end; ++part) dot += p.dots[part * all + first + t];
  return in.branch[branch].scale * dot;
}

// dlogit of learned gate g for every row of sentence b.
__device__ __forceinline__ void derive_logits(const GatesParams& p, Shared& s, int g, int b,
                                              float real_rows) {
  const Linear& in = p.in;
  const Gate& gate = in.gate[g];
  const int64_t all = static_cast<int64_t>(in.B) * in.S, first = static_cast<int64_t>(b) * in.S;
  const bool is_masked = gate.pooling == Pooling::kMaskedMean;
  const bool is_pooled = gate.pooling != Pooling::kToken;
  // By how many rows forward divided the sentence's sum.
  const float count = is_masked ? real_rows : is_pooled ? static_cast<float>(in.S) : 1.0f;
  // The gradient of a pooled gate's value, the same for all rows: given for an extra gate, summed
  // here for a branch's.
  float of_sentence = 0.0f;
  if (is_pooled && gate.branch < 0) {
    of_sentence = gate.dvalue[b];
  } else if (is_pooled) {
    of_sentence = sum_rows(s, in.S, [&](int t) { return gate_grad_of(p, gate.branch, first, t); });
  }
  for (int t = thread_index(); t < in.S; t += kThreads) {
    float dvalue = of_sentence;
    if (!is_pooled) {
      dvalue = gate.branch < 0 ? gate.dvalue[first + t] : gate_grad_of(p, gate.branch, first, t);
    }
    const float value = p.row_gates[g * all + first + t];
    // A masked row has no part in the gate; fmaxf as in forward, where no row may count.
    const bool counts = !is_masked || in.mask[first + t];
    p.dlogits[g * all + first + t] =
        counts ? dvalue / fmaxf(count, 1.0f) * value * (1.0f - value) : 0.0f;
  }
}

// Grid: sentences.
template <class T>
__global__ void __launch_bounds__(kThreads)
    lora_linear_gates_sm80(const __grid_constant__ GatesParams p) {
  auto& s = shared_memory_as<Shared>();
  const Linear& in = p.in;
  const int b = block_index_x();
  const int64_t first = static_cast<int64_t>(b) * in.S;
  // Gates that are inputs: their gradients are results.
  for (int i = 0; i < in.branches; ++i) {
    const ParameterGrad& dgate = in.branch[i].dgate;
    if (dgate.data == nullptr) continue;
    if (in.branch[i].has_gate_per_row) {
      for (int t = thread_index(); t < in.S; t += kThreads) {
        store_grad<T>(dgate, first + t, gate_grad_of(p, i, first, t));
      }
    } else {
      const float sum = sum_rows(s, in.S, [&](int t) { return gate_grad_of(p, i, first, t); });
      if (thread_index() == 0) store_grad<T>(dgate, b, sum);
    }
  }
  if (in.gates == 0) return;
  // Learned gates: the gradients of their logits, for the launches behind this one.
  float real_rows = 0.0f;  // that the mask leaves; needed for masked means alone
  if (in.mask != nullptr) {
    real_rows = sum_rows(s, in.S, [&](int t) { return in.mask[first + t] ? 1.0f : 0.0f; });
  }
  for (int g = 0; g < in.gates; ++g) derive_logits(p, s, g, b, real_rows);
}

// Threads work on rows, whatever T is: it is the type of the inputs' gates only.
template <class T>
void launch_typed(const GatesParams& p, Stream stream) {
  const LaunchShape shape{p.in.B, 1, 1, kThreads, sizeof(Shared)};
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
