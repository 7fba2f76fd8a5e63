// Which kernels serve a call. There is one family so far, for sm_80 and everything after it.
#include "common/check.h"
#include "ops/masked_weight/params.h"

namespace pelt::masked_weight {

std::string why_not(int64_t Dout, int64_t Din, int64_t R, int64_t R2) {
  constexpr int64_t kLimit = int64_t{1} << 31;
  if (Dout * Din >= kLimit) {
    return sentence("it counts entries in 32 bits, so Dout Din must be below ", kLimit,
                    ", and it is ", Dout * Din);
  }
  constexpr int64_t kMaxRank = 1 << 20;
  if (R >= kMaxRank || R2 >= kMaxRank) {
    return sentence("its ranks must be below ", kMaxRank, ", and they are R=", R, " and R2=", R2);
  }
  return "";
}

void launch_masked_weight_fwd(const ForwardParams& params, void* workspace, Stream stream) {
  launch_masked_weight_fwd_sm80(params, workspace, stream);
}

void launch_masked_weight_bwd(const BackwardParams& params, void* workspace, Stream stream) {
  launch_masked_weight_bwd_sm80(params, workspace, stream);
}

}  // namespace pelt::masked_weight
