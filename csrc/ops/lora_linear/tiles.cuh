// What the kernels share beside the kit for rows (cuda/rows.cuh): how x, rows of A and scaled ranks
// come into shared memory, and what a row is multiplied by.
#pragma once

#include "common/check.h"
#include "common/type_list.h"
#include "cuda/rows.cuh"
#include "ops/lora_linear/params.h"

namespace pelt::lora_linear {

using namespace pelt::rows;

// Ranks of a block, or of a step, for a branch with so many: the sizes that are compiled.
constexpr int block_of(int ranks) { return ranks <= 16 ? 16 : 64; }

// Calls run(TypeTag<Config>) for the configuration with this dtype and so many ranks.
template <class Configs, class Run>
void run_config(Configs configs, DType dtype, int ranks, Run&& run) {
  const bool is_found = run_first_fit(
      configs,
      [&](auto tag) {
        using C = typename decltype(tag)::type;
        return DTypeOf<typename C::T>::value == dtype && C::kRanks == ranks;
      },
      run);
  check(is_found, "lora_linear: no configuration for ", name_of(dtype), " and ", ranks,
        " ranks, which why_not should have refused");
}

// An address that is made once and kept: what it is made of is unknown from here on. The optimiser
// likes to take the last steps of such a sum into the loop.
__device__ __forceinline__ uint32_t kept_address(uint32_t address) {
  return static_cast<uint32_t>(opaque(static_cast<int>(address)));
}

__device__ __forceinline__ int64_t member_of_a(const Branch& branch, int group) {
  return member_of(branch.a_index, branch.has_a_index_per_sample, group, branch.M);
}

__device__ __forceinline__ int64_t member_of_b(const Branch& branch, int group) {
  return member_of(branch.b_index, branch.has_b_index_per_sample, group, branch.N);
}

// A chunk of dropout(x), from column `first` on; rows that are not there are zero. Dropped before the
// product and rounded like any x: forward and backward drop and round in the same way.
template <class T, int kRows>
__device__ __forceinline__ void stage_dropped_x(T* tile, const Linear& in, const TileRows& rows,
                                                int first) {
  for (int i = thread_index(); i < kRows * kVectors; i += kThreads) {
    const int row = i / kVectors, column = first + i % kVectors * 8;
    Float8 x = {};
    if (row < rows.count && column < in.Din) {
      const int64_t element = (rows.first + row) * in.Din + column;
      x = load_8(static_cast<const T*>(in.x) + element);
      const Float8 factors = dropout_of(in.dropout, element);
      for (int e = 0; e < 8; ++e) x.v[e] *= factors.v[e];
    }
    store_16(tile + row * kChunkStride + i % kVectors * 8, narrow<T>(x));
  }
}

// As rows::stage, for a tile whose rows are kStride elements apart. Where all elements lie whole at
// 16-byte borders, as a rule, a thread makes one address and moves on from row to row.
template <class T, int kRows, int kColumns, int kStride>
__device__ __forceinline__ void stage_rows(T* tile, const Parameter& source,
                                           const Rectangle& from) {
  constexpr int kAcross = kColumns / 8, kStep = kThreads / kAcross;
  static_assert(kRows % kStep == 0, "every thread has as many vectors");
  const bool is_whole = from.leading % 8 == 0 && from.offset % 8 == 0 && from.columns % 8 == 0;
  if (!is_whole || source.is_float32) {
    stage<T, kRows, kColumns>(tile, kStride, source, from);
    return;
  }
  const int row = thread_index() / kAcross, column = thread_index() % kAcross * 8;
  const T* address = static_cast<const T*>(source.data) + from.offset +
                     static_cast<int64_t>(row) * from.leading + column;
  const uint32_t to = shared_address(tile + row * kStride + column);
  const int first = row - from.begin;
  const unsigned rows = column < from.columns ? from.rows - from.begin : 0;
  for_constants<kRows / kStep>([&](auto turn) {
    constexpr int kRow = decltype(turn)::value * kStep;
    const bool is_there = static_cast<unsigned>(first + kRow) < rows;
    cp_async_16_at<kRow * kStride* static_cast<int>(sizeof(T))>(to, address, is_there ? 16 : 0);
    address += static_cast<int64_t>(kStep) * from.leading;
  });
}

// Where a row of A or of the gates' weights lies, so that a thread finds it without a search.
struct Source {
  Parameter row;  // [Din]; null: nothing, zeros
  int64_t offset;
};

// Rank `column` of all branches', for a tile in `group`.
__device__ __forceinline__ Source rank_row(const Linear& in, int column, int group) {
  for (int i = 0; i < in.branches; ++i) {
    const Branch& branch = in.branch[i];
    const int rank = column - branch.first;
    if (rank < 0 || rank >= branch.R) continue;
    const int64_t member = member_of_a(branch, group);
    return {branch.a, (member * branch.R + rank) * in.Din};
  }
  return {};
}

// kRows rows in shared memory from a table of them, columns [first, first + kColumns).
template <class T, int kRows, int kColumns, int kStride>
__device__ __forceinline__ void stage_sources(T* tile, const Linear& in, const Source* sources,
                                              int first) {
  constexpr int kAcross = kColumns / 8;
#pragma unroll
  for (int turn = 0; turn < kRows * kAcross / kThreads; ++turn) {
    const int i = thread_index() + turn * kThreads;
    const int row = i / kAcross, column = first + i % kAcross * 8;
    const Source& source = sources[row];
    const bool is_there = source.row.data != nullptr && column < in.Din;
    T* to = tile + row * kStride + i % kAcross * 8;
    if (!source.row.is_float32) {
      // An address that is never read still has to be one of global memory.
      const T* from = is_there ? static_cast<const T*>(source.row.data) + source.offset + column
                               : static_cast<const T*>(in.x);
      cp_async_16(to, from, is_there);
      continue;
    }
    Float8 values = {};
    if (is_there) values = load_parameter_8<T>(source.row, source.offset + column);
    store_16(to, narrow<T>(values));
  }
}

// A row's sentence. Rows are counted in 32 bits (see why_not), and their division is far cheaper.
__device__ __forceinline__ int sentence_of(const Linear& in, int64_t row) {
  return static_cast<int>(row) / in.S;
}

// Does a row count in its sentence's gate.
__device__ __forceinline__ bool counts(const Linear& in, const Gate& gate, int64_t row) {
  return gate.pooling != Pooling::kMaskedMean || in.mask[row];
}

// scale g of a branch's row; g is 1 where there is no gate.
template <class T>
__device__ __forceinline__ float factor_of(const Linear& in, const Branch& branch, int64_t row) {
  float gate = 1.0f;
  if (branch.learned_gate >= 0) {
    const Gate& learned = in.gate[branch.learned_gate];
    gate = learned.value[learned.pooling == Pooling::kToken ? row : sentence_of(in, row)];
  } else if (branch.gate.data != nullptr) {
    gate = load_parameter<T>(branch.gate, branch.has_gate_per_row ? row : sentence_of(in, row));
  }
  return branch.scale * gate;
}

// scale g s of a branch's ranks from `rank` on; absent rows and ranks are zero.
template <class T, int kRows, int kRanks>
__device__ __forceinline__ void stage_scaled(T* tile, int stride, const Linear& in,
                                             const Branch& branch, const TileRows& rows, int rank) {
  constexpr int kVectorsPerRow = kRanks / 8;
  // Are the branch's ranks of every row of s whole vectors at 16-byte borders.
  const bool is_aligned = in.ranks % 8 == 0 && branch.first % 8 == 0;
  for (int i = thread_index(); i < kRows * kVectorsPerRow; i += kThreads) {
    const int row = i / kVectorsPerRow, offset = i % kVectorsPerRow * 8;
    const int left = branch.R - rank - offset;
    Float8 values = {};
    if (row < rows.count && left > 0) {
      const float factor = factor_of<T>(in, branch, rows.first + row);
      const T* from = static_cast<const T*>(in.s) + (rows.first + row) * in.ranks + branch.first +
                      rank + offset;
      if (is_aligned && left >= 8) {
        values = load_8(from);
        for (int e = 0; e < 8; ++e) values.v[e] *= factor;
      } else {
        for (int e = 0; e < 8; ++e) {
          if (e < left) values.v[e] = factor * to_float(from[e]);
        }
      }
    }
    store_16(tile + row * stride + offset, narrow<T>(values));
  }
}

// Up to eight neighbouring elements of a row of s or ds.
template <class T>
__device__ __forceinline__ void store_ranks(void* memory, int64_t at, int count,
                                            const Float8& values) {
  T* to = static_cast<T*>(memory) + at;
  // A sum of ranks that is no multiple of 8 leaves rows off the 16-byte borders.
  if (count == 8 && at % 8 == 0) {
    store_16(to, narrow<T>(values));
    return;
  }
#pragma unroll
  for (int e = 0; e < 8; ++e) {
    if (e < count) to[e] = round_to<T>(values.v[e]);
  }
}

// sum += part in columns [begin, end); the fragments' columns start at `first`. Beside a branch's
// own columns its B was staged as zeros, and 0 times an infinite s is a NaN that must not be added.
__device__ __forceinline__ void add_columns(FragmentD& sum, const FragmentD& part, int first,
                                            int begin, int end) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int column = first + FragmentD::column(i);
    if (column >= begin && column < end) sum.r[i] += part.r[i];
  }
}

// sum += a b in columns [begin, end), likewise. As a rule all eight columns are the branch's; where
// none is there is no product.
template <class T>
__device__ __forceinline__ void multiply_columns(FragmentD& sum, const FragmentA& a,
                                                 const FragmentB& b, int first, int begin,
                                                 int end) {
  if (begin <= first && end >= first + 8) {
    multiply_add<T>(sum, a, b);
  } else if (begin < first + 8 && end > first) {
    FragmentD part;
    multiply_add<T>(part, a, b);
    add_columns(sum, part, first, begin, end);
  }
}

}  // namespace pelt::lora_linear
