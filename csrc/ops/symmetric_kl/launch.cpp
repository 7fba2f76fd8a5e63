// Which kernels serve a call. There is one family so far, for sm_80 and everything after it.
#include "common/check.h"
#include "ops/symmetric_kl/params.h"

namespace pelt::symmetric_kl {

std::string why_not(int64_t T, int64_t C) {
  constexpr int64_t kLimit = int64_t{1} << 30;
  if (T >= kLimit || C >= kLimit) {
    return sentence("it counts rows and columns in 32 bits, so T and C must be below ", kLimit,
                    ", and they are ", T, " and ", C);
  }
  return "";
}

void launch_symmetric_kl_fwd(const ForwardParams& params, void* workspace, Stream stream) {
  launch_symmetric_kl_fwd_sm80(params, workspace, stream);
}

void launch_symmetric_kl_bwd(const BackwardParams& params, Stream stream) {
  launch_symmetric_kl_bwd_sm80(params, stream);
}

}  // namespace pelt::symmetric_kl
