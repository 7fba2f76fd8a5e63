// prefix_attention, backward, second launch: dk and dv, of own columns and of prefixes.
//   dV = (dropout g P)^T dout,  dK = scale g dS^T Q      with P, D and dS as in the first launch
//
// A block takes a tile of columns and walks the queries that see them (walk.cuh). It computes
// scores with columns as rows, S^T = K Q^T, because the accumulators of that product are, as they
// lie in registers, the left operand of dK += dS^T Q and dV += P^T dout: nothing of size [S, P + N]
// goes through shared memory, and dk and dv stay in registers until the end.
//
//        K, V [columns, E]      | Q, dout 64 rows | Q, dout 64 rows | ...
//        |########| x 2    x    |  heads of a group, and for prefixes samples, one after another
//
// Own columns: 4 warps with 16 columns each; one sample, all heads that share these keys. Prefix
// columns: a tile of 16 for the whole block, whose warps take 16 of each 64 queries, because a
// prefix is short and its sum long: over all queries of one chunk of the batch (of a table: of
// those samples that use this member). The warps' sums are added in their order, those of chunks by
// the last launch, so nothing depends on timing.
//
// Tiles start at a multiple of 4 of the joined axis, where dropout's words do; columns of a tile
// that are not the block's are zeros, and their results are not stored.
//
// Shared memory per block, E = 32, 64, 96, 128: 21, 38, 54, 105 KB.
#include "ops/prefix_attention/configs.h"
#include "ops/prefix_attention/products.cuh"
#include "ops/prefix_attention/scores.cuh"
#include "ops/prefix_attention/walk.cuh"

