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

// Chunks of the batch at most. More of them are more work for more threads, and more memory.
constexpr int64_t kMaxChunks = 8;

// Gradients to which several units of work add: partial sums in float32, zero at first, which are
// added in a fixed order at the end and rounded once.
struct PartialSums {
  // The batch is cut into chunks, and each has its own sums of shared prefixes. It follows from B,
  // so that threads do not change a bit. The rows of a table and a bias that all samples share
  // belong to no chunk: beside them there is a single one.
  int64_t chunks = 1;
  float* prefix_k[kMaxPrefixes] = {};  // [chunks, P_i, G, E] | [A_i, P_i, G, E]
  float* prefix_v[kMaxPrefixes] = {};
  float* gate = nullptr;  // [B, H]
  float* bias = nullptr;  // [B or 1, H, S, N]

  PartialSums(const CpuInputs& in, Arena& arena) {
    bool is_whole = in.grad[kBias] && in.is_bias_shared_by_batch();
    for (int i = 0; i < in.prefixes; ++i) is_whole |= in.index_of(i) != nullptr;
    if (!is_whole) chunks = std::clamp<int64_t>(in.B, 1, kMaxChunks);
    for (int i = 0; i < in.prefixes; ++i) {
      if (in.grad[kPrefixK + i]) prefix_k[i] = arena.take(count(in, i) * size(in, i));
      if (in.grad[kPrefixV + i]) prefix_v[i] = arena.take(count(in, i) * size(in, i));
    }
    if (in.grad[kGate]) gate = arena.take(in.B * in.H);
    if (in.grad[kBias])
      bias = is_bias_final(in) ? in.grad_as<float>(kBias) : arena.take(numbers(in));
  }

  // One member's gradient, and how many of them there are.
  static int64_t size(const CpuInputs& in, int i) { return in.P_i[i] * in.G * in.E; }
  int64_t count(const CpuInputs& in, int i) const { return in.index_of(i) ? in.A_i[i] : chunks; }

  // Nothing is left to be added or rounded: the sums are the gradient itself.
  static bool is_bias_final(const CpuInputs& in) {
    return in.is_float32[kBias] && !in.is_bias_shared_by_heads();
  }
  static int64_t numbers(const CpuInputs& in) {
    return (in.is_bias_shared_by_batch() ? 1 : in.B) * in.H * in.S * in.N;
  }

  void clear(const CpuInputs& in) const {
    for (int i = 0; i < in.prefixes; ++i) {
      const int64_t all = count(in, i) * size(in, i);
      if (prefix_k[i]) std::fill_n(prefix_k[i], all, 0.0f);
      if (prefix_v[i]) std::fill_n(prefix_v[i], all, 0.0f);
    }
    if (!bias || in.N == 0) return;
    const int64_t matrix = in.S * in.N;
    parallel_for(numbers(in) / matrix, in.threads,
                 [&](int64_t i) { std::fill_n(bias + i * matrix, matrix, 0.0f); });
  }

  void add_up(const CpuInputs& in) const;
};

// to[i] = the sum over j < terms of from[j * size + i], for i < size, in the gradient's dtype.
template <class To>
void add_terms(const float* from, int64_t size, int64_t terms, To* to) {
  for_vectors(size, [&](int64_t i, auto part) {
    Vector sum = part.load_from(from + i);
    for (int64_t j = 1; j < terms; ++j) sum += part.load_from(from + j * size + i);
    part.store_to(to + i, sum);
  });
}

// `count` such sums, one behind the other, into the gradient of an input.
void add_groups(const CpuInputs& in, int input, const float* from, int64_t count, int64_t size,
                int64_t terms) {
  parallel_for(count, count * size > (1 << 16) ? in.threads : 1, [&](int64_t i) {
    const float* first = from + i * terms * size;
    if (in.is_float32[input]) {
      add_terms(first, size, terms, in.grad_as<float>(input) + i * size);
    } else {
      add_terms(first, size, terms, in.grad_as<bf16>(input) + i * size);
    }
  });
}

