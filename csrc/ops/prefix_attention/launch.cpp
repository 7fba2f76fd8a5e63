// Which kernels serve a call, and how backward is cut. There is one family of kernels so far, for
// sm_80 and everything after it.
#include <algorithm>

#include "common/arena.h"
#include "ops/prefix_attention/configs.h"

namespace pelt::prefix_attention {
namespace {

// Of a configuration what why_not asks for.
template <class T_, int kE_>
struct Capacity {
  using T = T_;
  static constexpr int kE = kE_;
};

int tiles_of(int64_t size, int tile) { return static_cast<int>((size + tile - 1) / tile); }

// In the composed form the places of K and V hold what another attention has made of them.
CudaInputs inputs_of(const Call& call) {
  CudaInputs in(call);
  if (call.form == kComposed) in.N = 0;
  return in;
}

// Blocks for the gradients of one prefix tile: enough for a large GPU, from sizes alone, so that
// the order of every sum is the same on all of them.
constexpr int kPrefixBlocks = 512;

// Cuts the work, and lays out the workspace.
BackwardParams backward_params(const Call& call, Arena& arena) {
  BackwardParams p{inputs_of(call)};
  const CudaInputs& in = p.in;
  if (call.form == kComposed) p.own_dq = call.input[kK];
  const int64_t heads = static_cast<int64_t>(in.B) * in.H;
  p.padded_rows = tiles_of(in.S, kRowTile) * kRowTile;
  p.row_tiles = tiles_of(in.S, kQueryTile);
  p.row_lse = arena.take(heads * p.padded_rows);
  p.row_delta = arena.take(heads * p.padded_rows);
  if (in.grad[kGate] != nullptr) p.gate_partial = arena.take(heads * p.row_tiles);
  for (int i = 0; i < in.prefixes; ++i) {
    PrefixGrad& grad = p.prefix[i];
    const int64_t size = static_cast<int64_t>(in.A_i[i]) * in.P_i[i] * in.G * in.E;
    const bool has_grad = in.grad[kPrefixK + i] != nullptr || in.grad[kPrefixV + i] != nullptr;
    const int before = in.first[i] - in.tiles_from(in.first[i]);
    grad.tiles = has_grad && in.P_i[i] > 0 ? tiles_of(before + in.P_i[i], kPrefixTile) : 0;
    const int64_t blocks = static_cast<int64_t>(in.A_i[i]) * in.G * grad.tiles;
    const int64_t wanted = blocks == 0 ? 1 : kPrefixBlocks / blocks;
    grad.chunks = static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(wanted, in.B)));
    grad.chunk_samples = tiles_of(in.B, grad.chunks);
    grad.chunks = tiles_of(in.B, grad.chunk_samples);
    grad.first_block = p.prefix_blocks;
    p.prefix_blocks += static_cast<int>(blocks) * grad.chunks;
    if (in.grad[kPrefixK + i] != nullptr) grad.partial_k = arena.take(grad.chunks * size);
    if (in.grad[kPrefixV + i] != nullptr) grad.partial_v = arena.take(grad.chunks * size);
  }
  const bool wants_own = in.grad[kK] != nullptr || in.grad[kV] != nullptr;
  p.own_tiles = wants_own && in.N > 0 ? tiles_of(in.P - in.tiles_from(in.P) + in.N, kOwnTile) : 0;
  return p;
}

}  // namespace
}  // namespace pelt::prefix_attention

namespace pelt {

using namespace prefix_attention;

template <>
std::string Cuda<Contract>::why_not(const NativeCall<Contract, int64_t>& call) {
  if (call.dtype == DType::kF32) {
    return "its matrix products take float16 or bfloat16 activations, and q is float32";
  }
  if (!find_config<Capacity>(call.dtype, call.E, [](auto) {})) {
    return sentence("head size ", call.E, " is not one of ", kHeadSizes);
  }
  // Rows, columns and tiles are counted in 32 bits; elements are in 64.
  constexpr int64_t kMaxRows = int64_t{1} << 31;
  constexpr int64_t kMaxColumns = int64_t{1} << 21;
  const int64_t rows = call.S, columns = Inputs<int64_t>(call).P + call.N, heads = call.B * call.H;
  if (heads * rows >= kMaxRows || heads * columns >= kMaxRows) {
    return sentence("its tiles are counted in 32 bits, so B H S and B H (P + N) must be below ",
                    kMaxRows, ", and they are ", heads * rows, " and ", heads * columns);
  }
  if (rows > kMaxColumns || columns > kMaxColumns) {
    return sentence(
        "a head's rows and columns are counted in 21 bits, so S and P + N must be at most ",
        kMaxColumns, ", and they are ", rows, " and ", columns);
  }
  return "";
}

template <>
void Cuda<Contract>::forward(const Call& call, Arena& arena) {
  if (arena.only_counts) return;
  ForwardParams p{inputs_of(call)};
  if (call.form == kComposed) {
    p.own_out = call.input[kK];
    p.own_lse = call.input_as<float>(kV);
  }
  launch_fwd_sm80(p);
}

template <>
void Cuda<Contract>::backward(const Call& call, Arena& arena) {
  const BackwardParams p = backward_params(call, arena);
  if (arena.only_counts) return;
  launch_bwd_queries_sm80(p);
  if (p.prefix_blocks > 0 || p.own_tiles > 0) launch_bwd_keys_sm80(p);
  if (call.grad[kBias] != nullptr) launch_bwd_bias_sm80(p);
  if (p.prefix_blocks > 0 || p.gate_partial != nullptr) launch_bwd_sums_sm80(p);
}

}  // namespace pelt
