// Which kernels serve a call. There is one family so far, for sm_80 and everything after it.
#include "common/arena.h"
#include "common/check.h"
#include "ops/symmetric_kl/params.h"

namespace pelt {

using namespace symmetric_kl;

template <>
std::string Cuda<Contract>::why_not(const NativeCall<Contract, int64_t>& call) {
  constexpr int64_t kLimit = int64_t{1} << 30;
  if (call.T >= kLimit || call.C >= kLimit) {
    return sentence("it counts rows and columns in 32 bits, so T and C must be below ", kLimit,
                    ", and they are ", call.T, " and ", call.C);
  }
  return "";
}

template <>
void Cuda<Contract>::forward(const Call& call, Arena& arena) {
  ForwardParams p{call};
  p.ticket = arena.take<int>(1);
  p.rows = arena.take<float>(call.T);
  if (arena.only_counts) return;
  zero_async(p.ticket, sizeof(int), call.stream);
  launch_forward_sm80(p);
}

template <>
void Cuda<Contract>::backward(const Call& call, Arena& arena) {
  if (!arena.only_counts) launch_backward_sm80(call);
}

}  // namespace pelt
