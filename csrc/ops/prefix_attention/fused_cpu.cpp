// prefix_attention on the CPU.
//
//   out = softmax([ g scale Q Pkᵀ ; scale Q Kᵀ + mask ]) [ g Pv ; V ]
//
// One unit of work is a sample and a group of heads that share keys. Its columns are the prefix
// rows, multiplied by the gate, and then the keys that the mask lets through: padding costs
// nothing, and no column of the prefix exists for a whole batch. Columns are taken in blocks that
// stay in the second-level cache, as Kᵀ [E, columns] and V [columns, E] in float32; against each
// block go the queries, kQueryRows at a time:
//
//   forward    s = Q Kᵀ -> online softmax (row maximum m, sum l) -> acc = acc exp(m' - m) + p V
//   backward   p = exp(s - lse);  dp = dO Vᵀ;  ds = p (dp - rowsum(dO out));
//              dQ += ds K;  dK += dsᵀ Q;  dV += pᵀ dO
//
// A gate multiplies a prefix row's key and value, so its gradient is <dK, pk> + <dV, pv> over the
// rows: it falls out of the products that exist anyway. Everything is float32 inside. The order of
// every sum is fixed by the shapes alone.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "common/parallel.h"
#include "cpu/math.h"
#include "cpu/philox_lanes.h"
#include "cpu/product.h"
#include "ops/prefix_attention/cpu.h"

namespace pelt::prefix_attention {
namespace {

using namespace pelt::cpu;

constexpr int64_t kQueryRows = 24;
constexpr int64_t kBlockVector = 16384;  // of one packed operand: 64 KB
constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

int64_t padded(int64_t n) { return round_up(n, kTileColumns); }

// to[i] = factor * from[i] for i < count, and 0 up to `width`.
template <class T>
void read_row(const T* from, int64_t count, int64_t width, float factor, float* to) {
  for_vectors(count, [&](int64_t i, auto part) {
    store(to + i, part.load_from(from + i) * factor);  // rows are padded to whole vectors
  });
  std::fill(to + round_up(count, kWidth), to + width, 0.0f);
}

template <class T>
void write_row(const float* from, int64_t count, float factor, T* to) {
  for_vectors(count, [&](int64_t i, auto part) { part.store_to(to + i, load(from + i) * factor); });
}

float dot_of(const float* a, const float* b, int64_t width) {
  Vector sum = {};
  for (int64_t i = 0; i < width; i += kWidth) sum += load(a + i) * load(b + i);
  return sum_of(sum);
}

// What is hidden has a score of minus infinity, and a probability of exactly 0.
Vector exp_or_zero(Vector x) { return x < -87.0f ? Vector{} : exp_of_negative(x); }

// Memory of one thread, which the next unit of work finds again.
float* scratch(int64_t floats) {
  thread_local std::vector<float> memory;
  if (static_cast<int64_t>(memory.size()) < floats + 16) memory.resize(floats + 16);
  const auto address = reinterpret_cast<uintptr_t>(memory.data());
  return reinterpret_cast<float*>((address + 63) / 64 * 64);
}

// Cuts consecutive arrays out of one piece of memory.
struct Arena {
  float* next;
  float* take(int64_t floats) {
    float* here = next;
    next += (floats + 15) / 16 * 16;
    return here;
  }
};

// A column of the attention matrix: a prefix row (segment >= 0) or a key.
struct Column {
  int32_t segment;
  int32_t row;  // of the segment, or of the keys
};

// The columns that a sample sees, in order, and of each its place in the whole row of P + N.
struct Columns {
  std::vector<Column> at;
  std::vector<int32_t> place;
  int64_t prefix = 0;  // how many are prefix rows
  int64_t total = 0;   // P + N

  Columns(const CpuInputs& in, int64_t b) {
    for (int i = 0; i < in.segments; ++i) {
      for (int64_t p = 0; p < in.prefix[i].length; ++p) add(i, p, total + p);
      total += in.prefix[i].length;
    }
    prefix = total;
    const int64_t end = in.lengths ? std::clamp<int64_t>(in.lengths[b], 0, in.N) : in.N;
    for (int64_t n = 0; n < end; ++n) {
      if (!in.key_mask || in.key_mask[b * in.N + n]) add(-1, n, prefix + n);
    }
    total += in.N;
  }

  int64_t count() const { return static_cast<int64_t>(at.size()); }

  // How many of the columns query s sees: all but, if causal, those of later keys.
  int64_t seen_by(const CpuInputs& in, int64_t s) const {
    if (!in.is_causal) return count();
    const int32_t last = static_cast<int32_t>(prefix + s + in.N - in.S);
    const auto first_key = place.begin() + prefix;
    return std::upper_bound(first_key, place.end(), last) - place.begin();
  }

