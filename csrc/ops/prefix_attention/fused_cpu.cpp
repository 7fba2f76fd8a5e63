// prefix_attention forward on the CPU.
//
//   out = softmax([ g scale Q Pkᵀ ; scale Q Kᵀ + bias + mask ]) [ g Pv ; V ]
//
// One unit of work is a sample and a head. Its columns are the prefix rows, multiplied by the gate,
// and then the keys that the mask lets through: padding costs nothing, and no column of the prefix
// exists for a whole batch. Columns are taken in blocks that stay in the second cache, packed as Kᵀ
// [E, columns] and V [columns, E]; against each block go the queries, a few rows at a time:
//
//   s = Q Kᵀ -> online softmax (row maximum m, sum l) -> acc = acc exp(m' - m) + p V
//
// Sums are float32, and so are operands, or on tiles bfloat16. The order of every sum is fixed by
// the shapes alone.
#include "ops/prefix_attention/cpu_head.h"

namespace pelt::prefix_attention {
namespace {

// One head of one sample.
template <class T, class Products>
struct Forward {
  using Element = typename Products::Element;
  static constexpr bool kOnTiles = std::is_same_v<Element, bf16>;
  static constexpr int64_t kRows = Products::kQueryRows;

  const CpuInputs& in;
  const Columns& columns;
  const Head<T>& head;
  int64_t width, out_width, most;  // of operands' rows [E], of results [E], of a block of columns
  Element *rows, *keys, *values, *q, *p;
  float *acc, *m, *l, *s, *factors;

  Forward(const CpuInputs& in, const Columns& columns, const Head<T>& head)
      : in(in),
        columns(columns),
        head(head),
        width(Products::width(in.E)),
        out_width(Products::columns(in.E)),
        most(block_columns(in, columns)) {
    Arena count;
    place(count);
    Arena arena{scratch(count.used)};
    place(arena);
  }

  void place(Arena& arena) {
    rows = arena.take<Element>(most * width);
    keys = arena.take<Element>(Products::numbers(in.E, most));    // [E, most]
    values = arena.take<Element>(Products::numbers(most, in.E));  // [most, E]
    q = arena.take<Element>(kRows * width);
    p = arena.take<Element>(kOnTiles ? kRows * Products::width(most) : 0);  // else s itself
    acc = arena.take(round_up(in.S, kRows) * out_width);
    m = arena.take(in.S);
    l = arena.take(in.S);
    s = arena.take(kRows * most);
    factors = arena.take(most);
  }

  void run(T* out, float* lse) {
    std::fill(m, m + in.S, kMinusInfinity);
    std::fill(l, l + in.S, 0.0f);
    std::fill(acc, acc + round_up(in.S, kRows) * out_width, 0.0f);
    // Rows behind the last query are multiplied too.
    std::memset(q, 0, static_cast<size_t>(kRows * width) * sizeof(Element));
    std::memset(s, 0, static_cast<size_t>(kRows * most) * sizeof(float));
    for (int64_t begin = 0; begin < columns.count(); begin += most) {
      const int64_t end = std::min(columns.count(), begin + most), count = end - begin;
      head.read(true, begin, end, width, rows);
      Products::pack_transposed(rows, width, in.E, count, keys);
      head.read(false, begin, end, width, rows);
      Products::pack(rows, width, count, in.E, values);
      for (int64_t row = 0; row < in.S; row += kRows) attend(row, begin, end);
    }
    for (int64_t i = 0; i < in.S; ++i) {
      const float sum = l[i];
      lse[head.row(i)] = sum == 0.0f ? kMinusInfinity : m[i] + std::log(sum);
      write_row(acc + i * out_width, in.E, sum == 0.0f ? 0.0f : 1.0f / sum,
                out + head.row(i) * in.E);
    }
  }

  // The queries from `first` on against a block of columns.
  void attend(int64_t first, int64_t begin, int64_t end) {
    const int64_t count = std::min(kRows, in.S - first), here = Products::columns(end - begin);
    if (columns.seen_by(in, first + count - 1) <= begin) return;
    head.read_queries(first, first + count, width, kOnTiles ? 1.0f : in.scale, q);
    Products::multiply(q, width, keys, in.E, count, here, s, here, false);
    for (int64_t i = 0; i < count; ++i) {
      float *row = s + i * here, *sums = acc + (first + i) * out_width;
      const float shrink = soften(first + i, begin, end, here, row);
      if (begin) scale_row(sums, out_width, shrink);
      if (kOnTiles) {
        read_row(row, end - begin, pair_depth(end - begin), 1.0f, p + i * Products::width(most));
      }
    }
    if constexpr (kOnTiles) {
      Products::multiply(p, Products::width(most), values, pair_depth(end - begin), count, in.E,
                         acc + first * out_width, out_width, true);
    } else {
      Products::multiply(s, here, values, end - begin, count, in.E, acc + first * out_width,
                         out_width, true);
    }
  }

  // Scores become exponentials against the largest score so far; gives what older sums shrink by.
  float soften(int64_t query, int64_t begin, int64_t end, int64_t here, float* row) {
    const int64_t seen = std::clamp<int64_t>(columns.seen_by(in, query) - begin, 0, end - begin);
    if (kOnTiles) scale_row(row, here, in.scale);
    head.add_bias(query, begin, end, row);
    std::fill(row + seen, row + here, kMinusInfinity);
    const float largest = std::max(m[query], max_of(row, here));
    // A row that has seen nothing yet: its exponentials are 0 for any finite offset.
    const float offset = largest == kMinusInfinity ? 0.0f : largest;
    const float shrink = std::exp(m[query] - offset);
    l[query] = l[query] * shrink + exp_row(row, here, offset);
    m[query] = largest;
    if (in.threshold) {
      head.read_dropout(query, begin, end, factors);
      for (int64_t j = 0; j < end - begin; ++j) row[j] *= factors[j];
    }
    return shrink;
  }
};

template <class T, class Products>
void forward_all(const CpuInputs& in, void* out, float* lse) {
  parallel_for(in.B * in.H, in.threads, [&](int64_t unit) {
    const TileScope scope;
    const int64_t b = unit / in.H;
    const Columns columns(in, b);
    const Head<T> head(in, columns, b, unit % in.H);
    Forward<T, Products>(in, columns, head).run(static_cast<T*>(out), lse);
  });
}

}  // namespace

template <>
void forward_on_cpu<cpu::Isa::PELT_CPU_ISA>(const CpuInputs& in, void* out, float* lse) {
  if (in.is_float32) return forward_all<float, FloatProducts>(in, out, lse);
  forward_all<bf16, std::conditional_t<kHasPairs, PairProducts, FloatProducts>>(in, out, lse);
}

}  // namespace pelt::prefix_attention
