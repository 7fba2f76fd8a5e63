// What forward and backward of prefix_attention on the CPU have in common: the columns that a sample
// sees, reading a head's rows, and the scores of a block of columns.
//
// Compiled once for each instruction set (see cpu/isa.h), so everything is in an unnamed namespace.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>
#include <vector>

#include "common/parallel.h"
#include "cpu/entry.h"
#include "cpu/kernels.h"
#include "cpu/math.h"
#include "cpu/rows.h"
#include "ops/prefix_attention/cpu_products.h"
#include "ops/prefix_attention/inputs.h"

namespace pelt::prefix_attention {
namespace {

using namespace pelt::cpu;

using CpuInputs = Inputs<int64_t>;

constexpr int64_t kBlockVector = 16384;  // numbers of one packed operand: 64 KB of float32
constexpr int64_t kColumnUnit = 32;      // what is seen of a block is rounded up to
static_assert(kColumnUnit % kPanel == 0 && kColumnUnit % kPairColumns == 0, "whole panels");
constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

// ---- rows ----

// to[i] = factor * from[i] for i < count, and 0 up to `width`, a multiple of kWidth.
template <class T, class To>
inline void read_row(const T* from, int64_t count, int64_t width, float factor, To* to) {
  for_vectors(count,
              [&](int64_t i, auto part) { store(to + i, part.load_from(from + i) * factor); });
  std::fill(to + round_up(count, kWidth), to + width, To{});
}

template <class T>
inline void write_row(const float* from, int64_t count, float factor, T* to) {
  for_vectors(count, [&](int64_t i, auto part) { part.store_to(to + i, load(from + i) * factor); });
}

inline float dot_of(const float* a, const float* b, int64_t width) {
  Vector sum = {};
  for (int64_t i = 0; i < width; i += kWidth) sum += load(a + i) * load(b + i);
  return sum_of(sum);
}

// What is hidden has a score of minus infinity, and a probability of exactly 0.
inline Vector exp_or_zero(Vector x) { return x < -87.0f ? Vector{} : exp_of_negative(x); }

// Memory of one thread, which the next unit of work finds again.
inline char* scratch(int64_t bytes) {
  thread_local std::vector<char> memory;
  if (static_cast<int64_t>(memory.size()) < bytes + 64) memory.resize(bytes + 64);
  const auto address = reinterpret_cast<uintptr_t>(memory.data());
  return reinterpret_cast<char*>((address + 63) / 64 * 64);
}

// A column of the attention matrix: a prefix row (segment >= 0) or a key.
struct Column {
  int32_t segment;
  int32_t row;  // of the segment, or of the keys
};

// The columns that a sample sees, in order. The others are never read: padding costs nothing, and a
// NaN in it goes nowhere.
struct Columns {
  std::vector<Column> list;
  std::vector<int32_t> position;  // of each in the whole row of P + N columns
  int64_t prefix = 0;             // how many are prefix rows
  int64_t total = 0;              // P + N

  Columns(const CpuInputs& in, int64_t b) {
    for (int i = 0; i < in.prefixes; ++i) {
      for (int64_t p = 0; p < in.P_i[i]; ++p) add(i, p, in.first[i] + p);
    }
    prefix = in.P;
    total = in.P + in.N;
    const int64_t end = in.lengths() ? std::clamp<int64_t>(in.lengths()[b], 0, in.N) : in.N;
    const bool* mask = in.mask_of(b);
    for (int64_t n = 0; n < end; ++n) {
      if (!mask || mask[n]) add(-1, n, prefix + n);
    }
  }

  int64_t count() const { return static_cast<int64_t>(list.size()); }

  // How many of the columns query s sees: all but, if causal, those of later keys.
  int64_t seen_by(const CpuInputs& in, int64_t s) const {
    if (!in.is_causal) return count();
    const int32_t last = static_cast<int32_t>(prefix + s + in.N - in.S);
    const auto first_key = position.begin() + prefix;
    return std::upper_bound(first_key, position.end(), last) - position.begin();
  }

 private:
  void add(int64_t segment, int64_t row, int64_t column) {
    list.push_back({static_cast<int32_t>(segment), static_cast<int32_t>(row)});
    position.push_back(static_cast<int32_t>(column));
  }
};

// A block of columns [begin, end) of a sample's list.
struct Block {
  int64_t begin;
  int64_t end;
  int64_t count() const { return end - begin; }
};

// The rows of one query head of a sample, read from where they lie.
template <class T>
class Head {
 public:
  Head(const CpuInputs& in, const Columns& columns, int64_t b, int64_t h)
      : in_(in), columns_(columns), b_(b), h_(h), g_(h / (in.H / in.G)) {
    if (!in.has_gate()) return;
    gate_ = element_of<T>(in.parameter(kGate), in.has_gate_per_head() ? b * in.H + h : b);
  }