namespace pelt::prefix_attention {
namespace {

constexpr int kTilesM = 1;  // a warp's columns are one tile of 16 rows of S^T
constexpr int kWarpColumns = 16 * kTilesM;
constexpr int kStep = 16;           // queries that a warp works on at a time
constexpr int kTilesN = kStep / 8;  // fragments of 8 queries
// The walk and the plan of the workspace are written for these sizes.
static_assert(kRowTile == kWarps * kStep, "one step for each warp where warps share columns");
static_assert(kOwnTile == kWarps * kWarpColumns && kPrefixTile == kWarpColumns,
              "the plan counts these tiles");

template <class Element, int kHeadSize>
struct Config {
  using T = Element;
  static constexpr int kE = kHeadSize;
  static constexpr int kStride = kE + kTilePad;
  static constexpr int kVectors = kE / 8;
  // K and V stay in registers where there is room; they arrive in the second buffer, which is free
  // until the second tile of queries comes.
  static constexpr bool kKeepsKeys = kE <= 96;
  // As many blocks as registers allow: while one waits for its copies, another one multiplies.
  static constexpr int kMinBlocks = kE <= 32 ? 4 : (kE <= 64 ? 3 : 2);
};

template <class C>
struct Shared {
  // Two buffers of [kRowTile, E]; at the end the first one of q holds dk, of dout dv.
  alignas(16) typename C::T q[2][kRowTile * C::kStride];
  alignas(16) typename C::T dout[2][kRowTile * C::kStride];
  // [2, kOwnTile, E]: K and V, where they do not stay in registers.
  alignas(16) typename C::T keys[C::kKeepsKeys ? 1 : 2 * kOwnTile * C::kStride];
  alignas(16) float lse[2][kRowTile];  // in units of log 2, from the first launch
  alignas(16) float delta[2][kRowTile];
  // The same for all threads, and here instead of in registers, which sums and operands fill.
  Columns columns;
  Range range;
  Walk walk[2];  // which queries each buffer holds
  int scratch[kWarps];
};

// Where K and V of the block lie in shared memory; with kKeepsKeys only until the second tile of
// queries is staged there.
template <class C>
__device__ __forceinline__ typename C::T* keys_of(Shared<C>& s) {
  return C::kKeepsKeys ? s.q[1] : s.keys;
}

template <class C>
__device__ __forceinline__ typename C::T* values_of(Shared<C>& s) {
  return C::kKeepsKeys ? s.dout[1] : s.keys + kOwnTile * C::kStride;
}

// What a warp carries along the queries: sums for its 16 columns, and its operands with kKeepsKeys.
template <class C>
struct State {
  FragmentD dk[kTilesM][C::kE / 8];
  FragmentD dv[kTilesM][C::kE / 8];
  FragmentA k[kTilesM][C::kKeepsKeys ? C::kE / 16 : 1];
  FragmentA v[kTilesM][C::kKeepsKeys ? C::kE / 16 : 1];
};

// Starts copies of the block's keys and values. Columns of the tile that are not the block's, and
// own columns that no query sees, become zeros.
template <class C>
__device__ __forceinline__ void stage_keys(Shared<C>& s, const CudaInputs& in, int b) {
  using T = typename C::T;
  const Columns& columns = s.columns;
  const int g = columns.g;
  T* s_k = keys_of<C>(s);
  T* s_v = values_of<C>(s);
  // A tile of own columns has 64 rows, one of a prefix 16.
  const int count = columns.prefix < 0 ? kOwnTile : kWarpColumns;
  const T* g_k = head_rows<T>(in, kK, b, g);  // [N, E]
  const T* g_v = head_rows<T>(in, kV, b, g);  // [N, E]
  const ReadColumns read(in, b);
#pragma unroll 1
  for (int i = thread_index(); i < count * C::kVectors; i += kThreads) {
    const int row = i / C::kVectors, e = i % C::kVectors * 8, column = columns.first + row;
    const int to = row * C::kStride + e;
    const bool is_there = column >= columns.begin && column < columns.end;
    if (columns.prefix < 0 || !is_there) {
      const int n = column - in.P;
      const bool is_read = is_there && read.has(n);
      // An address that is not read still has to lie at a 16-byte border, as the tensor itself does.
      cp_async_16(s_k + to, is_read ? g_k + n * row_stride(in, kK) + e : in.input_as<T>(kK),
                  is_read);
      cp_async_16(s_v + to, is_read ? g_v + n * row_stride(in, kV) + e : in.input_as<T>(kV),
                  is_read);
    } else {
      const int prefix = columns.prefix;
      stage_prefix_8(s_k + to, in.parameter(kPrefixK + prefix),
                     prefix_offset(in, kPrefixK, prefix, columns.member, g, column) + e);
      stage_prefix_8(s_v + to, in.parameter(kPrefixV + prefix),
                     prefix_offset(in, kPrefixV, prefix, columns.member, g, column) + e);
    }
  }
}

// Starts copies of a tile of 64 queries: Q, dout, and the lse and D that the first launch wrote, in
// rows padded to whole tiles, so that 16 threads for each of the two bring them whole.
template <class C>
__device__ __forceinline__ void stage_queries(Shared<C>& s, const BackwardParams& p,
                                              const Walk& walk, int buffer) {
  using T = typename C::T;
  const CudaInputs& in = p.in;
  const int first_row = walk.tile * kRowTile, i = thread_index();
  const int64_t head = static_cast<int64_t>(walk.b) * in.H + walk.h;
  stage_rows<C, kRowTile>(s.q[buffer], head_rows<T>(in, kQ, walk.b, walk.h), row_stride(in, kQ),
                          first_row, in.S);
  stage_rows<C, kRowTile>(s.dout[buffer], in.doutput_as<T>(kOut) + head * in.S * C::kE, C::kE,
                          first_row, in.S);
  const int64_t padded = head * p.padded_rows + first_row;
  if (i < kRowTile / 4) {
    cp_async_16(&s.lse[buffer][4 * i], p.row_lse + padded + 4 * i, true);
  } else if (i < kRowTile / 2) {
    cp_async_16(&s.delta[buffer][4 * i - kRowTile], p.row_delta + padded + 4 * i - kRowTile, true);
  }
}

// Which of a warp's columns the sample sees, in one register of each lane. It is read once: own
// columns have one sample, and prefix columns are always seen.
struct VisibleColumns {
  static constexpr uint32_t kAll = 1u << 31;

