// symmetric_kl on the CPU.
//
//   loss = mean over rows of 0.5 [KL(p2 ‖ p1) + KL(p1 ‖ p2)],  p = softmax(z)
//
// The two divergences add up to Σ (p1 - p2) (log p1 - log p2), and because both p sum to 1 the
// log-sum-exps drop out of it: Σ (p1 - p2) d with d = z1 - z2, or d less any constant. So one pass
// over the vocabulary does: with the maximum m so far, l = Σ exp(z - m) and t = Σ exp(z - m) d for
// both, rescaled where m grows, and in the end t1 / l1 - t2 / l2. The constant is the mean of d
// under p1 over the block that weighs most: without it the quotients could be much larger than
// their difference. To find it, such a block is summed twice; the first one always is.
//
// Where classes are few, a vector is the same class of several rows, and its rows are one block.
//
// A logit of -inf is a class that does not exist: its probability is exactly 0, and so is its term,
// whatever d is. Where the other side has it, that side's term is infinite.
//
// Backward is a second pass: dz1 = -dz2 = 0.5 dloss (exp(z1 - lse1) - exp(z2 - lse2)) / count.
// Rows that do not count are not read. Everything is float32 inside; the order of sums follows from
// the sizes alone.
#include <algorithm>
#include <cmath>
#include <limits>

#include "common/parallel.h"
#include "cpu/entry.h"
#include "cpu/kernels.h"
#include "cpu/math.h"
#include "cpu/pages.h"
#include "ops/symmetric_kl/contract.h"

namespace pelt::symmetric_kl {
namespace {

using namespace pelt::cpu;
using Call = NativeCall<Contract, int64_t>;

constexpr int64_t kBlock = 512;         // columns between two looks at the maximum
constexpr int64_t kWorkUnit = 1 << 14;  // elements that are worth a thread's while
constexpr int64_t kFewClasses = 16;
constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

inline bool counts(const Call& in, int64_t row) {
  const bool* mask = in.input_as<bool>(kMask);
  return !mask || mask[row];
}

// From row to row, in elements.
inline int64_t stride_of(const Call& in, Input z) { return in.stride[z][0]; }

// How many rows count; 1 where none does, so that an empty mean is 0.
inline int64_t count_of(const Call& in) {
  int64_t count = 0;
  for (int64_t t = 0; t < in.T; ++t) count += counts(in, t);
  return std::max<int64_t>(count, 1);
}

// body(row), or with a step body(the first of so many rows), on several threads, in groups of rows
// that are worth it.
template <class Body>
void for_rows(const Call& in, Body&& body, int64_t step = 1) {
  const int64_t each = round_up(std::max<int64_t>(1, kWorkUnit / in.C), step);
  parallel_for((in.T + each - 1) / each, in.threads, [&](int64_t group) {
    const int64_t end = std::min(in.T, (group + 1) * each);
    for (int64_t t = group * each; t < end; t += step) body(t);
  });
}

// exp(z - m) with a maximum or log-sum-exp m; exactly 0 for a class that does not exist, unless no
// class does or m is NaN.
inline Vector weight_of(Vector z, Vector m) {
  const Vector e = exp_of_negative(z - m);
  return (z == kMinusInfinity) & (m > kMinusInfinity) ? Vector{} : e;
}

// z1 - z2, and 0 where they are equal: two classes that do not exist have no difference.
inline Vector difference_of(Vector z1, Vector z2) { return z1 == z2 ? Vector{} : z1 - z2; }

// e d, where 0 is what a class without weight adds to a sum.
inline Vector term_of(Vector e, Vector d) { return e == 0.0f ? Vector{} : e * d; }

template <class T>
float largest(const T* z, int64_t count) {
  Vector most = splat(kMinusInfinity);
  int64_t c = 0;
  for (; c + kWidth <= count; c += kWidth) {
    const Vector v = load(z + c);
    most = v > most ? v : most;
  }
  float lanes[kWidth];
  store(lanes, most);
  float largest = kMinusInfinity;
  for (float lane : lanes) largest = lane > largest ? lane : largest;
  for (; c < count; ++c) largest = to_float(z[c]) > largest ? to_float(z[c]) : largest;
  return largest;
}

// Sums of one distribution over the columns so far, and over those of the block at hand: chains of
// rounding errors stay short.
struct Sums {
  float m = kMinusInfinity;
  Vector l = {}, t = {};
  Vector block_l = {}, block_t = {};

