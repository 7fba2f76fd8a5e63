// prefix_attention, backward, second launch: dk and dv, of own columns and of prefixes.
//   dV = (dropout g P)^T dout,  dK = scale g dS^T Q      with P, D and dS as in the first launch
//
// A block takes a tile of columns and walks the queries that see them. It computes scores with
// columns as rows, S^T = K Q^T, because the accumulators of that product are, as they lie in
// registers, the left operand of dK += dS^T Q and dV += P^T dout: nothing of size [S, P + N] goes
// through shared memory, and dk and dv stay in registers until the end.
//
//        K, V [columns, E]      | Q, dout 64 rows | Q, dout 64 rows | ...
//        |########| x 2    x    |  heads of a group, and for prefixes samples, one after another
//
// Own columns: 4 warps with 16 columns each; one sample, all heads that share these keys. Prefix
// columns: a tile of 16 for the whole block, whose warps take 16 of each 64 queries, because a
// prefix is short and its sum long: over all queries of one part of the batch (of a table: of those
// samples that use this member). Warps are added up in their order, parts of the batch by the last
// launch, so nothing depends on timing.
//
// Tiles start at a multiple of 4 of the joined axis, where dropout's words do; columns that belong
// to somebody else are zeros, and their results are not stored.
//
// Shared memory per block, E = 32, 64, 96, 128: 21, 38, 54, 105 KB.
#include "ops/prefix_attention/configs.h"
#include "ops/prefix_attention/products.cuh"
#include "ops/prefix_attention/scores.cuh"

