#include "cpu/isa.h"

#include "common/check.h"

namespace pelt::cpu {

const char* name_of(Isa isa) {
  constexpr const char* kNames[kIsaCount] = {"baseline", "avx2", "avx512", "avx512_bf16"};
  return kNames[static_cast<int>(isa)];
}

bool is_supported(Isa isa) {
  if (isa == Isa::kBaseline) return true;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                        __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
  if (isa == Isa::kAvx2) return has_avx2;
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") &&
                          __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512cd") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (isa == Isa::kAvx512) return has_avx512;
  return has_avx512 && __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

Isa best_isa() {
  static const Isa best = [] {
    for (int i = kIsaCount - 1; i > 0; --i) {
      if (is_supported(static_cast<Isa>(i))) return static_cast<Isa>(i);
    }
    return Isa::kBaseline;
  }();
  return best;
}

Isa isa_by_name(const std::string& name) {
  if (name.empty()) return best_isa();
  for (int i = 0; i < kIsaCount; ++i) {
    const auto isa = static_cast<Isa>(i);
    if (name == name_of(isa) && is_supported(isa)) return isa;
  }
  std::string able;
  for (int i = 0; i < kIsaCount; ++i) {
    const auto isa = static_cast<Isa>(i);
    if (is_supported(isa)) able += sentence(able.empty() ? "" : ", ", name_of(isa));
  }
  fail("instruction set: expected one that this processor runs (", able, "), got '", name, "'");
}

}  // namespace pelt::cpu