void PartialSums::add_up(const CpuInputs& in) const {
  for (int i = 0; i < in.prefixes; ++i) {
    // A table has one sum for each member, a shared prefix one for each chunk.
    const int64_t groups = in.index_of(i) ? in.A_i[i] : 1, terms = in.index_of(i) ? 1 : chunks;
    if (prefix_k[i]) add_groups(in, kPrefixK + i, prefix_k[i], groups, size(in, i), terms);
    if (prefix_v[i]) add_groups(in, kPrefixV + i, prefix_v[i], groups, size(in, i), terms);
  }
  if (gate) {
    const bool is_per_head = in.has_gate_per_head();
    add_groups(in, kGate, gate, in.B, is_per_head ? in.H : 1, is_per_head ? 1 : in.H);
  }
  if (!bias || is_bias_final(in)) return;
  const int64_t samples = in.is_bias_shared_by_batch() ? 1 : in.B, matrix = in.S * in.N;
  const bool is_shared = in.is_bias_shared_by_heads();
  add_groups(in, kBias, bias, is_shared ? samples : samples * in.H, matrix, is_shared ? in.H : 1);
}

// The heads of one sample that share keys; members are memory for one of them, and their dK and dV.
template <class T, class Products>
struct Backward : Blocks<T, Products> {
  using Base = Blocks<T, Products>;
  using Base::columns, Base::in, Base::keys, Base::kOnTiles, Base::kRows, Base::largest,
      Base::out_width, Base::q, Base::rows, Base::scores, Base::width;
  using typename Base::Element;

  const PartialSums& sums;
  Element *values, *keys_by_row, *d;
  float *group_dk, *group_dv, *dk, *dv, *dq, *ds, *row_dots, *one_row;
  // Not on tiles: queries and dO as right sides.
  Element *packed_q = nullptr, *packed_d = nullptr;
  // On tiles: their transposes, and ds and p as left and right sides.
  Element *q_transposed = nullptr, *d_transposed = nullptr;
  Element *ds_rows = nullptr, *p_rows = nullptr, *packed_ds = nullptr, *packed_p = nullptr;
  float *dk_transposed = nullptr, *dv_transposed = nullptr;

  Backward(const CpuInputs& in, const PartialSums& sums, const Columns& columns)
      : Base(in, columns), sums(sums) {
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
      head.read(kV, block, width, rows);
      Products::pack_transposed(rows, width, in.E, count, values);
      this->pack_keys(head, block);
      Products::pack(rows, width, count, in.E, keys_by_row);
      const int64_t numbers = kOnTiles ? pair_columns(in.E) * largest : largest * out_width;
      std::fill_n(kOnTiles ? dk_transposed : dk, numbers, 0.0f);
      std::fill_n(kOnTiles ? dv_transposed : dv, numbers, 0.0f);
      for (int64_t row = 0; row < in.S; row += kRows) attend(head, row, block);
      if (kOnTiles) {
        store_transposed(dk_transposed, largest, in.E, count, dk, out_width);
        store_transposed(dv_transposed, largest, in.E, count, dv, out_width);
      }
      fold(head, chunk, block, dgate);
    });
    T* to = in.template grad_as<T>(kQ);
    for (int64_t i = 0; to && i < in.S; ++i) {
      write_row(dq + i * out_width, in.E, in.scale, to + head.row(i) * in.E);
    }
    if (sums.gate) sums.gate[head.b() * in.H + head.h()] = static_cast<float>(dgate);
  }

  template <class To>
  void read_dout(const Head<T>& head, int64_t query, int64_t row_width, To* to) const {
    read_row(in.template doutput_as<T>(kOut) + head.row(query) * in.E, in.E, row_width, 1.0f, to);
  }

  // rowsum(dO out)
  void read_row_dots(const Head<T>& head) {
    const T* out = in.template output_as<T>(kOut);
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
    const int64_t count = std::min(kRows, in.S - first);
    const Block part = this->seen_part(first, count, block);
    const int64_t used = part.count(), padded = Products::columns(used);
    if (used == 0) return;
    this->multiply_keys(head, first, count, part);
    for (int64_t i = 0; i < count; ++i) read_dout(head, first + i, width, d + i * width);
    Products::multiply(d, width, values, in.E, in.E, count, padded, ds, padded, false);
    float* p = scores;
    for (int64_t i = 0; i < count; ++i) {
      row_backward(head, first + i, part, p + i * padded, ds + i * padded);
    }
    float* to = dq + first * out_width;
    if constexpr (kOnTiles) {
      const int64_t distance = score_distance(), depth = pair_depth(used);
      for (int64_t i = 0; i < count; ++i) {
        read_row(ds + i * padded, used, depth, 1.0f, ds_rows + i * distance);
        read_row(p + i * padded, used, depth, 1.0f, p_rows + i * distance);
      }
      Products::multiply(ds_rows, distance, keys_by_row, block.count(), depth, count, in.E, to,
                         out_width, true);
      Products::pack(ds_rows, distance, count, used, packed_ds);
      Products::pack(p_rows, distance, count, used, packed_p);
      Products::multiply(q_transposed + first, query_distance(), packed_ds, kRows, kRows,
                         round_up(in.E, kTileSide), used, dk_transposed, largest, true);
      Products::multiply(d_transposed + first, query_distance(), packed_p, kRows, kRows,
                         round_up(in.E, kTileSide), used, dv_transposed, largest, true);
    } else {
      Products::multiply(ds, padded, keys_by_row, block.count(), used, count, in.E, to, out_width,
                         true);
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
    const float dot = row_dots[query], lse = in.template output_as<float>(kLse)[head.row(query)];
    const int64_t padded = Products::columns(block.count());
    this->finish_scores(head, query, block, p_row);
    exp_row(p_row, padded, lse == kMinusInfinity ? 0.0f : lse);
    if (in.dropout.is_active()) {
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
    if (!sums.bias) return;
    const int64_t sample = in.is_bias_shared_by_batch() ? 0 : head.b();
    float* dbias = sums.bias + ((sample * in.H + head.h()) * in.S + query) * in.N;
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
      const int64_t* index = in.index_of(column.segment);
      const int64_t member = index ? index[head.b()] : chunk;
      const int64_t row = member * in.P_i[column.segment] + column.row;
      const int64_t offset = (row * in.G + head.g()) * in.E;
      if (float* to = sums.prefix_k[column.segment]) {
        for (int64_t e = 0; e < in.E; ++e) to[offset + e] += head.gate() * dk_row[e];
      }
      if (float* to = sums.prefix_v[column.segment]) {
        for (int64_t e = 0; e < in.E; ++e) to[offset + e] += head.gate() * dv_row[e];
      }
      if (!sums.gate) continue;
      const int64_t whole = round_up(in.E, kWidth);
      head.read_prefix(kPrefixK, column, whole, 1.0f, one_row);
      dgate += dot_of(dk_row, one_row, whole);
      head.read_prefix(kPrefixV, column, whole, 1.0f, one_row);
      dgate += dot_of(dv_row, one_row, whole);
    }
  }
};

