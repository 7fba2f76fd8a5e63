// Which configuration of a kernel serves a call: every kernel has one for each of these dtypes and
// head sizes. The launchers and why_not read the same list.
#pragma once

#include <cstdint>

#include "common/check.h"
#include "common/dtype.h"
#include "common/type_list.h"
#include "ops/prefix_attention/params.h"

namespace pelt::prefix_attention {

template <template <class, int> class Config>
using ConfigsOf = TypeList<Config<bf16, 32>, Config<bf16, 64>, Config<bf16, 96>, Config<bf16, 128>,
                           Config<f16, 32>, Config<f16, 64>, Config<f16, 96>, Config<f16, 128>>;

constexpr const char* kHeadSizes = "32, 64, 96, 128";

template <class Config>
constexpr bool fits(DType dtype, int64_t E) {
  return DTypeOf<typename Config::T>::value == dtype && E == Config::kE;
}

// Calls run(TypeTag<Config>) for the configuration that takes the call's dtype and head size.
template <class Configs, class Run>
void run_fitting(const char* kernel, const Inputs& in, Run&& run) {
  const bool found = run_first_fit(
      Configs{}, [&](auto tag) { return fits<typename decltype(tag)::type>(in.dtype, in.E); }, run);
  check(found, kernel, ": expected bfloat16 or float16 and a head size of ", kHeadSizes, ", got ",
        name_of(in.dtype), " and E=", in.E);
}

}  // namespace pelt::prefix_attention
