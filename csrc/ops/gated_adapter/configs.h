// The configurations that exist, for the kernels that are compiled for each of them, the launchers
// that choose the first one that fits, and why_not.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/type_list.h"
#include "ops/gated_adapter/params.h"

namespace pelt::gated_adapter {

// Of the kernels with both products: dtype; ranks whose sums are in registers at a time; ranks that
// fit in shared memory.
template <template <class, int, int> class Config>
using ConfigsOf = TypeList<Config<bf16, 16, 16>, Config<bf16, 48, 48>, Config<bf16, 64, 64>,
                           Config<bf16, 128, 128>, Config<bf16, 128, 512>, Config<f16, 16, 16>,
                           Config<f16, 48, 48>, Config<f16, 64, 64>, Config<f16, 128, 128>,
                           Config<f16, 128, 512>>;

template <class C>
constexpr bool fits(DType dtype, int64_t R) {
  return DTypeOf<typename C::T>::value == dtype && R <= C::kRanks;
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