  // Takes a block's maximum into account; true where most of the weight may now be in this block.
  // A maximum that is not finite would make every difference from it NaN: a row that begins with
  // -inf is summed as it is, one with +inf becomes NaN either way.
  bool raise(float largest) {
    if (!(largest > m)) return false;
    const float factor = m == kMinusInfinity ? 0.0f : std::exp(m - largest);
    l *= factor, t = term_of(splat(factor), t);
    m = largest;
    return factor < 0.5f;
  }

  template <bool kAllExist>
  void add(Vector z, Vector d) {
    const Vector offset = splat(m == kMinusInfinity ? 0.0f : m);
    const Vector e = kAllExist ? exp_of_negative(z - offset) : weight_of(z, offset);
    block_l += e, block_t += kAllExist ? e * d : term_of(e, d);
  }

  // The same sums for d less another `step`.
  void move(float step) { t -= step * l; }

  void empty_block() { block_l = block_t = Vector{}; }

  void close_block() {
    l += block_l, t += block_t;
    empty_block();
  }
};

template <bool kAllExist, class T>
void add_columns(const T* z1, const T* z2, int64_t count, float shift, Sums& first, Sums& second) {
  first.empty_block();
  second.empty_block();
  int64_t c = 0;
  for (; c + kWidth <= count; c += kWidth) {
    const Vector x = load(z1 + c), y = load(z2 + c);
    const Vector d = (kAllExist ? x - y : difference_of(x, y)) - shift;
    first.add<kAllExist>(x, d);
    second.add<kAllExist>(y, d);
  }
  if (c == count) return;
  float exists[kWidth];
  for (int i = 0; i < kWidth; ++i) exists[i] = i < count - c;
  const auto is_there = load(exists) > 0.0f;
  const Vector x = load_part(z1 + c, count - c), y = load_part(z2 + c, count - c);
  const Vector d = (kAllExist ? x - y : difference_of(x, y)) - shift;
  first.add<kAllExist>(is_there ? x : splat(kMinusInfinity), is_there ? d : Vector{});
  second.add<kAllExist>(is_there ? y : splat(kMinusInfinity), is_there ? d : Vector{});
}

// A class that does not exist makes an unguarded sum infinite or NaN, and then the block is summed
// again: looking for one at every class costs a quarter of the time.
template <class T>
void add_block(const T* z1, const T* z2, int64_t count, float shift, Sums& first, Sums& second) {
  add_columns<true>(z1, z2, count, shift, first, second);
  if (!std::isfinite(sum_of(first.block_t) + sum_of(second.block_t))) {
    add_columns<false>(z1, z2, count, shift, first, second);
  }
}

template <class T>
void forward_row(const Call& in, int64_t row, float* rows, float* lse) {
  const T* z1 = in.input_as<T>(kZ1) + row * stride_of(in, kZ1);
  const T* z2 = in.input_as<T>(kZ2) + row * stride_of(in, kZ2);
  Sums first, second;
  float shift = 0.0f;
  for (int64_t begin = 0; begin < in.C; begin += kBlock) {
    const int64_t count = std::min(kBlock, in.C - begin);
    const T *a = z1 + begin, *b = z2 + begin;
    const bool is_heavy = first.raise(largest(a, count));
    second.raise(largest(b, count));
    add_block(a, b, count, shift, first, second);
    if (is_heavy) {
      const float step = sum_of(first.block_t) / sum_of(first.block_l);
      if (std::isfinite(step) && step != 0.0f) {
        shift += step;
        first.move(step);
        second.move(step);
        add_block(a, b, count, shift, first, second);
      }
    }
    first.close_block();
    second.close_block();
  }
  const float l1 = sum_of(first.l), l2 = sum_of(second.l);
  const float difference = sum_of(first.t) / l1 - sum_of(second.t) / l2;
  // Never negative but by rounding; a NaN stays one.
  rows[row] = difference < 0.0f ? 0.0f : 0.5f * difference;
  lse[row] = first.m + std::log(l1);
  lse[in.T + row] = second.m + std::log(l2);
}

// ---- few classes: kWidth rows at once ----

// The same class of `count` rows.
template <class T>
Vector class_of_rows(const T* z, int64_t stride, int64_t count) {
  float lanes[kWidth] = {};
  for (int64_t i = 0; i < count; ++i) lanes[i] = to_float(z[i * stride]);
  return load(lanes);
}

// Of kWidth rows: their classes, largest ones, and sums of exponentials.
struct FewClasses {
  Vector z[kFewClasses], e[kFewClasses], m, l = {};

