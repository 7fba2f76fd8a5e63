// The executor's memory: stacks of the fibers, and shared memory with guard zones around it.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "common/check.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#define PELT_SIM_POISON(address, bytes) __asan_poison_memory_region(address, bytes)
#define PELT_SIM_UNPOISON(address, bytes) __asan_unpoison_memory_region(address, bytes)
#else
#define PELT_SIM_POISON(address, bytes) ((void)(address), (void)(bytes))
#define PELT_SIM_UNPOISON(address, bytes) ((void)(address), (void)(bytes))
#endif

namespace pelt::sim {

#if defined(__SANITIZE_ADDRESS__) || !defined(__OPTIMIZE__)
constexpr size_t kStackBytes = 256 * 1024;  // red zones and unoptimised frames are large
#else
constexpr size_t kStackBytes = 64 * 1024;
#endif
constexpr uint64_t kStackCanary = 0x5ca1ab1e0ddba11u;
constexpr size_t kSharedAlignment = 1024;
constexpr size_t kGuardBytes = 4096;  // on both sides of the arena
constexpr unsigned char kGuardByte = 0xa5;
constexpr unsigned char kUnwrittenByte = 0xff;  // NaN in every float type, -1 in every integer

// Stacks are kept between launches: mapping them anew would cost more than a small kernel does.
class StackPool {
 public:
  StackPool() = default;
  StackPool(const StackPool&) = delete;
  StackPool& operator=(const StackPool&) = delete;
  ~StackPool() {
    for (char* stack : free_) munmap(stack, kStackBytes);
  }

  char* take() {
    if (free_.empty()) {
      void* stack = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE,
                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      check(stack != MAP_FAILED, "simulator: no memory for a thread's stack of ", kStackBytes,
            " bytes");
      free_.push_back(static_cast<char*>(stack));
    }
    char* stack = free_.back();
    free_.pop_back();
    PELT_SIM_UNPOISON(stack, kStackBytes);
    memcpy(stack, &kStackCanary, sizeof(kStackCanary));
    return stack;
  }

  // False once a thread has used the stack down to its last bytes.
  static bool is_intact(const char* stack) {
    return memcmp(stack, &kStackCanary, sizeof(kStackCanary)) == 0;
  }

  void give_back(char* stack) { free_.push_back(stack); }

 private:
  std::vector<char*> free_;
};

// A block's shared memory between two guard zones. The zone behind it begins at the last requested
// byte: AddressSanitizer reports a touch as it happens, a plain build finds writes after the block.
class Arena {
 public:
  explicit Arena(size_t bytes) : bytes_(bytes) {
    const size_t whole = (bytes + kSharedAlignment - 1) / kSharedAlignment * kSharedAlignment;
    total_ = whole + 2 * kGuardBytes;
    start_ = static_cast<char*>(std::aligned_alloc(kSharedAlignment, total_));
    check(start_ != nullptr, "simulator: no memory for ", bytes, " bytes of shared memory");
    memset(start_, kGuardByte, total_);
    memset(base(), kUnwrittenByte, bytes_);
    PELT_SIM_POISON(start_, kGuardBytes);
    PELT_SIM_POISON(base() + bytes_, total_ - kGuardBytes - bytes_);
  }
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;
  ~Arena() {
    PELT_SIM_UNPOISON(start_, total_);
    std::free(start_);
  }

  char* base() const { return start_ + kGuardBytes; }
  size_t bytes() const { return bytes_; }

  // Whether a guard byte was overwritten; the first one, as an offset from base(). Lifts the
  // poison, so it is for a block that has finished.
  bool find_overrun(ptrdiff_t* offset) const {
    PELT_SIM_UNPOISON(start_, total_);
    const auto* bytes = reinterpret_cast<const unsigned char*>(start_);
    for (size_t i = 0; i < total_; ++i) {
      const bool is_guard = i < kGuardBytes || i >= kGuardBytes + bytes_;
      if (is_guard && bytes[i] != kGuardByte) {
        *offset = static_cast<ptrdiff_t>(i) - static_cast<ptrdiff_t>(kGuardBytes);
        return true;
      }
    }
    return false;
  }

 private:
  size_t bytes_;
  size_t total_ = 0;
  char* start_ = nullptr;
};

}  // namespace pelt::sim
