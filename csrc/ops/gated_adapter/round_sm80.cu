// Both weights of gated_adapter rounded to the activation's type, where a call has them in float32
// beside 16-bit activations, as automatic mixed precision does. The products of every tile take them
// rounded: doing that once costs their bytes once, and leaves the loops of the other kernels with
// copies that pass through no register.
//
// A thread rounds eight neighbouring elements at a time. Read: 4 bytes of each element; written: 2.
#include "cuda/device.cuh"
#include "ops/gated_adapter/params.h"

namespace pelt::gated_adapter {
namespace {

constexpr int kRoundThreads = 256;

template <class T>
__global__ void __launch_bounds__(kRoundThreads)
    gated_adapter_round_sm80(const __grid_constant__ RoundParams p) {
  for (int i = 0; i < 2; ++i) {
    const RoundParams::Weight& weight = p.weight[i];
    const int64_t step = static_cast<int64_t>(grid_blocks_x()) * kRoundThreads * 8;
    const int64_t first = static_cast<int64_t>(block_index_x()) * kRoundThreads + thread_index();
    for (int64_t e = 8 * first; e < weight.count; e += step) {
      store_16(static_cast<T*>(weight.to) + e, narrow<T>(load_8(weight.from + e)));
    }
  }
}

template <class T>
void launch_typed(const RoundParams& p, Stream stream) {
  LaunchShape shape;
  shape.threads = kRoundThreads;
  const int64_t count =
      p.weight[0].count > p.weight[1].count ? p.weight[0].count : p.weight[1].count;
  const int64_t blocks = (count / 8 + kRoundThreads - 1) / kRoundThreads;
  const int64_t most = 8 * multiprocessors();  // more than that take another turn
  shape.blocks_x = static_cast<int>(blocks < most ? blocks : most);
  launch<gated_adapter_round_sm80<T>>("gated_adapter_round_sm80", shape, stream, p);
}

}  // namespace

void launch_round_sm80(const RoundParams& p, DType dtype, Stream stream) {
  if (dtype == DType::kBF16) {
    launch_typed<bf16>(p, stream);
  } else {
    launch_typed<f16>(p, stream);
  }
}

}  // namespace pelt::gated_adapter
