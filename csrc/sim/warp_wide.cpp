// Instructions that a warp carries out as one: matrices, shuffles, votes.
#include <cstring>

#include "common/check.h"
#include "sim/machine.h"

namespace pelt::sim {
namespace {

// Both elements of a register, as floats, in all lanes.
struct Pairs {
  alignas(64) float half[2][kLanes];
};

Pairs widen(const uint32_t* bits, bool is_bf16) {
  Pairs pairs;
  if (is_bf16) {
    alignas(64) uint32_t wide[2][kLanes];
    for (int lane = 0; lane < kLanes; ++lane) {
      wide[0][lane] = bits[lane] << 16;
      wide[1][lane] = bits[lane] & 0xffff0000u;
    }
    memcpy(pairs.half, wide, sizeof(wide));
    return pairs;
  }
  for (int lane = 0; lane < kLanes; ++lane) {
    _Float16 narrow[2];
    memcpy(narrow, &bits[lane], sizeof(narrow));
    pairs.half[0][lane] = static_cast<float>(narrow[0]);
    pairs.half[1][lane] = static_cast<float>(narrow[1]);
  }
  return pairs;
}

}  // namespace

// The address of row r of matrix m is lane 8 m + r's. Lane l receives of each matrix the elements
// (l / 4, 2 (l % 4)) and the next one, or with .trans those of the transposed matrix.
void Machine::load_matrix(const Step& step) {
  const Instruction& i = step.i;
  uint64_t addresses[kLanes] = {};
  for (int m = 0; m < i.destinations; ++m) {
    uint16_t matrix[8][8];
    for (int r = 0; r < 8; ++r) {
      const int lane = 8 * m + r;
      addresses[lane] = step.address(0, 0, lane);
      memcpy(matrix[r], reach(step, Use::kRead, Space::kShared, addresses[lane], 16, lane), 16);
    }
    auto* to = reinterpret_cast<uint32_t*>(step.place(m));
    for (int lane = 0; lane < kLanes; ++lane) {
      const int a = lane / 4, b = 2 * (lane % 4);
      const uint32_t low = i.is_transposed ? matrix[b][a] : matrix[a][b];
      const uint32_t high = i.is_transposed ? matrix[b + 1][a] : matrix[a][b + 1];
      to[lane] = high << 16 | low;
    }
  }
  if (!is_counting_) return;
  Step reading = step;
  reading.active = i.destinations == 4 ? kAllLanes : (uint32_t{1} << (8 * i.destinations)) - 1;
  count_access(reading, Space::kShared, addresses, 16, false);
}

// D = A B + C; csrc/cuda/mma.cuh draws the fragments. Products are exact in float32; they are added
// one after the other, which is one of the orders that the hardware may take.
void Machine::mma(const Step& step) {
  using Row = float __attribute__((vector_size(32)));  // of B or D, 8 elements
  alignas(64) float a[16][16];
  Row b[16], d[16];
  const bool is_bf16 = step.i.is_bf16;
  for (int n = 0; n < 4; ++n) {
    const Pairs pairs = widen(step.lanes32(4 + n), is_bf16);
    for (int lane = 0; lane < kLanes; ++lane) {
      float* to = &a[lane / 4 + n % 2 * 8][2 * (lane % 4) + n / 2 * 8];
      to[0] = pairs.half[0][lane];
      to[1] = pairs.half[1][lane];
    }
  }
  for (int n = 0; n < 2; ++n) {
    const Pairs pairs = widen(step.lanes32(8 + n), is_bf16);
    for (int lane = 0; lane < kLanes; ++lane) {
      const int k = 2 * (lane % 4) + 8 * n;
      b[k][lane / 4] = pairs.half[0][lane];
      b[k + 1][lane / 4] = pairs.half[1][lane];
    }
  }
  for (int n = 0; n < 4; ++n) {
    const auto* from = reinterpret_cast<const float*>(step.place(10 + n));
    for (int lane = 0; lane < kLanes; ++lane) {
      d[lane / 4 + n / 2 * 8][2 * (lane % 4) + n % 2] = from[lane];
    }
  }
  for (Row& row : d) {
    const float* factors = a[&row - d];
    for (int k = 0; k < 16; ++k) row += factors[k] * b[k];
  }
  for (int n = 0; n < 4; ++n) {
    auto* to = reinterpret_cast<float*>(step.place(n));
    for (int lane = 0; lane < kLanes; ++lane) {
      to[lane] = d[lane / 4 + n / 2 * 8][2 * (lane % 4) + n % 2];
    }
  }
}

// PTX gives the source lane by b and, in c, the segment's mask and the last lane that may be read.
void Machine::shuffle(const Step& step) {
  uint32_t a[kLanes];
  memcpy(a, step.place(2), sizeof(a));
  const uint32_t *b = step.lanes32(3), *c = step.lanes32(4);
  auto* to = reinterpret_cast<uint32_t*>(step.place(0));
  uint32_t in_range = 0, result[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) {
    if (!((step.active >> lane) & 1)) continue;
    const int by = static_cast<int>(b[lane] & 31), clamp = static_cast<int>(c[lane] & 31);
    const int segment = static_cast<int>((c[lane] >> 8) & 31);
    const int last = (lane & segment) | (clamp & ~segment);
    const int first = lane & segment;
    int from = 0;
    bool is_valid = false;
    switch (static_cast<Shuffle>(step.i.variant)) {
      case Shuffle::kUp:
        from = lane - by;
        is_valid = from >= last;
        break;
      case Shuffle::kDown:
        from = lane + by;
        is_valid = from <= last;
        break;
      case Shuffle::kButterfly:
        from = lane ^ by;
        is_valid = from <= last;
        break;
      case Shuffle::kIndex:
        from = first | (by & ~segment);
        is_valid = from <= last;
        break;
    }
    if (!is_valid) from = lane;
    if (!((step.active >> from) & 1)) {
      fault(step, lane, sentence("reads lane ", from, ", which does not take part"));
    }
    result[lane] = a[from];
    if (is_valid) in_range |= uint32_t{1} << lane;
  }
  for (int lane = 0; lane < kLanes; ++lane) {
    if ((step.active >> lane) & 1) to[lane] = result[lane];
  }
  auto& predicate = *reinterpret_cast<uint32_t*>(step.place(1));
  predicate = (predicate & ~step.active) | in_range;
}

void Machine::vote(const Step& step) {
  uint32_t holds = *step.lanes32(1);
  if (step.i.is_signed) holds = ~holds;  // of the negated predicate
  holds &= step.active;
  const auto what = static_cast<Vote>(step.i.variant);
  if (what == Vote::kBallot) {
    auto* to = reinterpret_cast<uint32_t*>(step.place(0));
    for (int lane = 0; lane < kLanes; ++lane) {
      if ((step.active >> lane) & 1) to[lane] = holds;
    }
    return;
  }
  const bool answer = what == Vote::kAny ? holds != 0 : holds == step.active;
  auto& predicate = *reinterpret_cast<uint32_t*>(step.place(0));
  predicate = (predicate & ~step.active) | (answer ? step.active : 0);
}

}  // namespace pelt::sim