namespace pelt::prefix_attention {
namespace {

constexpr int kTilesM = 1;
constexpr int kWarpColumns = 16 * kTilesM;
constexpr int kStep = 16;  // queries that a warp works on at a time
constexpr int kTilesN = kStep / 8;
static_assert(kRowTile == kWarps * kStep, "one step for each warp where warps share columns");
static_assert(kOwnTile == kWarps * kWarpColumns && kPrefixTile == kWarpColumns,
              "the plan counts these tiles");

template <class Element, int kHeadSize>
struct Config {
  using T = Element;
  static constexpr int kE = kHeadSize;
  static constexpr int kStride = kE + kTilePad;
  static constexpr int kVectors = kE / 8;
  // K and V stay in registers where there is room, and their place goes to the second buffer.
  static constexpr bool kKeeps = kE <= 96;
  static constexpr int kMinBlocks = kE <= 32 ? 4 : (kE <= 64 ? 3 : 2);
};

// The columns of a block: [begin, end) of the joined axis, in a tile that starts at `first`.
struct Columns {
  int first;
  int begin;
  int end;
  int seen_end;  // behind the last column that is seen
  int prefix;    // which one, or -1 for own columns
  int member;
  int chunk;
  int g;  // the key-value head
};

// Which queries a block walks: tiles of rows, of heads [g H / G, (g + 1) H / G), of samples.
struct Walk {
  int b;
  int h;
  int tile;
};

struct Range {
  int b_end;
  int h_begin;
  int h_end;
  int tile_begin;
  int tile_end;
};

template <class C>
struct Shared {
  alignas(16) typename C::T q[2][kRowTile * C::kStride];  // [kRowTile, E]; at the end dk
  alignas(16) typename C::T dout[2][kRowTile * C::kStride];
  alignas(16) typename C::T kept[C::kKeeps ? 1 : 2 * kOwnTile * C::kStride];  // [2, kOwnTile, E]
  alignas(16) float lse[2][kRowTile];
  alignas(16) float delta[2][kRowTile];
  Columns columns;  // here and not in registers, which are all taken by sums and operands
  Range range;
  Walk walk[2];  // where the block is, for each buffer
  int scratch[kWarps];
};

// Where K and V of the block lie; if they stay in registers, only until the second tile of queries
// needs the place.
template <class C>
__device__ __forceinline__ typename C::T* keys_of(Shared<C>& s) {
  return C::kKeeps ? s.q[1] : s.kept;
}

template <class C>
__device__ __forceinline__ typename C::T* values_of(Shared<C>& s) {
  return C::kKeeps ? s.dout[1] : s.kept + kOwnTile * C::kStride;
}

// The next sample from b on that uses the member.
__device__ __forceinline__ int next_sample(const Inputs& in, const Columns& columns, int b,
                                           int end) {
  if (columns.prefix < 0) return b;
  const int64_t* index = in.prefix[columns.prefix].prefix_index;
  if (index == nullptr) return b;
  while (b < end && index[b] != columns.member) ++b;
  return b;
}

__device__ __forceinline__ Walk advanced(const Inputs& in, const Columns& columns,
                                         const Range& range, Walk walk) {
  if (++walk.tile < range.tile_end) return walk;
  walk.tile = range.tile_begin;
  if (++walk.h < range.h_end) return walk;
  walk.h = range.h_begin;
  walk.b = next_sample(in, columns, walk.b + 1, range.b_end);
  return walk;
}

// What a warp carries along the queries.
template <class C>
struct State {
  FragmentD dk[kTilesM][C::kE / 8];
  FragmentD dv[kTilesM][C::kE / 8];
  FragmentA k[kTilesM][C::kKeeps ? C::kE / 16 : 1];
  FragmentA v[kTilesM][C::kKeeps ? C::kE / 16 : 1];
};

template <class C>
__device__ __forceinline__ void stage_keys(Shared<C>& s, const Inputs& in, int b) {
  using T = typename C::T;
  const Columns& columns = s.columns;
  const int g = columns.g;
  T* s_k = keys_of<C>(s);
  T* s_v = values_of<C>(s);
  const int count = columns.prefix < 0 ? kOwnTile : kWarpColumns;
  const T* g_k = head_rows<T>(in.k, in.k_strides, b, g);  // [N, E]
  const T* g_v = head_rows<T>(in.v, in.v_strides, b, g);  // [N, E]
  const ReadColumns read(in, b);
#pragma unroll 1
  for (int i = thread_index(); i < count * C::kVectors; i += kThreads) {
    const int row = i / C::kVectors, e = i % C::kVectors * 8, column = columns.first + row;
    const int to = row * C::kStride + e;
    const bool is_there = column >= columns.begin && column < columns.end;
    if (columns.prefix < 0 || !is_there) {
      const bool is_read = is_there && read.has(column - in.P);
      const int n = is_read ? column - in.P : 0;
      cp_async_16(s_k + to, g_k + n * in.k_strides.row + e, is_read);
      cp_async_16(s_v + to, g_v + n * in.v_strides.row + e, is_read);
    } else {
      const Prefix& prefix = in.prefix[columns.prefix];
      stage_prefix_8(s_k + to, prefix.prefix_k,
                     prefix_offset(prefix, prefix.k_strides, columns.member, g, column) + e);
      stage_prefix_8(s_v + to, prefix.prefix_v,
                     prefix_offset(prefix, prefix.v_strides, columns.member, g, column) + e);
    }
  }
}

template <class C>
__device__ __forceinline__ void stage_queries(Shared<C>& s, const BackwardParams& p,
                                              const Walk& walk, int buffer) {
  using T = typename C::T;
  const Inputs& in = p.in;
  const int first_row = walk.tile * kRowTile, i = thread_index();
  const int64_t head = static_cast<int64_t>(walk.b) * in.H + walk.h;
  stage_rows<C, kRowTile>(s.q[buffer], head_rows<T>(in.q, in.q_strides, walk.b, walk.h),
                          in.q_strides.row, first_row, in.S);
  stage_rows<C, kRowTile>(s.dout[buffer], static_cast<const T*>(p.dout) + head * in.S * C::kE,
                          C::kE, first_row, in.S);
  const int64_t at = head * p.padded_rows + first_row;
  if (i < kRowTile / 4) {
    cp_async_16(&s.lse[buffer][4 * i], p.row_lse + at + 4 * i, true);
  } else if (i < kRowTile / 2) {
    cp_async_16(&s.delta[buffer][4 * i - kRowTile], p.row_delta + at + 4 * i - kRowTile, true);
  }
}

// What a lane knows of its columns, in one register.
struct SeenColumns {
  static constexpr uint32_t kAll = 1u << 31;

