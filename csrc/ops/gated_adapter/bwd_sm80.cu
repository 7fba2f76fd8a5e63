// gated_adapter, backward, first of two launches, for the calls that methods make (options.h);
// bwd_general_sm80.cu serves the others. What belongs to rows, with dy' = dropout(dy):
//
//   v   = dy' W_up                            [T, R]
//   dot = v . phi(h) + dy' . b_up             [T]      equals dy' . u, without computing u
//   dh  = scale g v phi'(h)                   [T, R]   to memory, for the second launch
//   dx  = dh W_down + dlogit w_gate + dy      [T, D]
//
// dlogit comes from the dots: those of the row (token), or of the whole sentence (pooled); then
// tiles wait for their sentence as in forward. b_up is one more column of W_up, so its share of the
// dot costs one mma for each 16 columns.
//
//     x [rows, D]  -->  logits;    dy' [rows, D]  -->  dh [rows, R]  -->  dx [rows, D]
//                                  W_up, chunks of 64 rows           W_down, of 64 columns
//
// A block takes a tile of 64, 32 or 16 rows. The chunks of all three passes over the columns come
// through one ring of shared memory (backward_ring.cuh). A pooled gate's logits are computed again,
// since forward keeps none of single rows: a pass over x of its own, so that other calls do not pay
// for a place of x in the ring. dx starts from dy, which lies in the slot, leaves through the same
// place, and is written as what nobody reads soon.
//
// Read: dy, h, and x for a pooled gate; written: dx, dh, and scale g phi(h).
#include "common/check.h"
#include "ops/gated_adapter/backward_ring.cuh"
#include "ops/gated_adapter/backward_rows.cuh"

namespace pelt::gated_adapter {
namespace {

// Where the calling thread's warp stands in the tile.
template <class C>
__device__ __forceinline__ int row_of_warp() {
  return warp_index() / C::kSplit * 16;
}
template <class C>
__device__ __forceinline__ int rank_of_warp() {
  return warp_index() % C::kSplit * C::kRankTiles * 8;
}
template <class C>
__device__ __forceinline__ int column_of_warp() {
  return warp_index() % C::kSplit * C::kColumnTiles * 8;
}

// The vectors [D] that are rows of products, as these take them; the first step's barrier is behind.
template <class C>
__device__ __forceinline__ void load_columns(const Call& in, BackwardShared<C>& s,
                                             int64_t up_member) {
  using T = typename C::T;
  for (int d = 8 * thread_index(); d < in.D; d += 8 * C::kThreads) {
    if (in.input[kBUp] != nullptr) {
      const Float8 bias = load_parameter_8<T>(in.parameter(kBUp), up_member * in.D + d);
      store_16(s.columns + d, narrow<T>(bias));
    }
    if (has_learned_gate(in)) {
      const Float8 weight = load_parameter_8<T>(in.parameter(kGateWeight), d);
      store_16(s.columns + in.D + d, narrow<T>(weight));
    }
  }
  if (thread_index() < kChunk / 2) store_4(s.zeros + 2 * thread_index(), 0);
}

// A vector [D] in shared memory as one row of eight of an operand, chunk after chunk; the other rows
// are zeros. Its products are in column 0 of what they are added to.
template <class C>
struct VectorRow {
  using T = typename C::T;
  uint32_t at;  // of this lane
  uint32_t step;

  __device__ __forceinline__ VectorRow(const BackwardShared<C>& s, const T* vector) {
    const int lane = lane_index();
    const bool is_zero = lane % 8 != 0;
    at = shared_address(is_zero ? s.zeros : vector) + lane / 8 % 2 * 16;
    step = is_zero ? 0 : kChunk * sizeof(T);
  }