  uint32_t
      bits;  // bit 2 m + half: the lane's column tile_row(m, half); kAll: every one of the warp

  __device__ __forceinline__ bool has_hidden() const { return (bits & kAll) == 0; }
};

__device__ __forceinline__ VisibleColumns visible_columns(const CudaInputs& in,
                                                          const Columns& columns, int b,
                                                          int column) {
  if (columns.prefix >= 0) return {~uint32_t{0}};
  const bool* mask = in.mask_of(b);
  uint32_t hidden = 0;
#pragma unroll
  for (int i = 0; i < 2 * kTilesM; ++i) {
    const int own = column + tile_row(i / 2, i % 2);
    const bool is_seen =
        own >= in.P && own < columns.seen_end && (mask == nullptr || mask[own - in.P]);
    hidden |= static_cast<uint32_t>(!is_seen) << i;
  }
  return {~(hidden | (vote_any(hidden != 0) ? VisibleColumns::kAll : 0u))};
}

// Adds the bias, as add_bias_by_rows does; the bias of the head begins at element `bias_offset`.
// Rows and columns beyond the last one read the last one: their p is 0, by lse or by the mask.
template <class Element>
__device__ __forceinline__ void add_bias_by_columns(const CudaInputs& in, int64_t bias_offset,
                                                    FragmentD (&scores)[kTilesM][kTilesN],
                                                    int column, int row) {
  const Element* bias = in.input_as<Element>(kBias) + bias_offset;
#pragma unroll
  for (int n = 0; n < kTilesN; ++n) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int query = row + 8 * n + FragmentD::column(e);
      const Element* from =
          bias + static_cast<int64_t>(query < in.S ? query : in.S - 1) * in.N;  // [N]
#pragma unroll
      for (int i = 0; i < 2 * kTilesM; ++i) {  // the lane's columns: tile m = i / 2, half i % 2
        const int key = column + tile_row(i / 2, i % 2) - in.P;
        const int inside = key < 0 ? 0 : (key < in.N ? key : in.N - 1);
        scores[i / 2][n].r[i % 2 * 2 + e] += to_float(from[inside]) * kLog2e;
      }
    }
  }
}

// Turns products into scores, with columns as rows: what score_by_rows does, for the columns of one
// warp, which all take the same factor. Columns that are not the block's get numbers, too; nothing
// that is stored depends on them.
template <class T>
__device__ __forceinline__ void score_by_columns(const CudaInputs& in, const Head& head,
                                                 bool is_prefix, float gate,
                                                 FragmentD (&scores)[kTilesM][kTilesN], int column,
                                                 int row, const VisibleColumns& visible) {
  const float factor =
      in.scale * kLog2e * gate;  // to units of log 2; the gate is 1 for own columns
#pragma unroll
  for (int m = 0; m < kTilesM; ++m) {
#pragma unroll
    for (int n = 0; n < kTilesN; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) scores[m][n].r[i] *= factor;
    }
  }
  if (is_prefix) return;  // no bias, no mask, and not under the causal diagonal
  if (in.has_bias()) {
    const int64_t bias_offset = head.b * in.bias_batch_stride + head.h * in.bias_head_stride;
    if (in.is_float32[kBias]) {
      add_bias_by_columns<float>(in, bias_offset, scores, column, row);
    } else {
      add_bias_by_columns<T>(in, bias_offset, scores, column, row);
    }
  }
  // Whether the causal diagonal crosses this tile; if not, and no column is hidden, all is seen.
  const bool crosses = in.is_causal && column + kWarpColumns > row_limit(in, row, in.P + in.N);
  if (!visible.has_hidden() && !crosses) return;
