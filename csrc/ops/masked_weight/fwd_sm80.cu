// masked_weight, forward, one launch:
//   W = w0 + beta u v;  s = |W| + alpha1 a b + alpha2 (row 1ᵀ + 1 colᵀ);  y = W at the `keep`
//   highest s, else 0
//
// The threshold is found by its bits: a score becomes an integer key of the same order, whose three
// digits (11, 11 and 10 bits) are counted one after the other.
//
//   tiles of the matrix:  y = W, keys, and the counts of the first digit
//   all keys:             the counts of the second digit, of those that share the first
//   all keys:             the counts of the third
//   all keys:             mask, and y = 0 where it is 0
//
// Between these steps the whole grid waits at a barrier (a cooperative launch), and each block then
// reads the counts and finds the next digit for itself. Where more keys are equal to the threshold
// than stay, those of the lowest flat index do: each warp has a contiguous part of the keys and
// counts its equals, all wait once more, and each knows how many come before its own.
//
// Counts are integers, so their order does not matter: two runs give the same bits. Scores are
// float32 and are made once. NaN counts as infinity. Shared memory: 20 KB.
//
// Why so: one launch reads w0 once and writes y twice and the keys once; the rest are passes over
// the keys, 4 bytes an entry, which L2 holds for the layers of a BERT or a GPT-2. A lane has
// sixteen keys on the way at once: the counts that follow would not let a next load start before
// them.
#include "common/type_list.h"
#include "ops/masked_weight/tiles.cuh"