  // Of the chunk of rows at `of_a`, this lane's place in it for a fragment A.
  __device__ __forceinline__ void multiply(uint32_t of_a, FragmentD& sums) {
    for_constants<kChunk / 16>([&](auto k) {
      constexpr int kColumn = decltype(k)::value * 32;  // bytes
      FragmentA a;
      FragmentB b;
      ldmatrix_x4_at<kColumn>(a.r, of_a);
      ldmatrix_x2_at<kColumn>(b.r, at);
      multiply_add<T>(sums, a, b);
    });
    at += step;
  }
};

// This lane's place in a chunk of rows, for a fragment A.
template <class C>
__device__ __forceinline__ uint32_t place_of_a() {
  const int lane = lane_index();
  return (row_of_warp<C>() + lane % 16) * C::kRowStride * sizeof(typename C::T) + lane / 16 * 16;
}

// s.logit, by the first of the warps that share rows.
template <class C>
__device__ __forceinline__ void compute_logits(const Call& in, Ring<C>& ring,
                                               BackwardShared<C>& s) {
  using T = typename C::T;
  FragmentD logits;
  VectorRow<C> weight(s, s.columns + in.D);
  const uint32_t of_a = place_of_a<C>();
#pragma unroll 1
  for (int chunk = 0; chunk < ring.chunks; ++chunk) {
    const uint32_t slot = ring.template next<Ring<C>::kLogits>(chunk);
    if (rank_of_warp<C>() == 0) weight.multiply(slot + of_a, logits);
  }
  if (rank_of_warp<C>() == 0 && FragmentD::column(0) == 0) {
    const float bias = load_parameter<T>(in.parameter(kGateBias), 0);
    s.logit[row_of_warp<C>() + FragmentD::row(0)] = logits.r[0] + bias;
    s.logit[row_of_warp<C>() + FragmentD::row(2)] = logits.r[2] + bias;
  }
}

// Dropout of the vectors of a chunk of dy that this thread has copied.
template <class C>
__device__ __forceinline__ void drop_chunk(const Call& in, BackwardShared<C>& s,
                                           const TileRows& rows, uint32_t offset, int first) {
  using T = typename C::T;
  using Source = RowsCopy<C>;
  const int column = Source::lane() * 8;
  T* chunk = reinterpret_cast<T*>(reinterpret_cast<char*>(s.slots) + offset);
#pragma unroll 1
  for (int i = 0; i < Source::kPasses; ++i) {
    const int row = Source::row() + i * Source::kRowsOfPass;
    if (row >= rows.count) break;  // what is not there is zero
    T* at = chunk + row * C::kRowStride + column;
    Float8 dy = widen<T>(load_16(at));
    const Float8 factors = dropout_of_row(in, rows.first + row, first + column);
    for (int e = 0; e < 8; ++e) dy.v[e] *= factors.v[e];
    store_16(at, narrow<T>(dy));
  }
}

// This warp's [16, its ranks] of v = dy' W_up, and dy' . b_up in column 0 of `bias_dot`.
template <class C>
__device__ __forceinline__ void project_dy(const Call& in, Ring<C>& ring, BackwardShared<C>& s,
                                           const TileRows& rows, FragmentD (&v)[C::kRankTiles],
                                           FragmentD& bias_dot) {
  using T = typename C::T;
  constexpr int kRankBytes = C::kRankStride * sizeof(T);
  const uint32_t of_a = place_of_a<C>();
  // The weight lies with its ranks beside each other, and is read transposed.
  const uint32_t of_second = lane_index() / 16 * 8 * sizeof(T);
  const uint32_t of_b = Ring<C>::kWeightOffset + lane_index() % 16 * kRankBytes +
                        rank_of_warp<C>() * sizeof(T) + of_second;
  VectorRow<C> bias(s, s.columns);
  const bool has_bias = in.input[kBUp] != nullptr && rank_of_warp<C>() == 0;
  const bool drops = in.dropout.is_active();
#pragma unroll 1
  for (int chunk = 0; chunk < ring.chunks; ++chunk) {
    const uint32_t slot = ring.template next<Ring<C>::kUp>(chunk, [&](uint32_t at) {
      if (drops) drop_chunk<C>(in, s, rows, at - ring.first, chunk * kChunk);
    });
    const uint32_t at_a = slot + of_a, at_b = slot + of_b;
    for_constants<kChunk / 16>([&](auto k) {
      constexpr int kColumn = decltype(k)::value * 32;  // bytes
      constexpr int kRow = decltype(k)::value * 16 * kRankBytes;
      FragmentA a;
      ldmatrix_x4_at<kColumn>(a.r, at_a);
      for_constants<C::kRankTiles / 2>([&](auto n) {
        constexpr int kTile = 2 * decltype(n)::value;
        uint32_t b[4];
        ldmatrix_x4_trans_at<kRow + kTile * 16>(b, at_b);
        multiply_add<T>(v[kTile], a, FragmentB{{b[0], b[1]}});
        multiply_add<T>(v[kTile + 1], a, FragmentB{{b[2], b[3]}});
      });
      if constexpr (C::kRankTiles % 2 == 1) {
        uint32_t b[4];  // of which the second half is the first again
        ldmatrix_x4_trans_at<kRow + (C::kRankTiles - 1) * 16>(b, at_b - of_second);
        multiply_add<T>(v[C::kRankTiles - 1], a, FragmentB{{b[0], b[1]}});
      }
    });
    // Asked once for a chunk: another load of A is less than a branch for each.
    if (has_bias) bias.multiply(at_a, bias_dot);
  }
}

// Of this lane's elements, in pairs: those of h, in the order of the fragments of v.
template <class C>
struct HiddenPairs {
  static constexpr int kPairs = 2 * C::kRankTiles;
  uint32_t h[kPairs];

