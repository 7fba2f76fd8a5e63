// masked_weight, backward, two launches. With G = dy:
//
//   dW = G (mask + |W|),  dscore = G W
//   dw0 = dW;  du = beta dW vᵀ;  dv = beta uᵀ dW
//   da = alpha1 dscore bᵀ;  db = alpha1 aᵀ dscore;  drow, dcol = alpha2 sums of dscore
//
// First, a block takes 128 rows by 128 columns, 32 rows at a time; or fewer rows, where the matrix
// has too few for every multiprocessor. It makes W again from the
// factors, puts dW and dscore into shared memory, and multiplies them there with both factors,
// kRankChunk ranks at a time:
//
//              v, b [ranks, 128]
//   u, a [32,] dW, dscore [32, 128]  ->  a part of du, da [32, ranks]: one for each column tile
//              v                         a part of dv, db [ranks, 128]: one for each band of rows
//
// drow and dcol are one more rank of a and b, of ones. The second kernel adds the parts in order,
// so two runs give the same bits. Shared memory: 45 KB. The parts take (R + R2 + 1) / 16 bytes an
// entry of the matrix; nothing else of its size is kept.
//
// Why so: each of w0, G and the mask is read once, and float32 sums on the ordinary units keep up
// with memory for the ranks that methods use (8 and 16).
#include "common/type_list.h"
#include "ops/masked_weight/tiles.cuh"