  int64_t b() const { return b_; }
  int64_t h() const { return h_; }
  int64_t g() const { return g_; }
  float gate() const { return gate_; }

  // A column's row of a prefix's keys (kPrefixK) or values (kPrefixV), without the gate.
  template <class To>
  void read_prefix(Input tensor, const Column& column, int64_t width, float factor, To* to) const {
    const int i = tensor + column.segment;
    const int64_t* index = in_.index_of(column.segment);
    const int64_t (&stride)[3] = in_.stride[i];  // of a member, a row and a head
    const int64_t offset =
        (index ? index[b_] : 0) * stride[0] + column.row * stride[1] + g_ * stride[2];
    with_elements<T>(in_.parameter(i),
                     [&](const auto* from) { read_row(from + offset, in_.E, width, factor, to); });
  }

  // Keys (kK) or values (kV) of a block of columns, with the gate: [columns, width].
  template <class To>
  void read(Input tensor, const Block& block, int64_t width, To* to) const {
    const T* rows = head_rows(tensor, g_);
    for (int64_t c = block.begin; c < block.end; ++c, to += width) {
      const Column& column = columns_.list[c];
      if (column.segment < 0) {
        read_row(rows + column.row * in_.stride[tensor][2], in_.E, width, 1.0f, to);
      } else {
        read_prefix(tensor == kK ? kPrefixK : kPrefixV, column, width, gate_, to);
      }
    }
  }

  // Queries [begin, end) times a factor: [rows, width].
  template <class To>
  void read_queries(int64_t begin, int64_t end, int64_t width, float factor, To* to) const {
    const T* q = head_rows(kQ, h_);
    for (int64_t s = begin; s < end; ++s, to += width) {
      read_row(q + s * in_.stride[kQ][2], in_.E, width, factor, to);
    }
  }

  // Adds query s's bias to its scores of a block of columns; a prefix has none.
  void add_bias(int64_t s, const Block& block, float* scores) const {
    const int64_t begin = std::max(block.begin, columns_.prefix), count = block.end - begin;
    if (!in_.has_bias() || count <= 0) return;
    const int64_t offset = b_ * in_.bias_batch_stride + h_ * in_.bias_head_stride + s * in_.N;
    const Column* columns = columns_.list.data() + begin;
    scores += begin - block.begin;
    with_elements<T>(in_.parameter(kBias), [&](const auto* bias) {
      bias += offset;
      if (columns[count - 1].row - columns[0].row == count - 1) {  // one behind the other
        bias += columns[0].row;
        for_vectors(count, [&](int64_t i, auto part) {
          part.store_to(scores + i, part.load_from(scores + i) + part.load_from(bias + i));
        });
      } else {
        for (int64_t i = 0; i < count; ++i) scores[i] += to_float(bias[columns[i].row]);
      }
    });
  }

  // Query s's row of out, dout, dq and lse.
  int64_t row(int64_t s) const { return (b_ * in_.H + h_) * in_.S + s; }

  // What dropout multiplies a block of columns of query s by. Words are drawn as many at a time as
  // the vectors of Philox give, and only where the sample sees a column.
  void read_dropout(int64_t s, const Block& block, float* to) const {
    const uint64_t first = row(s) * ((columns_.total + 3) / 4);
    alignas(64) uint32_t words[4 * kPhiloxGroups];
    int64_t from = 0, until = 0;  // the positions that `words` covers
    for (int64_t c = block.begin; c < block.end; ++c) {
      const int64_t position = columns_.position[c];
      if (position >= until) {
        from = position / 4 * 4;
        until = from + 4 * kPhiloxGroups;
        philox_words(first + from / 4, 0, in_.dropout.seed, words);
      }
      *to++ = words[position - from] >= in_.dropout.threshold ? in_.dropout.keep_scale : 0.0f;
    }
  }

 private:
  // The first row of a head of q, k or v.
  const T* head_rows(Input tensor, int64_t h) const {
    const int64_t (&stride)[3] = in_.stride[tensor];
    return in_.input_as<T>(tensor) + b_ * stride[0] + h * stride[1];
  }