  uint32_t bits;  // bit 2 m + half: the sample sees it; kAll: it sees all columns of the warp

  __device__ __forceinline__ bool has_hidden() const { return (bits & kAll) == 0; }
};

__device__ __forceinline__ SeenColumns see_columns(const Inputs& in, const Columns& columns, int b,
                                                   int column) {
  if (columns.prefix >= 0) return {~uint32_t{0}};
  const bool* mask =
      in.key_mask == nullptr ? nullptr : in.key_mask + static_cast<int64_t>(b) * in.N;
  uint32_t hidden = 0;
#pragma unroll
  for (int i = 0; i < 2 * kTilesM; ++i) {
    const int own = column + tile_row(i / 2, i % 2);
    const bool is_seen =
        own >= in.P && own < columns.seen_end && (mask == nullptr || mask[own - in.P]);
    hidden |= static_cast<uint32_t>(!is_seen) << i;
  }
  return {~(hidden | (vote_any(hidden != 0) ? SeenColumns::kAll : 0u))};
}

// The bias of a head begins at element `bias_at`.
template <class Element>
__device__ __forceinline__ void add_bias_by_columns(const Inputs& in, int64_t bias_at,
                                                    FragmentD (&scores)[kTilesM][kTilesN],
                                                    int column, int row) {
  const Element* bias = static_cast<const Element*>(in.bias.data) + bias_at;
#pragma unroll
  for (int n = 0; n < kTilesN; ++n) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int own_row = row + 8 * n + FragmentD::column(e);
      const Element* from =
          bias + static_cast<int64_t>(own_row < in.S ? own_row : in.S - 1) * in.N;  // [N]
#pragma unroll
      for (int i = 0; i < 2 * kTilesM; ++i) {
        const int own = column + tile_row(i / 2, i % 2) - in.P;
        const int inside = own < 0 ? 0 : (own < in.N ? own : in.N - 1);
        scores[i / 2][n].r[i % 2 * 2 + e] += to_float(from[inside]) * kLog2e;
      }
    }
  }
}

// Products become scores, with columns as rows: score_by_rows for the columns of one warp, which
// all take the same factor. Other people's columns get numbers that nobody looks at.
template <class T>
__device__ __forceinline__ void score_by_columns(const Inputs& in, const Head& head, bool is_prefix,
                                                 float gate, FragmentD (&scores)[kTilesM][kTilesN],
                                                 int column, int row, const SeenColumns& seen) {
  const float factor = in.scale * kLog2e * gate;
#pragma unroll
  for (int m = 0; m < kTilesM; ++m) {
#pragma unroll
    for (int n = 0; n < kTilesN; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) scores[m][n].r[i] *= factor;
    }
  }
  if (is_prefix) return;
  if (in.bias.data != nullptr) {
    const int64_t bias_at = head.b * in.bias_batch_stride + head.h * in.bias_head_stride;
    if (in.bias.is_float32) {
      add_bias_by_columns<float>(in, bias_at, scores, column, row);
    } else {
      add_bias_by_columns<T>(in, bias_at, scores, column, row);
    }
  }
  const bool crosses = in.is_causal && column + kWarpColumns > row_limit(in, row, in.P + in.N);
  if (!seen.has_hidden() && !crosses) return;
#pragma unroll
  for (int m = 0; m < kTilesM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const bool is_seen = (seen.bits >> (2 * m + half) & 1u) != 0;
      // The first query that sees the column, from the lane's first one on.
      const int first = in.is_causal ? column + tile_row(m, half) - in.P + in.S - in.N - row -
                                           FragmentD::column(0)
                                     : -kStep;
#pragma unroll
      for (int n = 0; n < kTilesN; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& value = scores[m][n].r[2 * half + e];
          value = is_seen && 8 * n + e >= first ? value : kMinusInfinity;
        }
      }
    }
  }
}

