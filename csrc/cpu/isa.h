// Which instruction set the CPU kernels use.
//
// A *_cpu.cpp file is compiled once for each entry of Isa, with that entry's flags and PELT_CPU_ISA
// defined as its name, and gives one specialization of each function it offers. A call names the
// one it wants; nothing here is kept from call to call. So that no linker can pick a function
// compiled for a newer processor where an older one runs it, those files keep every helper, headers
// included, in unnamed namespaces.
#pragma once

#include <string>

namespace pelt::cpu {

enum class Isa : int {
  kBaseline,    // what the compiler assumes: SSE2 on x86-64, NEON on aarch64
  kAvx2,        // x86-64-v3: AVX2 and FMA, 8 floats
  kAvx512,      // x86-64-v4: 16 floats
  kAvx512Bf16,  // and conversion to bfloat16 in one instruction
  kAmx,         // and products of bfloat16 on tiles; all that the simulator's module holds
};

constexpr int kIsaCount = 5;

const char* name_of(Isa isa);
bool is_supported(Isa isa);  // by this processor and system, and compiled into this module

// Why tiles that this processor lists are not used; empty otherwise.
std::string why_no_tiles();

// The best that the processor supports.
Isa best_isa();

// The one of that name; "" is the best. Throws Error if it cannot run here.
Isa isa_by_name(const std::string& name);

template <Isa kIsa>
struct IsaTag {
  static constexpr Isa value = kIsa;
};

// Calls visit(IsaTag<isa>{}).
template <class Visit>
auto with_isa(Isa isa, Visit&& visit) {
#if defined(PELT_SIMULATED_TILES)
  (void)isa;
  return visit(IsaTag<Isa::kAmx>{});
#else
  switch (isa) {
#if defined(PELT_WITH_AMX)
    case Isa::kAmx:
      return visit(IsaTag<Isa::kAmx>{});
#endif
#if defined(__x86_64__)
    case Isa::kAvx2:
      return visit(IsaTag<Isa::kAvx2>{});
    case Isa::kAvx512:
      return visit(IsaTag<Isa::kAvx512>{});
    case Isa::kAvx512Bf16:
      return visit(IsaTag<Isa::kAvx512Bf16>{});
#endif
    default:
      return visit(IsaTag<Isa::kBaseline>{});
  }
#endif
}

}  // namespace pelt::cpu
