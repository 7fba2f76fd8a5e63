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

// The heads of one sample that share keys; members are memory for one of them, and their dK and dV.
template <class T, class Products>
struct Backward : Blocks<T, Products> {
  using Base = Blocks<T, Products>;
  using Base::columns, Base::in, Base::keys, Base::kOnTiles, Base::kRows, Base::largest,
      Base::out_width, Base::q, Base::rows, Base::scores, Base::width;
  using typename Base::Element;

  const CpuBackward& grad;
  Element *values, *keys_by_row, *d;
  float *group_dk, *group_dv, *dk, *dv, *dq, *ds, *row_dots, *one_row;
  // Not on tiles: queries and dO as right sides.
  Element *packed_q = nullptr, *packed_d = nullptr;
  // On tiles: their transposes, and ds and p as left and right sides.
  Element *q_transposed = nullptr, *d_transposed = nullptr;
  Element *ds_rows = nullptr, *p_rows = nullptr, *packed_ds = nullptr, *packed_p = nullptr;
  float *dk_transposed = nullptr, *dv_transposed = nullptr;

  Backward(const CpuInputs& in, const CpuBackward& grad, const Columns& columns)
      : Base(in, columns), grad(grad) {
    Arena count;
    take(count);
    Arena arena{scratch(count.used)};
    take(arena);
    this->clear_blocks();
    std::memset(d, 0, static_cast<size_t>(kRows * width) * sizeof(Element));
    std::memset(ds, 0, static_cast<size_t>(kRows * largest) * sizeof(float));
    std::memset(group_dk, 0, static_cast<size_t>(in.N * out_width) * sizeof(float));
    std::memset(group_dv, 0, static_cast<size_t>(in.N * out_width) * sizeof(float));
  }

  int64_t query_distance() const { return pair_distance(in.S); }
  int64_t score_distance() const { return pair_distance(largest); }

  void take(Arena& arena) {
    this->take_blocks(arena);
    group_dk = arena.take(in.N * out_width);
    group_dv = arena.take(in.N * out_width);
    values = arena.take<Element>(Products::numbers(in.E, largest));       // [E, largest]
    keys_by_row = arena.take<Element>(Products::numbers(largest, in.E));  // [largest, E]
    d = arena.take<Element>(kRows * width);
    dk = arena.take(largest * out_width);
    dv = arena.take(largest * out_width);
    dq = arena.take(round_up(in.S, kRows) * out_width);
    ds = arena.take(kRows * largest);
    row_dots = arena.take(in.S);
    one_row = arena.take(2 * out_width);
    if constexpr (kOnTiles) {
      q_transposed = arena.take<Element>(pair_columns(in.E) * query_distance());
      d_transposed = arena.take<Element>(pair_columns(in.E) * query_distance());
      ds_rows = arena.take<Element>(kRows * score_distance());
      p_rows = arena.take<Element>(kRows * score_distance());
      packed_ds = arena.take<Element>(Products::numbers(kRows, largest));
      packed_p = arena.take<Element>(Products::numbers(kRows, largest));
      dk_transposed = arena.take(pair_columns(in.E) * largest);
      dv_transposed = arena.take(pair_columns(in.E) * largest);
    } else {
      packed_q = arena.take<Element>(Products::numbers(kRows, in.E));
      packed_d = arena.take<Element>(Products::numbers(kRows, in.E));
    }
  }

