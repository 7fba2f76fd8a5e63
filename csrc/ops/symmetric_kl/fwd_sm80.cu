// symmetric_kl, forward, one launch:
//   loss = mean over rows of 0.5 [KL(p2 ‖ p1) + KL(p1 ‖ p2)],  p = softmax(z)
//
// The two divergences add up to Σ (p1 - p2) (log p1 - log p2), and because both p sum to 1 the
// log-sum-exps drop out of it: Σ (p1 - p2) d with d = z1 - z2, or d less any constant. So one pass
// over the vocabulary does: with the maximum m so far, l = Σ exp(z - m) and t = Σ exp(z - m) d for
// both, rescaled where m grows, and in the end t1 / l1 - t2 / l2. Those should not be large numbers
// with a small difference: each thread's constant is first the d of its largest z1, which is most
// of what a confident model has, and then the mean of d under p1, again where two threads' sums
// meet.
//
// The last block to finish adds up the rows' values, in an order that does not depend on which
// block that is: two runs give the same bits. Rows that do not count are not read.
//
// A logit of -inf is a class that does not exist: its probability is 0, and so is its term,
// whatever d is. Where the other side has it, that side's term is infinite.
//
// Shared memory: 0.3 KB. Why so: reading the logits once is all the memory traffic there is.
#include "common/type_list.h"
#include "ops/symmetric_kl/rows.cuh"

namespace pelt::symmetric_kl {
namespace {

// What a thread knows of its part of a row.
struct Sums {
  float m1 = -INFINITY, l1 = 0.0f, t1 = 0.0f;
  float m2 = -INFINITY, l2 = 0.0f, t2 = 0.0f;
  float shift = 0.0f;  // finite: what d is less by

  // The factor of sums whose maximum grows from m to `larger`. A row of -inf has no difference of
  // maxima that is a number.
  __device__ __forceinline__ static float scale(float m, float larger) {
    return m == larger ? 1.0f : expf(m - larger);
  }

  // e d, where 0 is what a class without weight adds to a sum.
  __device__ __forceinline__ static float term(float e, float d) {
    return e == 0.0f ? 0.0f : e * d;
  }

  // Sums relative to the old maxima become sums relative to larger ones.
  __device__ __forceinline__ void raise(float larger1, float larger2) {
    const float f1 = scale(m1, larger1), f2 = scale(m2, larger2);
    l1 *= f1, t1 = term(f1, t1), m1 = larger1;
    l2 *= f2, t2 = term(f2, t2), m2 = larger2;
  }

  // Sums of d less the old shift become sums of d less a new one.
  __device__ __forceinline__ void move_to(float new_shift) {
    const float step = new_shift - shift;
    if (!(step - step == 0.0f)) return;  // an infinity or a NaN says nothing about the others
    t1 -= step * l1, t2 -= step * l2;
    shift = new_shift;
  }

  // The mean of d under p1 for the shift.
  __device__ __forceinline__ void centre() { move_to(shift + t1 / l1); }

  template <int kCount>
  __device__ __forceinline__ void add(const Elements<kCount>& z1, const Elements<kCount>& z2) {
    // Maxima first: a rescaling of the sums costs two exponentials, and most elements need none.
    float larger1 = m1, larger2 = m2, at_largest = shift;
    for (int i = 0; i < kCount; ++i) {
      if (z1.v[i] > larger1) larger1 = z1.v[i], at_largest = z1.v[i] - z2.v[i];
      if (z2.v[i] > larger2) larger2 = z2.v[i];
    }
    if (larger1 > m1 || larger2 > m2) {
      raise(larger1, larger2);
      move_to(at_largest);
    }
    // Without a maximum yet there are only -inf and NaN, and exp of them is what it should be.
    const float base1 = m1 == -INFINITY ? 0.0f : m1, base2 = m2 == -INFINITY ? 0.0f : m2;
    for (int i = 0; i < kCount; ++i) {
      // Two classes that do not exist have no difference.
      const float d = (z1.v[i] == z2.v[i] ? 0.0f : z1.v[i] - z2.v[i]) - shift;
      const float e1 = expf(z1.v[i] - base1), e2 = expf(z2.v[i] - base2);
      l1 += e1, t1 += term(e1, d);
      l2 += e2, t2 += term(e2, d);
    }
  }

  // Adds the sums of other columns: both sides are brought to the same maxima and the same shift,
  // that of the side which has the largest z1.
  __device__ __forceinline__ void merge(Sums other) {
    const float new_shift = other.m1 > m1 ? other.shift : shift;
    const float larger1 = other.m1 > m1 ? other.m1 : m1, larger2 = other.m2 > m2 ? other.m2 : m2;
    raise(larger1, larger2);
    other.raise(larger1, larger2);
    move_to(new_shift);
    other.move_to(new_shift);
    l1 += other.l1, t1 += other.t1;
    l2 += other.l2, t2 += other.t2;
    centre();
  }