namespace pelt::masked_weight {
namespace {

template <class Type>
struct Config {
  using T = Type;
};

struct Digit {
  int shift;
  int bits;
};

__device__ __forceinline__ Digit digit_of(int i) {
  return i == 0 ? Digit{21, 11} : i == 1 ? Digit{10, 11} : Digit{0, 10};
}

// What is known of the threshold so far.
struct Search {
  uint32_t prefix;  // its digits
  int stay;         // of the keys that have them, how many stay
  int equal;        // and how many there are
};

struct Shared {
  FactorTiles factors;
  int counts[kBins];
  int sums[kThreads];  // of kBins / kThreads neighbouring counts
  Search search;
};

// The order of scores as an order of integers.
__device__ __forceinline__ uint32_t key_of(float score) {
  if (score != score) return 0xff800000u;  // that of infinity
  const uint32_t bits = bits_of(score);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

// Every block of the grid; what they wrote before is visible after. `round` counts from 1.
__device__ __forceinline__ void grid_barrier(const ForwardParams& p, int round) {
  // The one release below stands for all that the block wrote.
  sync_threads();
  if (thread_index() == 0) {
    atomic_add_release(p.arrivals, 1);
    // Counts up from round to round, so that it is never set back.
    wait_until_at_least(p.arrivals, round * grid_blocks_x());
  }
  // The others go on when thread 0 has acquired what all blocks wrote.
  sync_threads();
}

__device__ __forceinline__ void clear_counts(Shared& s) {
  for (int i = thread_index(); i < kBins; i += kThreads) s.counts[i] = 0;
  // Any thread may count in any bin.
  sync_threads();
}

// The block's counts go to those of the grid.
__device__ __forceinline__ void publish_counts(const ForwardParams& p, const Shared& s, int digit) {
  // All threads of the block have counted.
  sync_threads();
  for (int i = thread_index(); i < kBins; i += kThreads) {
    // Most bins are empty: scores are concentrated on a few exponents.
    if (s.counts[i] != 0) atomic_count(p.counts + digit * kBins + i, s.counts[i]);
  }
}

// y = W, keys, and the counts of their first digit.
template <class C>
__device__ __forceinline__ void score_tiles(const ForwardParams& p, Shared& s) {
  using T = typename C::T;
  const Call& in = p.in;
  const int across = (in.Din + kTileColumns - 1) / kTileColumns;
  const int tiles = across * ((in.Dout + kTileRows - 1) / kTileRows);
  for (int tile = block_index_x(); tile < tiles; tile += grid_blocks_x()) {
    const Place at = {tile / across * kTileRows, tile % across * kTileColumns};
    TileValues w, product;
    update_weight<T>(in, at, s.factors, w);
    multiply<T>(in, {in.parameter(kA), in.parameter(kB), in.R2, false}, at, s.factors, product);
    // Before the first store, behind which the compiler could not move these loads.
    float row[kRowsEach] = {}, col[kColumnsEach] = {};
    for (int i = 0; i < kRowsEach; ++i) {
      const int r = at.row + tile_row(i);
      if (r < in.Dout) row[i] = load_parameter<T>(in.parameter(kRow), r);
    }
    for (int j = 0; j < kColumnsEach; ++j) {
      const int c = at.column + tile_column(j);
      if (c < in.Din) col[j] = load_parameter<T>(in.parameter(kCol), c);
    }
    // y is W everywhere for now: what stays is known when every key has been counted.
    for_elements(in, at, [&](int i, int j, int64_t index) {
      const float with_product = add_scaled(fabsf(w[i][j]), in.alpha1, product[i][j]);
      const float score = add_scaled(with_product, in.alpha2, row[i] + col[j]);
      const uint32_t key = key_of(score);
      in.output_as<T>(kY)[index] = round_to<T>(w[i][j]);
      p.keys[index] = key;
      atomic_count(&s.counts[key >> 21], 1);
    });
  }
}

// The contiguous part of the keys that a warp of the grid has: whole steps of the warp.
struct Part {
  int64_t begin, end;
};

constexpr int kStep = 4 * 32;  // four neighbouring keys of each lane
constexpr int kBatch = 4;      // steps whose keys are on the way together

__device__ __forceinline__ int warp_of_grid() { return block_index_x() * kWarps + warp_index(); }

__device__ __forceinline__ Part part_of_warp(const Call& in) {
  const int64_t warps = static_cast<int64_t>(grid_blocks_x()) * kWarps;
  const int64_t steps = (entries_of(in) + kStep - 1) / kStep;
  const int64_t each = (steps + warps - 1) / warps * kStep;
  const int64_t begin = warp_of_grid() * each, end = begin + each;
  return {begin < entries_of(in) ? begin : entries_of(in),
          end < entries_of(in) ? end : entries_of(in)};
}

// visit(index, keys, count) for a lane's four neighbouring keys, of which `count` are there. Every
// lane of the warp comes to every visit.
template <class Visit>
__device__ __forceinline__ void for_keys(const ForwardParams& p, Visit&& visit) {
  const Part part = part_of_warp(p.in);
  for (int64_t first = part.begin; first < part.end; first += kBatch * kStep) {
    // All loads of a batch before the first visit, whose stores and counts they could not pass.
    Words4 keys[kBatch];
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const int64_t at = first + j * kStep + 4 * lane_index();
      keys[j] = {};
      if (at + 4 <= part.end) {
        keys[j] = load_16(p.keys + at);
      } else {  // at the end of the matrix
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if (at + i < part.end) keys[j].word[i] = p.keys[at + i];
        }
      }
    }
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      if (first + j * kStep >= part.end) continue;
      const int64_t at = first + j * kStep + 4 * lane_index(), left = part.end - at;
      visit(at, keys[j], left >= 4 ? 4 : left > 0 ? static_cast<int>(left) : 0);
    }
  }
}

// Counts digit i of the keys that have the threshold's digits before it.
__device__ __forceinline__ void count_digit(const ForwardParams& p, Shared& s, int i) {
  const Digit digit = digit_of(i);
  const uint32_t prefix = s.search.prefix;
  for_keys(p, [&](int64_t, const Words4& keys, int count) {
    for (int e = 0; e < 4; ++e) {
      const uint32_t key = keys.word[e];
      if (e < count && key >> (digit.shift + digit.bits) == prefix) {
        atomic_count(&s.counts[key >> digit.shift & ((1u << digit.bits) - 1)], 1);
      }
    }
  });
}

