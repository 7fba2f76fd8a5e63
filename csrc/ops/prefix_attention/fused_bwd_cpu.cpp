// prefix_attention backward on the CPU, from q, k, v, out and the log-sum-exp:
//
//   p = exp(s - lse);  dp = dO Vᵀ;  ds = p (dp - rowsum(dO out))
//   dQ += ds K;  dK += dsᵀ Q;  dV += pᵀ dO
//
// A gate multiplies a prefix row's key and value, so its gradient is <dK, pk> + <dV, pv> over the
// rows: it falls out of the products that exist anyway.
//
// One unit of work is a part of the batch and a group of heads that share keys; for blocks of
// columns see fused_cpu.cpp. On tiles ds and p are rounded to bfloat16 and are the right side of
// the products over queries, which give the transposes of dK and dV: there they need only be
// packed, while as the left side they would have to be transposed.
#include "ops/prefix_attention/cpu_head.h"

namespace pelt::prefix_attention {
namespace {

// One head of one sample; members are memory for it.
template <class T, class Products>
struct Backward {
  using Element = typename Products::Element;
  static constexpr bool kOnTiles = std::is_same_v<Element, bf16>;
  static constexpr int64_t kRows = Products::kQueryRows;

  const CpuInputs& in;
  const CpuBackward& grad;
  const Columns& columns;
  int64_t width, out_width, most;  // of operands' rows [E], of results [E], of a block of columns
  Element *rows, *keys, *values, *keys_by_row, *q, *d;
  float *group_dk, *group_dv, *dk, *dv, *dq, *p, *ds, *row_dots, *one_row, *factors;
  // Not on tiles: queries and dO as right sides.
  Element *packed_q = nullptr, *packed_d = nullptr;
  // On tiles: their transposes, and ds and p as left and right sides.
  Element *q_transposed = nullptr, *d_transposed = nullptr;
  Element *ds_rows = nullptr, *p_rows = nullptr, *packed_ds = nullptr, *packed_p = nullptr;
  float *dk_transposed = nullptr, *dv_transposed = nullptr;

  Backward(const CpuInputs& in, const CpuBackward& grad, const Columns& columns)
      : in(in),
        grad(grad),
        columns(columns),
        width(Products::width(in.E)),
        out_width(Products::columns(in.E)),
        most(block_columns(in, columns)) {
    Arena count;
    place(count);
    Arena arena{scratch(count.used)};
    place(arena);
    std::memset(q, 0, static_cast<size_t>(kRows * width) * sizeof(Element));
    std::memset(d, 0, static_cast<size_t>(kRows * width) * sizeof(Element));
    std::memset(ds, 0, static_cast<size_t>(kRows * most) * sizeof(float));
    std::memset(p, 0, static_cast<size_t>(kRows * most) * sizeof(float));
    std::memset(group_dk, 0, static_cast<size_t>(in.N * out_width) * sizeof(float));
    std::memset(group_dv, 0, static_cast<size_t>(in.N * out_width) * sizeof(float));
  }

  int64_t query_distance() const { return pair_distance(in.S); }
  int64_t score_distance() const { return pair_distance(most); }

  void place(Arena& arena) {
    group_dk = arena.take(in.N * out_width);
    group_dv = arena.take(in.N * out_width);
    rows = arena.take<Element>(most * width);
    keys = arena.take<Element>(Products::numbers(in.E, most));         // [E, most]
    values = arena.take<Element>(Products::numbers(in.E, most));       // [E, most]
    keys_by_row = arena.take<Element>(Products::numbers(most, in.E));  // [most, E]
    q = arena.take<Element>(kRows * width);
    d = arena.take<Element>(kRows * width);
    dk = arena.take(most * out_width);
    dv = arena.take(most * out_width);
    dq = arena.take(round_up(in.S, kRows) * out_width);
    p = arena.take(kRows * most);
    ds = arena.take(kRows * most);
    row_dots = arena.take(in.S);
    one_row = arena.take(2 * out_width);
    factors = arena.take(most);
    if constexpr (kOnTiles) {
      q_transposed = arena.take<Element>(pair_columns(in.E) * query_distance());
      d_transposed = arena.take<Element>(pair_columns(in.E) * query_distance());
      ds_rows = arena.take<Element>(kRows * score_distance());
      p_rows = arena.take<Element>(kRows * score_distance());
      packed_ds = arena.take<Element>(Products::numbers(kRows, most));
      packed_p = arena.take<Element>(Products::numbers(kRows, most));
      dk_transposed = arena.take(pair_columns(in.E) * most);
      dv_transposed = arena.take(pair_columns(in.E) * most);
    } else {
      packed_q = arena.take<Element>(Products::numbers(kRows, in.E));
      packed_d = arena.take<Element>(Products::numbers(kRows, in.E));
    }
  }