 private:
  void add(int64_t segment, int64_t row, int64_t where) {
    at.push_back({static_cast<int32_t>(segment), static_cast<int32_t>(row)});
    place.push_back(static_cast<int32_t>(where));
  }
};

template <class T>
class Head {
 public:
  Head(const CpuInputs& in, const Columns& columns, int64_t b, int64_t h)
      : in_(in), columns_(columns), b_(b), h_(h), g_(h / (in.H / in.G)) {
    if (in.gate.data) gate_ = element(in.gate, in.has_gate_per_head ? b * in.H + h : b);
  }

  float gate() const { return gate_; }

  // Row `place` of a prefix's keys or values, without the gate.
  void read_prefix(const CpuTensor& from, const CpuSegment& segment, int64_t row, int64_t width,
                   float factor, float* to) const {
    const int64_t member = segment.index ? segment.index[b_] : 0;
    const int64_t offset = ((member * segment.length + row) * in_.G + g_) * in_.E;
    if (from.is_float32) {
      read_row(static_cast<const float*>(from.data) + offset, in_.E, width, factor, to);
    } else {
      read_row(static_cast<const bf16*>(from.data) + offset, in_.E, width, factor, to);
    }
  }

  // Keys or values of the columns [begin, end), with the gate: [columns, width].
  void read(bool keys, int64_t begin, int64_t end, int64_t width, float* to) const {
    const T* rows = static_cast<const T*>(keys ? in_.k : in_.v);
    const int64_t* strides = keys ? in_.k_strides : in_.v_strides;
    for (int64_t c = begin; c < end; ++c, to += width) {
      const Column column = columns_.at[c];
      if (column.segment < 0) {
        const T* row = rows + b_ * strides[0] + g_ * strides[1] + column.row * strides[2];
        read_row(row, in_.E, width, 1.0f, to);
      } else {
        const CpuSegment& segment = in_.prefix[column.segment];
        read_prefix(keys ? segment.k : segment.v, segment, column.row, width, gate_, to);
      }
    }
  }

  // Queries [begin, end) times scale: [rows, width].
  void read_queries(int64_t begin, int64_t end, int64_t width, float* to) const {
    const T* q = static_cast<const T*>(in_.q) + b_ * in_.q_strides[0] + h_ * in_.q_strides[1];
    for (int64_t s = begin; s < end; ++s, to += width) {
      read_row(q + s * in_.q_strides[2], in_.E, width, in_.scale, to);
    }
  }

  // Adds query s's bias to its scores of the columns [begin, end); a prefix has none.
  void add_bias(int64_t s, int64_t begin, int64_t end, float* scores) const {
    if (!in_.bias.data) return;
    const int64_t offset = b_ * in_.bias_strides[0] + h_ * in_.bias_strides[1] + s * in_.N;
    for (int64_t c = std::max(begin, columns_.prefix); c < end; ++c) {
      scores[c - begin] += element(in_.bias, offset + columns_.at[c].row);
    }
  }

  int64_t row(int64_t s) const { return (b_ * in_.H + h_) * in_.S + s; }

  // What dropout multiplies the columns [begin, end) of query s by.
  void read_dropout(int64_t s, int64_t begin, int64_t end, float* to) const {
    const uint64_t first = row(s) * ((columns_.total + 3) / 4);
    alignas(64) uint32_t words[4 * kPhiloxGroups];
    int64_t from = 0, until = 0;  // the places that `words` covers
    for (int64_t c = begin; c < end; ++c) {
      const int64_t place = columns_.place[c];
      if (place >= until) {
        from = place / 4 * 4;
        until = from + 4 * kPhiloxGroups;
        philox_words(first + from / 4, 0, in_.seed, words);
      }
      *to++ = words[place - from] >= in_.threshold ? in_.kept : 0.0f;
    }
  }

 private:
  static float element(const CpuTensor& tensor, int64_t i) {
    if (tensor.is_float32) return static_cast<const float*>(tensor.data)[i];
    return load_part(static_cast<const bf16*>(tensor.data) + i, 1)[0];
  }

