// How rows are given to warps, and how a row is read: what forward and backward share.
//
// A row has one warp, or the whole block where it is long. Lanes take elements in turn, eight at a
// time where every row starts at a 16-byte border, otherwise one.
#pragma once

#include "common/type_list.h"
#include "cuda/device.cuh"
#include "ops/symmetric_kl/params.h"

namespace pelt::symmetric_kl {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kLongRow = 1024;  // columns from which a row has the whole block

template <class Type, int kWarpsOfRow>
struct Config {
  using T = Type;
  static constexpr int kRowWarps = kWarpsOfRow;
  static constexpr int kRowThreads = 32 * kWarpsOfRow;
  static constexpr int kRows = kWarps / kWarpsOfRow;  // of a block at a time
  static_assert(kRowWarps == 1 || kRowWarps == kWarps, "a row has one warp or the whole block");

  static bool fits(const Call& in) {
    return DTypeOf<T>::value == in.dtype && (kRowWarps == kWarps) == (in.C >= kLongRow);
  }
};

using Configs = TypeList<Config<float, 1>, Config<float, kWarps>, Config<bf16, 1>,
                         Config<bf16, kWarps>, Config<f16, 1>, Config<f16, kWarps>>;

// What a lane reads of a row at a time.
template <int kCount>
struct Elements {
  static constexpr int kSize = kCount;
  float v[kCount];
};

template <int kCount, class T>
__device__ __forceinline__ Elements<kCount> load_elements(const T* from) {
  Elements<kCount> out;
  if constexpr (kCount == 8) {
    const Float8 values = load_8(from);
    for (int i = 0; i < 8; ++i) out.v[i] = values.v[i];
  } else {
    out.v[0] = to_float(from[0]);
  }
  return out;
}

// Rounded to T; eight elements go out in one or two accesses of 16 bytes.
template <int kCount, class T>
__device__ __forceinline__ void store_elements(T* to, const Elements<kCount>& values) {
  if constexpr (kCount == 1) {
    to[0] = round_to<T>(values.v[0]);
  } else if constexpr (sizeof(T) == 2) {
    Float8 all;
    for (int i = 0; i < 8; ++i) all.v[i] = values.v[i];
    store_16(to, narrow<T>(all));
  } else {
    for (int half = 0; half < 2; ++half) {
      Words4 words;
      for (int i = 0; i < 4; ++i) words.word[i] = bits_of(values.v[4 * half + i]);
      store_16(to + 4 * half, words);
    }
  }
}

// How many elements a visit has, as a type: both cases are compiled.
template <int kCount>
struct CountTag {
  static constexpr int value = kCount;
};

// visit(tag, column) for this thread's elements of a row: tag::value of them from `column` on.
template <class C, class Visit>
__device__ __forceinline__ void for_columns(const Call& in, Visit&& visit) {
  const int own = thread_index() % C::kRowThreads;
  // Every row starts at a 16-byte border where the classes are a multiple of 8.
  if (in.C % 8 == 0) {
    for (int c = 8 * own; c < in.C; c += 8 * C::kRowThreads) visit(CountTag<8>{}, c);
  } else {
    for (int c = own; c < in.C; c += C::kRowThreads) visit(CountTag<1>{}, c);
  }
}

// Does a row have a part in the mean.
__device__ __forceinline__ bool counts(const Call& in, int64_t row) {
  const bool* mask = in.input_as<bool>(kMask);
  return mask == nullptr || mask[row];
}

// The sum over the threads of a block, for all of them; `sums` is for one value of each warp.
__device__ __forceinline__ float block_sum(float value, float (&sums)[kWarps]) {
  value = warp_sum(value);
  if (lane_index() == 0) sums[warp_index()] = value;
  // Every warp's sum is there to be added, by each thread in the same order.
  sync_threads();
  float total = 0.0f;
  for (float sum : sums) total += sum;
  // All have read the sums: the next call may write its own.
  sync_threads();
  return total;
}

// How many rows count; 1 where none does, so that an empty mean is 0.
__device__ __forceinline__ float count_of(const Call& in, float (&sums)[kWarps]) {
  const bool* mask = in.input_as<bool>(kMask);
  if (mask == nullptr) return static_cast<float>(in.T);
  // Every block counts for itself, which saves a launch: a mask is T bytes, and L2 has it.
  float own = 0.0f;
  for (int64_t t = thread_index(); t < in.T; t += kThreads) own += mask[t] ? 1.0f : 0.0f;
  const float count = block_sum(own, sums);
  return count < 1.0f ? 1.0f : count;
}

// Enough blocks for all threads that a GPU holds; rows beyond that come in turns.
template <class C>
int blocks_of(const Call& in) {
  const int64_t wanted = (in.T + C::kRows - 1) / C::kRows;
  const int64_t resident = 2048 / kThreads * static_cast<int64_t>(multiprocessors());
  return static_cast<int>(wanted < resident ? wanted : resident);
}

}  // namespace
}  // namespace pelt::symmetric_kl
