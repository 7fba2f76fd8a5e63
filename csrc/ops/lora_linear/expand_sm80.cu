// lora_linear, what is added in place to a base product:
//
//   expand  y[:, columns_i] += scale_i g_i s_i B_i^T      forward, second of two launches
//   spread  dx += dropout(ds A) + sum of dlogit w         backward
//
// A block takes 64 rows and 128 columns of y or dx (64 where that leaves multiprocessors without
// work), a warp 16 of the rows, and goes over the ranks 16 or 64 at a time. Branches that overlap add
// up in float32 registers, so y is read, rounded and written once; a block that no branch reaches
// touches nothing. All of the traffic is y itself: s and the factor are a few columns and come from
// L2.
//
// The sums begin as the base product: an ldmatrix gives a lane the elements that it has of a
// fragment of sums, and what the products leave goes back to the same places, from where rows are
// stored in 16-byte vectors. Where dropout falls on the sums they begin as zeros.
//
// Shared memory per block of 128 columns, ranks 16, 64: 28, 46 KB; spread has 8 KB more.
#include "ops/lora_linear/fragment_dropout.cuh"
#include "ops/lora_linear/tiles.cuh"

namespace pelt::lora_linear {
namespace {

constexpr int kRows = kWideRows;
static_assert(kRows == 16 * kWarps, "a warp has the 16 rows of a fragment");

template <class T_, int kRanks_, int kColumns_>
struct Config {
  using T = T_;
  static constexpr int kRanks = kRanks_;  // of a step
  static constexpr int kColumns = kColumns_;
  static constexpr int kTiles = kColumns / 8;  // fragments of sums
  static constexpr int kStride = kColumns + kTilePad;
  static constexpr int kRankStride = kRanks + kTilePad;
  // One buffer for either factor, B as [columns, ranks] or A as [ranks, columns].
  static constexpr int kFactorElements =
      kColumns * kRankStride > kRanks* kStride ? kColumns * kRankStride : kRanks * kStride;
  static_assert(kRanks % 16 == 0, "ranks are a whole number of k steps of mma_m16n8k16");
};

template <class C>
struct Shared {
  using T = typename C::T;
  alignas(16) T ranks[kRows * C::kRankStride];  // of s or ds
  alignas(16) T factor[C::kFactorElements];     // of B [columns, ranks] or A [ranks, columns]
  alignas(16) T base[kRows * C::kStride];       // of y or dx, then the result
  Source source[C::kRanks];
};

template <class C>
struct SpreadShared : Shared<C> {
  alignas(16) float gate_weight[kMaxGates * C::kColumns];  // rounded as they were in forward
};

template <class C>
using TileSums = FragmentD[C::kTiles];  // of a warp, [16, kColumns]

// sums += ranks times the factor, for what is in shared memory, in columns [begin, end) of the
// block's. kIsTransposed: the factor lies as [ranks, columns], which is A in backward.
template <bool kIsTransposed, bool kIsWhole, class C>
__device__ __forceinline__ void multiply_columns_of(TileSums<C>& sums, const Shared<C>& s,
                                                    int begin, int end) {
  using T = typename C::T;
  constexpr int kBytes = sizeof(T), kFactorStride = kIsTransposed ? C::kStride : C::kRankStride;
  const int lane = lane_index();
  // The warp's 16 rows and 16 ranks; all of the block's columns meet them.
  const uint32_t ranks =
      shared_address(s.ranks + (warp_index() * 16 + lane % 16) * C::kRankStride + lane / 16 * 8);
  const int row = kIsTransposed ? lane % 16 : lane % 8 + lane / 16 * 8;
  const int column = kIsTransposed ? lane / 16 * 8 : lane / 8 % 2 * 8;
  const uint32_t factor = shared_address(s.factor + row * kFactorStride + column);
  for_constants<C::kRanks / 16>([&](auto step) {
    constexpr int k = 16 * decltype(step)::value;
    const FragmentA a = load_a_at<kBytes * k>(ranks);
    for_constants<C::kTiles / 2>([&](auto pair) {
      constexpr int n = 2 * decltype(pair)::value;
      constexpr int kAt = kIsTransposed ? k * kFactorStride + 8 * n : 8 * n * kFactorStride + k;
      FragmentB b[2];
      load_b_pair_at<kIsTransposed, kBytes * kAt>(b, factor);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if constexpr (kIsWhole) {
          multiply_add<T>(sums[n + half], a, b[half]);
        } else {
          multiply_columns<T>(sums[n + half], a, b[half], 8 * (n + half), begin, end);
        }
      }
    });
  });
}

template <bool kIsTransposed, class C>
__device__ __forceinline__ void multiply_ranks(TileSums<C>& sums, const Shared<C>& s, int begin = 0,
                                               int end = C::kColumns) {
  // As a rule all of the block's columns are the branch's: no question for each eight of them.
  if (begin <= 0 && end >= C::kColumns) {
    multiply_columns_of<kIsTransposed, true, C>(sums, s, begin, end);
  } else {
    multiply_columns_of<kIsTransposed, false, C>(sums, s, begin, end);
  }
}

// Asks for the block's tile of the base product.
template <class C>
__device__ __forceinline__ void bring_base(Shared<C>& s, const void* base, const TileRows& rows,
                                           int first, int columns) {
  stage_rows<typename C::T, kRows, C::kColumns, C::kStride>(
      s.base, Parameter{base, false},
      {rows.first * columns + first, columns, rows.count, columns - first});
  cp_async_commit();
}

// sums += the base product, whose tile is in shared memory.
template <class C>
__device__ __forceinline__ void add_base(TileSums<C>& sums, const Shared<C>& s) {
  using T = typename C::T;
  const int lane = lane_index();
  const uint32_t own =
      shared_address(s.base + (warp_index() * 16 + lane % 16) * C::kStride + lane / 16 * 8);
  for_constants<C::kTiles / 2>([&](auto constant) {
    constexpr int n = 2 * decltype(constant)::value;
    // As a fragment of A, whose registers are those of two neighbouring fragments of sums.
    const FragmentA pairs = load_a_at<static_cast<int>(sizeof(T)) * 8 * n>(own);
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const Float2 pair = unpack<T>(pairs.r[r]);
      sums[n + r / 2].r[r % 2 * 2] += pair.low;
      sums[n + r / 2].r[r % 2 * 2 + 1] += pair.high;
    }
  });
}

