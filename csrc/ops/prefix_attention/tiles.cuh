// What the kernels of attention share: where the rows of the joined axis lie, how tiles of them
// come into shared memory, and which sample and head a block works for.
//
// Words: the joined axis is the P prefix columns followed by the N own ones (the model's own keys),
// and `column` is a position on it; `n` is a position among the own ones, column - P. `end` and
// `limit` are columns too: the first one that is not seen any more.
#pragma once

#include "cuda/device.cuh"
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

  __device__ __forceinline__ explicit ReadColumns(const CudaInputs& in, int b) {
    const int64_t length = in.lengths() == nullptr ? in.N : in.lengths()[b];
    end = static_cast<int>(length < 0 ? 0 : (length < in.N ? length : in.N));
    mask = in.mask_of(b);
  }

  __device__ __forceinline__ bool has(int n) const {
    return n < end && (mask == nullptr || mask[n]);
  }
};

// Starts copies of rows [first, first + kRows) of a matrix; rows that are not there become zeros. A
// thread stays at its vector of a row, so that going on to its next row is one addition.
template <class C, int kRows, class IsThere>
__device__ __forceinline__ void stage_rows_if(typename C::T* tile, const typename C::T* rows,
                                              int64_t stride, int first, IsThere&& is_there) {
  // 96 elements are 12 vectors, which do not divide 128 threads: 96 of them take 8 rows at a time.
  constexpr int kRowStep = C::kVectors == 12 ? 8 : kThreads / C::kVectors;
  static_assert(kRows % kRowStep == 0 && kRowStep * C::kVectors <= kThreads,
                "all threads, or three of four, take whole vectors of whole rows");
  if (thread_index() >= kRowStep * C::kVectors) return;
  const int row = thread_index() / C::kVectors, e = thread_index() % C::kVectors * 8;
  const typename C::T* from = rows + (first + row) * stride + e;
  typename C::T* to = tile + row * C::kStride + e;
#pragma unroll
  for (int i = 0; i < kRows; i += kRowStep) {
    cp_async_16(to + i * C::kStride, from, is_there(first + row + i));
    from += kRowStep * stride;
  }
}

template <class C, int kRows>
__device__ __forceinline__ void stage_rows(typename C::T* tile, const typename C::T* rows,
                                           int64_t stride, int first, int end) {
  stage_rows_if<C, kRows>(tile, rows, stride, first, [=](int row) { return row < end; });
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
__device__ __forceinline__ void stage_prefix_8(T* to, const Parameter& from, int64_t offset) {
  if (from.is_float32) {
    store_16(to, narrow<T>(load_8(static_cast<const float*>(from.data) + offset)));
  } else {
    cp_async_16(to, static_cast<const T*>(from.data) + offset, true);
  }
}

// Starts copies of columns [first, first + kRows) of keys and values; columns that no query sees,
// and those behind the last one, become zeros. Prefix rows come from where each prefix lies, so
// prefixes are never copied side by side in global memory.
template <class C, int kRows>
__device__ __forceinline__ void stage_columns(typename C::T* s_k, typename C::T* s_v,
                                              const CudaInputs& in, const Head& head, int first) {
  using T = typename C::T;
  const T* g_k = head_rows<T>(in, kK, head.b, head.g);  // [N, E]
  const T* g_v = head_rows<T>(in, kV, head.b, head.g);  // [N, E]
  const int64_t k_stride = row_stride(in, kK), v_stride = row_stride(in, kV);
  const ReadColumns read(in, head.b);
  if (first >= in.P) {  // a tile of own columns alone: no thread looks for a prefix
    const auto is_there = [&](int n) { return read.has(n); };
    stage_rows_if<C, kRows>(s_k, g_k, k_stride, first - in.P, is_there);
    stage_rows_if<C, kRows>(s_v, g_v, v_stride, first - in.P, is_there);
    return;
  }
#pragma unroll 1
  for (int i = thread_index(); i < kRows * C::kVectors; i += kThreads) {
    const int row = i / C::kVectors, e = i % C::kVectors * 8, column = first + row;
    const int to = row * C::kStride + e;
    if (column < in.P) {
      int segment = 0;
      while (segment + 1 < in.prefixes && column >= in.first[segment + 1]) ++segment;
      const int64_t member = member_of(in, segment, head.b);
      stage_prefix_8(s_k + to, in.parameter(kPrefixK + segment),
                     prefix_offset(in, kPrefixK, segment, member, head.g, column) + e);
      stage_prefix_8(s_v + to, in.parameter(kPrefixV + segment),
                     prefix_offset(in, kPrefixV, segment, member, head.g, column) + e);
    } else {
      const int n = column - in.P;
      const bool is_there = read.has(n);
      // An address that is not read still has to lie at a 16-byte border, as the tensor itself does.
      cp_async_16(s_k + to, is_there ? g_k + n * k_stride + e : in.input_as<T>(kK), is_there);
      cp_async_16(s_v + to, is_there ? g_v + n * v_stride + e : in.input_as<T>(kV), is_there);
    }
  }
}

// The column behind the last one that any query of sample b sees. Every thread of the block must
// call it; `scratch` has a word for each warp, and holds nothing afterwards.
__device__ __forceinline__ int seen_end_of(const CudaInputs& in, int b, int (&scratch)[kWarps]) {
  if (in.lengths() != nullptr) {
    const int64_t length = in.lengths()[b];
    return in.P + static_cast<int>(length < 0 ? 0 : (length < in.N ? length : in.N));
  }
  const bool* mask = in.mask_of(b);
  if (mask == nullptr) return in.P + in.N;
  int end = 0;
  for (int n = thread_index(); n < in.N; n += kThreads) end = mask[n] ? n + 1 : end;
  // The largest of the 128 threads' ends: over the lanes of a warp, then over the warps.
  for (int lanes = 16; lanes > 0; lanes /= 2) {
    const int other = shfl_xor(end, lanes);
    end = other > end ? other : end;
  }
  if (lane_index() == 0) scratch[warp_index()] = end;
  sync_threads();  // every warp's end is written before any warp reads all four
  for (int w = 0; w < kWarps; ++w) end = scratch[w] > end ? scratch[w] : end;
  return in.P + end;
}

// The column behind the last one that a row sees, where `end` is that of its sample. A causal mask
// is aligned at the bottom right: row i sees own columns up to i + N - S, and every prefix column.
__device__ __forceinline__ int row_limit(const CudaInputs& in, int row, int end) {
  if (!in.is_causal) return end;
  const int keys = row + in.N - in.S + 1;
  const int limit = in.P + (keys < 0 ? 0 : keys);
  return limit < end ? limit : end;
}

}  // namespace pelt::prefix_attention