  // Where pair i stands: a lane has two neighbours of each of two rows.
  __device__ __forceinline__ static int row(int i) {
    return row_of_warp<C>() + FragmentD::row(2 * (i % 2));
  }
  __device__ __forceinline__ static int rank(int i) {
    return rank_of_warp<C>() + i / 2 * 8 + FragmentD::column(0);
  }

  // Long before they are needed; zeros for what does not exist.
  __device__ __forceinline__ void load(const Call& in, const TileRows& rows) {
    using T = typename C::T;
    const T* g_h = static_cast<const T*>(in.output[kH]) + rows.first * in.R;
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      const bool is_there = row(i) < rows.count && rank(i) < in.R;
      h[i] = is_there ? load_4(g_h + row(i) * static_cast<int64_t>(in.R) + rank(i)) : 0;
    }
  }
};

// From v: dh, in shared memory and in global memory, a for the second launch, and this warp's share
// of the dots.
template <class C>
__device__ __forceinline__ void derive_hidden(const BackwardParams& p, BackwardShared<C>& s,
                                              const TileRows& rows,
                                              const FragmentD (&sums)[C::kRankTiles],
                                              const FragmentD& bias_dot, HiddenPairs<C>& pairs) {
  using T = typename C::T;
  const Call& in = p.in;
  constexpr int kPairs = HiddenPairs<C>::kPairs;
  float v[2 * kPairs];
#pragma unroll
  for (int i = 0; i < 2 * kPairs; ++i) v[i] = sums[i / 4].r[i % 4];
  float factor[2], dot[2] = {0.0f, 0.0f};  // of this lane's two rows
  for (int half = 0; half < 2; ++half) {
    const int row = HiddenPairs<C>::row(half);
    factor[half] =
        row < rows.count ? factor_of_row<T, typename C::Options>(in, rows.first + row) : 0.0f;
  }
  with_activation(in.activation, [&](auto phi) {
    constexpr Activation kPhi = decltype(phi)::value;
    // The first pair of what is left; one body for all, since six activations are code enough.
#pragma unroll 1
    for (int i = 0; i < kPairs; ++i) {
      const int row = HiddenPairs<C>::row(i), rank = HiddenPairs<C>::rank(i);
      const bool is_there = row < rows.count && rank < in.R;
      const Float2 both = unpack<T>(pairs.h[0]);
      const float h[2] = {both.low, both.high}, f = i % 2 == 0 ? factor[0] : factor[1];
      float dh[2], a[2], share = 0.0f;
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float phi_h = activate(kPhi, h[e]);
        // Rounded as forward's product took it, so that the dot is that of its u.
        share += v[e] * to_float(round_to<T>(phi_h));
        a[e] = f * phi_h;
        dh[e] = f * through_activation(kPhi, v[e], h[e]);
      }
      dot[0] += i % 2 == 0 ? share : 0.0f;
      dot[1] += i % 2 == 0 ? 0.0f : share;
      const uint32_t packed = is_there ? pack<T>(dh[0], dh[1]) : 0;
      store_4(&s.hidden[row * C::kRankStride + rank], packed);
      if (is_there) {
        const int64_t to = (rows.first + row) * p.rank_stride + rank;
        store_4(static_cast<T*>(p.dh) + to, packed);
        if (p.a != nullptr) store_4(static_cast<T*>(p.a) + to, pack<T>(a[0], a[1]));
      }
#pragma unroll
      for (int j = 0; j + 1 < kPairs; ++j) {
        pairs.h[j] = pairs.h[j + 1];
        v[2 * j] = v[2 * j + 2];
        v[2 * j + 1] = v[2 * j + 3];
      }
    }
  });
  for (int half = 0; half < 2; ++half) {
    const float whole = group_sum<4>(dot[half]);  // four lanes share a row
    if (FragmentD::column(0) == 0) {
      // bias_dot is dy' . b_up, in the first warp, in the lanes that hold column 0.
      s.dot[warp_index() % C::kSplit][HiddenPairs<C>::row(half)] = whole + bias_dot.r[2 * half];
    }
  }
  sync_threads();  // dh and all shares of the dots are there
}