// Rounds the sums and stores them. A warp writes its own rows alone.
template <class C>
__device__ __forceinline__ void store_sums(const TileSums<C>& sums, Shared<C>& s, void* memory,
                                           const TileRows& rows, int first, int columns) {
  using T = typename C::T;
  T* own = s.base + warp_index() * 16 * C::kStride;
  // The base product's places take the result: all lanes have read them.
  sync_warp();
#pragma unroll
  for (int n = 0; n < C::kTiles; ++n) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float* pair = sums[n].r + 2 * half;
      store_4(own + FragmentD::row(2 * half) * C::kStride + 8 * n + FragmentD::column(0),
              pack<T>(pair[0], pair[1]));
    }
  }
  // A lane stores whole vectors, of elements that other lanes have written.
  sync_warp();
  constexpr int kAcross = C::kColumns / 8, kStep = 32 / kAcross;
  const int row = lane_index() / kAcross, column = lane_index() % kAcross * 8;
  const int left = first + column < columns ? rows.count - warp_index() * 16 - row : 0;
  T* to =
      static_cast<T*>(memory) + (rows.first + warp_index() * 16 + row) * columns + first + column;
  const T* from = own + row * C::kStride + column;
#pragma unroll
  for (int below = 0; below < 16; below += kStep) {
    if (below < left) store_16(to, load_16(from + below * C::kStride));
    to += static_cast<int64_t>(kStep) * columns;
  }
}

// Does the branch have one of the block's columns, from `first` on.
template <class C>
__device__ __forceinline__ bool reaches(const Branch& branch, int first) {
  return first < branch.offset + branch.size && first + C::kColumns > branch.offset;
}

