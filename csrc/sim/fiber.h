// A fiber: a call that can be suspended and resumed, with a stack of its own.
//
// A simulated kernel switches fibers at every warp instruction, so the switch itself must be cheap.
// On x86-64 it saves the six callee-saved registers and changes the stack pointer; swapcontext, the
// fallback everywhere else, asks the operating system to save the signal mask each time (about 20
// times slower here). Both tell AddressSanitizer which stack is the current one.
#pragma once

#include <cstddef>

#if defined(__x86_64__) && !defined(PELT_SIM_UCONTEXT)
#define PELT_SIM_ASSEMBLY_SWITCH 1
#else
#define PELT_SIM_ASSEMBLY_SWITCH 0
#include <ucontext.h>
#endif

namespace pelt::sim {

// Where a suspended call continues: the thread that runs the scheduler, or a fiber.
struct Context {
#if PELT_SIM_ASSEMBLY_SWITCH
  void* stack_pointer = nullptr;
#else
  ucontext_t state;
#endif
  const void* stack_bottom = nullptr;  // for AddressSanitizer
  size_t stack_bytes = 0;
  void* fake_stack = nullptr;  // AddressSanitizer's, while this context is suspended
};

class Fiber {
 public:
  using Entry = void (*)(void* argument);

  // Prepares the call entry(argument) on the given stack. The entry must not let an exception out.
  // A fiber that was started and never finished may simply be started again: kernels own nothing.
  void start(void* stack, size_t stack_bytes, Entry entry, void* argument);

  // Runs the fiber until it suspends or its entry returns. Called by the scheduler.
  void resume(Context& scheduler);

  // Goes back to the scheduler. Called on the fiber.
  void suspend() { leave(/*for_good=*/false); }

  bool has_finished() const { return has_finished_; }

 private:
  static void begin();
  void leave(bool for_good);

  Context own_;
  Context* scheduler_ = nullptr;
  Entry entry_ = nullptr;
  void* argument_ = nullptr;
  bool has_finished_ = true;
};

}  // namespace pelt::sim
