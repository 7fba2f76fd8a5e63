// Which kernels serve a call. There is one family so far, for sm_80 and everything after it.
#include "common/check.h"
#include "ops/gated_adapter/params.h"

namespace pelt::gated_adapter {

std::string why_not(DType dtype, int64_t B, int64_t S, int64_t D, int64_t R) {
  if (dtype == DType::kF32) {
    return "its matrix products take float16 or bfloat16 activations, and x is float32";
  }
  if (D % 8 != 0) {
    return sentence("its rows are read 16 bytes at a time, so D must be a multiple of 8, and D=", D,
                    " is not");
  }
  if (R < 1 || R > kMaxRank) {
    return sentence("h of a tile is kept in shared memory, so R must be 1 to ", kMaxRank,
                    ", and R=", R, " is not");
  }
  // Tiles and columns are counted in 32 bits; elements are in 64.
  constexpr int64_t kMaxRows = int64_t{1} << 31;
  constexpr int64_t kMaxColumns = int64_t{1} << 24;
  if (B * S >= kMaxRows || D > kMaxColumns) {
    return sentence("its tiles are counted in 32 bits, so B S must be below ", kMaxRows,
                    " and D at most ", kMaxColumns, ", and they are ", B * S, " and ", D);
  }
  return "";
}

void launch_gated_adapter_fwd(const ForwardParams& params, void* workspace, Stream stream) {
  launch_gated_adapter_fwd_sm80(params, workspace, stream);
}

void launch_gated_adapter_bwd(const BackwardParams& params, void* workspace, Stream stream) {
  launch_gated_adapter_bwd_sm80(params, workspace, stream);
}

}  // namespace pelt::gated_adapter