template <class T>
void backward_group(const CpuInputs& in, const PartialSums& sums, int64_t b, int64_t g,
                    int64_t chunk) {
  const Columns columns(in, b);
  Backward<T, ProductsOf<T>> backward(in, sums, columns);
  const int64_t heads = in.H / in.G, width = backward.out_width;
  for (int64_t h = g * heads; h < (g + 1) * heads; ++h) {
    backward.run(Head<T>(in, columns, b, h), chunk);
  }
  T *dk = in.grad_as<T>(kK), *dv = in.grad_as<T>(kV);
  for (int64_t n = 0; n < in.N; ++n) {
    const int64_t to = ((b * in.G + g) * in.N + n) * in.E;
    if (dk) write_row(backward.group_dk + n * width, in.E, 1.0f, dk + to);
    if (dv) write_row(backward.group_dv + n * width, in.E, 1.0f, dv + to);
  }
}

template <class T>
void backward_all(const CpuInputs& in, const PartialSums& sums) {
  sums.clear(in);
  parallel_for(sums.chunks * in.G, in.threads, [&](int64_t unit) {
    const TileScope scope;
    const int64_t chunk = unit / in.G, g = unit % in.G;
    const int64_t begin = chunk * in.B / sums.chunks, end = (chunk + 1) * in.B / sums.chunks;
    for (int64_t b = begin; b < end; ++b) backward_group<T>(in, sums, b, g, chunk);
  });
  sums.add_up(in);
}

}  // namespace
}  // namespace pelt::prefix_attention

namespace pelt {

using namespace prefix_attention;
using Kernels = Cpu<Contract, cpu::Isa::PELT_CPU_ISA>;

template <>
void Kernels::backward(const Call& call, Arena& arena) {
  const CpuInputs in(call);
  const PartialSums sums(in, arena);
  if (arena.only_counts) return;
  with_type(call.dtype, [&](auto zero) { backward_all<decltype(zero)>(in, sums); });
}

}  // namespace pelt
