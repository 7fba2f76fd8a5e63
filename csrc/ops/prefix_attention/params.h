// prefix_attention: out = softmax([g scale Q Pk^T ; scale Q K^T + bias + mask]) [g Pv ; V].
//
// Plain pointers, sizes and numbers, filled in by the bindings. A null pointer is an input that is
// not there. Shapes are the contract's (pelt_kernels/ops/prefix_attention/contract.py), in its
// letters.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "common/dtype.h"
#include "common/launch.h"
#include "common/parameter.h"
#include "cuda/philox.cuh"

namespace pelt::prefix_attention {

constexpr int kMaxPrefixes = 4;

// In elements; the last dimension's stride is 1.
struct Strides {
  int64_t batch = 0;
  int64_t head = 0;
  int64_t row = 0;
};

struct Prefix {
  Parameter prefix_k;                     // [P_i, G, E] | [A_i, P_i, G, E]
  Parameter prefix_v;                     // [P_i, G, E] | [A_i, P_i, G, E]
  const int64_t* prefix_index = nullptr;  // [B]
  int members = 1;                        // A_i; 1 for a prefix that the batch shares
  int length = 0;                         // P_i
  int first = 0;                          // its first column of the joined axis
  Strides k_strides;                      // batch: of a member
  Strides v_strides;
};

// Prefix columns and own columns (the model's own keys) are one axis of P + N columns: `column`
// always means a position on it.
struct Inputs {
  DType dtype = DType::kBF16;
  int B = 0;
  int H = 0;
  int G = 0;
  int S = 0;
  int N = 0;
  int E = 0;
  int P = 0;  // the sum of P_i

  const void* q = nullptr;  // [B, H, S, E]
  const void* k = nullptr;  // [B, G, N, E]
  const void* v = nullptr;  // [B, G, N, E]
  Strides q_strides;
  Strides k_strides;
  Strides v_strides;
  Prefix prefix[kMaxPrefixes];
  int prefixes = 0;
  Parameter gate;                    // [B] | [B, H]
  const bool* key_mask = nullptr;    // [B, N]
  const int64_t* lengths = nullptr;  // [B]
  Parameter bias;                    // [B, H, S, N] | [1, H, S, N] | [B, 1, S, N] | [1, 1, S, N]
  int64_t bias_batch_stride = 0;     // in elements; 0 where one serves all
  int64_t bias_head_stride = 0;
  bool has_gate_per_head = false;
  bool is_causal = false;
  float scale = 1.0f;
  Dropout dropout;
  PhiloxKeys dropout_keys;  // of its seed
};

struct ForwardParams {
  Inputs in;
  void* out = nullptr;   // [B, H, S, E]
  float* lse = nullptr;  // [B, H, S]

  // In the composed form another attention has attended to the own columns, and here there are none
  // (N = 0): its results, to which the prefixes are added. Null in the single form.
  const void* own_out = nullptr;   // [B, H, S, E]
  const float* own_lse = nullptr;  // [B, H, S]
  Strides own_out_strides;
};

// Where the gradient of a prefix goes, and its partial sums: one for each chunk of the batch, which
// the last kernel adds in their order.
struct PrefixGrad {
  ParameterGrad dprefix_k;     // [P_i, G, E] | [A_i, P_i, G, E]
  ParameterGrad dprefix_v;     // [P_i, G, E] | [A_i, P_i, G, E]
  float* partial_k = nullptr;  // [chunks, A_i, P_i, G, E]
  float* partial_v = nullptr;
  int tiles = 0;          // of columns
  int chunks = 1;         // of the batch
  int chunk_samples = 0;  // samples of a chunk
  int first_block = 0;    // of the kernel of keys and values
};

struct BackwardParams {
  Inputs in;
  const void* dout = nullptr;  // [B, H, S, E]
  const void* out = nullptr;   // [B, H, S, E]
  const float* lse = nullptr;  // [B, H, S]

  void* dq = nullptr;  // [B, H, S, E]
  void* dk = nullptr;  // [B, G, N, E]
  void* dv = nullptr;  // [B, G, N, E]
  PrefixGrad prefix[kMaxPrefixes];
  ParameterGrad dgate;  // [B] | [B, H]
  ParameterGrad dbias;  // [B, H, S, N] | [1, H, S, N] | [B, 1, S, N] | [1, 1, S, N]
  bool is_dbias_shared_by_batch = false;
  bool is_dbias_shared_by_heads = false;

  // In the composed form dq of the own columns, by the other attention; null otherwise.
  const void* own_dq = nullptr;  // [B, H, S, E]
  Strides own_dq_strides;

  // Between the kernels. Rows are padded to whole tiles, so that a tile of them comes by aligned
  // copies.
  float* row_lse = nullptr;       // [B, H, padded_rows], in units of log 2; inf where p is 0
  float* row_delta = nullptr;     // [B, H, padded_rows], dout . out
  float* gate_partial = nullptr;  // [B, H, row_tiles]
  int padded_rows = 0;
  int row_tiles = 0;
  int prefix_blocks = 0;  // of the kernel of keys and values: they come first
  int own_tiles = 0;      // of columns of K, if their gradients are wanted
};

// Why the kernels refuse a call on the current device, with numbers; empty if they serve it.
std::string why_not(DType dtype, int64_t B, int64_t H, int64_t S, int64_t N, int64_t P, int64_t E);

// Bytes of device memory that backward needs beside its inputs and outputs. Which gradients are
// wanted is told by their pointers.
int64_t backward_workspace_bytes(const BackwardParams& params);

void launch_prefix_attention_fwd(const ForwardParams& params, Stream stream);
void launch_prefix_attention_bwd(const BackwardParams& params, void* workspace, Stream stream);

// What each kernel's file offers; launch.cpp chooses. The bytes are the shared memory of a block, 0
// where the kernel has no configuration.
size_t prefix_attention_fwd_sm80_bytes(DType dtype, int64_t E);
size_t prefix_attention_bwd_queries_sm80_bytes(DType dtype, int64_t E);
size_t prefix_attention_bwd_keys_sm80_bytes(DType dtype, int64_t E);
size_t prefix_attention_bwd_bias_sm80_bytes(DType dtype, int64_t E);

void launch_prefix_attention_fwd_sm80(const ForwardParams& params, Stream stream);
void launch_prefix_attention_bwd_queries_sm80(const BackwardParams& params, Stream stream);
void launch_prefix_attention_bwd_keys_sm80(const BackwardParams& params, Stream stream);
void launch_prefix_attention_bwd_bias_sm80(const BackwardParams& params, Stream stream);
void launch_prefix_attention_bwd_sums_sm80(const BackwardParams& params, Stream stream);

// Tiles that the plan has to know of: queries of a block of the first launch, and queries, own
// columns and prefix columns of one of the second.
constexpr int kQueryTile = 128;
constexpr int kRowTile = 64;
constexpr int kOwnTile = 64;
constexpr int kPrefixTile = 16;

}  // namespace pelt::prefix_attention
