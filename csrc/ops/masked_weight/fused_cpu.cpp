// masked_weight on the CPU, forward.
//
//   W = w0 + beta u v;  s = |W| + alpha1 a b + alpha2 (row 1ᵀ + 1 colᵀ);  y = W where s is one of
//   the `keep` highest, else 0
//
// As a rule one sweep over the matrix does it all. A sample of the scores tells between which two
// values, lo and hi, the threshold lies. The sweep writes W where s >= lo and 0 elsewhere, counts
// the scores above hi, and notes each entry between lo and hi: some three in a hundred. The
// threshold is among those; a selection finds it, and the entries of them that do not stay are
// zeroed.
//
// Where lo and hi are the same, a score that many entries have, that sweep counts those in each
// row, and a second one writes. Where the sample was misleading the threshold is found digit by
// digit: three sweeps with histograms, one that counts in each row the scores equal to it, and one
// that writes. All see the same scores, bit for bit, because one function makes them.
//
// Nothing the size of the matrix is kept beside y and mask. Scores are float32; NaN counts as
// infinity. Results depend neither on the run nor on the number of threads.
#include <cstring>

#include "common/check.h"
#include "cpu/pages.h"
#include "ops/masked_weight/cpu_tiles.h"

namespace pelt::masked_weight {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr int64_t kRows = kEachRows;   // of a tile
constexpr int64_t kSampledPanels = 4;  // of each band of kRows rows
constexpr int64_t kSmall = 1 << 14;    // entries that are looked at without a sample
constexpr double kMargin = 0.0125;     // of rank, on both sides of the sample's threshold
constexpr int kDigits = 3;
constexpr int kDigitShift[kDigits] = {21, 10, 0};
constexpr int kDigitBits[kDigits] = {11, 11, 10};
constexpr int64_t kBins = 1 << 11;

// A number whose order is that of the scores.
inline uint32_t key_of(float score) {
  const uint32_t bits = pelt::bits_of(score);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

inline float score_of(uint32_t key) {
  return float_from_bits(key >> 31 ? key & 0x7fffffffu : ~key);
}

// What one thread works in.
struct Tile {
  float* u;             // [kRows, R], times beta
  float* a;             // [kRows, R2], times alpha1
  float* w;             // [kRows, kColumns]
  float* s;             // the same
  uint64_t* found;      // [kRows * kColumns], entries between lo and hi
  uint32_t* histogram;  // [kBins]
};

struct Memory {
  int64_t tiles;  // bands of kRows rows
  int64_t entries;
  int64_t room;  // for entries between lo and hi
  int64_t sample_size;
  float* v;           // panels of [R, Din]
  float* b;           // panels of [R2, Din]
  float* col;         // [Din] and zeros up to whole vectors
  int64_t* above;     // [tiles], scores above hi
  int64_t* quota;     // [Dout], entries equal to the threshold that stay
  uint64_t* between;  // [room]
  uint64_t* scratch;  // [room or sample_size]
  uint64_t* sample;   // [sample_size]
  char* each;         // each thread's own
  int64_t each_bytes;

  Memory(const Call& in, Arena& arena) {
    tiles = (in.Dout + kRows - 1) / kRows;
    entries = in.Dout * in.Din;
    room = entries / 16 + kSmall;
    sample_size = entries <= kSmall ? 0 : tiles * kSampledPanels * kRows * kPanel;
    v = arena.take<float>(panel_floats(in.R, in.Din));
    b = arena.take<float>(panel_floats(in.R2, in.Din));
    col = arena.take<float>(round_up(in.Din, kWidth));
    above = arena.take<int64_t>(tiles);
    quota = arena.take<int64_t>(in.Dout);
    between = arena.take<uint64_t>(room);
    scratch = arena.take<uint64_t>(std::max(room, sample_size));
    sample = arena.take<uint64_t>(sample_size);
    Arena one;
    cut(in, one);
    each_bytes = one.used;
    each = arena.take<char>(each_bytes * in.threads);
  }

  static Tile cut(const Call& in, Arena& arena) {
    Tile tile;
    tile.u = arena.take<float>(kRows * in.R);
    tile.a = arena.take<float>(kRows * in.R2);
    tile.w = arena.take<float>(kRows * kColumns);
    tile.s = arena.take<float>(kRows * kColumns);
    tile.found = arena.take<uint64_t>(kRows * kColumns);
    tile.histogram = arena.take<uint32_t>(kBins);
    return tile;
  }

  Tile of_thread(const Call& in, int thread) const {
    Arena arena{each + thread * each_bytes};
    return cut(in, arena);
  }
};

// tile.w and tile.s of an area. Not inlined: wherever scores are asked for, they have to be the
// same bits, and a copy of this code might be compiled to other roundings.
template <class T>
__attribute__((noinline)) void score(const Call& in, const Memory& memory, const Area& area,
                                     const Tile& tile) {
  update_weight<T>(in, area, tile.u, memory.v, tile.w);
  multiply_each(tile.a, in.R2, memory.b + area.column * in.R2, in.R2, round_up(area.rows, kRowUnit),
                round_up(area.columns, kWidth), [&](int64_t row, int64_t column, auto& sums) {
                  for_sums(sums, [&](int i, int j, Vector product) {
                    const int64_t r = row + i, c = column + j;
                    if (r >= area.rows) return;
                    const Vector structure =
                        factor_of(in, kRow)[area.row + r] + load(memory.col + area.column + c);
                    const Vector s =
                        absolute(load(tile.w + r * kColumns + c)) + product + in.alpha2 * structure;
                    store(tile.s + r * kColumns + c, s == s ? s : splat(kInfinity));
                  });
                });
}

// visit(area, tile, thread) for every area of the matrix, scored; bands of rows on several threads,
// each from left to right.
template <class T, class Visit>
void sweep(const Call& in, const Memory& memory, Visit&& visit) {
  parallel_for_on(memory.tiles, in.threads, [&](int64_t band, int thread) {
    const Tile tile = memory.of_thread(in, thread);
    const int64_t row = band * kRows, rows = std::min(kRows, in.Dout - row);
    scale_rows(factor_of(in, kU) + row * in.R, rows, in.R, in.beta, kRows, tile.u);
    scale_rows(factor_of(in, kA) + row * in.R2, rows, in.R2, in.alpha1, kRows, tile.a);
    for_areas(in, row, rows, [&](const Area& area) {
      score<T>(in, memory, area, tile);
      visit(area, tile, thread);
    });
  });
}

// The k-th smallest of distinct numbers, k from 1, by digits from the top. Uses up `numbers`.
uint64_t kth_smallest(uint64_t* numbers, int64_t count, int64_t k) {
  for (int shift = 56; count > 1; shift -= 8) {
    int64_t counts[256] = {};
    for (int64_t i = 0; i < count; ++i) ++counts[numbers[i] >> shift & 255];
    uint64_t digit = 0;
    while (k > counts[digit]) k -= counts[digit++];
    int64_t left = 0;
    for (int64_t i = 0; i < count; ++i) {
      numbers[left] = numbers[i];
      left += (numbers[i] >> shift & 255) == digit;
    }
    count = left;
  }
  return numbers[0];
}

// An entry as a number: the higher its score, and of equal ones the lower its index, the smaller.
inline uint64_t ranked(float score, int64_t index) {
  return static_cast<uint64_t>(~key_of(score)) << 32 | static_cast<uint64_t>(index);
}

inline float score_of_ranked(uint64_t number) {
  return score_of(~static_cast<uint32_t>(number >> 32));
}

// ---- one sweep ----

struct Window {
  float lo, hi;
};

// Between which scores the threshold probably lies. The sample is a few panels of each band, at
// places that look random and follow from the sizes alone.
template <class T>
Window guess_window(const Call& in, const Memory& memory) {
  Window window = {-kInfinity, kInfinity};
  if (memory.sample_size == 0) return window;
  const int64_t panels = panels_of(in.Din);
  const int64_t each = kSampledPanels * kRows * kPanel;
  constexpr uint64_t kAbsent = ~uint64_t{0};
  std::fill(memory.sample, memory.sample + memory.sample_size, kAbsent);
  parallel_for_on(memory.tiles, in.threads, [&](int64_t band, int thread) {
    const Tile tile = memory.of_thread(in, thread);
    const int64_t row = band * kRows, rows = std::min(kRows, in.Dout - row);
    scale_rows(factor_of(in, kU) + row * in.R, rows, in.R, in.beta, kRows, tile.u);
    scale_rows(factor_of(in, kA) + row * in.R2, rows, in.R2, in.alpha1, kRows, tile.a);
    uint64_t* to = memory.sample + band * each;
    for (int64_t i = 0; i < kSampledPanels; ++i) {
      const uint64_t mixed =
          (static_cast<uint64_t>(band * kSampledPanels + i) + 1) * 0x9e3779b97f4a7c15u;
      const int64_t column = static_cast<int64_t>((mixed >> 32) % panels) * kPanel;
      const Area area = {row, rows, column, std::min<int64_t>(kPanel, in.Din - column)};
      score<T>(in, memory, area, tile);
      for (int64_t r = 0; r < rows; ++r) {
        for (int64_t c = 0; c < area.columns; ++c) {
          // The index makes the numbers distinct, also where a panel is drawn twice.
          *to = ranked(tile.s[r * kColumns + c], to - memory.sample);
          ++to;
        }
      }
    }
  });
  int64_t count = 0;
  for (int64_t i = 0; i < memory.sample_size; ++i) {
    memory.sample[count] = memory.sample[i];
    count += memory.sample[i] != kAbsent;
  }
  const double rank = static_cast<double>(in.keep) / static_cast<double>(memory.entries);
  auto sampled = [&](double at) {
    std::copy(memory.sample, memory.sample + count, memory.scratch);
    return score_of_ranked(
        kth_smallest(memory.scratch, count, static_cast<int64_t>(at * static_cast<double>(count))));
  };
  const double least = 1.0 / static_cast<double>(count);
  if (rank - kMargin > least) window.hi = sampled(rank - kMargin);
  if (rank + kMargin < 1.0) window.lo = sampled(std::max(rank + kMargin, least));
  return window;
}

inline bool has_lane(Ints lanes) {
  uint64_t words[kVectorBytes / 8];
  std::memcpy(words, &lanes, sizeof words);
  uint64_t any = 0;
  for (uint64_t word : words) any |= word;
  return any != 0;
}

// Writes a row of an area where its scores are at least lo; returns how many are above hi.
template <class T>
int64_t write_row(const float* w, const float* s, int64_t columns, const Window& window, T* y,
                  bool* mask) {
  for_vectors(columns, [&](int64_t c, auto part) {
    part.store_to(y + c, load(s + c) >= window.lo ? load(w + c) : Vector{});
  });
  for (int64_t c = 0; c < columns; ++c) mask[c] = s[c] >= window.lo;
  int32_t above = 0;
  for (int64_t c = 0; c < columns; ++c) above += s[c] > window.hi;
  return above;
}

// Appends the entries of a row between lo and hi.
inline int64_t find_between(const float* s, int64_t columns, const Window& window, int64_t index,
                            uint64_t* found, int64_t count) {
  for_vectors(columns, [&](int64_t c, auto part) {
    const Vector scores = part.load_from(s + c);
    if (!has_lane((scores >= window.lo) & (scores <= window.hi))) return;
    const int64_t end = std::min(c + kWidth, columns);
    for (int64_t i = c; i < end; ++i) {
      found[count] = ranked(s[i], index + i);
      count += s[i] >= window.lo && s[i] <= window.hi;
    }
  });
  return count;
}

struct Threshold {
  float score;
  int64_t equal;  // entries with this score
  int64_t stay;   // and how many of them stay
};

enum class Outcome {
  kWritten,
  kFound,    // the threshold, and in memory.quota how many entries of each row are equal to it
  kUnknown,  // it is not in the window, or too much is
};

// y and mask are finished only where the outcome is kWritten.
template <class T>
Outcome write_by_window(const Call& in, const Memory& memory, const Window& window, T* y,
                        bool* mask, Threshold& threshold) {
  int64_t found = 0;
  std::fill(memory.above, memory.above + memory.tiles, 0);
  std::fill(memory.quota, memory.quota + in.Dout, 0);
  sweep<T>(in, memory, [&](const Area& area, const Tile& tile, int) {
    int64_t above = 0, count = 0;
    for (int64_t r = 0; r < area.rows; ++r) {
      const int64_t at = (area.row + r) * in.Din + area.column, before = count;
      const float* s = tile.s + r * kColumns;
      above += write_row(tile.w + r * kColumns, s, area.columns, window, y + at, mask + at);
      count = find_between(s, area.columns, window, at, tile.found, count);
      memory.quota[area.row + r] += count - before;
    }
    memory.above[area.row / kRows] += above;
    // In any order: what is selected from the numbers does not depend on it.
    const int64_t to = __atomic_fetch_add(&found, count, __ATOMIC_RELAXED);
    if (to + count <= memory.room) std::copy(tile.found, tile.found + count, memory.between + to);
  });
  int64_t above = 0;
  for (int64_t i = 0; i < memory.tiles; ++i) above += memory.above[i];
  if (above > in.keep || above + found < in.keep) return Outcome::kUnknown;
  const int64_t stay = in.keep - above;
  threshold = {window.lo, found, stay};
  if (stay == found) return Outcome::kWritten;
  if (found > memory.room) return window.lo == window.hi ? Outcome::kFound : Outcome::kUnknown;
  uint64_t last = 0;
  if (stay > 0) {
    std::copy(memory.between, memory.between + found, memory.scratch);
    last = kth_smallest(memory.scratch, found, stay);
  }
  for (int64_t i = 0; i < found; ++i) {
    if (stay > 0 && memory.between[i] <= last) continue;
    const int64_t index = static_cast<int64_t>(memory.between[i] & 0xffffffffu);
    y[index] = T{};
    mask[index] = false;
  }
  return Outcome::kWritten;
}

// ---- digit by digit ----

template <class T>
Threshold find_threshold(const Call& in, const Memory& memory) {
  uint64_t prefix = 0;
  int64_t stay = in.keep, equal = 0;
  for (int digit = 0; digit < kDigits; ++digit) {
    const int shift = kDigitShift[digit], bits = kDigitBits[digit];
    for (int i = 0; i < in.threads; ++i) {
      std::fill_n(memory.of_thread(in, i).histogram, kBins, 0u);
    }
    sweep<T>(in, memory, [&](const Area& area, const Tile& tile, int) {
      for (int64_t r = 0; r < area.rows; ++r) {
        for (int64_t c = 0; c < area.columns; ++c) {
          const uint64_t key = key_of(tile.s[r * kColumns + c]);
          if (key >> (shift + bits) == prefix) {
            ++tile.histogram[key >> shift & ((1u << bits) - 1)];
          }
        }
      }
    });
    int64_t bin = int64_t{1} << bits;
    for (;;) {
      --bin;
      equal = 0;
      for (int i = 0; i < in.threads; ++i) equal += memory.of_thread(in, i).histogram[bin];
      if (stay <= equal) break;
      stay -= equal;
    }
    prefix = prefix << bits | static_cast<uint64_t>(bin);
  }
  return {score_of(static_cast<uint32_t>(prefix)), equal, stay};
}

// memory.quota = how many entries of each row are equal to the threshold.
template <class T>
void count_equal(const Call& in, const Memory& memory, const Threshold& threshold) {
  std::fill(memory.quota, memory.quota + in.Dout, 0);
  sweep<T>(in, memory, [&](const Area& area, const Tile& tile, int) {
    for (int64_t r = 0; r < area.rows; ++r) {
      int32_t equal = 0;
      for (int64_t c = 0; c < area.columns; ++c) {
        equal += tile.s[r * kColumns + c] == threshold.score;
      }
      memory.quota[area.row + r] += equal;
    }
  });
}

// Equal scores stay in the order of their flat index: a row has what the rows before it leave.
template <class T>
void write_by_threshold(const Call& in, const Memory& memory, const Threshold& threshold, T* y,
                        bool* mask) {
  int64_t rest = threshold.stay;
  for (int64_t r = 0; r < in.Dout; ++r) {
    memory.quota[r] = std::min(memory.quota[r], rest);
    rest -= memory.quota[r];
  }
  sweep<T>(in, memory, [&](const Area& area, const Tile& tile, int) {
    for (int64_t r = 0; r < area.rows; ++r) {
      const float* s = tile.s + r * kColumns;
      const int64_t at = (area.row + r) * in.Din + area.column;
      int64_t left = memory.quota[area.row + r];
      for (int64_t c = 0; c < area.columns; ++c) {
        const bool is_equal = s[c] == threshold.score;
        mask[at + c] = s[c] > threshold.score || (is_equal && left > 0);
        left -= is_equal && left > 0;
        y[at + c] = mask[at + c] ? round_to<T>(tile.w[r * kColumns + c]) : T{};
      }
      memory.quota[area.row + r] = left;
    }
  });
}

template <class T>
void forward_all(const Call& in, const Memory& memory) {
  T* y = in.output_as<T>(kY);
  bool* mask = in.output_as<bool>(kMask);
  prefer_huge_pages(y, memory.entries * static_cast<int64_t>(sizeof(T)));
  prefer_huge_pages(mask, memory.entries);
  if (in.keep == 0) {
    std::memset(static_cast<void*>(y), 0, static_cast<size_t>(memory.entries) * sizeof(T));
    std::memset(mask, 0, static_cast<size_t>(memory.entries));
    return;
  }
  pack_factor(factor_of(in, kV), in.R, in, memory.v);
  pack_factor(factor_of(in, kB), in.R2, in, memory.b);
  std::fill(memory.col, memory.col + round_up(in.Din, kWidth), 0.0f);
  std::copy(factor_of(in, kCol), factor_of(in, kCol) + in.Din, memory.col);
  const Window window =
      in.keep == memory.entries ? Window{-kInfinity, -kInfinity} : guess_window<T>(in, memory);
  Threshold threshold;
  const Outcome outcome = write_by_window(in, memory, window, y, mask, threshold);
  if (outcome == Outcome::kWritten) return;
  if (outcome == Outcome::kUnknown) {
    threshold = find_threshold<T>(in, memory);
    count_equal<T>(in, memory, threshold);
  }
  write_by_threshold(in, memory, threshold, y, mask);
}

}  // namespace
}  // namespace pelt::masked_weight

namespace pelt {

using namespace masked_weight;
using Kernels = Cpu<Contract, cpu::Isa::PELT_CPU_ISA>;

template <>
std::string Kernels::why_not(const Call& in) {
  constexpr int64_t kMaxEntries = int64_t{1} << 32;  // flat indices have 32 bits
  if (in.Dout * in.Din < kMaxEntries) return "";
  return sentence("its entries have indices of 32 bits, so Dout Din must be below ", kMaxEntries,
                  ", and it is ", in.Dout * in.Din);
}

template <>
void Kernels::forward(const Call& in, Arena& arena) {
  const Memory memory(in, arena);
  if (arena.only_counts) return;
  cpu::with_type(in.dtype, [&](auto zero) { forward_all<decltype(zero)>(in, memory); });
}

}  // namespace pelt