// From scores and dP^T to dropout g P^T and g dS^T, in their places.
template <class C>
__device__ __forceinline__ void differentiate(const Inputs& in, const Head& head, float gate,
                                              FragmentD (&scores)[kTilesM][kTilesN],
                                              FragmentD (&dp)[kTilesM][kTilesN], const float* s_lse,
                                              const float* s_delta, int column, int row) {
  uint32_t kept[kTilesM] = {};
  if (in.dropout.is_active()) {
    const DropoutRows rows = DropoutRows::of(in, head);
#pragma unroll
    for (int m = 0; m < kTilesM; ++m) {
      kept[m] = kept_by_columns(in, rows, column + 16 * m, row);
    }
  }
#pragma unroll
  for (int n = 0; n < kTilesN; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int at = 8 * n + FragmentD::column(i);
      const float lse = s_lse[at], delta = s_delta[at];
#pragma unroll
      for (int m = 0; m < kTilesM; ++m) {
        const float probability = exp2_approx(scores[m][n].r[i] - lse);
        float factor = gate;
        if (in.dropout.is_active()) {
          const bool is_kept = (kept[m] >> kept_bit_by_columns(n, i) & 1u) != 0;
          factor = is_kept ? in.dropout.keep_scale * gate : 0.0f;
        }
        scores[m][n].r[i] = probability * factor;
        dp[m][n].r[i] = probability * (dp[m][n].r[i] * factor - delta) * gate;
      }
    }
  }
}

// One step of a warp: its columns, from `column` on, and kStep queries from `row` on.
template <class C>
__device__ __forceinline__ void attend(const Inputs& in, bool is_prefix, State<C>& state,
                                       Shared<C>& s, int buffer, int at, int column, int row,
                                       const SeenColumns& seen) {
  column = opaque(column);
  const Head head = {s.walk[buffer].b, s.walk[buffer].h, s.columns.g};
  [[maybe_unused]] const int warp_at = (is_prefix ? 0 : warp_index() * kWarpColumns) * C::kStride;
  const typename C::T* s_q = s.q[buffer] + at * C::kStride;
  const typename C::T* s_dout = s.dout[buffer] + at * C::kStride;
  FragmentD dots[kTilesM][kTilesN], dp[kTilesM][kTilesN];
  auto k_of = [&](int m, int step) {
    if constexpr (C::kKeeps) return state.k[m][step];
    return load_a(keys_of<C>(s) + warp_at + 16 * m * C::kStride + 16 * step, C::kStride);
  };
  auto v_of = [&](int m, int step) {
    if constexpr (C::kKeeps) return state.v[m][step];
    return load_a(values_of<C>(s) + warp_at + 16 * m * C::kStride + 16 * step, C::kStride);
  };
  multiply_rows<C>(dots, k_of, s_q);
  multiply_rows<C>(dp, v_of, s_dout);
  const float gate = is_prefix ? gate_of<typename C::T>(in, head) : 1.0f;
  score_by_columns<typename C::T>(in, head, is_prefix, gate, dots, column, row, seen);
  differentiate<C>(in, head, gate, dots, dp, s.lse[buffer] + at, s.delta[buffer] + at, column, row);
  accumulate_rows<C>(state.dv, dots, s_dout);
  accumulate_rows<C>(state.dk, dp, s_q);
}

template <class C>
__device__ __forceinline__ void load_operands(State<C>& state, const typename C::T* s_k,
                                              const typename C::T* s_v) {
#pragma unroll
  for (int m = 0; m < kTilesM; ++m) {
#pragma unroll
    for (int step = 0; step < C::kE / 16; ++step) {
      const int at = 16 * m * C::kStride + 16 * step;
      state.k[m][step] = load_a(s_k + at, C::kStride);
      state.v[m][step] = load_a(s_v + at, C::kStride);
    }
  }
}