// sums += scale g s_i B_i^T over those of a block's columns that the branch reaches.
template <class C>
__device__ __forceinline__ void multiply_branch(const ExpandParams& p, Shared<C>& s,
                                                const TileRows& rows, const Branch& branch,
                                                int first, bool& is_base_added, TileSums<C>& sums) {
  using T = typename C::T;
  const int64_t member = member_of_b(branch, rows.group);
  // The first of the block's columns may lie before the branch's: there is no such row of B.
  const int row_of_b = first - branch.offset;
  for (int rank = 0; rank < branch.R; rank += C::kRanks) {
    // All warps have multiplied what both tiles held before.
    sync_threads();
    stage_rows<T, C::kColumns, C::kRanks, C::kRankStride>(
        s.factor, branch.b,
        {(member * branch.size + row_of_b) * branch.R + rank, branch.R, branch.size - row_of_b,
         branch.R - rank, row_of_b < 0 ? -row_of_b : 0});
    cp_async_commit();
    stage_scaled<T, kRows, C::kRanks>(s.ranks, C::kRankStride, p.in, branch, rows, rank);
    // Both tiles are there, and with the first of them the base product.
    cp_async_wait<0>();
    sync_threads();
    if (!is_base_added) add_base(sums, s);
    is_base_added = true;
    multiply_ranks<false, C>(sums, s, -row_of_b, branch.size - row_of_b);
  }
}

// Grid: tiles of rows; tiles of columns.
template <class C>
__global__ void __launch_bounds__(kThreads)
    lora_linear_expand_sm80(const __grid_constant__ ExpandParams p) {
  auto& s = shared_memory_as<Shared<C>>();
  const Linear& in = p.in;
  const TileRows rows = rows_of_tile<kRows>(p.tiling, block_index_x());
  const int first = block_index_y() * C::kColumns;
  // Columns of no branch stay as the base product left them, without being read.
  bool is_touched = false;
  for (int i = 0; i < in.branches; ++i) is_touched |= reaches<C>(in.branch[i], first);
  if (!is_touched) return;
  bring_base<C>(s, p.in.y, rows, first, in.Dout);
  TileSums<C> sums;
  bool is_base_added = false;
  // One branch after the other, because each has its own gate, scale and columns.
  for (int i = 0; i < in.branches; ++i) {
    if (!reaches<C>(in.branch[i], first)) continue;
    multiply_branch<C>(p, s, rows, in.branch[i], first, is_base_added, sums);
  }
  store_sums<C>(sums, s, p.in.y, rows, first, in.Dout);
}

// sums += dlogit w. In float32: a pooled gate's dlogit is small enough to vanish in float16.
template <class C>
__device__ __forceinline__ void add_gates(const SpreadParams& p, const SpreadShared<C>& s,
                                          const TileRows& rows, TileSums<C>& sums) {
  const int64_t all = static_cast<int64_t>(p.in.B) * p.in.S;
  for (int g = 0; g < p.in.gates; ++g) {
    float dlogit[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = warp_index() * 16 + FragmentD::row(2 * half);
      dlogit[half] = row < rows.count ? p.dlogits[g * all + rows.first + row] : 0.0f;
    }
    const float* w = s.gate_weight + g * C::kColumns + FragmentD::column(0);
#pragma unroll
    for (int n = 0; n < C::kTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[n].r[i] += dlogit[i / 2] * w[8 * n + i % 2];
    }
  }
}