// The dots of the rows, and what they mean for others. Behind it s.dot[0] is there for all.
template <class C>
__device__ __forceinline__ void settle_dots(const BackwardParams& p, BackwardShared<C>& s,
                                            const TileRows& rows, int tile, bool returns) {
  using T = typename C::T;
  const Call& in = p.in;
  const int r = thread_index();
  if (r < rows.count) {
    const int64_t row = rows.first + r;
    float dot = 0.0f;
    for (int split = 0; split < C::kSplit; ++split) dot += s.dot[split][r];
    s.dot[0][r] = dot;
    *row_scalar(p, kDot, row) = dot;
    if (returns) *row_scalar(p, kLogit, row) = s.logit[r];
    if (p.a != nullptr) {
      store_16(static_cast<T*>(p.factor_parts) + row * kPartsStride,
               split_into_parts<T>(factor_of_row<T, typename C::Options>(in, row)));
    }
  }
  sync_threads();  // the dots are there
  if (in.grad[kScale] != nullptr) leave_gated_dot<T, typename C::Options>(p, s.dot[0], rows, tile);
}

// Comes back to a tile that another one has replaced in shared memory.
template <class C>
__device__ __forceinline__ void reload_tile(const BackwardParams& p, BackwardShared<C>& s,
                                            const TileRows& rows) {
  using T = typename C::T;
  const int r = thread_index();
  if (r < rows.count) s.logit[r] = *row_scalar(p, kLogit, rows.first + r);
  reload_dh<T, C::kTileRows, C::kRankStride>(p, rows, C::kRanks / 8, C::kThreads, s.hidden);
}