#pragma unroll
  for (int m = 0; m < kTilesM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const bool is_seen = (visible.bits >> (2 * m + half) & 1u) != 0;
      // The first query that sees the column, from the lane's first one on.
      const int first = in.is_causal ? column + tile_row(m, half) - in.P + in.S - in.N - row -
                                           FragmentD::column(0)
                                     : -kStep;
#pragma unroll
      for (int n = 0; n < kTilesN; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          // The lane's queries are 8 n + e behind its first one.
          float& value = scores[m][n].r[2 * half + e];
          value = is_seen && 8 * n + e >= first ? value : kMinusInfinity;
        }
      }
    }
  }
}

// Turns scores and dP^T into dropout g P^T and g dS^T, in their places: the left operands of dV and
// dK. Where p has to be 0 lse is +inf or the score -inf, so 2^(score - lse) is 0.
template <class C>
__device__ __forceinline__ void differentiate(const CudaInputs& in, const Head& head, float gate,
                                              FragmentD (&scores)[kTilesM][kTilesN],
                                              FragmentD (&dp)[kTilesM][kTilesN], const float* s_lse,
                                              const float* s_delta, int column, int row) {
  // A bit for each element: one call of Philox gives four, so they are drawn before the loops.
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
      const int query = 8 * n + FragmentD::column(i);  // columns of these fragments are queries
      const float lse = s_lse[query], delta = s_delta[query];
#pragma unroll
      for (int m = 0; m < kTilesM; ++m) {
        // A query that does not exist is a row of zeros, whose product with an infinite key is NaN;
        // its lse is +inf.
        const float probability = lse == INFINITY ? 0.0f : exp2_approx(scores[m][n].r[i] - lse);
        // What multiplies the probability before the value: the gate, and dropout's factor or 0.
        float factor = gate;
        if (in.dropout.is_active()) {
          const bool is_kept = (kept[m] >> kept_bit_by_columns(n, i) & 1u) != 0;
          factor = is_kept ? in.dropout.keep_scale * gate : 0.0f;
        }
        scores[m][n].r[i] = probability * factor;
        // The last gate is the key's: dk is the gradient of the key before it is gated.
        dp[m][n].r[i] = probability * (dp[m][n].r[i] * factor - delta) * gate;
      }
    }
  }
}

// One step of a warp: its columns, from `column` on, and kStep queries from `row` on, which begin
// at row `step` of the buffer. Four products: S^T and dP^T, then dV and dK.
template <class C>
__device__ __forceinline__ void attend(const CudaInputs& in, bool is_prefix, State<C>& state,
                                       Shared<C>& s, int buffer, int step, int column, int row,
                                       const VisibleColumns& visible) {
  column = opaque(column);  // else what follows from it would be kept in registers along the walk
  // For dropout's rows and the gate, which change with the walk.
  const Head head = {s.walk[buffer].b, s.walk[buffer].h, s.columns.g};
  [[maybe_unused]] const int warp_keys = (is_prefix ? 0 : warp_index() * kWarpColumns) * C::kStride;
  const typename C::T* s_q = s.q[buffer] + step * C::kStride;
  const typename C::T* s_dout = s.dout[buffer] + step * C::kStride;
  FragmentD dots[kTilesM][kTilesN], dp[kTilesM][kTilesN];  // S^T, then P^T; dP^T, then dS^T
  auto k_of = [&](int m, int k_step) {
    if constexpr (C::kKeepsKeys) return state.k[m][k_step];
    return load_a(keys_of<C>(s) + warp_keys + 16 * m * C::kStride + 16 * k_step, C::kStride);
  };
  auto v_of = [&](int m, int k_step) {
    if constexpr (C::kKeepsKeys) return state.v[m][k_step];
    return load_a(values_of<C>(s) + warp_keys + 16 * m * C::kStride + 16 * k_step, C::kStride);
  };
  multiply_rows<C>(dots, k_of, s_q);
  multiply_rows<C>(dp, v_of, s_dout);
  const float gate = is_prefix ? gate_of<typename C::T>(in, head) : 1.0f;
  score_by_columns<typename C::T>(in, head, is_prefix, gate, dots, column, row, visible);
  differentiate<C>(in, head, gate, dots, dp, s.lse[buffer] + step, s.delta[buffer] + step, column,
                   row);
  accumulate_rows<C>(state.dv, dots, s_dout);
  accumulate_rows<C>(state.dk, dp, s_q);
}

