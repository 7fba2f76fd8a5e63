// The configurations that exist, for the kernels that are compiled for each of them, the launchers
// that choose the first one that fits, and why_not.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/type_list.h"
#include "ops/gated_adapter/options.h"

namespace pelt::gated_adapter {

// Of the kernels with both products: dtype; ranks whose sums are in registers at a time; ranks that
// fit in shared memory; options. The first that fits a call serves it.
template <template <class, int, int, class> class Config>
using ConfigsOf =
    TypeList<Config<bf16, 16, 16, Usual>, Config<bf16, 48, 48, Plain>, Config<bf16, 48, 48, Usual>,
             Config<bf16, 64, 64, Plain>, Config<bf16, 64, 64, Usual>,
             Config<bf16, 128, 128, Usual>, Config<bf16, 64, 64, General>,
             Config<bf16, 128, 512, General>, Config<f16, 16, 16, Usual>,
             Config<f16, 64, 64, Usual>, Config<f16, 128, 128, Usual>, Config<f16, 64, 64, General>,
             Config<f16, 128, 512, General>>;

template <class C>
constexpr bool fits(DType dtype, int64_t R) {
  return DTypeOf<typename C::T>::value == dtype && R <= C::kRanks;
}

template <class C>
bool serves(const Call& in) {
  return fits<C>(in.dtype, in.R) && C::Options::serve(in);
}

// Of the weights' gradients: dtype and the ranks of a tile, one of these two.
constexpr int kNarrow = 16, kWide = 64;
template <template <class, int> class Config>
using WeightConfigsOf =
    TypeList<Config<bf16, kNarrow>, Config<bf16, kWide>, Config<f16, kNarrow>, Config<f16, kWide>>;

constexpr int weight_ranks(int64_t R) { return R <= kNarrow ? kNarrow : kWide; }

// Floats that a block leaves of a tile: the gradients of both weights [ranks, columns], then db_up
// and dw_gate [columns], db_down [ranks].
constexpr int partial_floats(int ranks) { return 2 * ranks * kChunk + 2 * kChunk + ranks; }

}  // namespace pelt::gated_adapter