namespace pelt::masked_weight {
namespace {

// Blocks of a multiprocessor for which ptxas leaves registers, of the two kernels: by its own choice
// it makes room for more of them, and spills.
constexpr int kBlocks = 2, kSumBlocks = 5;

template <class Type>
struct Config {
  using T = Type;
};

struct Shared {
  FactorTiles factors;
  alignas(16) float dw[kTileRows * kColumnStride];  // [kTileRows, kTileColumns]
  alignas(16) float ds[kTileRows * kColumnStride];  // the same
};

// dW and dscore of a tile; 0 past the matrix's end.
template <class C>
__device__ __forceinline__ void derive_scores(const BackwardParams& p, const Place& at, Shared& s) {
  using T = typename C::T;
  TileValues w, ds = {};
  update_weight<T>(p.in, at, s.factors, w);
  // Without a store in between, behind which the compiler could not move the next load.
  for_elements(p.in, at, [&](int i, int j, int64_t index) {
    const float g = to_float(p.in.doutput_as<T>(kY)[index]);
    const float kept = p.in.output_as<bool>(kMask)[index] ? 1.0f : 0.0f;
    ds[i][j] = g * w[i][j];
    w[i][j] = g * (kept + fabsf(w[i][j]));
  });
  // w holds dW from here on.
  if (p.in.grad[kW0] != nullptr) {
    for_elements(p.in, at, [&](int i, int j, int64_t index) {
      p.in.grad_as<T>(kW0)[index] = round_to<T>(w[i][j]);
    });
  }
  // For the products, in which a thread needs other elements than its own. All of the tile, zeros
  // past the matrix's end too: they are multiplied. project() has the barrier before they are read.
  for (int i = 0; i < kRowsEach; ++i) {
    for (int j = 0; j < kColumnsEach; ++j) {
      s.dw[tile_row(i) * kColumnStride + tile_column(j)] = w[i][j];
      s.ds[tile_row(i) * kColumnStride + tile_column(j)] = ds[i][j];
    }
  }
}

// sum + the products of four pairs of float32.
__device__ __forceinline__ float dot_of_4(const Words4& a, const Words4& b, float sum) {
  for (int i = 0; i < 4; ++i) sum += float_from_bits(a.word[i]) * float_from_bits(b.word[i]);
  return sum;
}

// A part of the left factor's gradient: the tile times the right factor, [kTileRows, kRankChunk]. A
// thread has one row and two ranks.
__device__ __forceinline__ void project_columns(const Call& in, const Place& at, int first,
                                                int ranks, const float* tile, const FactorTiles& s,
                                                float* partial) {
  constexpr int kHalf = kRankChunk / 2;
  static_assert(kThreads == kTileRows * kHalf, "a thread has one row and two ranks");
  // Eight neighbouring threads share a row: its values are read once for all of them.
  const int r = thread_index() / kHalf, k = thread_index() % kHalf;
  float sum[2] = {0.0f, 0.0f};
  for (int c = 0; c < kTileColumns; c += 4) {
    const Words4 values = load_16(tile + r * kColumnStride + c);
    for (int half = 0; half < 2; ++half) {
      const Words4 right = load_16(s.right + (k + half * kHalf) * kColumnStride + c);
      sum[half] = dot_of_4(values, right, sum[half]);
    }
  }
  // Written by this block alone: it has the column tile and these rows.
  for (int half = 0; half < 2; ++half) {
    const int rank = first + k + half * kHalf;
    if (at.row + r < in.Dout && rank < ranks) {
      partial[static_cast<int64_t>(at.row + r) * ranks + rank] = sum[half];
    }
  }
}

// A part of the right factor's gradient: the left factor's transpose times the tile. A thread has
// one column and half of the ranks, and always the same, so it may add to what it wrote before.
__device__ __forceinline__ void project_rows(const Call& in, const Place& at, int first, int ranks,
                                             const float* tile, const FactorTiles& s, bool is_first,
                                             float* partial) {
  constexpr int kRanksEach = kRankChunk * kTileColumns / kThreads;
  const int c = thread_index() % kTileColumns;
  const int k = thread_index() / kTileColumns * kRanksEach;
  float sum[kRanksEach] = {};
  for (int r = 0; r < kTileRows; ++r) {
    const float value = tile[r * kColumnStride + c];  // neighbouring threads, neighbouring columns
    for (int i = 0; i < kRanksEach; ++i) sum[i] += s.left[r * kRankStride + k + i] * value;
  }
  for (int i = 0; i < kRanksEach; ++i) {
    const int rank = first + k + i;
    if (at.column + c >= in.Din || rank >= ranks) continue;
    // The band's first tile overwrites, so that the memory need not be zeroed before.
    float* to = partial + static_cast<int64_t>(rank) * in.Din + at.column + c;
    *to = is_first ? sum[i] : *to + sum[i];
  }
}

// What a tile adds to the gradients of a pair of factors.
template <class T>
__device__ __forceinline__ void project(const Call& in, const Factors& f, const Place& at,
                                        const float* tile, FactorTiles& s, bool is_first,
                                        float* left_partial, float* right_partial) {
  for (int first = 0; first < f.ranks(); first += kRankChunk) {
    // The factors' last readers are done; and, the first time, dW and dscore are written.
    sync_threads();
    load_factors<T>(in, f, at, first, s);
    // A thread multiplies ranks that others have loaded.
    sync_threads();
    project_columns(in, at, first, f.ranks(), tile, s, left_partial);
    project_rows(in, at, first, f.ranks(), tile, s, is_first, right_partial);
  }
}

// Grid: column tiles by bands of rows.
template <class C>
__global__ void __launch_bounds__(kThreads, kBlocks)
    masked_weight_bwd_sm80(const __grid_constant__ BackwardParams p) {
  using T = typename C::T;
  auto& s = shared_memory_as<Shared>();
  const Call& in = p.in;
  const int column_tile = block_index_x() % p.column_tiles;
  const int band = block_index_x() / p.column_tiles;
  const int64_t rows = in.Dout, columns = in.Din;
  // The band's tiles one after the other add to the same dv and db; each has its own du and da.
  for (int turn = 0; turn < p.band_rows / kTileRows; ++turn) {
    const Place at = {band * p.band_rows + turn * kTileRows, column_tile * kTileColumns};
    if (at.row >= in.Dout) break;
    derive_scores<C>(p, at, s);
    project<T>(in, {in.parameter(kU), in.parameter(kV), in.R, false}, at, s.dw, s.factors,
               turn == 0, p.du_partial + column_tile * rows * in.R,
               p.dv_partial + band * columns * in.R);
    project<T>(in, {in.parameter(kA), in.parameter(kB), in.R2, true}, at, s.ds, s.factors,
               turn == 0, p.da_partial + column_tile * rows * (in.R2 + 1),
               p.db_partial + band * columns * (in.R2 + 1));
    // The next tile's dW and dscore are written where these were read.
    sync_threads();
  }
}

template <class T>
__device__ __forceinline__ void store_grad(const ParameterGrad& grad, int64_t i, float value) {
  if (grad.data == nullptr) return;
  if (grad.is_float32) {
    static_cast<float*>(grad.data)[i] = value;
  } else {
    static_cast<T*>(grad.data)[i] = round_to<T>(value);
  }
}

// Element i of `parts` parts of `size` elements each.
__device__ __forceinline__ float sum_of_parts(const float* partial, int64_t size, int parts,
                                              int64_t i) {
  float sum = 0.0f;  // in the parts' order: two runs give the same bits
  for (int part = 0; part < parts; ++part) sum += partial[part * size + i];
  return sum;
}

// A thread adds up one element of one gradient: du, dv, da with drow, db with dcol, one behind the
// other. Scales fall on the sums, once.
template <class C>
__global__ void __launch_bounds__(kThreads, kSumBlocks)
    masked_weight_bwd_sums_sm80(const __grid_constant__ BackwardParams p) {
  using T = typename C::T;
  const Call& in = p.in;
  const int64_t du = static_cast<int64_t>(in.Dout) * in.R, dv = static_cast<int64_t>(in.R) * in.Din;
  const int64_t da = static_cast<int64_t>(in.Dout) * (in.R2 + 1);
  const int64_t db = static_cast<int64_t>(in.R2 + 1) * in.Din;
  const int64_t step = static_cast<int64_t>(grid_blocks_x()) * kThreads;
  const int64_t start = static_cast<int64_t>(block_index_x()) * kThreads + thread_index();
  for (int64_t i = start; i < du + dv + da + db; i += step) {
    if (i < du) {
      store_grad<T>(in.parameter_grad(kU), i,
                    in.beta * sum_of_parts(p.du_partial, du, p.column_tiles, i));
    } else if (i < du + dv) {
      const int64_t at = i - du;
      store_grad<T>(in.parameter_grad(kV), at,
                    in.beta * sum_of_parts(p.dv_partial, dv, p.row_bands, at));
    } else if (i < du + dv + da) {
      // The last rank is that of ones: drow.
      const int64_t at = i - du - dv, row = at / (in.R2 + 1), rank = at % (in.R2 + 1);
      const float sum = sum_of_parts(p.da_partial, da, p.column_tiles, at);
      if (rank < in.R2) {
        store_grad<T>(in.parameter_grad(kA), row * in.R2 + rank, in.alpha1 * sum);
      } else {
        store_grad<T>(in.parameter_grad(kRow), row, in.alpha2 * sum);
      }
    } else {
      // The last row is that of ones: dcol.
      const int64_t at = i - du - dv - da, columns_before = static_cast<int64_t>(in.R2) * in.Din;
      const float sum = sum_of_parts(p.db_partial, db, p.row_bands, at);
      if (at < columns_before) {
        store_grad<T>(in.parameter_grad(kB), at, in.alpha1 * sum);
      } else {
        store_grad<T>(in.parameter_grad(kCol), at - columns_before, in.alpha2 * sum);
      }
    }
  }
}

using Configs = TypeList<Config<float>, Config<bf16>, Config<f16>>;

template <class C>
void launch_config(const BackwardParams& p) {
  const LaunchShape shape{p.column_tiles * p.row_bands, 1, 1, kThreads, sizeof(Shared)};
  launch<masked_weight_bwd_sm80<C>>("masked_weight_bwd_sm80", shape, p.in.stream, p);
  const int64_t sums = (static_cast<int64_t>(p.in.Dout) + p.in.Din) * (p.in.R + p.in.R2 + 1);
  const int64_t wanted = (sums + kThreads - 1) / kThreads;
  // Eight blocks of 256 threads fill a multiprocessor; more elements come in turns.
  const int blocks =
      wanted < 8 * multiprocessors() ? static_cast<int>(wanted) : 8 * multiprocessors();
  launch<masked_weight_bwd_sums_sm80<C>>("masked_weight_bwd_sums_sm80", {blocks, 1, 1, kThreads},
                                         p.in.stream, p);
}

}  // namespace

void launch_backward_sm80(const BackwardParams& p) {
  run_first_fit(
      Configs{},
      [&](auto tag) { return DTypeOf<typename decltype(tag)::type::T>::value == p.in.dtype; },
      [&](auto tag) { launch_config<typename decltype(tag)::type>(p); });
}

}  // namespace pelt::masked_weight