  __device__ __forceinline__ Sums of_lane(int distance) const {
    Sums other;
    other.m1 = shfl_xor(m1, distance), other.l1 = shfl_xor(l1, distance);
    other.t1 = shfl_xor(t1, distance), other.m2 = shfl_xor(m2, distance);
    other.l2 = shfl_xor(l2, distance), other.t2 = shfl_xor(t2, distance);
    other.shift = shfl_xor(shift, distance);
    return other;
  }
};

struct Shared {
  Sums sums[kWarps];
  float partial[kWarps];
  int is_last;
};

// Lane 0 of a row's first warp gets the whole row.
template <class C>
__device__ __forceinline__ Sums sum_row(const Call& in, Shared& s, int64_t row, bool is_read) {
  using T = typename C::T;
  Sums sums;
  if (is_read) {
    const T *z1 = in.input_as<T>(kZ1) + row * in.C, *z2 = in.input_as<T>(kZ2) + row * in.C;
    for_columns<C>(in, [&](auto tag, int c) {
      constexpr int kCount = decltype(tag)::value;
      sums.add(load_elements<kCount>(z1 + c), load_elements<kCount>(z2 + c));
    });
    sums.centre();
  }
  // A row that is not read merges empty sums: the shuffles need all lanes.
  for (int distance = 1; distance < 32; distance *= 2) sums.merge(sums.of_lane(distance));
  if constexpr (C::kRowWarps > 1) {
    if (lane_index() == 0) s.sums[warp_index()] = sums;
    // Every warp's sums are there to be merged.
    sync_threads();
    if (thread_index() == 0) {
      for (int warp = 1; warp < kWarps; ++warp) sums.merge(s.sums[warp]);
    }
    // They have been read: the block's next row may write its own.
    sync_threads();
  }
  return sums;
}

// The mean of the rows' values, by the block that finishes last.
__device__ __forceinline__ void finish(const ForwardParams& p, Shared& s) {
  // The ticket releases the rows' values of the whole block.
  sync_threads();
  if (thread_index() == 0) s.is_last = take_ticket(p.ticket) == grid_blocks_x() - 1;
  // Every thread learns whether the block came last, and then sees the other blocks' rows.
  sync_threads();
  if (!s.is_last) return;
  float own = 0.0f;
  for (int64_t t = thread_index(); t < p.in.T; t += kThreads) own += p.rows[t];
  const float sum = block_sum(own, s.partial);
  const float count = count_of(p.in, s.partial);
  if (thread_index() == 0) *p.in.output_as<float>(kLoss) = sum / count;
}

// Grid: rows in turns. All threads stay in the loop equally long: a long row has barriers.
template <class C>
__global__ void __launch_bounds__(kThreads)
    symmetric_kl_fwd_sm80(const __grid_constant__ ForwardParams p) {
  auto& s = shared_memory_as<Shared>();
  const Call& in = p.in;
  float* lse = in.output_as<float>(kLse);
  const int64_t step = static_cast<int64_t>(grid_blocks_x()) * C::kRows;
  for (int64_t first = block_index_x() * C::kRows; first < in.T; first += step) {
    const int64_t row = first + warp_index() / C::kRowWarps;
    const bool is_read = row < in.T && counts(in, row);
    const Sums sums = sum_row<C>(in, s, row, is_read);
    // From here on one thread of the row.
    if (row >= in.T || thread_index() % C::kRowThreads != 0) continue;
    const float value = sums.t1 / sums.l1 - sums.t2 / sums.l2;
    // Never negative but by rounding; a NaN stays one.
    p.rows[row] = !is_read || value < 0.0f ? 0.0f : 0.5f * value;
    lse[row] = is_read ? sums.m1 + logf(sums.l1) : 0.0f;
    lse[in.T + row] = is_read ? sums.m2 + logf(sums.l2) : 0.0f;
  }
  finish(p, s);
}

}  // namespace

void launch_forward_sm80(const ForwardParams& p) {
  run_first_fit(
      Configs{}, [&](auto tag) { return decltype(tag)::type::fits(p.in); },
      [&](auto tag) {
        using C = typename decltype(tag)::type;
        const LaunchShape shape{blocks_of<C>(p.in), 1, 1, kThreads, sizeof(Shared)};
        launch<symmetric_kl_fwd_sm80<C>>("symmetric_kl_fwd_sm80", shape, p.in.stream, p);
      });
}

}  // namespace pelt::symmetric_kl