// dx, from dh in s.hidden.
template <class C, bool kHasGate>
__device__ __forceinline__ void derive_input(const BackwardParams& p, Ring<C>& ring,
                                             BackwardShared<C>& s, const TileRows& rows) {
  using T = typename C::T;
  const Call& in = p.in;
  constexpr int kRowBytes = C::kRowStride * sizeof(T), kRankBytes = C::kRankStride * sizeof(T);
  constexpr int kColumnBytes = 16;  // of a tile of eight columns
  const int lane = lane_index();
  float dlogit[2] = {0.0f, 0.0f};  // of this lane's two rows
  for (int half = 0; half < 2; ++half) {
    const int row = row_of_warp<C>() + FragmentD::row(2 * half);
    if (kHasGate && row < rows.count) dlogit[half] = s.dlogit[row];
  }
  FragmentA dh[C::kRanks / 16];  // the same for every chunk
  const uint32_t of_dh =
      shared_address(s.hidden) + (row_of_warp<C>() + lane % 16) * kRankBytes + lane / 16 * 16;
  for_constants<C::kRanks / 16>(
      [&](auto k) { ldmatrix_x4_at<decltype(k)::value * 32>(dh[decltype(k)::value].r, of_dh); });
  const uint32_t of_b = Ring<C>::kWeightOffset + lane % 16 * kRowBytes +
                        (column_of_warp<C>() + lane / 16 * 8) * sizeof(T);
  // Where the lane's fragments are in the slot, its rows of an ldmatrix, and its 16-byte pieces.
  const uint32_t of_pair = (row_of_warp<C>() + FragmentD::row(0)) * kRowBytes +
                           (column_of_warp<C>() + FragmentD::column(0)) * sizeof(T);
  const uint32_t of_rows = (row_of_warp<C>() + lane % 16) * kRowBytes +
                           (column_of_warp<C>() + lane / 16 * 8) * sizeof(T);
  constexpr int kVectors = C::kColumnTiles, kRowsPerPass = 32 / kVectors;
  const int row = row_of_warp<C>() + lane / kVectors;
  const int column = column_of_warp<C>() + lane % kVectors * 8;
  const uint32_t of_vector = row * kRowBytes + column * sizeof(T);
  T* g_dx = in.grad_as<T>(kX) + (rows.first + row) * in.D + in.D - kChunk + column;
  const int64_t pass_step = static_cast<int64_t>(kRowsPerPass) * in.D;
  const T* weight = s.columns + 2 * in.D - kChunk + column_of_warp<C>() + FragmentD::column(0);

#pragma unroll 1
  for (int chunk = 0; chunk < ring.chunks; ++chunk) {
    const uint32_t slot = ring.template next<Ring<C>::kDown>(chunk);
    FragmentA dy[C::kColumnTiles / 2] = {};
    if (ring.has_residual) {
      for_constants<C::kColumnTiles / 2>([&](auto pair) {
        constexpr int n = decltype(pair)::value;
        ldmatrix_x4_at<2 * n * kColumnBytes>(dy[n].r, slot + of_rows);
      });
    }
    FragmentD dx[C::kColumnTiles];
#pragma unroll
    for (int n = 0; n < C::kColumnTiles; ++n) {
      Float2 w = {};
      if constexpr (kHasGate) w = unpack<T>(load_4(weight + 8 * n));
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const Float2 both = unpack<T>(dy[n / 2].r[n % 2 * 2 + half]);
        dx[n].r[2 * half] = kHasGate ? both.low + dlogit[half] * w.low : both.low;
        dx[n].r[2 * half + 1] = kHasGate ? both.high + dlogit[half] * w.high : both.high;
      }
    }
    const uint32_t at_b = slot + of_b;
    for_constants<C::kRanks / 16>([&](auto k) {
      for_constants<C::kColumnTiles / 2>([&](auto n) {
        constexpr int kTile = 2 * decltype(n)::value;
        uint32_t b[4];
        ldmatrix_x4_trans_at<decltype(k)::value * 16 * kRowBytes + kTile * kColumnBytes>(b, at_b);
        multiply_add<T>(dx[kTile], dh[decltype(k)::value], FragmentB{{b[0], b[1]}});
        multiply_add<T>(dx[kTile + 1], dh[decltype(k)::value], FragmentB{{b[2], b[3]}});
      });
    });
    sync_warp();  // all lanes have what they read of dy, whose place dx takes
    for_constants<C::kColumnTiles>([&](auto tile) {
      constexpr int n = decltype(tile)::value;
      for_constants<2>([&](auto half) {
        constexpr int h = decltype(half)::value;
        store_shared_4_at<8 * h * kRowBytes + n * kColumnBytes>(
            slot + of_pair, pack<T>(dx[n].r[2 * h], dx[n].r[2 * h + 1]));
      });
    });
    sync_warp();  // a lane reads what others wrote
    T* g_at = g_dx;
    for_constants<16 / kRowsPerPass>([&](auto pass) {
      constexpr int kRow = decltype(pass)::value * kRowsPerPass;
      const Words4 words = load_shared_16_at<kRow * kRowBytes>(slot + of_vector);
      if (row + kRow < rows.count) store_global_16_streaming(g_at, words);
      g_at += pass_step;
    });
    g_dx -= kChunk;
    weight -= kChunk;
  }
}