// Brings the warp's keys and values into registers, for the whole walk along the queries.
template <class C>
__device__ __forceinline__ void load_operands(State<C>& state, const typename C::T* s_k,
                                              const typename C::T* s_v) {
#pragma unroll
  for (int m = 0; m < kTilesM; ++m) {
#pragma unroll
    for (int step = 0; step < C::kE / 16; ++step) {
      const int element = 16 * m * C::kStride + 16 * step;
      state.k[m][step] = load_a(s_k + element, C::kStride);
      state.v[m][step] = load_a(s_v + element, C::kStride);
    }
  }
}

// Adds the four warps' sums of a prefix tile in their order, and writes them to the workspace, to
// the [A_i, P_i, G, E] of the block's chunk. The whole block takes part.
template <class C>
__device__ __forceinline__ void store_partial(Shared<C>& s, const CudaInputs& in, float* partial,
                                              float factor,
                                              const FragmentD (&sums)[kTilesM][C::kE / 8]) {
  constexpr int kSize = kWarpColumns * C::kE;
  static_assert(sizeof(float) * kWarps * kSize <= sizeof(s.q) + sizeof(s.dout),
                "the sums of the warps fit where queries were");
  float* s_sums = reinterpret_cast<float*>(s.q[0]);  // [kWarps, kWarpColumns, E]
  // Every warp has read the queries, or of the call before the sums, that lie where sums go now.
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
  sync_threads();  // all four warps' sums are written before any thread adds them
  if (partial == nullptr) return;
  const Columns& columns = s.columns;
  const int prefix = columns.prefix;
  // The first row of the chunk's and member's [P_i, G, E].
  const int64_t row =
      (static_cast<int64_t>(columns.chunk) * in.A_i[prefix] + columns.member) * in.P_i[prefix];
  for (int i = thread_index(); i < kSize; i += kThreads) {
    const int column = columns.first + i / C::kE;
    if (column < columns.begin || column >= columns.end) continue;  // another prefix's column
    float sum = 0.0f;                                               // in the order of the warps
    for (int w = 0; w < kWarps; ++w) sum += s_sums[w * kSize + i];
    partial[((row + column - in.first[prefix]) * in.G + columns.g) * C::kE + i % C::kE] =
        sum * factor;
  }
}

// Rounds a warp's dk and dv of own columns and writes them. No other block adds to them.
template <class C>
__device__ __forceinline__ void store_own(const BackwardParams& p, Shared<C>& s, int b,
                                          const State<C>& state) {
  using T = typename C::T;
  const Columns& columns = s.columns;
  sync_threads();  // the other warps have read the queries that lie where dk and dv go
  const int warp_column = warp_index() * kWarpColumns, column = columns.first + warp_column;
  // A tile's first columns may be the prefix's, and its last ones may lie behind the last key.
  const int begin = columns.begin > column ? columns.begin - column : 0;
  const int end = columns.end - column < kWarpColumns ? columns.end - column : kWarpColumns;
  const int64_t first = (static_cast<int64_t>(b) * p.in.G + columns.g) * p.in.N + column - p.in.P;
  if (p.in.grad[kK] != nullptr) {
    T* s_dk = s.q[0] + warp_column * C::kStride;
    put_rows<C>(s_dk, state.dk, p.in.scale);  // S = scale Q K^T, so dK has the scale once more
    store_rows<C>(p.in.grad_as<T>(kK) + first * C::kE, s_dk, begin, end);
  }
  if (p.in.grad[kV] != nullptr) {
    T* s_dv = s.dout[0] + warp_column * C::kStride;
    put_rows<C>(s_dv, state.dv, 1.0f);
    store_rows<C>(p.in.grad_as<T>(kV) + first * C::kE, s_dv, begin, end);
  }
}

