// Dropout on fragments in registers. A lane holds two of four neighbouring elements in each of two
// rows, and the lane beside it the other two, so the even lane draws for the upper row and the odd
// one for the lower: nothing is drawn twice.
#pragma once

#include "ops/lora_linear/tiles.cuh"

namespace pelt::lora_linear {

// Which of the four elements from `element` on are kept, a bit for each (cuda/philox.cuh has the
// contract; this draw takes round keys that are parameters of the kernel).
__device__ __forceinline__ uint32_t draw_4(const Dropout& dropout, const PhiloxKeys& keys,
                                           int64_t element) {
  const uint64_t group = static_cast<uint64_t>(element) / 4;
  const PhiloxWords words = philox4x32_10(
      {{static_cast<uint32_t>(group), static_cast<uint32_t>(group >> 32), 0, 0}}, keys);
  uint32_t kept = 0;
  for (int e = 0; e < 4; ++e) kept |= words.word[e] >= dropout.threshold ? 1u << e : 0u;
  return kept;
}

struct KeptPairs {
  uint32_t row[2];  // bits 0 and 1: this lane's two elements, in the rows lane / 4 and 8 below
};

// From what both lanes of a pair have drawn to what each of them holds. `own` may carry a second
// draw in bits 4 to 7, which moves along.
__device__ __forceinline__ KeptPairs exchange(uint32_t own) {
  const bool is_odd = opaque(lane_index()) % 2 != 0;
  const uint32_t other = shfl_xor(own, 1);
  const int pair = is_odd ? 2 : 0;
  return {{(is_odd ? other : own) >> pair, (is_odd ? own : other) >> pair}};
}

// The element that this lane draws from, of an [16, 8] piece whose first one is (row, column).
__device__ __forceinline__ int64_t drawn_element(const Linear& in, int64_t row, int column) {
  const int lane = opaque(lane_index());
  return (row + lane / 4 + 8 * (lane % 2)) * in.Din + column + lane % 4 / 2 * 4;
}

// All ones for each 16-bit element of a register that is kept.
__device__ __forceinline__ uint32_t mask_of_pair(uint32_t kept) {
  return ((kept & 1u) != 0 ? 0xffffu : 0u) | ((kept & 2u) != 0 ? 0xffff0000u : 0u);
}

// A fragment of x without what dropout drops; the factor of the rest is applied to the sums.
__device__ __forceinline__ FragmentA drop(const Linear& in, const PhiloxKeys& keys,
                                          const FragmentA& x, int64_t row, int column) {
  const uint32_t own = draw_4(in.dropout, keys, drawn_element(in, row, column)) |
                       draw_4(in.dropout, keys, drawn_element(in, row, column + 8)) << 4;
  const KeptPairs kept = exchange(own);
  // Registers 0 and 1 are columns 0-7 of both rows, 2 and 3 columns 8-15 (see cuda/mma.cuh).
  FragmentA dropped;
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    dropped.r[r] = x.r[r] & mask_of_pair(kept.row[r % 2] >> (r / 2 * 4));
  }
  return dropped;
}

// delta with its dropout, which in backward falls on what comes out of A.
__device__ __forceinline__ void drop_delta(const Linear& in, const PhiloxKeys& keys, int64_t row,
                                           int column, FragmentD& delta) {
  const KeptPairs kept = exchange(draw_4(in.dropout, keys, drawn_element(in, row, column)));
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const bool is_kept = (kept.row[i / 2] >> i % 2 & 1u) != 0;
    delta.r[i] *= is_kept ? in.dropout.keep_scale : 0.0f;
  }
}

}  // namespace pelt::lora_linear