  template <class T>
  FewClasses(const T* from, int64_t stride, int64_t classes, int64_t count) {
    m = splat(kMinusInfinity);
    for (int64_t c = 0; c < classes; ++c) {
      z[c] = class_of_rows(from + c, stride, count);
      m = z[c] > m ? z[c] : m;
    }
    const Vector offset = m == kMinusInfinity ? Vector{} : m;
    for (int64_t c = 0; c < classes; ++c) {
      e[c] = weight_of(z[c], offset);
      l += e[c];
    }
  }
};

template <class T>
void forward_rows(const Call& in, int64_t row, float* rows, float* lse) {
  const int64_t count = std::min<int64_t>(kWidth, in.T - row);
  const FewClasses first(in.input_as<T>(kZ1) + row * stride_of(in, kZ1), stride_of(in, kZ1), in.C,
                         count);
  const FewClasses second(in.input_as<T>(kZ2) + row * stride_of(in, kZ2), stride_of(in, kZ2), in.C,
                          count);
  Vector shift = {};
  for (int64_t c = 0; c < in.C; ++c) {
    shift += term_of(first.e[c], difference_of(first.z[c], second.z[c]));
  }
  shift /= first.l;
  shift = absolute(shift) <= std::numeric_limits<float>::max() ? shift : Vector{};
  Vector t1 = {}, t2 = {};
  for (int64_t c = 0; c < in.C; ++c) {
    const Vector d = difference_of(first.z[c], second.z[c]) - shift;
    t1 += term_of(first.e[c], d);
    t2 += term_of(second.e[c], d);
  }
  const Vector difference = t1 / first.l - t2 / second.l;
  const Vector half = difference < 0.0f ? Vector{} : 0.5f * difference;
  for (int64_t i = 0; i < count; ++i) {
    const bool is_read = counts(in, row + i);
    rows[row + i] = is_read ? half[i] : 0.0f;
    lse[row + i] = is_read ? first.m[i] + std::log(first.l[i]) : 0.0f;
    lse[in.T + row + i] = is_read ? second.m[i] + std::log(second.l[i]) : 0.0f;
  }
}

template <class T>
void backward_rows(const Call& in, int64_t row, float factor, const float* lse, T* dz1, T* dz2) {
  const int64_t count = std::min<int64_t>(kWidth, in.T - row);
  const T* z1 = in.input_as<T>(kZ1) + row * stride_of(in, kZ1);
  const T* z2 = in.input_as<T>(kZ2) + row * stride_of(in, kZ2);
  const Vector lse1 = load_part(lse + row, count), lse2 = load_part(lse + in.T + row, count);
  for (int64_t c = 0; c < in.C; ++c) {
    const Vector p1 = weight_of(class_of_rows(z1 + c, stride_of(in, kZ1), count), lse1);
    const Vector p2 = weight_of(class_of_rows(z2 + c, stride_of(in, kZ2), count), lse2);
    T d[kWidth], minus[kWidth];
    store(d, factor * (p1 - p2));
    store(minus, -(factor * (p1 - p2)));
    for (int64_t i = 0; i < count; ++i) {
      const int64_t place = (row + i) * in.C + c;
      const bool is_read = counts(in, row + i);
      if (dz1) dz1[place] = is_read ? d[i] : T{};
      if (dz2) dz2[place] = is_read ? minus[i] : T{};
    }
  }
}

template <class T>
void forward_all(const Call& in, float* rows, float* lse, float* loss) {
  if (in.C <= kFewClasses) {
    for_rows(in, [&](int64_t t) { forward_rows<T>(in, t, rows, lse); }, kWidth);
  } else {
    for_rows(in, [&](int64_t t) {
      if (counts(in, t)) {
        forward_row<T>(in, t, rows, lse);
      } else {
        rows[t] = lse[t] = lse[in.T + t] = 0.0f;
      }
    });
  }
  double sum = 0.0;
  for (int64_t t = 0; t < in.T; ++t) sum += rows[t];
  *loss = static_cast<float>(sum / static_cast<double>(count_of(in)));
}

template <class T>
void backward_all(const Call& in, float dloss, const float* lse, T* dz1, T* dz2) {
  const int64_t bytes = in.T * in.C * static_cast<int64_t>(sizeof(T));
  prefer_huge_pages(dz1, bytes);
  prefer_huge_pages(dz2, bytes);
  const float factor = 0.5f * dloss / static_cast<float>(count_of(in));
  if (in.C <= kFewClasses) {
    for_rows(in, [&](int64_t t) { backward_rows(in, t, factor, lse, dz1, dz2); }, kWidth);
    return;
  }
  for_rows(in, [&](int64_t row) {
    const T* z1 = in.input_as<T>(kZ1) + row * stride_of(in, kZ1);
    const T* z2 = in.input_as<T>(kZ2) + row * stride_of(in, kZ2);
    T* to1 = dz1 ? dz1 + row * in.C : nullptr;
    T* to2 = dz2 ? dz2 + row * in.C : nullptr;
    const float lse1 = lse[row], lse2 = lse[in.T + row];
    const bool is_read = counts(in, row);
    for_vectors(in.C, [&](int64_t c, auto part) {
      Vector d = {};
      if (is_read) {
        const Vector p1 = weight_of(part.load_from(z1 + c), splat(lse1));
        d = factor * (p1 - weight_of(part.load_from(z2 + c), splat(lse2)));
      }
      if (to1) part.store_to(to1 + c, d);
      if (to2) part.store_to(to2 + c, -d);
    });
  });
}

}  // namespace
}  // namespace pelt::symmetric_kl

namespace pelt {

using namespace symmetric_kl;
using Kernels = Cpu<Contract, cpu::Isa::PELT_CPU_ISA>;

template <>
std::string Kernels::why_not(const Call&) {
  return "";
}

template <>
void Kernels::forward(const Call& in, Arena& arena) {
  auto* rows = arena.take(in.T);  // each one's value
  if (arena.only_counts) return;
  auto *lse = in.output_as<float>(kLse), *loss = in.output_as<float>(kLoss);
  cpu::with_type(in.dtype, [&](auto zero) { forward_all<decltype(zero)>(in, rows, lse, loss); });
}

template <>
void Kernels::backward(const Call& in, Arena& arena) {
  if (arena.only_counts) return;
  const float dloss = *in.doutput_as<float>(kLoss);
  const auto* lse = in.output_as<float>(kLse);
  cpu::with_type(in.dtype, [&](auto zero) {
    using T = decltype(zero);
    backward_all(in, dloss, lse, in.grad_as<T>(kZ1), in.grad_as<T>(kZ2));
  });
}

}  // namespace pelt
