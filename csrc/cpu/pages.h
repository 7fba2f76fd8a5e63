// Large results and page faults.
#pragma once

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace pelt::cpu {
namespace {

// glibc gives memory back to the kernel soon, above 32 MB at once, so many a call pays a page fault
// for every 4 KB of its results: 14 ms for 33 MB, where the writing takes 2 (EPYC Zen 3). Asked for
// in time, the kernel gives pages of 2 MB.
inline void prefer_huge_pages(void* memory, int64_t bytes) {
#if defined(__linux__)
  constexpr int64_t kHuge = int64_t{2} << 20;
  if (memory == nullptr || bytes < kHuge) return;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(memory);
  const uintptr_t first = (begin + kHuge - 1) / kHuge * kHuge;
  const uintptr_t last = (begin + static_cast<uintptr_t>(bytes)) / kHuge * kHuge;
  // Advice only: where the kernel has no such pages, nothing changes.
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  (void)memory, (void)bytes;
#endif
}

}  // namespace
}  // namespace pelt::cpu
