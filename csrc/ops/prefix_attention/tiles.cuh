// What the kernels of attention share: where the rows of the joined axis lie, how tiles of them
// come into shared memory, and which sample and head a block works for.
//
// Words: the joined axis is the P prefix columns followed by the N own ones (the model's own keys),
// and `column` is a position on it; `n` is a position among the own ones, column - P. `end` and
// `limit` are columns too: the first one that is not seen any more.
#pragma once

#include "cuda/approximate.cuh"
#include "cuda/device.cuh"
#include "cuda/lane_address.cuh"
#include "cuda/mma_from.cuh"
#include "ops/prefix_attention/params.h"

namespace pelt::prefix_attention {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / 32;

// Scores are kept in units of log 2, because the hardware has 2^x and not e^x.
constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;
constexpr float kMinusInfinity = -__builtin_huge_valf();

struct Head {
  int b;
  int h;
  int g;  // the key-value head that serves h
};

__device__ __forceinline__ Head head_of(const CudaInputs& in, int index) {
  const int b = index / in.H, h = index % in.H;
  return {b, h, h / (in.H / in.G)};
}

__device__ __forceinline__ int64_t head_index(const CudaInputs& in, const Head& head) {
  return static_cast<int64_t>(head.b) * in.H + head.h;
}

// One element of a parameter in float32.
template <class T>
__device__ __forceinline__ float load_parameter(const Parameter& parameter, int64_t i) {
  return parameter.is_float32 ? static_cast<const float*>(parameter.data)[i]
                              : to_float(static_cast<const T*>(parameter.data)[i]);
}

// The gate of a sample and head; 1 without one.
template <class T>
__device__ __forceinline__ float gate_of(const CudaInputs& in, const Head& head) {
  if (!in.has_gate()) return 1.0f;
  const int64_t i = in.has_gate_per_head() ? head_index(in, head) : head.b;
  return load_parameter<T>(in.parameter(kGate), i);
}

// The first row of a head in q, k, v, or in what stands in their places. From a row to the next one
// it is row_stride elements.
template <class T>
__device__ __forceinline__ const T* head_rows(const CudaInputs& in, Input tensor, int b, int h) {
  return in.input_as<T>(tensor) + b * in.stride[tensor][0] + h * in.stride[tensor][1];
}

__device__ __forceinline__ int64_t row_stride(const CudaInputs& in, Input tensor) {
  return in.stride[tensor][2];
}

// Which of a sample's own columns any query sees, by its mask or length. The others are staged as
// zeros, because their probability of 0 times a NaN in memory would be a NaN.
struct ReadColumns {
  int end;
  const bool* mask;  // [N]

  ReadColumns() = default;

  __device__ __forceinline__ explicit ReadColumns(const CudaInputs& in, int b) {
    const int64_t length = in.lengths() == nullptr ? in.N : in.lengths()[b];
    end = static_cast<int>(length < 0 ? 0 : (length < in.N ? length : in.N));
    mask = in.mask_of(b);
  }

  __device__ __forceinline__ bool has(int n) const {
    return n < end && (mask == nullptr || mask[n]);
  }
};

// Which vector of which rows of a tile a thread copies: it stays at its vector of a row, so that
// going on to its next row adds constants.
template <class C>
struct Share {
  // 96 elements are 12 vectors, which do not divide 128 threads: 96 of them take 8 rows at a time.
  static constexpr int kRowStep = C::kVectors == 12 ? 8 : kThreads / C::kVectors;
  static constexpr int kStepBytes = kRowStep * C::kStride * 2;  // from row to row in shared memory
  static_assert(kRowStep <= 32 && kRowStep * C::kVectors <= kThreads,
                "all threads, or three of four, take whole vectors of whole rows");

