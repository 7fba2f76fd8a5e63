#include "sim/fiber.h"

#include <cstdint>
#include <cstring>

#if defined(__SANITIZE_ADDRESS__)
#define PELT_SIM_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define PELT_SIM_ASAN 1
#endif
#endif

#if defined(PELT_SIM_ASAN)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if PELT_SIM_ASSEMBLY_SWITCH
// Saves the callee-saved registers of the System V ABI on the current stack, stores its pointer in
// *from and continues on the stack `to` where its own switch left off.
extern "C" void pelt_sim_switch_stack(void** from, void* to);
asm(R"(
.text
.p2align 4
.hidden pelt_sim_switch_stack
.globl pelt_sim_switch_stack
.type pelt_sim_switch_stack, @function
pelt_sim_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size pelt_sim_switch_stack, .-pelt_sim_switch_stack
)");
#endif

namespace pelt::sim {
namespace {

// The fiber that begin() is entered for: a fresh stack has no argument registers to carry it.
thread_local Fiber* t_starting = nullptr;

void announce_switch(Context& from, const Context& to, bool for_good) {
#if defined(PELT_SIM_ASAN)
  __sanitizer_start_switch_fiber(for_good ? nullptr : &from.fake_stack, to.stack_bottom,
                                 to.stack_bytes);
#else
  (void)from, (void)to, (void)for_good;
#endif
}

// `came_from` is null where the extent of that stack is known already.
void complete_switch(Context& now, Context* came_from) {
#if defined(PELT_SIM_ASAN)
  __sanitizer_finish_switch_fiber(now.fake_stack, came_from ? &came_from->stack_bottom : nullptr,
                                  came_from ? &came_from->stack_bytes : nullptr);
#else
  (void)now, (void)came_from;
#endif
}

void switch_context(Context& from, Context& to) {
#if PELT_SIM_ASSEMBLY_SWITCH
  pelt_sim_switch_stack(&from.stack_pointer, to.stack_pointer);
#else
  swapcontext(&from.state, &to.state);
#endif
}

}  // namespace

void Fiber::start(void* stack, size_t stack_bytes, Entry entry, void* argument) {
  entry_ = entry;
  argument_ = argument;
  has_finished_ = false;
  own_.stack_bottom = stack;
  own_.stack_bytes = stack_bytes;
  own_.fake_stack = nullptr;
#if defined(PELT_SIM_ASAN)
  // Frames of a call that was abandoned on this stack have left their red zones behind.
  __asan_unpoison_memory_region(stack, stack_bytes);
#endif
#if PELT_SIM_ASSEMBLY_SWITCH
  // The frame that the first switch pops: six registers, then begin() as the return address, then a
  // null return address for begin() itself, which also aligns its stack as a call would have.
  uintptr_t top = (reinterpret_cast<uintptr_t>(stack) + stack_bytes) & ~uintptr_t{15};
  void** frame = reinterpret_cast<void**>(top) - 8;
  memset(frame, 0, 8 * sizeof(void*));
  frame[6] = reinterpret_cast<void*>(&Fiber::begin);
  own_.stack_pointer = frame;
#else
  getcontext(&own_.state);
  own_.state.uc_stack.ss_sp = stack;
  own_.state.uc_stack.ss_size = stack_bytes;
  own_.state.uc_link = nullptr;
  makecontext(&own_.state, &Fiber::begin, 0);
#endif
}

void Fiber::resume(Context& scheduler) {
  scheduler_ = &scheduler;
  t_starting = this;
  announce_switch(scheduler, own_, /*for_good=*/false);
  switch_context(scheduler, own_);
  complete_switch(scheduler, nullptr);
}

void Fiber::leave(bool for_good) {
  announce_switch(own_, *scheduler_, for_good);
  switch_context(own_, *scheduler_);
  complete_switch(own_, scheduler_);
}

void Fiber::begin() {
  Fiber* self = t_starting;
  complete_switch(self->own_, self->scheduler_);
  self->entry_(self->argument_);
  self->has_finished_ = true;
  self->leave(/*for_good=*/true);
  __builtin_trap();  // nobody resumes a fiber that has finished
}

}  // namespace pelt::sim
