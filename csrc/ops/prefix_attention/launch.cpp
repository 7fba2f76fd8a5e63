// Which kernels serve a call. There is one family so far, for sm_80 and everything after it.
#include <algorithm>

#include "ops/prefix_attention/configs.h"

namespace pelt::prefix_attention {

std::string why_not(DType dtype, int64_t B, int64_t H, int64_t S, int64_t N, int64_t P, int64_t E) {
  if (dtype == DType::kF32) {
    return "its matrix products take float16 or bfloat16 activations, and q is float32";
  }
  // Forward and backward are served by the same backend, so every kernel has to fit.
  const size_t bytes = std::max({prefix_attention_fwd_sm80_bytes(dtype, E),
                                 prefix_attention_bwd_queries_sm80_bytes(dtype, E),
                                 prefix_attention_bwd_keys_sm80_bytes(dtype, E),
                                 prefix_attention_bwd_bias_sm80_bytes(dtype, E)});
  if (bytes == 0) return sentence("head size ", E, " is not one of ", kHeadSizes);
  if (const size_t most = max_shared_bytes(); bytes > most) {
    return sentence("at head size ", E, " a block of its kernels takes ", bytes,
                    " bytes of shared memory, and this GPU offers ", most);
  }
  // Rows, columns and tiles are counted in 32 bits; elements are in 64.
  constexpr int64_t kMaxRows = int64_t{1} << 31;
  constexpr int64_t kMaxColumns = int64_t{1} << 21;
  if (B * H * S >= kMaxRows || B * H * (P + N) >= kMaxRows) {
    return sentence("its tiles are counted in 32 bits, so B H S and B H (P + N) must be below ",
                    kMaxRows, ", and they are ", B * H * S, " and ", B * H * (P + N));
  }
  if (S > kMaxColumns || P + N > kMaxColumns) {
    return sentence(
        "a head's rows and columns are counted in 21 bits, so S and P + N must be at most ",
        kMaxColumns, ", and they are ", S, " and ", P + N);
  }
  return "";
}

namespace {

int tiles_of(int64_t size, int tile) { return static_cast<int>((size + tile - 1) / tile); }

// Blocks for the gradients of one prefix tile: enough for a large GPU, from sizes alone, so that
// the order of every sum is the same on all of them.
constexpr int kPrefixBlocks = 512;

// Cuts the work, and lays out the workspace; returns its size.
int64_t plan(BackwardParams& p, void* workspace) {
  const Inputs& in = p.in;
  int64_t floats = 0;
  auto take = [&](int64_t count) {
    float* at = workspace == nullptr ? nullptr : static_cast<float*>(workspace) + floats;
    floats += (count + 3) / 4 * 4;
    return at;
  };
  const int64_t heads = static_cast<int64_t>(in.B) * in.H;
  p.padded_rows = tiles_of(in.S, kRowTile) * kRowTile;
  p.row_tiles = tiles_of(in.S, kQueryTile);
  p.row_lse = take(heads * p.padded_rows);
  p.row_delta = take(heads * p.padded_rows);
  if (p.dgate.data != nullptr) p.gate_partial = take(heads * p.row_tiles);
  p.prefix_blocks = 0;
  for (int i = 0; i < in.prefixes; ++i) {
    PrefixGrad& grad = p.prefix[i];
    const Prefix& prefix = in.prefix[i];
    const int64_t size = static_cast<int64_t>(prefix.members) * prefix.length * in.G * in.E;
    const bool has_grad = grad.dprefix_k.data != nullptr || grad.dprefix_v.data != nullptr;
    // Tiles start at a multiple of 4 of the joined axis, as dropout's words do.
    grad.tiles =
        has_grad && prefix.length > 0 ? tiles_of(prefix.first % 4 + prefix.length, kPrefixTile) : 0;
    const int64_t blocks = static_cast<int64_t>(prefix.members) * in.G * grad.tiles;
    const int64_t wanted = blocks == 0 ? 1 : kPrefixBlocks / blocks;
    grad.chunks = static_cast<int>(wanted < 1 ? 1 : (wanted < in.B ? wanted : in.B));
    grad.chunk_samples = tiles_of(in.B, grad.chunks);
    grad.chunks = tiles_of(in.B, grad.chunk_samples);
    grad.first_block = p.prefix_blocks;
    p.prefix_blocks += static_cast<int>(blocks) * grad.chunks;
    if (grad.dprefix_k.data != nullptr) grad.partial_k = take(grad.chunks * size);
    if (grad.dprefix_v.data != nullptr) grad.partial_v = take(grad.chunks * size);
  }
  const bool wants_own = p.dk != nullptr || p.dv != nullptr;
  p.own_tiles = wants_own && in.N > 0 ? tiles_of(in.P % 4 + in.N, kOwnTile) : 0;
  return floats * static_cast<int64_t>(sizeof(float));
}

}  // namespace

int64_t backward_workspace_bytes(const BackwardParams& params) {
  BackwardParams p = params;
  return plan(p, nullptr);
}

void launch_prefix_attention_fwd(const ForwardParams& params, Stream stream) {
  launch_prefix_attention_fwd_sm80(params, stream);
}

void launch_prefix_attention_bwd(const BackwardParams& params, void* workspace, Stream stream) {
  BackwardParams p = params;
  plan(p, workspace);
  launch_prefix_attention_bwd_queries_sm80(p, stream);
  if (p.prefix_blocks > 0 || p.own_tiles > 0) launch_prefix_attention_bwd_keys_sm80(p, stream);
  if (p.dbias.data != nullptr) launch_prefix_attention_bwd_bias_sm80(p, stream);
  if (p.prefix_blocks > 0 || p.dgate.data != nullptr) {
    launch_prefix_attention_bwd_sums_sm80(p, stream);
  }
}

}  // namespace pelt::prefix_attention
