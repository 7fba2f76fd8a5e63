// lora_linear, what is added in place to a base product:
//
//   expand  y[:, columns_i] += scale_i g_i s_i B_i^T      forward, second of two launches
//   spread  dx += dropout(ds A) + sum of dlogit w         backward
//
// A block takes 64 rows and 64 columns of y or dx, a warp 16 of the rows, and goes over the ranks
// 16 or 64 at a time. Branches that overlap add up in float32 registers, so y is read, rounded and
// written once; a block that no branch reaches touches nothing. All of the traffic is y itself: s
// and the factor are a few columns and come from L2.
//
// Shared memory per block, ranks 16, 64: 24, 36 KB.
#include "ops/lora_linear/tiles.cuh"

namespace pelt::lora_linear {
namespace {

constexpr int kRows = kWideRows;
static_assert(kRows == 16 * kWarps, "a warp has the 16 rows of a fragment");

template <class T_, int kRanks_>
struct Config {
  using T = T_;
  static constexpr int kRanks = kRanks_;  // of a step
  static constexpr int kRankStride = kRanks + kTilePad;
  // One buffer for either factor, B as [columns, ranks] or A as [ranks, columns].
  static constexpr int kFactorElements =
      kChunk * kRankStride > kRanks* kChunkStride ? kChunk * kRankStride : kRanks * kChunkStride;
  static_assert(kRanks % 16 == 0, "ranks are a whole number of k steps of mma_m16n8k16");
};

template <class C>
struct Shared {
  using T = typename C::T;
  alignas(16) T ranks[kRows * C::kRankStride];  // of s or ds
  alignas(16) T factor[C::kFactorElements];     // of B [columns, ranks] or A [ranks, columns]
  alignas(16) T base[kRows * kChunkStride];     // of y or dx
  alignas(16) float out[kWarps][16 * kOutStride];
  Source source[C::kRanks];
};

// sums += ranks times the factor, for what is in shared memory, in columns [begin, end) of the
// block's. kIsTransposed: the factor lies as [ranks, columns], which is A in backward.
template <bool kIsTransposed, class C>
__device__ __forceinline__ void multiply_ranks(FragmentD (&sums)[kChunk / 8], const Shared<C>& s,
                                               int begin = 0, int end = kChunk) {
#pragma unroll
  for (int k = 0; k < C::kRanks; k += 16) {
    // The warp's 16 rows and 16 ranks; all of the block's columns meet them.
    const FragmentA a = load_a(s.ranks + warp_index() * 16 * C::kRankStride + k, C::kRankStride);
#pragma unroll
    for (int n = 0; n < kChunk / 8; n += 2) {
      FragmentB b[2];
      if constexpr (kIsTransposed) {
        load_b_pair_transposed(b, s.factor + k * kChunkStride + 8 * n, kChunkStride);
      } else {
        load_b_pair(b, s.factor + 8 * n * C::kRankStride + k, C::kRankStride);
      }
      multiply_columns<typename C::T>(sums[n], a, b[0], 8 * n, begin, end);
      multiply_columns<typename C::T>(sums[n + 1], a, b[1], 8 * n + 8, begin, end);
    }
  }
}

// Asks for the block's tile of the base product, which is needed when all ranks have been
// multiplied: the copies run beside the products.
template <class C>
__device__ __forceinline__ void bring_base(Shared<C>& s, const void* base, const TileRows& rows,
                                           int first, int columns) {
  stage<typename C::T, kRows, kChunk>(
      s.base, kChunkStride, Parameter{base, false},
      {rows.first * columns + first, columns, rows.count, columns - first});
  cp_async_commit();
}

// Eight columns of a row: the base product, as it came into shared memory, plus the sums.
template <class C>
__device__ __forceinline__ void add_8(void* memory, const Shared<C>& s, const TileRows& rows,
                                      int columns, int row, int column, const Float8& values) {
  using T = typename C::T;
  // In float32, so that the sum is rounded once.
  Float8 sum = widen<T>(load_16(s.base + row * kChunkStride + column % kChunk));
  for (int e = 0; e < 8; ++e) sum.v[e] += values.v[e];
  store_16(static_cast<T*>(memory) + (rows.first + row) * columns + column, narrow<T>(sum));
}

// Does the branch have one of the columns from `first` on.
__device__ __forceinline__ bool reaches(const Branch& branch, int first) {
  return first < branch.offset + branch.size && first + kChunk > branch.offset;
}

// sums += scale g s_i B_i^T over those of a block's columns that the branch reaches.
template <class C>
__device__ __forceinline__ void multiply_branch(const ExpandParams& p, Shared<C>& s,
                                                const TileRows& rows, const Branch& branch,
                                                int first, FragmentD (&sums)[kChunk / 8]) {
  using T = typename C::T;
  const int64_t member = member_of_b(branch, rows.group);
  // The first of the block's columns may lie before the branch's: there is no such row of B.
  const int row_of_b = first - branch.offset;
  for (int rank = 0; rank < branch.R; rank += C::kRanks) {
    // All warps have multiplied what both tiles held before.
    sync_threads();
    stage<T, kChunk, C::kRanks>(s.factor, C::kRankStride, branch.b,
                                {(member * branch.size + row_of_b) * branch.R + rank, branch.R,
                                 branch.size - row_of_b, branch.R - rank, -row_of_b});
    cp_async_commit();
    stage_scaled<T, kRows, C::kRanks>(s.ranks, C::kRankStride, p.in, branch, rows, rank);
    // Both tiles are there, and with the first of them the base product.
    cp_async_wait<0>();
    sync_threads();
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
  const int first = block_index_y() * kChunk;
  // Columns of no branch stay as the base product left them, without being read.
  bool is_touched = false;
  for (int i = 0; i < in.branches; ++i) is_touched |= reaches(in.branch[i], first);
  if (!is_touched) return;
  bring_base<C>(s, p.in.y, rows, first, in.Dout);
  FragmentD sums[kChunk / 8];
  // One branch after the other, because each has its own gate, scale and columns.
  for (int i = 0; i < in.branches; ++i) {
    if (reaches(in.branch[i], first)) multiply_branch<C>(p, s, rows, in.branch[i], first, sums);
  }
  // A warp writes its own rows, and the base product under them is there since the last barrier.
  for_each_8(s.out[warp_index()], rows, first, in.Dout, sums,
             [&](int, int row, int column, const Float8& values) {
               add_8(p.in.y, s, rows, in.Dout, row, column, values);
             });
}

// Grid: tiles of rows; tiles of columns. The ranks of all branches are one reduction here: ds has
// their scales and gates in it already, and every branch reaches all of dx.
template <class C>
__global__ void __launch_bounds__(kThreads)
    lora_linear_spread_sm80(const __grid_constant__ SpreadParams p) {
  using T = typename C::T;
  auto& s = shared_memory_as<Shared<C>>();
  const Linear& in = p.in;
  const TileRows rows = rows_of_tile<kRows>(p.tiling, block_index_x());
  const int first = block_index_y() * kChunk;
  const int64_t all = static_cast<int64_t>(in.B) * in.S;
  bring_base<C>(s, p.in.dx, rows, first, in.Din);
  FragmentD sums[kChunk / 8];
  for (int rank = 0; rank < in.ranks; rank += C::kRanks) {
    // All warps have multiplied what the tiles held before, and read the table for it.
    sync_threads();
    for (int i = thread_index(); i < C::kRanks; i += kThreads) {
      s.source[i] = rank + i < in.ranks ? rank_row(in, rank + i, rows.group) : Source{};
    }
    stage<T, kRows, C::kRanks>(
        s.ranks, C::kRankStride, Parameter{p.ds, false},
        {rows.first * in.ranks + rank, in.ranks, rows.count, in.ranks - rank});
    // A thread stages rows of A whose places others have looked up.
    sync_threads();
    // A as it lies, [ranks, columns]; its rows belong to different branches and banks.
    stage_sources<T, C::kRanks>(s.factor, in, s.source, first);
    cp_async_commit();
    // ds, the rows of A and, the first time, the base product are there for all threads.
    cp_async_wait<0>();
    sync_threads();
    multiply_ranks<true, C>(sums, s);
  }
  // With gates alone there was no rank, and the base product is still to be waited for.
  cp_async_wait<0>();
  sync_threads();
  for_each_8(
      s.out[warp_index()], rows, first, in.Din, sums, [&](int, int row, int column, Float8 values) {
        // What comes back through dropout(x); the gates saw x itself.
        if (in.dropout.is_active()) {
          const Float8 factors = dropout_of(in.dropout, (rows.first + row) * in.Din + column);
          for (int e = 0; e < 8; ++e) values.v[e] *= factors.v[e];
        }
        for (int g = 0; g < in.gates; ++g) {
          const float dlogit = p.dlogits[g * all + rows.first + row];
          const Float8 w = load_parameter_8<T>(in.gate[g].weight, column);
          // With the weight rounded as it was in forward's product.
          for (int e = 0; e < 8; ++e) {
            values.v[e] += dlogit * to_float(round_to<T>(w.v[e]));
          }
        }
        add_8(p.in.dx, s, rows, in.Din, row, column, values);
      });
}

using Configs = TypeList<Config<bf16, 16>, Config<bf16, 64>, Config<f16, 16>, Config<f16, 64>>;

// Calls run(tag, shape) for the configuration that takes so many ranks in as few steps as there
// are.
template <class Run>
void run_for_ranks(const Linear& in, const Tiling& tiling, int columns, int ranks, Run&& run) {
  run_config(Configs{}, in.dtype, block_of(ranks), [&](auto tag) {
    constexpr size_t kBytes = sizeof(Shared<typename decltype(tag)::type>);
    const int blocks_y = (columns + kChunk - 1) / kChunk;
    run(tag, LaunchShape{tiling.tiles, blocks_y, 1, kThreads, kBytes});
  });
}

}  // namespace

void launch_expand_sm80(const ExpandParams& p, Stream stream) {
  run_for_ranks(p.in, p.tiling, p.in.Dout, rank_block_of(p.in),
                [&](auto tag, const LaunchShape& shape) {
                  using C = typename decltype(tag)::type;
                  launch<lora_linear_expand_sm80<C>>("lora_linear_expand_sm80", shape, stream, p);
                });
}

void launch_spread_sm80(const SpreadParams& p, Stream stream) {
  run_for_ranks(p.in, p.tiling, p.in.Din, p.in.ranks, [&](auto tag, const LaunchShape& shape) {
    using C = typename decltype(tag)::type;
    launch<lora_linear_spread_sm80<C>>("lora_linear_spread_sm80", shape, stream, p);
  });
}

}  // namespace pelt::lora_linear
