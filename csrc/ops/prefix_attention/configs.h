// Which configuration of a kernel serves a call: every kernel has one for each of these dtypes and
// head sizes. The launchers and why_not read the same list.
#pragma once

#include <cstdint>

#include "common/check.h"
#include "common/dtype.h"
#include "common/launch.h"
#include "common/type_list.h"
#include "ops/prefix_attention/params.h"

namespace pelt::prefix_attention {

template <template <class, int> class Config>
using ConfigsOf = TypeList<Config<bf16, 32>, Config<bf16, 64>, Config<bf16, 96>, Config<bf16, 128>,
                           Config<f16, 32>, Config<f16, 64>, Config<f16, 96>, Config<f16, 128>>;

constexpr const char* kHeadSizes = "32, 64, 96, 128";

// Calls run(TypeTag<Config>) for the configuration of this dtype and head size; false without one.
template <template <class, int> class Config, class Run>
bool find_config(DType dtype, int64_t E, Run&& run) {
  const auto fits = [&](auto tag) {
    using C = typename decltype(tag)::type;
    return DTypeOf<typename C::T>::value == dtype && E == C::kE;
  };
  return run_first_fit(ConfigsOf<Config>{}, fits, run);
}

// Calls run(TypeTag<Config>, kernel) for the configuration that why_not has promised.
template <template <class, int> class Config, class Run>
void run_fitting(const char* kernel, const CudaInputs& in, Run&& run) {
  const bool is_found = find_config<Config>(in.dtype, in.E, [&](auto tag) { run(tag, kernel); });
  check(is_found, kernel, ": expected bfloat16 or float16 and a head size of ", kHeadSizes,
        ", got ", name_of(in.dtype), " and E=", in.E);
}

}  // namespace pelt::prefix_attention