// The sum of this lane's value and those of all lanes before it.
__device__ __forceinline__ int sum_up_to_lane(int value) {
  for (int distance = 1; distance < 32; distance *= 2) {
    const int before = shfl(value, (lane_index() - distance) & 31);
    if (lane_index() >= distance) value += before;
  }
  return value;
}

// The next digit: of the counts, from the highest bin down, the one where `stay` is reached. A
// thread adds up a few neighbouring bins, a lane of the first warp a few of those sums; the lane
// that passes `stay` goes back into its own.
__device__ __forceinline__ void find_digit(const ForwardParams& p, Shared& s, int i) {
  constexpr int kBinsEach = kBins / kThreads, kSumsEach = kThreads / 32;
  const int* counts = p.counts + i * kBins;
  int own = 0;
  for (int j = 0; j < kBinsEach; ++j) own += counts[kBins - 1 - thread_index() * kBinsEach - j];
  s.sums[thread_index()] = own;
  // The first warp adds up all threads' sums.
  sync_threads();
  if (warp_index() == 0) {
    const int stay = s.search.stay;
    int sum = 0;
    for (int j = 0; j < kSumsEach; ++j) sum += s.sums[lane_index() * kSumsEach + j];
    const int up_to_here = sum_up_to_lane(sum);
    sync_warp();  // every lane has read `stay`, whose place the new digit takes
    // One lane alone: the sums grow from lane to lane, and `stay` lies in the range of one.
    if (up_to_here - sum < stay && stay <= up_to_here) {
      int left = stay - (up_to_here - sum);
      int group = lane_index() * kSumsEach;
      while (left > s.sums[group]) left -= s.sums[group++];
      int bin = kBins - 1 - group * kBinsEach;
      while (left > counts[bin]) left -= counts[bin--];
      s.search = {s.search.prefix << digit_of(i).bits | static_cast<uint32_t>(bin), left,
                  counts[bin]};
    }
  }
  // All threads read the digit that one lane has found.
  sync_threads();
}

__device__ __forceinline__ int count_equal(const Words4& keys, int count, uint32_t threshold) {
  int equal = 0;
  for (int e = 0; e < 4; ++e) equal += e < count && keys.word[e] == threshold;
  return equal;
}

// How many keys of the warps before this one are equal to the threshold.
__device__ __forceinline__ int equal_before(const ForwardParams& p, const Shared& s) {
  int own = 0;
  for_keys(p, [&](int64_t, const Words4& keys, int count) {
    own += count_equal(keys, count, s.search.prefix);
  });
  own = shfl(sum_up_to_lane(own), 31);  // of the warp: the last lane's sum is of all lanes
  if (lane_index() == 0) p.equal[warp_of_grid()] = own;
  // Every warp's number has to be there before one adds up those in front of its own.
  grid_barrier(p, kDigits + 1);
  int before = 0;
  for (int i = lane_index(); i < warp_of_grid(); i += 32) before += p.equal[i];
  return shfl(sum_up_to_lane(before), 31);
}

// The mask of four neighbouring entries, and zeros in y where it is 0.
template <class T>
__device__ __forceinline__ void write_4(const ForwardParams& p, int64_t at, uint32_t stays,
                                        int count) {
  T* y = p.in.output_as<T>(kY) + at;
  bool* mask = p.in.output_as<bool>(kMask) + at;
  if (count == 4) {
    // A byte for each: bits 0 to 3 become bits 0, 8, 16 and 24.
    store_4(mask, (stays & 1) | (stays & 2) << 7 | (stays & 4) << 14 | (stays & 8) << 21);
  }
  // None of the four stays, the usual case where most of a matrix is pruned: whole stores.
  if (count == 4 && stays == 0 && sizeof(T) == 4) {
    store_16(y, Words4{});
    return;
  }
  if (count == 4 && stays == 0) {
    store_4(y, 0);
    store_4(y + 2, 0);
    return;
  }
  for (int e = 0; e < count; ++e) {
    const bool stay = stays >> e & 1;
    if (count < 4) mask[e] = stay;
    if (!stay) y[e] = T{};
  }
}

