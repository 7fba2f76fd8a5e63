// masked_weight on the CPU, backward. With G = dy:
//
//   dW = G (mask + |W|),  dscore = G W
//   dw0 = dW;  du = beta dW vᵀ;  dv = beta uᵀ dW
//   da = alpha1 dscore bᵀ;  db = alpha1 aᵀ dscore;  drow, dcol = alpha2 sums of dscore
//
// One sweep over w0, G and the mask. A tile of W is made again from the factors, dW and dscore of
// the tile take its place, and all products are taken while they are in cache: nothing the size of
// the matrix is kept. The rows are cut into parts, each with its own sums of dv, db and dcol, which
// are added in order; parts follow from the sizes alone, so threads do not change a bit.
#include "cpu/pages.h"
#include "ops/masked_weight/cpu_tiles.h"

namespace pelt::masked_weight {
namespace {

constexpr int64_t kRows = 2 * kEachRows;  // of a tile
constexpr int64_t kMaxParts = 16;
constexpr int64_t kTileColumns = 2 * kWidth;  // of a step of project_rows
static_assert(kColumns % kTileColumns == 0 && kColumns <= kDepth, "a tile is one step of products");

// What one thread works in.
struct Tile {
  float* u;   // [kRows, R], times beta
  float* a;   // [kRows, R2], times alpha1
  float* dw;  // [kRows, kColumns], at first W
  float* ds;  // the same
  float* du;  // [kRows, R padded]
  float* da;  // [kRows, R2 padded]
};

// Sums over one part's rows.
struct Part {
  float* dv;    // [R, Din padded]
  float* db;    // [R2, Din padded]
  float* dcol;  // [Din padded]
};

struct Memory {
  int64_t bands;  // of kRows rows
  int64_t parts;
  int64_t width;          // Din padded for products
  int64_t ranks, ranks2;  // R and R2 padded
  float* v;               // panels of [R, Din]
  float* v_t;             // panels of its transpose
  float* b_t;             // panels of the transpose of [R2, Din]
  float* sums;            // [parts, R + R2 + 1, width]
  char* each;             // each thread's own
  int64_t each_bytes;

  Memory(const Call& in, Arena& arena) {
    bands = (in.Dout + kRows - 1) / kRows;
    parts = std::min(bands, kMaxParts);
    width = round_up(in.Din, kTileColumns);
    ranks = round_up(in.R, kWidth);
    ranks2 = round_up(in.R2, kWidth);
    v = arena.take<float>(panel_floats(in.R, in.Din));
    v_t = arena.take<float>(panel_floats(in.Din, in.R));
    b_t = arena.take<float>(panel_floats(in.Din, in.R2));
    sums = arena.take<float>(parts * (in.R + in.R2 + 1) * width);
    Arena one;
    cut(in, one);
    each_bytes = one.used;
    each = arena.take<char>(each_bytes * in.threads);
  }

  Tile cut(const Call& in, Arena& arena) const {
    Tile tile;
    tile.u = arena.take<float>(kRows * in.R);
    tile.a = arena.take<float>(kRows * in.R2);
    tile.dw = arena.take<float>(kRows * kColumns);
    tile.ds = arena.take<float>(kRows * kColumns);
    tile.du = arena.take<float>(kRows * ranks);
    tile.da = arena.take<float>(kRows * ranks2);
    return tile;
  }

  Tile of_thread(const Call& in, int thread) const {
    Arena arena{each + thread * each_bytes};
    return cut(in, arena);
  }

