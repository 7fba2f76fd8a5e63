// gated_adapter backward on the CPU, from x, h and the gate's value. With dropped = dropout(dy),
// a = phi(h), f = scale g and du the gradient of u = W_up a + b_up (f dropped, if there is no
// post-norm):
//
//   da = du W_up          dh = da phi'(h)          dx = dh W_down + dlogit w_gate + dy
//   dW_up = du^T a        dW_down = dh^T x         dgate = sum over rows of <dropped, u>
//
// The last needs no up projection again: <dropped, u> = <dropped W_up, a> + <dropped, b_up>.
//
//   rows:     dy tile -> da -> dh and f a, [B * S, R] in memory; each row's dot and gate's logit
//   gates:    dgate, dscale, dlogit: sums over what the rows left
//   rest:     tiles of dx; and columns of the weights' gradients,
//
//                G [R, columns] = sum over all rows of S [rows, R]^T X [rows, columns]
//
//             with S = dh, X = x for dW_down and S = f a, X = dropped for the transpose of dW_up.
//             A thread owns columns and passes by all rows in order, in stretches of kRowsAtOnce
//             that it packs once. No partial sums of weights exist, and threads do not matter.
//
// On tiles (cpu/pairs.h) dh and f a are rounded to bfloat16, as rows for dx and as the transpose
// S^T for the weights. What weights the rows of X for a gradient [columns] rides along as two more
// rows of S^T: its bfloat16 value, and what that leaves out.
//
// A pre-norm: G = dh^T xhat, from which dW_down and the norm's gradients follow without another
// pass, since the gradient of xhat's affine image is dh W_down. A post-norm: u is made again, du
// goes through memory, and its parameters' gradients are summed by tiles of a fixed cut.
#include "cpu/entry.h"
#include "cpu/kernels.h"
#include "ops/gated_adapter/cpu_backward_weights.h"

namespace pelt::gated_adapter {
namespace {

struct Backward : WeightsBackward {
  using WeightsBackward::WeightsBackward;

  template <class T>
  void run() {
    prefer_huge_pages(call.grad[kX], rows_of(call) * call.D * static_cast<int64_t>(sizeof(T)));
    parameters.read<T>(call);
    clear_unused_members<T>(call);
    pack<T>();
    // rows: a tile's scratch belongs to the thread, what it leaves lies by rows
    parallel_for_on(tiles.count(), call.threads, [&](int64_t i, int thread) {
      const TileScope scope;
      rows_backward<T>(i, scratch + thread * scratch_floats);
    });
    gates_backward<T>();  // dlogit, before dx and dw_gate need it

    // rest: the large tasks of the weights first, so that the small ones of dx even out the end
    const int64_t blocks = (width() + kColumnsAtOnce - 1) / kColumnsAtOnce;
    const int64_t down_tasks = wants_down() ? parameters.down.slots * blocks : 0;
    const int64_t up_tasks = call.grad[kWUp] || call.grad[kBUp] ? parameters.up.slots * blocks : 0;
    const int64_t tile_tasks = call.grad[kX] ? tiles.count() : 0;
    parallel_for_on(down_tasks + up_tasks + tile_tasks, call.threads, [&](int64_t i, int thread) {
      const TileScope scope;
      float* memory = scratch + thread * scratch_floats;
      if (i < down_tasks) {
        down_backward<T>(i / blocks, i % blocks * kColumnsAtOnce, memory);
      } else if (i < down_tasks + up_tasks) {
        const int64_t task = i - down_tasks;
        up_backward<T>(task / blocks, task % blocks * kColumnsAtOnce, memory);
      } else {
        x_backward<T>(tiles.at(i - down_tasks - up_tasks), memory);
      }
    });
    column_sums_backward<T>();
  }

  // What sums over rows of x or dh give. A pre-norm's gradients follow from dh^T xhat.
  bool wants_down() const {
    return call.grad[kWDown] || call.grad[kBDown] || call.grad[kGateWeight] ||
           call.grad[kPreNormWeight] || call.grad[kPreNormBias];
  }

  // W_up for da always, W_down for dx, and W_up the other way round for u again.
  template <class T>
  void pack() {
    const int64_t ups = parameters.up.slots * up.panels_per_slot(by_pairs);
    const int64_t downs =
        call.grad[kX] ? parameters.down.slots * down.panels_per_slot(by_pairs) : 0;
    const int64_t agains =
        has_post_norm(call) ? parameters.up.slots * up_again.panels_per_slot(by_pairs) : 0;
    parallel_for(ups + downs + agains, pack_threads(call), [&](int64_t i) {
      if (i < ups) {
        up.pack<T>(call, parameters.up, i);
      } else if (i < ups + downs) {
        down.pack<T>(call, parameters.down, i - ups);
      } else {
        up_again.pack<T>(call, parameters.up, i - ups - downs);
      }
    });
  }
};

}  // namespace

}  // namespace pelt::gated_adapter

namespace pelt {

using namespace gated_adapter;
using Kernels = Cpu<Contract, cpu::Isa::PELT_CPU_ISA>;

template <>
void Kernels::backward(const Call& call, Arena& arena) {
  cpu::run<Backward>(call, arena);
}

}  // namespace pelt