// mask, and y where it is 0.
template <class C>
__device__ __forceinline__ void write_mask(const ForwardParams& p, const Shared& s) {
  const uint32_t threshold = s.search.prefix;
  const int stay = s.search.stay;
  const bool has_ties = stay < s.search.equal;  // the same in every block
  int equal = has_ties ? equal_before(p, s) : 0;
  for_keys(p, [&](int64_t at, const Words4& keys, int count) {
    uint32_t stays = 0;
    for (int e = 0; e < 4; ++e) stays |= (keys.word[e] >= threshold ? 1u : 0u) << e;
    // Of keys equal to the threshold the first `stay` stay, in the order of their flat indices:
    // that is the order of warps, of a warp's steps, of lanes, and of a lane's four keys.
    if (has_ties) {
      const int own = count_equal(keys, count, threshold), up_to_here = sum_up_to_lane(own);
      int before = equal + up_to_here - own;
      for (int e = 0; e < 4; ++e) {
        if (e < count && keys.word[e] == threshold && before++ >= stay) stays &= ~(1u << e);
      }
      equal += shfl(up_to_here, 31);
    }
    write_4<typename C::T>(p, at, stays, count);
  });
}

// Grid: as many blocks as are resident together, for they wait for each other.
template <class C>
__global__ void __launch_bounds__(kThreads)
    masked_weight_fwd_sm80(const __grid_constant__ ForwardParams p) {
  auto& s = shared_memory_as<Shared>();
  clear_counts(s);
  score_tiles<C>(p, s);
  if (thread_index() == 0) s.search = {0, static_cast<int>(p.in.keep), 0};
  if (p.in.keep == 0) {
    // A threshold above every key. The barrier, because write_mask clears entries of y whose tiles
    // other blocks have written.
    if (thread_index() == 0) s.search = {~0u, 0, 0};
    grid_barrier(p, 1);
    write_mask<C>(p, s);
    return;
  }
  for (int digit = 0; digit < kDigits; ++digit) {
    if (digit > 0) {
      clear_counts(s);
      count_digit(p, s, digit);
    }
    publish_counts(p, s, digit);
    // All blocks' counts of this digit are there; after the first one, all keys as well.
    grid_barrier(p, digit + 1);
    find_digit(p, s, digit);
  }
  write_mask<C>(p, s);
}

using Configs = TypeList<Config<float>, Config<bf16>, Config<f16>>;

template <class C>
int blocks_of(const Call& in) {
  const int64_t tiles = static_cast<int64_t>((in.Din + kTileColumns - 1) / kTileColumns) *
                        ((in.Dout + kTileRows - 1) / kTileRows);
  const int resident = resident_blocks<masked_weight_fwd_sm80<C>>("masked_weight_fwd_sm80",
                                                                  kThreads, sizeof(Shared));
  return tiles < resident ? static_cast<int>(tiles) : resident;
}

// run(tag) with the configuration of a dtype.
template <class Run>
void with_config(DType dtype, Run&& run) {
  run_first_fit(
      Configs{}, [&](auto tag) { return DTypeOf<typename decltype(tag)::type::T>::value == dtype; },
      run);
}

}  // namespace

int forward_blocks_sm80(const Call& call) {
  int blocks = 0;
  with_config(call.dtype,
              [&](auto tag) { blocks = blocks_of<typename decltype(tag)::type>(call); });
  return blocks;
}

void launch_forward_sm80(const ForwardParams& p, int blocks) {
  with_config(p.in.dtype, [&](auto tag) {
    using C = typename decltype(tag)::type;
    const LaunchShape shape{blocks, 1, 1, kThreads, sizeof(Shared), /*is_cooperative=*/true};
    launch<masked_weight_fwd_sm80<C>>("masked_weight_fwd_sm80", shape, p.in.stream, p);
  });
}

}  // namespace pelt::masked_weight
