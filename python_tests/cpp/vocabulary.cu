// Compiles the device vocabulary with nvcc: every kernel of kernels.cuh is instantiated by its
// launch.
#include "common/launch.h"
#include "kernels.cuh"

namespace pelt::test {

template <auto... kKernels>
void launch_all(const Params& params) {
  (launch<kKernels>("vocabulary", LaunchShape{}, nullptr, params), ...);
}

void compile_vocabulary(const Params& params) {
  launch_all<exchange<true>, exchange_in_warp<true>, named_barriers, copy_asynchronously<true>,
             copy_in_two_stages, load_misaligned, diverge, shuffle_and_vote, count_and_ballot,
             moments, multiply_tiles<bf16>, multiply_tiles<f16>, ldmatrix_narrow,
             gather_from_all_blocks, last_block_reduces, derive_activations>(params);
}

}  // namespace pelt::test