  Part part(const Call& in, int64_t i) const {
    float* first = sums + i * (in.R + in.R2 + 1) * width;
    return {first, first + in.R * width, first + (in.R + in.R2) * width};
  }
};

// 1 or 0 for each byte of a mask.
inline Vector load_mask(const bool* from) {
  typedef int8_t Bytes __attribute__((vector_size(kWidth)));
  Bytes bytes;
  std::memcpy(&bytes, from, sizeof bytes);
  return __builtin_convertvector(__builtin_convertvector(bytes, Ints), Vector);
}

inline Vector load_mask(const bool* from, int64_t count) {
  bool whole[kWidth] = {};
  std::memcpy(whole, from, static_cast<size_t>(count));
  return load_mask(whole);
}

// W of the area gives way to dW and dscore. `row_sums` and `column_sums` take the sums of dscore.
template <class T>
void derive_scores(const Call& in, const Area& area, const Tile& tile, float* row_sums,
                   float* column_sums) {
  for (int64_t r = 0; r < area.rows; ++r) {
    const int64_t at = (area.row + r) * in.Din + area.column;
    const T* dy = in.doutput_as<T>(kY) + at;
    T* dw0 = in.grad[kW0] ? in.grad_as<T>(kW0) + at : nullptr;
    const bool* mask = in.output_as<bool>(kMask) + at;
    float *dw = tile.dw + r * kColumns, *ds = tile.ds + r * kColumns;
    Vector sum = {};
    auto derive = [&](int64_t c, Vector g, Vector kept, auto part) {
      const Vector w = load(dw + c);
      const Vector dscore = g * w, dweight = g * (kept + absolute(w));
      store(dw + c, dweight);
      store(ds + c, dscore);
      store(column_sums + c, load(column_sums + c) + dscore);
      sum += dscore;
      if (dw0) part.store_to(dw0 + c, dweight);
    };
    int64_t c = 0;
    for (; c + kWidth <= area.columns; c += kWidth) {
      derive(c, load(dy + c), load_mask(mask + c), Whole{});
    }
    const int64_t left = area.columns - c;
    if (left > 0) derive(c, load_part(dy + c, left), load_mask(mask + c, left), cpu::Part{left});
    row_sums[r] += sum_of(sum);
  }
}

// kRanks rows of c += leftᵀ tile, with left [rows, stride] and tile [rows, kColumns]. Two vectors
// of columns at a time: with four ranks their sums stay in registers on every instruction set.
template <int kRanks>
inline void add_ranks(const float* left, int64_t stride, const float* tile, int64_t rows,
                      int64_t columns, float* c, int64_t ldc) {
  for (int64_t column = 0; column < columns; column += kTileColumns) {
    Vector sum[kRanks][2];
#pragma GCC unroll 4
    for (int i = 0; i < kRanks; ++i) {
      sum[i][0] = load(c + i * ldc + column);
      sum[i][1] = load(c + i * ldc + column + kWidth);
    }
    const float *weights = left, *from = tile + column;
    for (int64_t k = 0; k < rows; ++k, weights += stride, from += kColumns) {
      const Vector low = load(from), high = load(from + kWidth);
#pragma GCC unroll 4
      for (int i = 0; i < kRanks; ++i) {
        const Vector weight = splat(weights[i]);
        sum[i][0] += weight * low;
        sum[i][1] += weight * high;
      }
    }
#pragma GCC unroll 4
    for (int i = 0; i < kRanks; ++i) {
      store(c + i * ldc + column, sum[i][0]);
      store(c + i * ldc + column + kWidth, sum[i][1]);
    }
  }
}

// c [ranks, columns] += leftᵀ tile; columns a multiple of kTileColumns.
inline void project_rows(const float* left, int64_t ranks, const float* tile, int64_t rows,
                         int64_t columns, float* c, int64_t ldc) {
  int64_t rank = 0;
  for (; rank + 4 <= ranks; rank += 4) {
    add_ranks<4>(left + rank, ranks, tile, rows, columns, c + rank * ldc, ldc);
  }
  for (; rank < ranks; ++rank) {
    add_ranks<1>(left + rank, ranks, tile, rows, columns, c + rank * ldc, ldc);
  }
}

// c [kRows, padded depth] += tile [kRows, columns] times panels of a factor's transpose.
inline void project_columns(const float* tile, const float* panels, const Call& in,
                            const Area& area, int64_t ranks, float* c) {
  multiply_into(tile, kColumns, 1, {panels, in.Din, area.column, area.columns}, c, ranks,
                round_up(area.rows, kRowUnit), ranks, true);
}

template <class T>
void derive_band(const Call& in, const Memory& memory, int64_t band, const Part& part,
                 const Tile& tile) {
  const int64_t row = band * kRows, rows = std::min(kRows, in.Dout - row);
  scale_rows(factor_of(in, kU) + row * in.R, rows, in.R, in.beta, kRows, tile.u);
  scale_rows(factor_of(in, kA) + row * in.R2, rows, in.R2, in.alpha1, kRows, tile.a);
  std::fill(tile.dw, tile.dw + kRows * kColumns, 0.0f);
  std::fill(tile.ds, tile.ds + kRows * kColumns, 0.0f);
  std::fill(tile.du, tile.du + kRows * memory.ranks, 0.0f);
  std::fill(tile.da, tile.da + kRows * memory.ranks2, 0.0f);
  float row_sums[kRows] = {};
  for_areas(in, row, rows, [&](const Area& area) {
    update_weight<T>(in, area, tile.u, memory.v, tile.dw);
    float column_sums[kColumns] = {};
    derive_scores<T>(in, area, tile, row_sums, column_sums);
    project_columns(tile.dw, memory.v_t, in, area, memory.ranks, tile.du);
    project_columns(tile.ds, memory.b_t, in, area, memory.ranks2, tile.da);
    const int64_t columns = round_up(area.columns, kTileColumns);
    project_rows(tile.u, in.R, tile.dw, rows, columns, part.dv + area.column, memory.width);
    project_rows(tile.a, in.R2, tile.ds, rows, columns, part.db + area.column, memory.width);
    for (int64_t c = 0; c < area.columns; ++c) part.dcol[area.column + c] += column_sums[c];
  });
  for (int64_t r = 0; r < rows; ++r) {
    float *du = in.grad_as<float>(kU) + (row + r) * in.R,
          *da = in.grad_as<float>(kA) + (row + r) * in.R2;
    for (int64_t i = 0; i < in.R; ++i) du[i] = in.beta * tile.du[r * memory.ranks + i];
    for (int64_t i = 0; i < in.R2; ++i) da[i] = in.alpha1 * tile.da[r * memory.ranks2 + i];
    in.grad_as<float>(kRow)[row + r] = in.alpha2 * row_sums[r];
  }
}

// dv, db and dcol from the parts' sums, which have beta and alpha1 in them already.
void add_parts(const Call& in, const Memory& memory) {
  const int64_t count = in.R + in.R2 + 1;
  parallel_for(count, in.threads, [&](int64_t i) {
    float* to = i < in.R        ? in.grad_as<float>(kV) + i * in.Din
                : i < count - 1 ? in.grad_as<float>(kB) + (i - in.R) * in.Din
                                : in.grad_as<float>(kCol);
    const float factor = i < count - 1 ? 1.0f : in.alpha2;
    for_vectors(in.Din, [&](int64_t c, auto part) {
      Vector sum = {};
      for (int64_t p = 0; p < memory.parts; ++p) {
        sum += load(memory.sums + (p * count + i) * memory.width + c);
      }
      part.store_to(to + c, factor * sum);
    });
  });
}

template <class T>
void backward_all(const Call& in, const Memory& memory) {
  prefer_huge_pages(in.grad[kW0], in.Dout * in.Din * static_cast<int64_t>(sizeof(T)));
  pack_factor(factor_of(in, kV), in.R, in, memory.v);
  for (int64_t i = 0; i < in.R; i += kPanel) {
    pack_panel_transposed(factor_of(in, kV), in.Din, in.Din, in.R, i, memory.v_t);
  }
  for (int64_t i = 0; i < in.R2; i += kPanel) {
    pack_panel_transposed(factor_of(in, kB), in.Din, in.Din, in.R2, i, memory.b_t);
  }
  parallel_for_on(memory.parts, in.threads, [&](int64_t i, int thread) {
    const Part part = memory.part(in, i);
    std::fill(part.dv, part.dv + (in.R + in.R2 + 1) * memory.width, 0.0f);
    const int64_t begin = i * memory.bands / memory.parts;
    const int64_t end = (i + 1) * memory.bands / memory.parts;
    const Tile tile = memory.of_thread(in, thread);
    for (int64_t band = begin; band < end; ++band) {
      derive_band<T>(in, memory, band, part, tile);
    }
  });
  add_parts(in, memory);
}

}  // namespace
}  // namespace pelt::masked_weight

namespace pelt {

using namespace masked_weight;
using Kernels = Cpu<Contract, cpu::Isa::PELT_CPU_ISA>;

// All factors' gradients are wanted, in float32.
template <>
void Kernels::backward(const Call& in, Arena& arena) {
  const Memory memory(in, arena);
  if (arena.only_counts) return;
  cpu::with_type(in.dtype, [&](auto zero) { backward_all<decltype(zero)>(in, memory); });
}

}  // namespace pelt
