// prefix_attention: out = softmax([g scale Q Pk^T ; scale Q K^T + bias + mask]) [g Pv ; V].
//
// What the CUDA kernels take: a call, in the order and the letters of contract.h, and pieces of its
// workspace.
#pragma once

#include <cstdint>

#include "common/launch.h"
#include "ops/prefix_attention/inputs.h"

namespace pelt::prefix_attention {

using Call = NativeCall<Contract, int>;
using CudaInputs = Inputs<int>;

struct ForwardParams {
  CudaInputs in;
  // In the composed form another attention has attended to the own columns, and here there are none
  // (N = 0): its results, to which the prefixes are added. Null in the single form.
  const void* own_out = nullptr;   // [B, H, S, E], with the strides of K
  const float* own_lse = nullptr;  // [B, H, S], with the strides of V
};

// How the gradient of a prefix is summed: each chunk of the batch has a partial sum, and the last
// kernel adds those in their order.
struct PrefixGrad {
  float* partial_k = nullptr;  // [chunks, A_i, P_i, G, E]
  float* partial_v = nullptr;
  int tiles = 0;          // of columns
  int chunks = 1;         // of the batch
  int chunk_samples = 0;  // samples of a chunk
  int first_block = 0;    // of the kernel of keys and values
};

struct BackwardParams {
  CudaInputs in;
  // In the composed form dq of the own columns, by the other attention, with the strides of K; null
  // otherwise.
  const void* own_dq = nullptr;  // [B, H, S, E]

  // Between the kernels. Rows are padded to whole tiles, so that a tile of them comes by aligned
  // copies.
  float* row_lse = nullptr;       // [B, H, padded_rows], in units of log 2; inf where p is 0
  float* row_delta = nullptr;     // [B, H, padded_rows], dout . out
  float* gate_partial = nullptr;  // [B, H, row_tiles]; null where dgate is not wanted
  PrefixGrad prefix[kMaxPrefixes] = {};
  int padded_rows = 0;
  int row_tiles = 0;
  int prefix_blocks = 0;  // of the kernel of keys and values: they come first
  int own_tiles = 0;      // of columns of K, if their gradients are wanted
};

// What each kernel's file offers; launch.cpp chooses.
void launch_fwd_sm80(const ForwardParams& params);
void launch_bwd_queries_sm80(const BackwardParams& params);
void launch_bwd_keys_sm80(const BackwardParams& params);
void launch_bwd_bias_sm80(const BackwardParams& params);
void launch_bwd_sums_sm80(const BackwardParams& params);

// Tiles that the plan has to know of: queries of a block of the first launch, and queries, own
// columns and prefix columns of one of the second.
constexpr int kQueryTile = 128;
constexpr int kRowTile = 64;
constexpr int kOwnTile = 64;
constexpr int kPrefixTile = 16;

}  // namespace pelt::prefix_attention