// The warps' sums of a prefix tile, added in their order, to one part's [A_i, P_i, G, E].
template <class C>
__device__ __forceinline__ void store_partial(Shared<C>& s, const Inputs& in, float* partial,
                                              float factor,
                                              const FragmentD (&sums)[kTilesM][C::kE / 8]) {
  constexpr int kSize = kWarpColumns * C::kE;
  static_assert(sizeof(float) * kWarps * kSize <= sizeof(s.q) + sizeof(s.dout),
                "the sums of the warps fit where queries were");
  float* s_sums = reinterpret_cast<float*>(s.q[0]);  // [kWarps, kWarpColumns, E]
  sync_threads();
#pragma unroll
  for (int m = 0; m < kTilesM; ++m) {
#pragma unroll
    for (int n = 0; n < C::kE / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        s_sums[warp_index() * kSize + tile_row(m, i / 2) * C::kE + 8 * n + FragmentD::column(i)] =
            sums[m][n].r[i];
      }
    }
  }
  sync_threads();
  if (partial == nullptr) return;
  const Columns& columns = s.columns;
  const Prefix& prefix = in.prefix[columns.prefix];
  const int64_t row =
      (static_cast<int64_t>(columns.chunk) * prefix.members + columns.member) * prefix.length;
  for (int i = thread_index(); i < kSize; i += kThreads) {
    const int column = columns.first + i / C::kE;
    if (column < columns.begin || column >= columns.end) continue;
    float sum = 0.0f;
    for (int w = 0; w < kWarps; ++w) sum += s_sums[w * kSize + i];
    partial[((row + column - prefix.first) * in.G + columns.g) * C::kE + i % C::kE] = sum * factor;
  }
}

template <class C>
__device__ __forceinline__ void store_own(const BackwardParams& p, Shared<C>& s, int b,
                                          const State<C>& state) {
  using T = typename C::T;
  const Columns& columns = s.columns;
  sync_threads();  // the other warps have read the queries that lie where dk and dv go
  const int warp_at = warp_index() * kWarpColumns, column = columns.first + warp_at;
  // A tile's first columns may belong to the prefix, its last ones to nobody.
  const int begin = columns.begin > column ? columns.begin - column : 0;
  const int end = columns.end - column < kWarpColumns ? columns.end - column : kWarpColumns;
  const int64_t first = (static_cast<int64_t>(b) * p.in.G + columns.g) * p.in.N + column - p.in.P;
  if (p.dk != nullptr) {
    T* s_dk = s.q[0] + warp_at * C::kStride;
    put_rows<C>(s_dk, state.dk, p.in.scale);
    store_rows<C>(static_cast<T*>(p.dk) + first * C::kE, s_dk, begin, end);
  }
  if (p.dv != nullptr) {
    T* s_dv = s.dout[0] + warp_at * C::kStride;
    put_rows<C>(s_dv, state.dv, 1.0f);
    store_rows<C>(static_cast<T*>(p.dv) + first * C::kE, s_dv, begin, end);
  }
}

// Which columns and queries a block has, and where it starts. The whole block takes part.
template <class C>
__device__ __forceinline__ void place_block(const BackwardParams& p, Shared<C>& s) {
  const Inputs& in = p.in;
  Columns columns;
  Range range;
  Walk walk;
  int block = block_index_x(), g;
  range.tile_begin = 0;
  range.tile_end = (in.S + kRowTile - 1) / kRowTile;
  if (block >= p.prefix_blocks) {
    block -= p.prefix_blocks;
    const int tile = block % p.own_tiles, head = block / p.own_tiles;
    g = head % in.G, walk.b = head / in.G;
    columns = {in.P / 4 * 4 + tile * kOwnTile, in.P, in.P + in.N, 0, -1, 0, 0, 0};
    columns.seen_end = columns_seen(in, walk.b, s.scratch);
    range.b_end = walk.b + 1;
    if (columns.first >= columns.seen_end) range.tile_end = 0;
    if (in.is_causal) {  // row i sees own column n from i = n + S - N on
      const int n = columns.first > in.P ? columns.first - in.P : 0;
      const int row = n + in.S - in.N;
      range.tile_begin = row > 0 ? row / kRowTile : 0;
    }
  } else {
    int i = 0;
    while (i + 1 < in.prefixes && block >= p.prefix[i + 1].first_block) ++i;
    const Prefix& prefix = in.prefix[i];
    const PrefixGrad& grad = p.prefix[i];
    block -= grad.first_block;
    const int tile = block % grad.tiles;
    block /= grad.tiles;
    g = block % in.G;
    block /= in.G;
    columns = {prefix.first / 4 * 4 + tile * kWarpColumns,
               prefix.first,
               prefix.first + prefix.length,
               in.P,
               i,
               block % prefix.members,
               block / prefix.members,
               0};
    const int b_end = (columns.chunk + 1) * grad.chunk_samples;
    range.b_end = b_end < in.B ? b_end : in.B;
    walk.b = next_sample(in, columns, columns.chunk * grad.chunk_samples, range.b_end);
  }
  range.h_begin = g * (in.H / in.G);
  range.h_end = range.h_begin + in.H / in.G;
  if (range.tile_begin >= range.tile_end) walk.b = range.b_end;
  walk.h = range.h_begin;
  walk.tile = range.tile_begin;
  columns.g = g;
  if (thread_index() == 0) {
    s.columns = columns;
    s.range = range;
    s.walk[0] = walk;
  }
  sync_threads();
}

