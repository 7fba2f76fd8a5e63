#include "cpu/isa.h"

#include <atomic>

#include "common/check.h"

namespace pelt::cpu {

namespace {

std::atomic<int> chosen_isa{-1};

Isa best_isa() {
  static const Isa best = [] {
    for (int i = kIsaCount - 1; i > 0; --i) {
      if (is_supported(static_cast<Isa>(i))) return static_cast<Isa>(i);
    }
    return Isa::kBaseline;
  }();
  return best;
}

}  // namespace

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

Isa current_isa() {
  const int chosen = chosen_isa.load(std::memory_order_relaxed);
  return chosen < 0 ? best_isa() : static_cast<Isa>(chosen);
}

void choose_isa(const std::string& name) {
  if (name.empty()) {
    chosen_isa = -1;
    return;
  }
  std::string able;
  for (int i = 0; i < kIsaCount; ++i) {
    if (!is_supported(static_cast<Isa>(i))) continue;
    if (name == name_of(static_cast<Isa>(i))) {
      chosen_isa = i;
      return;
    }
    able += sentence(able.empty() ? "" : ", ", name_of(static_cast<Isa>(i)));
  }
  fail("instruction set: expected one that this processor runs (", able, "), got '", name, "'");
}

}  // namespace pelt::cpu
