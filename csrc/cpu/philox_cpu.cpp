// Dropout's keep-mask: Philox in vectors, written as elements of 1, 2, 4 or 8 bytes.
//
// Rows start at a multiple of four elements, so a row is a whole number of groups of four, and the
// work is cut by groups: which thread computes one does not change its bits.
#include <algorithm>
#include <array>

#include "common/parallel.h"
#include "cpu/philox.h"
#include "cpu/philox_lanes.h"

namespace pelt::cpu {
namespace {

template <class Bits>
void fill_groups(const DropoutFill& fill, int64_t begin, int64_t end) {
  const int64_t groups_per_row = (fill.columns + 3) / 4;
  const Bits kept = static_cast<Bits>(fill.kept_bits);
  const uint32_t threshold = fill.threshold;
  alignas(64) uint32_t words[4 * kPhiloxGroups];
  int64_t row = begin / groups_per_row, group_of_row = begin % groups_per_row;
  for (int64_t group = begin; group < end;) {
    philox_words(fill.first_group + static_cast<uint64_t>(group), 0, fill.seed, words);
    const int64_t groups = std::min<int64_t>(kPhiloxGroups, end - group);
    // A vector of counters may end in another row than it began in.
    for (int64_t done = 0; done < groups;) {
      const int64_t here = std::min(groups - done, groups_per_row - group_of_row);
      const int64_t column = 4 * group_of_row;
      const int64_t count = std::min(4 * here, fill.columns - column);
      Bits* out = static_cast<Bits*>(fill.out) + row * fill.columns + column;
      const uint32_t* from = words + 4 * done;
      for (int64_t i = 0; i < count; ++i) out[i] = from[i] >= threshold ? kept : Bits{0};
      done += here;
      group_of_row += here;
      if (group_of_row == groups_per_row) ++row, group_of_row = 0;
    }
    group += groups;
  }
}

template <class Bits>
void fill_all(const DropoutFill& fill) {
  constexpr int64_t kChunk = 4096;  // groups: some 20 us of work
  const int64_t groups = fill.rows * ((fill.columns + 3) / 4);
  parallel_for((groups + kChunk - 1) / kChunk, fill.threads, [&](int64_t chunk) {
    fill_groups<Bits>(fill, chunk * kChunk, std::min(groups, (chunk + 1) * kChunk));
  });
}

}  // namespace

template <>
void fill_dropout<Isa::PELT_CPU_ISA>(const DropoutFill& fill) {
  switch (fill.element_bytes) {
    case 1:
      return fill_all<uint8_t>(fill);
    case 2:
      return fill_all<uint16_t>(fill);
    case 4:
      return fill_all<uint32_t>(fill);
    default:
      return fill_all<uint64_t>(fill);
  }
}

template <>
void philox_block<Isa::PELT_CPU_ISA>(const uint64_t (&counter)[2], uint64_t key,
                                     std::array<uint32_t, 4>& words) {
  uint32_t all[4 * kPhiloxGroups];
  philox_words(counter[0], counter[1], key, all);
  std::copy(all, all + 4, words.begin());
}

}  // namespace pelt::cpu
