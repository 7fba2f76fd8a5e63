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

// One head of one sample; members are memory for it.
template <class T, class Products>
struct Forward : Blocks<T, Products> {
  using Base = Blocks<T, Products>;
  using Base::columns, Base::in, Base::kOnTiles, Base::kRows, Base::largest, Base::out_width,
      Base::rows, Base::scores, Base::width;
  using typename Base::Element;

  const Head<T>& head;
  Element *values, *p;
  float *acc, *m, *l;

  Forward(const CpuInputs& in, const Columns& columns, const Head<T>& head)
      : Base(in, columns), head(head) {
    Arena count;
    take(count);
    Arena arena{scratch(count.used)};
    take(arena);
    this->clear_blocks();
  }

  void take(Arena& arena) {
    this->take_blocks(arena);
    values = arena.take<Element>(Products::numbers(largest, in.E));            // [largest, E]
    p = arena.take<Element>(kOnTiles ? kRows * Products::width(largest) : 0);  // else the scores
    acc = arena.take(round_up(in.S, kRows) * out_width);
    m = arena.take(in.S);
    l = arena.take(in.S);
  }

  void run(T* out, float* lse) {
    std::fill(m, m + in.S, kMinusInfinity);
    std::fill(l, l + in.S, 0.0f);
    std::fill(acc, acc + round_up(in.S, kRows) * out_width, 0.0f);
    this->for_blocks([&](const Block& block) {
      this->pack_keys(head, block);
      head.read(kV, block, width, rows);
      Products::pack(rows, width, block.count(), in.E, values);
      for (int64_t row = 0; row < in.S; row += kRows) attend(row, block);
    });
    for (int64_t i = 0; i < in.S; ++i) {
      const float sum = l[i];  // 0 for a row that sees nothing: out 0, lse -inf
      lse[head.row(i)] = sum == 0.0f ? kMinusInfinity : m[i] + std::log(sum);
      write_row(acc + i * out_width, in.E, sum == 0.0f ? 0.0f : 1.0f / sum,
                out + head.row(i) * in.E);
    }
  }

  // The queries from `first` on against a block of columns.
  void attend(int64_t first, const Block& block) {
    const int64_t count = std::min(kRows, in.S - first);
    const Block part = this->seen_part(first, count, block);
    if (part.count() == 0) return;
    this->multiply_keys(head, first, count, part);
    const int64_t padded = Products::columns(part.count());
    for (int64_t i = 0; i < count; ++i) {
      float *row = scores + i * padded, *sums = acc + (first + i) * out_width;
      const float shrink = soften(first + i, part, row);
      if (part.begin) scale_row(sums, out_width, shrink);
      if (kOnTiles) {
        read_row(row, part.count(), pair_depth(part.count()), 1.0f,
                 p + i * Products::width(largest));
      }
    }
    float* sums = acc + first * out_width;
    if constexpr (kOnTiles) {
      Products::multiply(p, Products::width(largest), values, block.count(),
                         pair_depth(part.count()), count, in.E, sums, out_width, true);
    } else {
      Products::multiply(scores, padded, values, block.count(), part.count(), count, in.E, sums,
                         out_width, true);
    }
  }

  // Scores become exponentials against the largest score so far; gives what older sums shrink by.
  float soften(int64_t query, const Block& block, float* row) {
    const int64_t padded = Products::columns(block.count());
    this->finish_scores(head, query, block, row);
    const float maximum = std::max(m[query], max_of(row, padded));
    // A row that has seen nothing yet: its exponentials are 0 for any finite offset.
    const float offset = maximum == kMinusInfinity ? 0.0f : maximum;
    const float shrink = std::exp(m[query] - offset);
    l[query] = l[query] * shrink + exp_row(row, padded, offset);
    m[query] = maximum;
    if (in.dropout.is_active()) {
      head.read_dropout(query, block, this->factors);
      for (int64_t j = 0; j < block.count(); ++j) row[j] *= this->factors[j];
    }
    return shrink;
  }
};

template <class T>
void forward_all(const CpuInputs& in) {
  T* out = in.output_as<T>(kOut);
  float* lse = in.output_as<float>(kLse);
  parallel_for(in.B * in.H, in.threads, [&](int64_t unit) {
    const TileScope scope;
    const int64_t b = unit / in.H;
    const Columns columns(in, b);
    const Head<T> head(in, columns, b, unit % in.H);
    Forward<T, ProductsOf<T>>(in, columns, head).run(out, lse);
  });
}

}  // namespace
}  // namespace pelt::prefix_attention

namespace pelt {

using namespace prefix_attention;
using Kernels = Cpu<Contract, cpu::Isa::PELT_CPU_ISA>;

template <>
std::string Kernels::why_not(const Call&) {
  return "";
}

template <>
void Kernels::forward(const Call& call, Arena& arena) {
  if (arena.only_counts) return;
  with_type(call.dtype, [&](auto zero) { forward_all<decltype(zero)>(CpuInputs(call)); });
}

}  // namespace pelt
