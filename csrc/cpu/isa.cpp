#include "cpu/isa.h"

#if defined(PELT_WITH_AMX)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "common/check.h"

namespace pelt::cpu {

namespace {

enum class Tiles { kAbsent, kRefused, kReady };

// What the processor lists, and whether the system lets this process use it: a thread's tiles are 8
// KB that Linux saves only for processes that asked. Asked once, for all threads.
Tiles tiles_of_processor() {
#if defined(PELT_WITH_AMX)
  static const Tiles found = [] {
    constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24;  // of EDX
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kBf16) == 0 || (d & kTile) == 0) {
      return Tiles::kAbsent;
    }
    constexpr int kRequestPermission = 0x1023, kTileData = 18;
    const bool may = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
    return may ? Tiles::kReady : Tiles::kRefused;
  }();
  return found;
#else
  return Tiles::kAbsent;
#endif
}

}  // namespace

const char* name_of(Isa isa) {
  constexpr const char* kNames[kIsaCount] = {"baseline", "avx2", "avx512", "avx512_bf16", "amx"};
  return kNames[static_cast<int>(isa)];
}

// Each instruction set contains the ones before it, so each test includes theirs: a system may
// switch off what the processor lists.
bool is_supported(Isa isa) {
#if defined(PELT_SIMULATED_TILES)
  return isa == Isa::kAmx;
#else
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
  const bool has_bf16 = has_avx512 && __builtin_cpu_supports("avx512bf16");
  if (isa == Isa::kAvx512Bf16) return has_bf16;
  return has_bf16 && tiles_of_processor() == Tiles::kReady;
#else
  return false;
#endif
#endif
}

std::string why_no_tiles() {
  if (tiles_of_processor() != Tiles::kRefused) return "";
  return "the processor has AMX tiles, but the system does not let this process use them";
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