template <class C>
__global__ void __launch_bounds__(kThreads, C::kMinBlocks)
    prefix_attention_bwd_keys_sm80(const __grid_constant__ BackwardParams p) {
  auto& s = shared_memory_as<Shared<C>>();
  const Inputs& in = p.in;
  place_block<C>(p, s);
  const bool is_prefix = s.columns.prefix >= 0;
  const int warp_at = is_prefix ? 0 : warp_index() * kWarpColumns;
  const int column = s.columns.first + warp_at;

  State<C> state;
  if (s.walk[0].b < s.range.b_end) {
    stage_keys<C>(s, in, s.walk[0].b);
    stage_queries<C>(s, p, s.walk[0], 0);
    cp_async_commit();
    const SeenColumns seen = see_columns(in, s.columns, s.walk[0].b, column);
    int buffer = 0;
    bool is_last = false;
    [[maybe_unused]] bool is_first = true;
#pragma unroll 1
    while (!is_last) {
      cp_async_wait<0>();
      sync_threads();
      if constexpr (C::kKeeps) {
        if (is_first) {
          load_operands<C>(state, keys_of<C>(s) + warp_at * C::kStride,
                           values_of<C>(s) + warp_at * C::kStride);
          sync_threads();
        }
        is_first = false;
      }
      const Walk next = advanced(in, s.columns, s.range, s.walk[buffer]);
      is_last = next.b >= s.range.b_end;
      if (!is_last) {
        stage_queries<C>(s, p, next, 1 - buffer);
        cp_async_commit();
      }
      if (thread_index() == 0) s.walk[1 - buffer] = next;
      const int first_row = s.walk[buffer].tile * kRowTile;
#pragma unroll 1
      for (int at = is_prefix ? warp_index() * kStep : 0; at < kRowTile;
           at += is_prefix ? kRowTile : kStep) {
        const int row = first_row + at;
        if (row >= in.S || column >= row_limit(in, row + kStep - 1, in.P + in.N)) continue;
        attend<C>(in, is_prefix, state, s, buffer, at, column, row, seen);
      }
      buffer = 1 - buffer;
    }
    cp_async_wait<0>();
  }
  if (is_prefix) {
    store_partial<C>(s, in, p.prefix[s.columns.prefix].partial_k, in.scale, state.dk);
    store_partial<C>(s, in, p.prefix[s.columns.prefix].partial_v, 1.0f, state.dv);
  } else {
    store_own<C>(p, s, s.range.b_end - 1, state);
  }
}

using Configs = ConfigsOf<Config>;

template <class C>
void launch_config(const BackwardParams& p, Stream stream) {
  LaunchShape shape;
  shape.threads = kThreads;
  shape.shared_bytes = sizeof(Shared<C>);
  shape.blocks_x = p.prefix_blocks + p.in.B * p.in.G * p.own_tiles;
  launch<prefix_attention_bwd_keys_sm80<C>>("prefix_attention_bwd_keys_sm80", shape, stream, p);
}

}  // namespace

void launch_prefix_attention_bwd_keys_sm80(const BackwardParams& p, Stream stream) {
  run_fitting<Configs>("prefix_attention_bwd_keys_sm80", p.in,
                       [&](auto tag) { launch_config<typename decltype(tag)::type>(p, stream); });
}

}  // namespace pelt::prefix_attention