template <class C>
__global__ void __launch_bounds__(kThreads, C::kMinBlocks)
    prefix_attention_bwd_keys_sm80(const __grid_constant__ BackwardParams p) {
  auto& s = shared_memory_as<Shared<C>>();
  const CudaInputs& in = p.in;
  place_block(p, s.columns, s.range, s.walk[0], s.scratch);
  const bool is_prefix = s.columns.prefix >= 0;
  // Of own columns each warp has 16, of a prefix tile all warps have the same 16.
  const int warp_column = is_prefix ? 0 : warp_index() * kWarpColumns;
  const int column = s.columns.first + warp_column;

  State<C> state;
  if (s.walk[0].b < s.range.b_end) {  // else no query sees the tile, and its gradients are zeros
    // Keys and the first tile of queries are one group of copies; every later tile is one.
    stage_keys<C>(s, in, s.walk[0].b);
    stage_queries<C>(s, p, s.walk[0], 0);
    cp_async_commit();
    const VisibleColumns visible = visible_columns(in, s.columns, s.walk[0].b, column);
    int buffer = 0;
    bool is_last = false;
    [[maybe_unused]] bool is_first = true;
#pragma unroll 1
    while (!is_last) {
      cp_async_wait<0>();
      // The tile and its walk are there, every thread's copies included, and every warp is done
      // with the last tile, whose buffer is filled next.
      sync_threads();
      if constexpr (C::kKeepsKeys) {
        if (is_first) {
          load_operands<C>(state, keys_of<C>(s) + warp_column * C::kStride,
                           values_of<C>(s) + warp_column * C::kStride);
          sync_threads();  // every warp has its keys before the second tile is staged over them
        }
        is_first = false;
      }
      // The next tile comes while this one is worked on.
      const Walk next = advanced(in, s.columns, s.range, s.walk[buffer]);
      is_last = next.b >= s.range.b_end;
      if (!is_last) {
        stage_queries<C>(s, p, next, 1 - buffer);
        cp_async_commit();
      }
      // Nobody reads this entry before the next barrier.
      if (thread_index() == 0) s.walk[1 - buffer] = next;
      const int first_row = s.walk[buffer].tile * kRowTile;
      // Of own columns each warp takes all 64 queries in four steps, of a prefix its 16 in one.
#pragma unroll 1
      for (int step = is_prefix ? warp_index() * kStep : 0; step < kRowTile;
           step += is_prefix ? kRowTile : kStep) {
        const int row = first_row + step;
        // Behind the last query, or the last of these queries sees none of the warp's columns.
        if (row >= in.S || column >= row_limit(in, row + kStep - 1, in.P + in.N)) continue;
        attend<C>(in, is_prefix, state, s, buffer, step, column, row, visible);
      }
      buffer = 1 - buffer;
    }
    cp_async_wait<0>();
  }
  // dv is complete, and dk still lacks the scale.
  if (is_prefix) {
    store_partial<C>(s, in, p.prefix[s.columns.prefix].partial_k, in.scale, state.dk);
    store_partial<C>(s, in, p.prefix[s.columns.prefix].partial_v, 1.0f, state.dv);
  } else {
    store_own<C>(p, s, s.range.b_end - 1, state);
  }
}

}  // namespace

void launch_bwd_keys_sm80(const BackwardParams& p) {
  const int blocks = p.prefix_blocks + p.in.B * p.in.G * p.own_tiles;
  run_fitting<Config>("prefix_attention_bwd_keys_sm80", p.in, [&](auto tag, const char* name) {
    using C = typename decltype(tag)::type;
    const LaunchShape shape{blocks, 1, 1, kThreads, sizeof(Shared<C>)};
    launch<prefix_attention_bwd_keys_sm80<C>>(name, shape, p.in.stream, p);
  });
}

}  // namespace pelt::prefix_attention