  void run(const Head<T>& head, int64_t b, int64_t h, int64_t chunk) {
    double dgate = 0.0;
    std::fill(dq, dq + round_up(in.S, kRows) * out_width, 0.0f);
    read_row_dots(head);
    if (kOnTiles) transpose_queries(head);
    for (int64_t begin = 0; begin < columns.count(); begin += most) {
      const int64_t end = std::min(columns.count(), begin + most), count = end - begin;
      head.read(false, begin, end, width, rows);
      Products::pack_transposed(rows, width, in.E, count, values);
      head.read(true, begin, end, width, rows);
      Products::pack_transposed(rows, width, in.E, count, keys);
      Products::pack(rows, width, count, in.E, keys_by_row);
      const int64_t sums = kOnTiles ? pair_columns(in.E) * most : most * out_width;
      std::fill_n(kOnTiles ? dk_transposed : dk, sums, 0.0f);
      std::fill_n(kOnTiles ? dv_transposed : dv, sums, 0.0f);
      for (int64_t row = 0; row < in.S; row += kRows) attend(head, b, h, row, begin, end);
      if (kOnTiles) {
        store_transposed(dk_transposed, most, in.E, count, dk, out_width);
        store_transposed(dv_transposed, most, in.E, count, dv, out_width);
      }
      fold(head, b, h, chunk, begin, end, dgate);
    }
    T* to = static_cast<T*>(grad.dq);
    for (int64_t i = 0; i < in.S; ++i) {
      write_row(dq + i * out_width, in.E, in.scale, to + head.row(i) * in.E);
    }
    if (grad.dgate) grad.dgate[b * in.H + h] = static_cast<float>(dgate);
  }

  template <class To>
  void read_dout(const Head<T>& head, int64_t query, int64_t row_width, To* to) const {
    read_row(static_cast<const T*>(grad.dout) + head.row(query) * in.E, in.E, row_width, 1.0f, to);
  }

  // rowsum(dO out)
  void read_row_dots(const Head<T>& head) {
    const T* out = static_cast<const T*>(grad.out);
    for (int64_t i = 0; i < in.S; ++i) {
      read_dout(head, i, out_width, one_row);
      read_row(out + head.row(i) * in.E, in.E, out_width, 1.0f, one_row + out_width);
      row_dots[i] = dot_of(one_row, one_row + out_width, out_width);
    }
  }

  // Zeros behind the last query. A few rows of dq, still zero then, serve as memory.
  void transpose_queries(const Head<T>& head) {
    for (int64_t first = 0; first < pair_depth(in.S); first += kRows) {
      const int64_t count = std::min(kRows, in.S - first);
      float* some = dq + first * out_width;  // cleared again below
      head.read_queries(first, first + count, out_width, 1.0f, some);
      store_transposed(some, out_width, kRows, in.E, q_transposed + first, query_distance());
      for (int64_t i = 0; i < count; ++i) {
        read_dout(head, first + i, out_width, some + i * out_width);
      }
      store_transposed(some, out_width, kRows, in.E, d_transposed + first, query_distance());
      std::fill(some, some + count * out_width, 0.0f);
    }
  }

  // The queries from `first` on against a block of columns.
  void attend(const Head<T>& head, int64_t b, int64_t h, int64_t first, int64_t begin,
              int64_t end) {
    const int64_t count = std::min(kRows, in.S - first), used = end - begin;
    const int64_t here = Products::columns(used);
    if (columns.seen_by(in, first + count - 1) <= begin) return;
    head.read_queries(first, first + count, width, kOnTiles ? 1.0f : in.scale, q);
    for (int64_t i = 0; i < count; ++i) read_dout(head, first + i, width, d + i * width);
    Products::multiply(q, width, keys, in.E, count, here, p, here, false);
    Products::multiply(d, width, values, in.E, count, here, ds, here, false);
    for (int64_t i = 0; i < count; ++i) {
      row_backward(head, b, h, first + i, begin, end, here, p + i * here, ds + i * here);
    }
    float* to = dq + first * out_width;
    if constexpr (kOnTiles) {
      const int64_t distance = score_distance(), depth = pair_depth(used);
      for (int64_t i = 0; i < count; ++i) {
        read_row(ds + i * here, used, depth, 1.0f, ds_rows + i * distance);
        read_row(p + i * here, used, depth, 1.0f, p_rows + i * distance);
      }
      Products::multiply(ds_rows, distance, keys_by_row, depth, count, in.E, to, out_width, true);
      Products::pack(ds_rows, distance, count, used, packed_ds);
      Products::pack(p_rows, distance, count, used, packed_p);
      Products::multiply(q_transposed + first, query_distance(), packed_ds, kRows,
                         round_up(in.E, kTileSide), used, dk_transposed, most, true);
      Products::multiply(d_transposed + first, query_distance(), packed_p, kRows,
                         round_up(in.E, kTileSide), used, dv_transposed, most, true);
    } else {
      Products::multiply(ds, here, keys_by_row, used, count, in.E, to, out_width, true);
      Products::pack(q, width, count, in.E, packed_q);
      Products::pack(d, width, count, in.E, packed_d);
      const int64_t all = round_up(used, kRowUnit);
      multiply_into(ds, 1, here, {packed_q, count, 0, count}, dk, out_width, all, out_width, true);
      multiply_into(p, 1, here, {packed_d, count, 0, count}, dv, out_width, all, out_width, true);
    }
  }

