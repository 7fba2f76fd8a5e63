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

// Of the weights' gradients: dtype; the ranks of a tile; whether x and dy are multiplied as they lie
// in memory, with neither dropout nor a pre-norm between.
template <template <class, int, bool> class Config>
using WeightConfigsOf =
    TypeList<Config<bf16, 16, true>, Config<bf16, 48, true>, Config<bf16, 64, true>,
             Config<f16, 16, true>, Config<f16, 64, true>, Config<bf16, 16, false>,
             Config<bf16, 48, false>, Config<bf16, 64, false>, Config<f16, 16, false>,
             Config<f16, 64, false>>;

// The fewest tiles, and of these the smallest that is listed.
constexpr int weight_ranks(DType dtype, int64_t R) {
  if (R <= 16) return 16;
  const int64_t tiles = (R + 63) / 64;
  return dtype == DType::kBF16 && R <= 48 * tiles ? 48 : 64;
}

// Floats that a block leaves of a tile: the gradients of both weights [ranks, columns], then db_up
// and dw_gate [columns], db_down [ranks].
constexpr int partial_floats(int ranks) { return 2 * ranks * kChunk + 2 * kChunk + ranks; }

}  // namespace pelt::gated_adapter