  __device__ __forceinline__ static bool has_none() {
    return kRowStep * C::kVectors < kThreads && thread_index() >= kRowStep * C::kVectors;
  }
  __device__ __forceinline__ static int row() { return thread_index() / C::kVectors; }
  __device__ __forceinline__ static int element() { return thread_index() % C::kVectors * 8; }
  __device__ __forceinline__ static uint32_t address(const typename C::T* tile) {
    return shared_address(tile + row() * C::kStride + element());
  }
};

// Starts copies of rows [first, first + kRows) of a matrix; rows from `end` on become zeros.
template <class C, int kRows>
__device__ __forceinline__ void stage_rows(typename C::T* tile, const typename C::T* rows,
                                           int64_t stride, int first, int end) {
  using Mine = Share<C>;
  static_assert(kRows % Mine::kRowStep == 0, "every thread takes as many rows");
  if (Mine::has_none()) return;
  const typename C::T* from = rows + (first + Mine::row()) * stride + Mine::element();
  const uint32_t to = Mine::address(tile);
  const int left = end - first - Mine::row();
  for_constants<kRows / Mine::kRowStep>([&](auto turn) {
    constexpr int kTurn = decltype(turn)::value;
    cp_async_16_at<kTurn * Mine::kStepBytes>(to, from, kTurn * Mine::kRowStep < left ? 16 : 0);
    from += Mine::kRowStep * stride;
  });
}

// Which member of a table serves a sample. An index outside of the table cannot be refused without
// waiting for the device, so it is clamped, and no memory beside the table is read.
__device__ __forceinline__ int64_t member_of(const CudaInputs& in, int prefix, int b) {
  const int64_t* index = in.index_of(prefix);
  if (index == nullptr) return 0;
  const int64_t member = index[b], last = in.A_i[prefix] - 1;
  return member < 0 ? 0 : (member < last ? member : last);
}

// The offset of a prefix's row for column `column` in its keys (kPrefixK) or values (kPrefixV).
__device__ __forceinline__ int64_t prefix_offset(const CudaInputs& in, Input tensor, int prefix,
                                                 int64_t member, int g, int column) {
  const int64_t (&stride)[3] = in.stride[tensor + prefix];  // of a member, a row and a head
  return member * stride[0] + (column - in.first[prefix]) * stride[1] + g * stride[2];
}

// Eight elements of a prefix: 16-bit ones come by an asynchronous copy, float32 masters through
// registers, because they are rounded on the way.
template <class T>
__device__ __forceinline__ void stage_prefix_8(uint32_t to, const Parameter& from, int64_t offset) {
  if (from.is_float32) {
    store_shared_16(to, narrow<T>(load_8(static_cast<const float*>(from.data) + offset)));
  } else {
    cp_async_16_at<0>(to, static_cast<const T*>(from.data) + offset, 16);
  }
}

// ---- tiles of the joined axis ----
//
// What is seen of 32 columns is a word, which one warp makes of the key mask in time: threads that
// copy a tile, and the products of its columns, find bits and numbers in shared memory.

// Whether any query sees a column: those of prefixes are seen.
__device__ __forceinline__ bool is_column_seen(const CudaInputs& in, const ReadColumns& read,
                                               int column) {
  return column < in.P || read.has(column - in.P);
}

// What the sums of a product start from, of two neighbouring columns: 0, or -inf where the column
// is hidden. Such a column is staged as zeros, and its score stays -inf without another
// instruction.
struct alignas(8) Start {
  float at[2];
};

template <int kColumns>
struct Seen {
  uint32_t words[kColumns / 32];
};

// Called by the warps that have the tile's columns, a thread for each.
template <int kColumns>
__device__ __forceinline__ void write_seen(Seen<kColumns>& s_seen, bool is_seen) {
  const uint32_t word = vote_ballot(is_seen);
  if (lane_index() == 0) s_seen.words[warp_index()] = word;
}

// Writes what is seen of the first two tiles.
template <int kColumns>
__device__ __forceinline__ void see_tiles(const CudaInputs& in, const ReadColumns& read,
                                          Seen<kColumns> (&s_seen)[2]) {
  static_assert(2 * kColumns <= kThreads, "a thread for each column of both tiles");
  constexpr int kWords = kColumns / 32;
  if (thread_index() >= 2 * kColumns) return;
  const uint32_t word = vote_ballot(is_column_seen(in, read, thread_index()));
  if (lane_index() == 0) s_seen[warp_index() / kWords].words[warp_index() % kWords] = word;
}

// Writes where a tile's products start, from what is seen of it.
template <int kColumns>
__device__ __forceinline__ void write_starts(Start (&s_starts)[kColumns / 2],
                                             const Seen<kColumns>& s_seen) {
  const int pair = thread_index();
  if (pair >= kColumns / 2) return;
  const uint32_t bits = s_seen.words[pair / 16] >> (pair % 16 * 2);
  Start start;
#pragma unroll
  for (int i = 0; i < 2; ++i) start.at[i] = (bits >> i & 1u) != 0 ? 0.0f : kMinusInfinity;
  s_starts[pair] = start;
}

// Of a pair of columns, for both of a lane's rows in a fragment.
__device__ __forceinline__ FragmentD start_of(const Start& s_start) {
  const Start start = s_start;
  return {{start.at[0], start.at[1], start.at[0], start.at[1]}};
}

// The addresses of a thread's vector in its next row of K and V. Those of columns before the first
// own one are only counted from.
template <class T>
struct Cursor {
  const T* k;
  const T* v;
};

// In the tile that begins with column `first`.
template <class C>
__device__ __forceinline__ Cursor<typename C::T> cursor_at(const CudaInputs& in, const Head& head,
                                                           int first) {
  using T = typename C::T;
  const int n = first + Share<C>::row() - in.P, e = Share<C>::element();
  return {head_rows<T>(in, kK, head.b, head.g) + n * row_stride(in, kK) + e,
          head_rows<T>(in, kV, head.b, head.g) + n * row_stride(in, kV) + e};
}

// The same of a tile that has prefix columns, whose rows come from where each prefix lies: they are
// never copied side by side in global memory.
template <class C, int kColumns>
__device__ __forceinline__ void stage_prefix_columns(uint32_t to_k, uint32_t to_v,
                                                     const CudaInputs& in, const Head& head,
                                                     Cursor<typename C::T>& from, int first,
                                                     const Seen<kColumns>& s_seen) {
  using Mine = Share<C>;
#pragma unroll 1
  for (int row = Mine::row(); row < kColumns; row += Mine::kRowStep) {
    const int column = first + row;
    if (column < in.P) {
      int prefix = 0;
      while (prefix + 1 < in.prefixes && column >= in.first[prefix + 1]) ++prefix;
      const int64_t member = member_of(in, prefix, head.b);
      stage_prefix_8<typename C::T>(
          to_k, in.parameter(kPrefixK + prefix),
          prefix_offset(in, kPrefixK, prefix, member, head.g, column) + Mine::element());
      stage_prefix_8<typename C::T>(
          to_v, in.parameter(kPrefixV + prefix),
          prefix_offset(in, kPrefixV, prefix, member, head.g, column) + Mine::element());
    } else {
      const bool is_seen = (s_seen.words[row / 32] >> (row % 32) & 1u) != 0;
      // An address that is not read still has to lie at a 16-byte border, as the tensor itself does;
      // in the composed form there are no such rows at all.
      using T = typename C::T;
      cp_async_16_at<0>(to_k, is_seen ? from.k : in.input_as<T>(kK), is_seen ? 16 : 0);
      cp_async_16_at<0>(to_v, is_seen ? from.v : in.input_as<T>(kV), is_seen ? 16 : 0);
    }
    to_k += Mine::kStepBytes, to_v += Mine::kStepBytes;
    from.k += Mine::kRowStep * row_stride(in, kK);
    from.v += Mine::kRowStep * row_stride(in, kV);
  }
}

// Starts copies of the keys and values of columns [first, first + kColumns); columns that no query
// sees become zeros.
template <class C, int kColumns>
__device__ __forceinline__ void stage_columns(typename C::T* s_k, typename C::T* s_v,
                                              const CudaInputs& in, const Head& head, int first,
                                              const Seen<kColumns>& s_seen) {
  using Mine = Share<C>;
  Cursor<typename C::T> from = cursor_at<C>(in, head, first);
  static_assert(kColumns % Mine::kRowStep == 0 && kColumns % 32 == 0,
                "every thread takes as many rows");
  if (Mine::has_none()) return;
  const uint32_t to_k = Mine::address(s_k), to_v = Mine::address(s_v);
  if (first < in.P) {
    stage_prefix_columns<C, kColumns>(to_k, to_v, in, head, from, first, s_seen);
    return;
  }
  uint32_t seen = 0;
  for_constants<kColumns / Mine::kRowStep>([&](auto turn) {
    constexpr int kTurn = decltype(turn)::value;
    constexpr int kRow = kTurn * Mine::kRowStep;  // and the thread's row further down
    if constexpr (kRow % 32 == 0) seen = s_seen.words[kRow / 32] >> Mine::row();
    const int bytes = (seen & 1u << kRow % 32) != 0 ? 16 : 0;
    cp_async_16_at<kTurn * Mine::kStepBytes>(to_k, from.k, bytes);
    cp_async_16_at<kTurn * Mine::kStepBytes>(to_v, from.v, bytes);
    from.k += Mine::kRowStep * row_stride(in, kK);
    from.v += Mine::kRowStep * row_stride(in, kV);
  });
}

// The column behind the last one that any query of sample b sees. Every thread of the block must
// call it; `scratch` has a word for each warp. A barrier is in it in any case, so that what the
// block has written before is there behind it.
__device__ __forceinline__ int seen_end_of(const CudaInputs& in, int b, int (&scratch)[kWarps]) {
  const bool* mask = in.lengths() == nullptr ? in.mask_of(b) : nullptr;
  int end = in.N;
  if (in.lengths() != nullptr) {
    const int64_t length = in.lengths()[b];
    end = static_cast<int>(length < 0 ? 0 : (length < in.N ? length : in.N));
  } else if (mask != nullptr) {
    end = 0;
    for (int n = thread_index(); n < in.N; n += kThreads) end = mask[n] ? n + 1 : end;
    // The largest of the 128 threads' ends: over the lanes of a warp, then over the warps.
    for (int lanes = 16; lanes > 0; lanes /= 2) {
      const int other = shfl_xor(end, lanes);
      end = other > end ? other : end;
    }
    if (lane_index() == 0) scratch[warp_index()] = end;
  }
  sync_threads();  // every warp's end is written before any warp reads all four
  if (mask != nullptr) {
    for (int w = 0; w < kWarps; ++w) end = scratch[w] > end ? scratch[w] : end;
  }
  return in.P + end;
}

// The column behind the last one that a row may see under a causal mask, which is aligned at the
// bottom right: row i sees own columns up to i + N - S, and every prefix column.
__device__ __forceinline__ int causal_limit(const CudaInputs& in, int row) {
  const int keys = row + in.N - in.S + 1;
  return in.P + (keys < 0 ? 0 : keys);
}

// The column behind the last one that a row sees, where `end` is that of its sample.
__device__ __forceinline__ int row_limit(const CudaInputs& in, int row, int end) {
  if (!in.is_causal) return end;
  const int limit = causal_limit(in, row);
  return limit < end ? limit : end;
}

// Whether a row, which exists, sees no column although its products had some: all that the causal
// mask leaves of its sample are hidden. Their scores are -inf unless the query is not finite.
__device__ __forceinline__ bool sees_nothing(const CudaInputs& in, int b, int row) {
  const bool* mask = in.mask_of(b);
  if (!in.is_causal || in.P > 0 || mask == nullptr) return false;
  const int end = causal_limit(in, row);
  int n = 0;
  while (n < end && !mask[n]) ++n;
  return n >= end;
}

}  // namespace pelt::prefix_attention