  // p and ds of a query from its scores and dp.
  void row_backward(const Head<T>& head, int64_t b, int64_t h, int64_t query, int64_t begin,
                    int64_t end, int64_t here, float* p_row, float* ds_row) {
    const float dot = row_dots[query], lse = grad.lse[head.row(query)];
    const int64_t seen = std::clamp<int64_t>(columns.seen_by(in, query) - begin, 0, end - begin);
    if (kOnTiles) scale_row(p_row, here, in.scale);
    head.add_bias(query, begin, end, p_row);
    std::fill(p_row + seen, p_row + here, kMinusInfinity);
    exp_row(p_row, here, lse == kMinusInfinity ? 0.0f : lse);
    if (in.threshold) {
      head.read_dropout(query, begin, end, factors);
      for (int64_t j = 0; j < end - begin; ++j) {
        ds_row[j] = p_row[j] * (ds_row[j] * factors[j] - dot);
        p_row[j] *= factors[j];
      }
    } else {
      for (int64_t j = 0; j < here; j += kWidth) {
        store(ds_row + j, load(p_row + j) * (load(ds_row + j) - dot));
      }
    }
    if (!grad.dbias) return;
    const int64_t sample = in.bias_strides[0] ? b : 0;
    float* dbias = grad.dbias + ((sample * in.H + h) * in.S + query) * in.N;
    for (int64_t c = std::max(begin, columns.prefix); c < end; ++c) {
      dbias[columns.at[c].row] += ds_row[c - begin];
    }
  }

  // Adds one head's gradients of the columns [begin, end) where they belong.
  void fold(const Head<T>& head, int64_t b, int64_t h, int64_t chunk, int64_t begin, int64_t end,
            double& dgate) {
    const int64_t g = h / (in.H / in.G);
    for (int64_t c = begin; c < end; ++c) {
      float *dk_row = dk + (c - begin) * out_width, *dv_row = dv + (c - begin) * out_width;
      if (kOnTiles) scale_row(dk_row, out_width, in.scale);  // elsewhere q has it
      const Column column = columns.at[c];
      if (column.segment < 0) {
        float *to_k = group_dk + column.row * out_width, *to_v = group_dv + column.row * out_width;
        for (int64_t e = 0; e < in.E; ++e) to_k[e] += dk_row[e];
        for (int64_t e = 0; e < in.E; ++e) to_v[e] += dv_row[e];
        continue;
      }
      const CpuSegment& segment = in.prefix[column.segment];
      const int64_t member = segment.index ? segment.index[b] : chunk;
      const int64_t offset = ((member * segment.length + column.row) * in.G + g) * in.E;
      for (int64_t e = 0; e < in.E; ++e) segment.dk[offset + e] += head.gate() * dk_row[e];
      for (int64_t e = 0; e < in.E; ++e) segment.dv[offset + e] += head.gate() * dv_row[e];
      if (!grad.dgate) continue;
      const int64_t whole = round_up(in.E, kWidth);
      head.read_prefix(segment.k, segment, column.row, whole, 1.0f, one_row);
      dgate += dot_of(dk_row, one_row, whole);
      head.read_prefix(segment.v, segment, column.row, whole, 1.0f, one_row);
      dgate += dot_of(dv_row, one_row, whole);
    }
  }
};

template <class T, class Products>
void backward_group(const CpuInputs& in, const CpuBackward& grad, int64_t b, int64_t g,
                    int64_t chunk) {
  const Columns columns(in, b);
  Backward<T, Products> backward(in, grad, columns);
  const int64_t heads = in.H / in.G, width = backward.out_width;
  for (int64_t h = g * heads; h < (g + 1) * heads; ++h) {
    backward.run(Head<T>(in, columns, b, h), b, h, chunk);
  }
  for (int64_t n = 0; n < in.N; ++n) {
    const int64_t to = ((b * in.G + g) * in.N + n) * in.E;
    write_row(backward.group_dk + n * width, in.E, 1.0f, static_cast<T*>(grad.dk) + to);
    write_row(backward.group_dv + n * width, in.E, 1.0f, static_cast<T*>(grad.dv) + to);
  }
}

template <class T, class Products>
void backward_all(const CpuInputs& in, const CpuBackward& grad) {
  parallel_for(grad.chunks * in.G, in.threads, [&](int64_t unit) {
    const TileScope scope;
    const int64_t chunk = unit / in.G, g = unit % in.G;
    const int64_t begin = chunk * in.B / grad.chunks, end = (chunk + 1) * in.B / grad.chunks;
    for (int64_t b = begin; b < end; ++b) backward_group<T, Products>(in, grad, b, g, chunk);
  });
}

}  // namespace

template <>
void backward_on_cpu<cpu::Isa::PELT_CPU_ISA>(const CpuInputs& in, const CpuBackward& grad) {
  if (in.is_float32) return backward_all<float, FloatProducts>(in, grad);
  backward_all<bf16, std::conditional_t<kHasPairs, PairProducts, FloatProducts>>(in, grad);
}

}  // namespace pelt::prefix_attention