  void run(const Head<T>& head, int64_t chunk) {
    double dgate = 0.0;
    std::fill(dq, dq + round_up(in.S, kRows) * out_width, 0.0f);
    read_row_dots(head);
    if (kOnTiles) transpose_queries(head);
    this->for_blocks([&](const Block& block) {
      const int64_t count = block.count();
      head.read(false, block, width, rows);
      Products::pack_transposed(rows, width, in.E, count, values);
      this->pack_keys(head, block);
      Products::pack(rows, width, count, in.E, keys_by_row);
      const int64_t sums = kOnTiles ? pair_columns(in.E) * largest : largest * out_width;
      std::fill_n(kOnTiles ? dk_transposed : dk, sums, 0.0f);
      std::fill_n(kOnTiles ? dv_transposed : dv, sums, 0.0f);
      for (int64_t row = 0; row < in.S; row += kRows) attend(head, row, block);
      if (kOnTiles) {
        store_transposed(dk_transposed, largest, in.E, count, dk, out_width);
        store_transposed(dv_transposed, largest, in.E, count, dv, out_width);
      }
      fold(head, chunk, block, dgate);
    });
    T* to = static_cast<T*>(grad.dq);
    for (int64_t i = 0; i < in.S; ++i) {
      write_row(dq + i * out_width, in.E, in.scale, to + head.row(i) * in.E);
    }
    if (grad.dgate) grad.dgate[head.b() * in.H + head.h()] = static_cast<float>(dgate);
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
  void attend(const Head<T>& head, int64_t first, const Block& block) {
    const int64_t count = std::min(kRows, in.S - first), used = block.count();
    const int64_t padded = Products::columns(used);
    if (!this->multiply_keys(head, first, count, block)) return;
    for (int64_t i = 0; i < count; ++i) read_dout(head, first + i, width, d + i * width);
    Products::multiply(d, width, values, in.E, count, padded, ds, padded, false);
    float* p = scores;
    for (int64_t i = 0; i < count; ++i) {
      row_backward(head, first + i, block, p + i * padded, ds + i * padded);
    }
    float* to = dq + first * out_width;
    if constexpr (kOnTiles) {
      const int64_t distance = score_distance(), depth = pair_depth(used);
      for (int64_t i = 0; i < count; ++i) {
        read_row(ds + i * padded, used, depth, 1.0f, ds_rows + i * distance);
        read_row(p + i * padded, used, depth, 1.0f, p_rows + i * distance);
      }
      Products::multiply(ds_rows, distance, keys_by_row, depth, count, in.E, to, out_width, true);
      Products::pack(ds_rows, distance, count, used, packed_ds);
      Products::pack(p_rows, distance, count, used, packed_p);
      Products::multiply(q_transposed + first, query_distance(), packed_ds, kRows,
                         round_up(in.E, kTileSide), used, dk_transposed, largest, true);
      Products::multiply(d_transposed + first, query_distance(), packed_p, kRows,
                         round_up(in.E, kTileSide), used, dv_transposed, largest, true);
    } else {
      Products::multiply(ds, padded, keys_by_row, used, count, in.E, to, out_width, true);
      Products::pack(q, width, count, in.E, packed_q);
      Products::pack(d, width, count, in.E, packed_d);
      // ds and p as left sides, read along their columns: nothing is transposed.
      const int64_t all = round_up(used, kRowUnit);
      multiply_into(ds, 1, padded, {packed_q, count, 0, count}, dk, out_width, all, out_width,
                    true);
      multiply_into(p, 1, padded, {packed_d, count, 0, count}, dv, out_width, all, out_width, true);
    }
  }

  // p and ds of a query from its products with keys and with values. A row that sees nothing has
  // lse = -inf; its scores are all -inf, and with any finite offset p is 0.
  void row_backward(const Head<T>& head, int64_t query, const Block& block, float* p_row,
                    float* ds_row) {
    const float dot = row_dots[query], lse = grad.lse[head.row(query)];
    const int64_t padded = Products::columns(block.count());
    this->finish_scores(head, query, block, p_row);
    exp_row(p_row, padded, lse == kMinusInfinity ? 0.0f : lse);
    if (in.threshold) {
      head.read_dropout(query, block, this->factors);
      for (int64_t j = 0; j < block.count(); ++j) {
        ds_row[j] = p_row[j] * (ds_row[j] * this->factors[j] - dot);
        p_row[j] *= this->factors[j];
      }
    } else {
      for (int64_t j = 0; j < padded; j += kWidth) {
        store(ds_row + j, load(p_row + j) * (load(ds_row + j) - dot));
      }
    }
    if (!grad.dbias) return;
    const int64_t sample = in.bias_strides[0] ? head.b() : 0;
    float* dbias = grad.dbias + ((sample * in.H + head.h()) * in.S + query) * in.N;
    for (int64_t c = std::max(block.begin, columns.prefix); c < block.end; ++c) {
      dbias[columns.list[c].row] += ds_row[c - block.begin];
    }
  }

  // Adds one head's gradients of a block of columns where they belong: of keys to the group's, of a
  // prefix to those of its member or of the chunk.
  void fold(const Head<T>& head, int64_t chunk, const Block& block, double& dgate) {
    for (int64_t c = block.begin; c < block.end; ++c) {
      float* dk_row = dk + (c - block.begin) * out_width;
      float* dv_row = dv + (c - block.begin) * out_width;
      if (kOnTiles) scale_row(dk_row, out_width, in.scale);  // elsewhere q has it
      const Column column = columns.list[c];
      if (column.segment < 0) {
        float *to_k = group_dk + column.row * out_width, *to_v = group_dv + column.row * out_width;
        for (int64_t e = 0; e < in.E; ++e) to_k[e] += dk_row[e];
        for (int64_t e = 0; e < in.E; ++e) to_v[e] += dv_row[e];
        continue;
      }
      const CpuSegment& segment = in.prefix[column.segment];
      const int64_t member = segment.index ? segment.index[head.b()] : chunk;
      const int64_t offset = ((member * segment.length + column.row) * in.G + head.g()) * in.E;
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
    backward.run(Head<T>(in, columns, b, h), chunk);
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
