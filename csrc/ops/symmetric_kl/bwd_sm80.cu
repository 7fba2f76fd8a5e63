// symmetric_kl, backward, one launch:
//   dz1 = -dz2 = 0.5 dloss (exp(z1 - lse1) - exp(z2 - lse2)) / count
//
// One pass over the logits. The target of each divergence is a constant for the gradient, which is
// therefore not the derivative of the value. Rows that do not count are not read, and get zeros.
// Shared memory: 32 bytes.
#include "common/type_list.h"
#include "ops/symmetric_kl/rows.cuh"

namespace pelt::symmetric_kl {
namespace {

struct Shared {
  float partial[kWarps];
};

// Grid: rows in turns; a warp, or for a long row the block, has one at a time.
template <class C>
__global__ void __launch_bounds__(kThreads) symmetric_kl_bwd_sm80(const __grid_constant__ Call in) {
  using T = typename C::T;
  auto& s = shared_memory_as<Shared>();
  const float *dloss = in.doutput_as<float>(kLoss), *lse = in.output_as<float>(kLse);
  // Null where a gradient is not wanted.
  T *to1 = in.grad_as<T>(kZ1), *to2 = in.grad_as<T>(kZ2);
  // dloss is read on the device: the host need not wait for it.
  const float factor = 0.5f * *dloss / count_of(in, s.partial);
  const int64_t step = static_cast<int64_t>(grid_blocks_x()) * C::kRows;
  const int64_t start = block_index_x() * C::kRows + warp_index() / C::kRowWarps;
  for (int64_t row = start; row < in.T; row += step) {
    const T *z1 = in.input_as<T>(kZ1) + row * in.C, *z2 = in.input_as<T>(kZ2) + row * in.C;
    const float lse1 = lse[row], lse2 = lse[in.T + row];
    // A row that does not count is not read: it may hold anything, NaN too.
    const bool is_read = counts(in, row);
    for_columns<C>(in, [&](auto tag, int c) {
      constexpr int kCount = decltype(tag)::value;
      Elements<kCount> dz1 = {}, dz2 = {};
      if (is_read) {
        const auto a = load_elements<kCount>(z1 + c), b = load_elements<kCount>(z2 + c);
        for (int i = 0; i < kCount; ++i) {
          // Probabilities from the saved log-sum-exps. A class that does not exist has 0 in both.
          dz1.v[i] = factor * (expf(a.v[i] - lse1) - expf(b.v[i] - lse2));
          dz2.v[i] = -dz1.v[i];
        }
      }
      // Also zeros for a row that was not read: the gradients' memory was not zeroed.
      if (to1 != nullptr) store_elements(to1 + row * in.C + c, dz1);
      if (to2 != nullptr) store_elements(to2 + row * in.C + c, dz2);
    });
  }
}

}  // namespace

void launch_backward_sm80(const Call& call) {
  run_first_fit(
      Configs{}, [&](auto tag) { return decltype(tag)::type::fits(call); },
      [&](auto tag) {
        using C = typename decltype(tag)::type;
        const LaunchShape shape{blocks_of<C>(call), 1, 1, kThreads, sizeof(Shared)};
        launch<symmetric_kl_bwd_sm80<C>>("symmetric_kl_bwd_sm80", shape, call.stream, call);
      });
}

}  // namespace pelt::symmetric_kl