  const CpuInputs& in_;
  const Columns& columns_;
  int64_t b_, h_, g_;
  float gate_ = 1.0f;
};

inline float max_of(const float* row, int64_t width) {
  Vector largest = splat(kMinusInfinity);
  for (int64_t j = 0; j < width; j += kWidth) {
    const Vector x = load(row + j);
    largest = x > largest ? x : largest;
  }
  float result = largest[0];
  for (int i = 1; i < kWidth; ++i) result = std::max(result, largest[i]);
  return result;
}

// row = exp(row - offset), and its sum.
inline float exp_row(float* row, int64_t width, float offset) {
  Vector sum = {};
  for (int64_t j = 0; j < width; j += kWidth) {
    const Vector p = exp_or_zero(load(row + j) - offset);
    store(row + j, p);
    sum += p;
  }
  return sum_of(sum);
}

inline void scale_row(float* row, int64_t width, float factor) {
  for (int64_t j = 0; j < width; j += kWidth) store(row + j, load(row + j) * factor);
}

// How many columns go into a block: its operands stay in the second cache.
inline int64_t block_columns(const CpuInputs& in, const Columns& all) {
  const int64_t rows = kBlockVector / round_up(in.E, 32) / kColumnUnit * kColumnUnit;
  return std::min(std::max(rows, kColumnUnit),
                  round_up(std::max<int64_t>(all.count(), 1), kColumnUnit));
}

// What forward and backward do alike: they take the columns that a sample sees in blocks, and
// against the keys of a block the queries, kRows at a time. Members are memory for one block and
// one group of queries.
template <class T, class Products>
struct Blocks {
  using Element = typename Products::Element;
  static constexpr bool kOnTiles = std::is_same_v<Element, bf16>;
  static constexpr int64_t kRows = Products::kQueryRows;

  const CpuInputs& in;
  const Columns& columns;
  int64_t width, out_width;  // of the rows of operands [E], and of results [E]
  int64_t largest;           // columns of a whole block
  Element *rows, *keys, *q;
  float *scores, *factors;

  Blocks(const CpuInputs& in, const Columns& columns)
      : in(in),
        columns(columns),
        width(Products::width(in.E)),
        out_width(Products::columns(in.E)),
        largest(block_columns(in, columns)) {}

  void take_blocks(Arena& arena) {
    rows = arena.take<Element>(largest * width);
    keys = arena.take<Element>(Products::numbers(in.E, largest));  // [E, largest]
    q = arena.take<Element>(kRows * width);
    scores = arena.take(kRows * largest);  // [kRows, columns of the block], packed
    factors = arena.take(largest);
  }

  // Rows behind the last query are multiplied too, so they must hold numbers.
  void clear_blocks() {
    std::memset(q, 0, static_cast<size_t>(kRows * width) * sizeof(Element));
    std::memset(scores, 0, static_cast<size_t>(kRows * largest) * sizeof(float));
  }

  template <class Visit>
  void for_blocks(Visit&& visit) const {
    for (int64_t begin = 0; begin < columns.count(); begin += largest) {
      visit(Block{begin, std::min(columns.count(), begin + largest)});
    }
  }

  // The block's keys, gated, as the right side of Q K^T; as rows [columns, width] they stay in
  // `rows`.
  void pack_keys(const Head<T>& head, const Block& block) {
    head.read(kK, block, width, rows);
    Products::pack_transposed(rows, width, in.E, block.count(), keys);
  }

  // The columns of a block up to the last that one of `count` queries from `first` on sees, in whole
  // panels; none where they see nothing of it.
  Block seen_part(int64_t first, int64_t count, const Block& block) const {
    const int64_t seen = columns.seen_by(in, first + count - 1) - block.begin;
    const int64_t whole = round_up(std::max<int64_t>(seen, 0), kColumnUnit);
    return {block.begin, std::min(block.end, block.begin + whole)};
  }

  // scores = Q K^T of `count` queries from `first` on and the block's columns in `part`. On tiles the
  // scale comes afterwards (finish_scores): it would round bfloat16 queries once more.
  void multiply_keys(const Head<T>& head, int64_t first, int64_t count, const Block& part) {
    const int64_t padded = Products::columns(part.count());
    head.read_queries(first, first + count, width, kOnTiles ? 1.0f : in.scale, q);
    Products::multiply(q, width, keys, in.E, in.E, count, padded, scores, padded, false);
  }

  // A query's products become scores: scale, bias, and -inf for columns that it does not see and
  // behind the last one.
  void finish_scores(const Head<T>& head, int64_t query, const Block& block, float* row) const {
    const int64_t padded = Products::columns(block.count());
    const int64_t seen =
        std::clamp<int64_t>(columns.seen_by(in, query) - block.begin, 0, block.count());
    if (kOnTiles) scale_row(row, padded, in.scale);
    head.add_bias(query, block, row);
    std::fill(row + seen, row + padded, kMinusInfinity);
  }
};

}  // namespace
}  // namespace pelt::prefix_attention