// Grid: tiles of rows; tiles of columns. The ranks of all branches are one reduction here: ds has
// their scales and gates in it already, and every branch reaches all of dx.
template <class C>
__global__ void __launch_bounds__(kThreads)
    lora_linear_spread_sm80(const __grid_constant__ SpreadParams p) {
  using T = typename C::T;
  auto& s = shared_memory_as<SpreadShared<C>>();
  const Linear& in = p.in;
  const TileRows rows = rows_of_tile<kRows>(p.tiling, block_index_x());
  const int first = block_index_y() * C::kColumns;
  const bool is_dropped = in.dropout.is_active();
  bring_base<C>(s, p.in.dx, rows, first, in.Din);
  for (int i = thread_index(); i < in.gates * C::kColumns; i += kThreads) {
    const int column = first + i % C::kColumns;
    s.gate_weight[i] =
        column < in.Din ? load_rounded<T>(in.gate[i / C::kColumns].weight, column) : 0.0f;
  }
  TileSums<C> sums;
  for (int rank = 0; rank < in.ranks; rank += C::kRanks) {
    // All warps have multiplied what the tiles held before, and read the table for it.
    sync_threads();
    for (int i = thread_index(); i < C::kRanks; i += kThreads) {
      s.source[i] = rank + i < in.ranks ? rank_row(in, rank + i, rows.group) : Source{};
    }
    stage_rows<T, kRows, C::kRanks, C::kRankStride>(
        s.ranks, Parameter{p.ds, false},
        {rows.first * in.ranks + rank, in.ranks, rows.count, in.ranks - rank});
    // A thread stages rows of A whose places others have looked up.
    sync_threads();
    // A as it lies, [ranks, columns]; its rows belong to different branches and banks.
    stage_sources<T, C::kRanks, C::kColumns, C::kStride>(s.factor, in, s.source, first);
    cp_async_commit();
    // ds, the rows of A and, the first time, the base product are there for all threads.
    cp_async_wait<0>();
    sync_threads();
    if (rank == 0 && !is_dropped) add_base(sums, s);
    multiply_ranks<true, C>(sums, s);
  }
  // With gates alone there was no rank: the base product and the gates' weights are waited for here.
  cp_async_wait<0>();
  sync_threads();
  if (is_dropped) {
    // What comes back through dropout(x); the gates saw x itself.
#pragma unroll
    for (int n = 0; n < C::kTiles; ++n) {
      drop_delta(in, p.keys, rows.first + warp_index() * 16, first + 8 * n, sums[n]);
    }
  }
  if (is_dropped || in.ranks == 0) add_base(sums, s);
  add_gates<C>(p, s, rows, sums);
  store_sums<C>(sums, s, p.in.dx, rows, first, in.Din);
}

using Configs = TypeList<Config<bf16, 16, 64>, Config<bf16, 64, 64>, Config<f16, 16, 64>,
                         Config<f16, 64, 64>, Config<bf16, 16, 128>, Config<bf16, 64, 128>,
                         Config<f16, 16, 128>, Config<f16, 64, 128>>;

// Calls run(tag, blocks over the columns) for the configuration that takes so many ranks in as few
// steps as there are. Tiles are wide where two for each multiprocessor are left even so.
template <class Run>
void run_for_ranks(const Linear& in, const Tiling& tiling, int columns, int ranks, Run&& run) {
  const int64_t wide_tiles = static_cast<int64_t>(tiling.tiles) * ((columns + 127) / 128);
  const int tile = wide_tiles >= 2 * multiprocessors() ? 128 : 64;
  const bool is_found = run_first_fit(
      Configs{},
      [&](auto tag) {
        using C = typename decltype(tag)::type;
        return DTypeOf<typename C::T>::value == in.dtype && C::kRanks == block_of(ranks) &&
               C::kColumns == tile;
      },
      [&](auto tag) { run(tag, (columns + tile - 1) / tile); });
  check(is_found, "lora_linear: no configuration for ", name_of(in.dtype), " and ", ranks,
        " ranks, which why_not should have refused");
}

}  // namespace

void launch_expand_sm80(const ExpandParams& p, Stream stream) {
  run_for_ranks(p.in, p.tiling, p.in.Dout, rank_block_of(p.in), [&](auto tag, int blocks_y) {
    using C = typename decltype(tag)::type;
    const LaunchShape shape{p.tiling.tiles, blocks_y, 1, kThreads, sizeof(Shared<C>)};
    launch<lora_linear_expand_sm80<C>>("lora_linear_expand_sm80", shape, stream, p);
  });
}

void launch_spread_sm80(const SpreadParams& p, Stream stream) {
  run_for_ranks(p.in, p.tiling, p.in.Din, p.in.ranks, [&](auto tag, int blocks_y) {
    using C = typename decltype(tag)::type;
    const LaunchShape shape{p.tiling.tiles, blocks_y, 1, kThreads, sizeof(SpreadShared<C>)};
    launch<lora_linear_spread_sm80<C>>("lora_linear_spread_sm80", shape, stream, p);
  });
}

}  // namespace pelt::lora_linear