// is_first: of the block's tiles. has_first, has_second: up to the dots, and from there on.
template <class C>
__device__ __forceinline__ void run_tile(const BackwardParams& p, BackwardShared<C>& s, int tile,
                                         bool is_first, bool has_first, bool has_second) {
  const Call& in = p.in;
  const TileRows rows = rows_of_tile<C::kTileRows>(p.tiling, tile);
  const bool is_pooled = has_pooled_gate(in);
  const Passes passes = {has_first && is_pooled, has_first, has_second && in.grad[kX] != nullptr};
  Ring<C> ring(p, s, rows, passes);
  if (is_first || has_weights_per_sample(in)) load_columns<C>(in, s, up_member_of(in, rows));
  if (has_first) {
    HiddenPairs<C> pairs;
    pairs.load(in, rows);
    if (passes.logits) compute_logits<C>(in, ring, s);
    FragmentD v[C::kRankTiles], bias_dot;
    project_dy<C>(in, ring, s, rows, v, bias_dot);
    derive_hidden<C>(p, s, rows, v, bias_dot, pairs);
    settle_dots<C>(p, s, rows, tile, /*returns=*/is_pooled && !has_second);
    if (is_pooled) publish_dots(p, s.dot[0], rows, tile);
  } else {
    reload_tile<C>(p, s, rows);
  }
  if (has_second) {
    if (is_pooled)
      await_sums(p.tiling, p.tiling.tiles_per_group, p.gate_partial, p.arrivals, rows, s.pooled);
    if (has_learned_gate(in)) {
      derive_logits<typename C::T, typename C::Options>(
          p, rows, tile, s.dot[0], s.pooled, s.dlogit, [&](int r) {
            return is_pooled ? sigmoid(s.logit[r])
                             : in.output_as<float>(kGateValue)[rows.first + r];
          });
    }
    if (passes.down && has_learned_gate(in)) derive_input<C, true>(p, ring, s, rows);
    if (passes.down && !has_learned_gate(in)) derive_input<C, false>(p, ring, s, rows);
  }
  sync_threads();  // the next tile may replace what is in shared memory
}

template <class C>
__global__ void __launch_bounds__(C::kThreads, C::kMinBlocks)
    gated_adapter_bwd_sm80(const __grid_constant__ BackwardParams p) {
  auto& s = shared_memory_as<BackwardShared<C>>();
  prepare_second_launch(p, C::kThreads);
  bool is_first = true;
  for_each_pass(p, has_pooled_gate(p.in), [&](int tile, bool has_first, bool has_second) {
    run_tile<C>(p, s, tile, is_first, has_first, has_second);
    is_first = false;
  });
}

using Configs = BackwardConfigs;

}  // namespace

void launch_bwd_rows_sm80(const BackwardParams& p) {
  const bool found = run_first_fit(
      Configs{}, [&](auto tag) { return serves_backward<typename decltype(tag)::type>(p.in); },
      [&](auto tag) {
        using C = typename decltype(tag)::type;
        launch_over_tiles<gated_adapter_bwd_sm80<C>>("gated_adapter_bwd_sm80", p, C::kThreads,
                                                     backward_bytes<C>(p.in));
      });
  if (!found) launch_bwd_general_sm80(p);
}

}  // namespace pelt::gated_adapter