  const CpuInputs& in_;
  const Columns& columns_;
  int64_t b_, h_, g_;
  float gate_ = 1.0f;
};

// [rows, width] -> [width used, columns]: reading down kWidth rows keeps them in the first cache.
void transpose(const float* from, int64_t rows, int64_t width, int64_t used, int64_t columns,
               float* to) {
  for (int64_t r = 0; r < columns; r += kWidth) {
    const int64_t here = std::clamp<int64_t>(rows - r, 0, kWidth);
    for (int64_t e = 0; e < used; ++e) {
      float* out = to + e * columns + r;
      for (int64_t i = 0; i < here; ++i) out[i] = from[(r + i) * width + e];
      for (int64_t i = here; i < kWidth; ++i) out[i] = 0.0f;
    }
  }
}

float max_of(const float* row, int64_t width) {
  Vector most = splat(kMinusInfinity);
  for (int64_t j = 0; j < width; j += kWidth) {
    const Vector x = load(row + j);
    most = x > most ? x : most;
  }
  float result = most[0];
  for (int i = 1; i < kWidth; ++i) result = std::max(result, most[i]);
  return result;
}

// row = exp(row - offset), and its sum.
float exp_row(float* row, int64_t width, float offset) {
  Vector sum = {};
  for (int64_t j = 0; j < width; j += kWidth) {
    const Vector p = exp_or_zero(load(row + j) - offset);
    store(row + j, p);
    sum += p;
  }
  return sum_of(sum);
}

void scale_row(float* row, int64_t width, float factor) {
  for (int64_t j = 0; j < width; j += kWidth) store(row + j, load(row + j) * factor);
}

struct Blocks {
  int64_t width;    // E, padded
  int64_t columns;  // of a block at most, padded
  Blocks(const CpuInputs& in, const Columns& all)
      : width(padded(in.E)),
        columns(std::min(padded(std::max<int64_t>(all.count(), 1)),
                         padded(kBlockVector / padded(in.E)))) {}
};

template <class T>
void forward_head(const CpuInputs& in, const Columns& columns, int64_t b, int64_t h, T* out,
                  float* lse) {
  const Head<T> head(in, columns, b, h);
  const Blocks blocks(in, columns);
  const int64_t width = blocks.width, most = blocks.columns;
  Arena arena{scratch(3 * most * width + in.S * (width + 2) + kQueryRows * (width + most + 16) +
                      most + 256)};
  float* rows = arena.take(most * width);
  float* keys = arena.take(most * width);    // [E, most]
  float* values = arena.take(most * width);  // [most, width]
  float* acc = arena.take(in.S * width);
  float* m = arena.take(in.S);
  float* l = arena.take(in.S);
  float* q = arena.take(kQueryRows * width);
  float* s = arena.take(kQueryRows * most);
  float* factors = arena.take(most);
  std::fill(m, m + in.S, kMinusInfinity);
  std::fill(l, l + in.S, 0.0f);
  std::fill(acc, acc + in.S * width, 0.0f);

  for (int64_t begin = 0; begin < columns.count(); begin += most) {
    const int64_t end = std::min(columns.count(), begin + most), here = padded(end - begin);
    head.read(true, begin, end, width, rows);
    transpose(rows, end - begin, width, in.E, here, keys);
    head.read(false, begin, end, width, values);
    for (int64_t r = 0; r < in.S; r += kQueryRows) {
      const int64_t count = std::min(kQueryRows, in.S - r);
      if (columns.seen_by(in, r + count - 1) <= begin) continue;
      head.read_queries(r, r + count, width, q);
      multiply(count, here, in.E, {q, width, 1}, keys, here, s, here, false);
      for (int64_t i = 0; i < count; ++i) {
        float* row = s + i * here;
        const int64_t seen =
            std::clamp<int64_t>(columns.seen_by(in, r + i) - begin, 0, end - begin);
        head.add_bias(r + i, begin, end, row);
        std::fill(row + seen, row + here, kMinusInfinity);
        const float largest = std::max(m[r + i], max_of(row, here));
        // A row that has seen nothing yet: its exponentials are 0 for any finite offset.
        const float offset = largest == kMinusInfinity ? 0.0f : largest;
        const float shrink = std::exp(m[r + i] - offset);
        l[r + i] = l[r + i] * shrink + exp_row(row, here, offset);
        m[r + i] = largest;
        if (begin) scale_row(acc + (r + i) * width, width, shrink);
        if (in.threshold) {
          head.read_dropout(r + i, begin, end, factors);
          for (int64_t j = 0; j < end - begin; ++j) row[j] *= factors[j];
        }
      }
      multiply(count, width, end - begin, {s, here, 1}, values, width, acc + r * width, width,
               true);
    }
  }
  for (int64_t i = 0; i < in.S; ++i) {
    const float sum = l[i];
    lse[head.row(i)] = sum == 0.0f ? kMinusInfinity : m[i] + std::log(sum);
    write_row(acc + i * width, in.E, sum == 0.0f ? 0.0f : 1.0f / sum, out + head.row(i) * in.E);
  }
}

// Adds one head's gradients of the columns [begin, end) where they belong.
template <class T>
void fold_columns(const CpuInputs& in, const CpuBackward& grad, const Head<T>& head,
                  const Columns& columns, int64_t b, int64_t h, int64_t chunk, int64_t begin,
                  int64_t end, int64_t width, const float* dk, const float* dv, float* group_dk,
                  float* group_dv, float* row, double& dgate) {
  const int64_t g = h / (in.H / in.G);
  for (int64_t c = begin; c < end; ++c, dk += width, dv += width) {
    const Column column = columns.at[c];
    if (column.segment < 0) {
      float* to_k = group_dk + column.row * width;
      float* to_v = group_dv + column.row * width;
      for (int64_t e = 0; e < in.E; ++e) to_k[e] += dk[e];
      for (int64_t e = 0; e < in.E; ++e) to_v[e] += dv[e];
      continue;
    }
    const CpuSegment& segment = in.prefix[column.segment];
    const int64_t member = segment.index ? segment.index[b] : chunk;
    const int64_t offset = ((member * segment.length + column.row) * in.G + g) * in.E;
    for (int64_t e = 0; e < in.E; ++e) segment.dk[offset + e] += head.gate() * dk[e];
    for (int64_t e = 0; e < in.E; ++e) segment.dv[offset + e] += head.gate() * dv[e];
    if (!grad.dgate) continue;
    head.read_prefix(segment.k, segment, column.row, width, 1.0f, row);
    dgate += dot_of(dk, row, width);
    head.read_prefix(segment.v, segment, column.row, width, 1.0f, row);
    dgate += dot_of(dv, row, width);
  }
}

template <class T>
void backward_head(const CpuInputs& in, const CpuBackward& grad, const Columns& columns, int64_t b,
                   int64_t h, int64_t chunk, Arena arena, float* group_dk, float* group_dv) {
  const Head<T> head(in, columns, b, h);
  const Blocks blocks(in, columns);
  const int64_t width = blocks.width, most = blocks.columns;
  float* rows = arena.take(most * width);        // K [columns, width]
  float* value_rows = arena.take(most * width);  // V, before it is turned
  float* keys = arena.take(most * width);        // Kᵀ
  float* values = arena.take(most * width);      // Vᵀ
  float* dk = arena.take(most * width);
  float* dv = arena.take(most * width);
  float* dq = arena.take(in.S * width);
  float* q = arena.take(kQueryRows * width);
  float* d = arena.take(kQueryRows * width);  // of out
  float* p = arena.take(kQueryRows * most);
  float* ds = arena.take(kQueryRows * most);
  float* o = arena.take(width);  // a row of out
  float* factors = arena.take(most);
  double dgate = 0.0;
  std::fill(dq, dq + in.S * width, 0.0f);
  const T* dout = static_cast<const T*>(grad.dout);
  const T* out = static_cast<const T*>(grad.out);

  for (int64_t begin = 0; begin < columns.count(); begin += most) {
    const int64_t end = std::min(columns.count(), begin + most), here = padded(end - begin);
    head.read(true, begin, end, width, rows);
    transpose(rows, end - begin, width, in.E, here, keys);
    head.read(false, begin, end, width, value_rows);
    transpose(value_rows, end - begin, width, in.E, here, values);
    std::fill(dk, dk + (end - begin) * width, 0.0f);
    std::fill(dv, dv + (end - begin) * width, 0.0f);
    for (int64_t r = 0; r < in.S; r += kQueryRows) {
      const int64_t count = std::min(kQueryRows, in.S - r);
      if (columns.seen_by(in, r + count - 1) <= begin) continue;
      head.read_queries(r, r + count, width, q);
      for (int64_t i = 0; i < count; ++i) {
        read_row(dout + head.row(r + i) * in.E, in.E, width, 1.0f, d + i * width);
      }
      multiply(count, here, in.E, {q, width, 1}, keys, here, p, here, false);
      multiply(count, here, in.E, {d, width, 1}, values, here, ds, here, false);
      for (int64_t i = 0; i < count; ++i) {
        float *p_row = p + i * here, *ds_row = ds + i * here;
        const T* out_row = out + head.row(r + i) * in.E;
        read_row(out_row, in.E, width, 1.0f, o);
        const float dot = dot_of(d + i * width, o, width);
        const int64_t seen =
            std::clamp<int64_t>(columns.seen_by(in, r + i) - begin, 0, end - begin);
        const float lse = grad.lse[head.row(r + i)];
        head.add_bias(r + i, begin, end, p_row);
        std::fill(p_row + seen, p_row + here, kMinusInfinity);
        exp_row(p_row, here, lse == kMinusInfinity ? 0.0f : lse);
        if (in.threshold) {
          head.read_dropout(r + i, begin, end, factors);
          for (int64_t j = 0; j < end - begin; ++j) {
            ds_row[j] = p_row[j] * (ds_row[j] * factors[j] - dot);
            p_row[j] *= factors[j];
          }
        } else {
          for (int64_t j = 0; j < here; j += kWidth) {
            store(ds_row + j, load(p_row + j) * (load(ds_row + j) - dot));
          }
        }
        if (grad.dbias) {
          const int64_t sample = in.bias_strides[0] ? b : 0;
          float* dbias = grad.dbias + ((sample * in.H + h) * in.S + r + i) * in.N;
          for (int64_t c = std::max(begin, columns.prefix); c < end; ++c) {
            dbias[columns.at[c].row] += ds_row[c - begin];
          }
        }
      }
      const int64_t used = end - begin;
      multiply(count, width, used, {ds, here, 1}, rows, width, dq + r * width, width, true);
      multiply(used, width, count, {ds, 1, here}, q, width, dk, width, true);
      multiply(used, width, count, {p, 1, here}, d, width, dv, width, true);
    }
    fold_columns(in, grad, head, columns, b, h, chunk, begin, end, width, dk, dv, group_dk,
                 group_dv, q, dgate);
  }
  T* to = static_cast<T*>(grad.dq);
  for (int64_t i = 0; i < in.S; ++i) {
    write_row(dq + i * width, in.E, in.scale, to + head.row(i) * in.E);
  }
  if (grad.dgate) grad.dgate[b * in.H + h] = static_cast<float>(dgate);
}

template <class T>
void backward_group(const CpuInputs& in, const CpuBackward& grad, int64_t b, int64_t g,
                    int64_t chunk) {
  const Columns columns(in, b);
  const Blocks blocks(in, columns);
  const int64_t width = blocks.width;
  Arena arena{scratch(6 * blocks.columns * width + (in.S + 2 * in.N) * width +
                      2 * kQueryRows * (width + blocks.columns + 16) + width + blocks.columns +
                      512)};
  float* dk = arena.take(in.N * width);
  float* dv = arena.take(in.N * width);
  std::fill(dk, dk + in.N * width, 0.0f);
  std::fill(dv, dv + in.N * width, 0.0f);
  const int64_t heads = in.H / in.G;
  for (int64_t h = g * heads; h < (g + 1) * heads; ++h) {
    backward_head<T>(in, grad, columns, b, h, chunk, arena, dk, dv);
  }
  for (int64_t n = 0; n < in.N; ++n) {
    const int64_t to = ((b * in.G + g) * in.N + n) * in.E;
    write_row(dk + n * width, in.E, 1.0f, static_cast<T*>(grad.dk) + to);
    write_row(dv + n * width, in.E, 1.0f, static_cast<T*>(grad.dv) + to);
  }
}

template <class T>
void forward_all(const CpuInputs& in, void* out, float* lse) {
  parallel_for(in.B * in.H, in.threads, [&](int64_t unit) {
    const int64_t b = unit / in.H;
    forward_head<T>(in, Columns(in, b), b, unit % in.H, static_cast<T*>(out), lse);
  });
}

template <class T>
void backward_all(const CpuInputs& in, const CpuBackward& grad) {
  parallel_for(grad.chunks * in.G, in.threads, [&](int64_t unit) {
    const int64_t chunk = unit / in.G, g = unit % in.G;
    const int64_t begin = chunk * in.B / grad.chunks, end = (chunk + 1) * in.B / grad.chunks;
    for (int64_t b = begin; b < end; ++b) backward_group<T>(in, grad, b, g, chunk);
  });
}

}  // namespace

template <>
void forward_on_cpu<cpu::Isa::PELT_CPU_ISA>(const CpuInputs& in, void* out, float* lse) {
  in.is_float32 ? forward_all<float>(in, out, lse) : forward_all<bf16>(in, out, lse);
}

template <>
void backward_on_cpu<cpu::Isa::PELT_CPU_ISA>(const CpuInputs& in, const CpuBackward& grad) {
  in.is_float32 ? backward_all<float>(in, grad) : backward_all<bf16>(in, grad);
}

}  // namespace pelt::prefix_attention
