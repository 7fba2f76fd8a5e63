#include "sim/executor.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <exception>
#include <memory>
#include <numeric>

#include "common/check.h"
#include "sim/block.h"
#include "sim/memory_pool.h"

namespace pelt::sim {
namespace {

std::atomic<uint64_t> g_seed{1};

// splitmix64: any seed, also 0 and neighbouring ones, gives an unrelated sequence.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint64_t next() {
    uint64_t z = (state_ += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }
  uint32_t below(uint32_t bound) { return static_cast<uint32_t>((next() >> 32) * bound >> 32); }

 private:
  uint64_t state_;
};

// One launch. The current one and its running fiber are found through these, because a kernel's
// code has no argument that could carry them.
class Execution;
thread_local Execution* t_execution = nullptr;
thread_local Thread* t_thread = nullptr;
thread_local StackPool t_stacks;

class Execution {
 public:
  Execution(const std::string& kernel, const GridShape& shape, const std::function<void()>& body)
      : kernel_(kernel), shape_(shape), body_(body), random_(g_seed.load()) {}

  ~Execution() {
    while (!alive_.empty()) retire(alive_.size() - 1);
  }

  void run() {
    const int count = shape_.blocks.x * shape_.blocks.y * shape_.blocks.z;
    std::vector<int> order(count);
    std::iota(order.begin(), order.end(), 0);
    shuffle(order);
    for (int i = 0; i < count; ++i) {
      bring_to_life(order[i]);
      if (!shape_.is_cooperative || i + 1 == count) drive();
    }
  }

  // ---- called on the fibers; each may let other fibers run before it returns ----

  void make_ready(Thread& thread) {
    thread.waits_at = nullptr;
    warp_of(thread).ready |= lane_bit(thread);
  }

  void wait(const char* at) {
    Thread& thread = *t_thread;
    thread.waits_at = at;
    warp_of(thread).ready &= ~lane_bit(thread);
    thread.fiber.suspend();
  }

  void preempt() { t_thread->fiber.suspend(); }

  // A thread that waits in vain is set aside; wake_spinners() asks it again.
  void wait_for_flag(const char* what, const std::function<bool()>& is_met) {
    preempt();
    while (!is_met()) {
      spinning_.push_back(t_thread);
      wait(what);
    }
    ++progress_;
  }

  void note_progress() { ++progress_; }

  // The last thread to arrive wakes the others, and lets them run first: code behind a barrier must
  // not depend on who reached it last.
  void barrier(const char* instruction, int id, int threads, bool waits) {
    Thread& thread = *t_thread;
    check(id >= 0 && id < kNamedBarriers, where(), instruction, ": expected a barrier from 0 to ",
          kNamedBarriers - 1, ", got ", id);
    check(threads > 0 && threads % kWarpLanes == 0 && threads <= shape_.threads, where(),
          instruction, ": expected a multiple of 32 threads up to ", shape_.threads, ", got ",
          threads);
    Barrier& barrier = thread.block->barriers[id];
    check(barrier.arrived == 0 || barrier.expected == threads, where(), instruction, ": barrier ",
          id, " was entered for ", barrier.expected, " threads, and now for ", threads);
    barrier.expected = threads;
    if (++barrier.arrived == threads) {
      for (Thread* waiting : barrier.waiting) make_ready(*waiting);
      barrier.waiting.clear();
      barrier.arrived = 0;
      ++progress_;
      preempt();
    } else if (waits) {
      barrier.waiting.push_back(&thread);
      wait(instruction);
    }
  }

  // The last lane to arrive executes the instruction for all 32, with operands as they were when
  // each lane arrived.
  void rendezvous(const char* instruction, void* operands, void (*execute)(Lanes)) {
    Thread& thread = *t_thread;
    Warp& warp = warp_of(thread);
    if (warp.arrived != 0 && warp.instruction != instruction &&
        strcmp(warp.instruction, instruction) != 0) {
      fail(where(), "lane ", lane_of(thread), " arrived at ", instruction, " while lanes ",
           describe_lanes(warp.arrived), " are at ", warp.instruction,
           "; a warp-wide instruction needs all 32 lanes");
    }
    warp.instruction = instruction;
    warp.operands[lane_of(thread)] = operands;
    warp.arrived |= lane_bit(thread);
    if (warp.arrived == ~uint32_t{0}) {
      warp.arrived = 0;
      execute(warp.operands);
      const int first = thread.index / kWarpLanes * kWarpLanes;
      for (int lane = 0; lane < kWarpLanes; ++lane) make_ready(thread.block->threads[first + lane]);
    } else {
      wait(instruction);
    }
  }

  uint32_t draw(uint32_t outcomes) { return random_.below(outcomes); }
  const GridShape& shape() const { return shape_; }

  // The beginning of every message about the current thread.
  std::string where() const {
    return sentence("simulator: kernel ", kernel_, ", block ", describe(t_thread->block->index),
                    ", warp ", t_thread->index / kWarpLanes, ", lane ", lane_of(*t_thread), ": ");
  }

 private:
  static int lane_of(const Thread& thread) { return thread.index % kWarpLanes; }
  static uint32_t lane_bit(const Thread& thread) { return uint32_t{1} << lane_of(thread); }
  static Warp& warp_of(Thread& thread) { return thread.block->warps[thread.index / kWarpLanes]; }

  void shuffle(std::vector<int>& order) {
    for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[draw(i)]);
  }

  // The entry of a fiber. No exception may cross a switch of stacks, so it is carried by hand to
  // resume(), which throws it on the scheduler's stack.
  static void enter_thread(void* argument) {
    auto* thread = static_cast<Thread*>(argument);
    try {
      t_execution->body_();
    } catch (...) {
      t_execution->fault_ = std::current_exception();
    }
    Warp& warp = warp_of(*thread);
    warp.ready &= ~lane_bit(*thread);
    warp.finished |= lane_bit(*thread);
    --thread->block->unfinished;
    t_execution->note_progress();
  }

  // Makes a block and all its threads, ready to run.
  void bring_to_life(int linear) {
    alive_.push_back(std::make_unique<Block>(shape_.shared_bytes, shape_.threads));
    Block& block = *alive_.back();
    block.index = {linear % shape_.blocks.x, linear / shape_.blocks.x % shape_.blocks.y,
                   linear / shape_.blocks.x / shape_.blocks.y};
    block.unfinished = shape_.threads;
    block.order.resize(block.warps.size());
    std::iota(block.order.begin(), block.order.end(), 0);
    shuffle(block.order);
    for (int i = 0; i < shape_.threads; ++i) {
      Thread& thread = block.threads[i];
      thread.block = &block;
      thread.index = i;
      thread.stack = t_stacks.take();
      thread.fiber.start(thread.stack, kStackBytes, &enter_thread, &thread);
      make_ready(thread);
    }
  }

  void retire(size_t position) {
    for (Thread& thread : alive_[position]->threads) t_stacks.give_back(thread.stack);
    alive_.erase(alive_.begin() + static_cast<ptrdiff_t>(position));
  }

  // Runs the living blocks to their end.
  void drive() {
    while (!alive_.empty()) {
      const size_t start = draw(static_cast<uint32_t>(alive_.size()));
      bool has_run = false;
      for (size_t i = 0; i < alive_.size() && !has_run; ++i) {
        const size_t position = (start + i) % alive_.size();
        has_run = run_burst(*alive_[position]);
        if (alive_[position]->unfinished == 0) {
          check_guards(*alive_[position]);
          retire(position);
          has_run = true;
        }
      }
      if (!has_run && !wake_spinners()) fail(describe_deadlock());
    }
  }

  // Runs threads of one block for a while; false if none of them is ready.
  bool run_burst(Block& block) {
    // A block alone runs through. One among several stops at a random point, so that the others see
    // its flags in many states.
    int switches = alive_.size() == 1 ? 1 << 30 : 1 + static_cast<int>(draw(512));
    bool has_run = false;
    for (; switches > 0; --switches) {
      Thread* thread = pick(block);
      if (thread == nullptr) break;
      resume(*thread);
      has_run = true;
    }
    return has_run;
  }

  // A ready thread of the first warp in the current order that has one. A warp therefore runs as
  // far ahead of the others as barriers let it, which is what makes a missing barrier visible; the
  // order changes now and then, at a random moment.
  Thread* pick(Block& block) {
    if (draw(64) == 0) shuffle(block.order);
    for (int w : block.order) {
      const uint32_t ready = block.warps[w].ready;
      if (ready == 0) continue;
      const uint32_t turn = draw(kWarpLanes);
      const uint32_t rotated = ready >> turn | ready << ((kWarpLanes - turn) % kWarpLanes);
      const uint32_t lane = (static_cast<uint32_t>(__builtin_ctz(rotated)) + turn) % kWarpLanes;
      return &block.threads[w * kWarpLanes + lane];
    }
    return nullptr;
  }

  void resume(Thread& thread) {
    t_thread = &thread;
    thread.fiber.resume(scheduler_);
    t_thread = nullptr;
    if (fault_) std::rethrow_exception(fault_);
    check(StackPool::is_intact(thread.stack), "simulator: kernel ", kernel_,
          ": a thread used more than its ", kStackBytes, " bytes of stack");
  }

  // Threads that wait for a flag are asked again only when nothing else can run; if nothing has
  // happened since they were last asked, nothing ever will.
  bool wake_spinners() {
    if (spinning_.empty() || progress_ == progress_at_last_wake_) return false;
    progress_at_last_wake_ = progress_;
    for (Thread* thread : spinning_) make_ready(*thread);
    spinning_.clear();
    return true;
  }

  void check_guards(const Block& block) const {
    ptrdiff_t offset = 0;
    if (!block.arena.find_overrun(&offset)) return;
    fail("simulator: kernel ", kernel_, ", block ", describe(block.index),
         ": wrote outside its shared memory, at byte ", offset, " of ", shape_.shared_bytes);
  }

  std::string describe_deadlock() const {
    std::ostringstream out;
    out << "simulator: kernel " << kernel_ << ": deadlock";
    int reports = 0;
    for (const auto& block : alive_) {
      for (size_t w = 0; w < block->warps.size() && reports < 8; ++w) {
        const std::string text = describe_stuck_warp(*block, static_cast<int>(w));
        if (text.empty()) continue;
        out << "; block " << describe(block->index) << ", warp " << w << ": " << text;
        ++reports;
      }
    }
    if (!shape_.is_cooperative && !spinning_.empty()) {
      out << "; the launch is not cooperative, so a block must not wait for another one's flag";
    }
    return out.str();
  }

  std::string kernel_;
  GridShape shape_;
  const std::function<void()>& body_;
  Random random_;
  Context scheduler_;
  std::vector<std::unique_ptr<Block>> alive_;
  std::vector<Thread*> spinning_;
  uint64_t progress_ = 1;
  uint64_t progress_at_last_wake_ = 0;
  std::exception_ptr fault_;
};

// A pointer that is set for the duration of a launch and cleared however the launch ends.
struct ActiveExecution {
  explicit ActiveExecution(Execution& execution) { t_execution = &execution; }
  ~ActiveExecution() {
    t_execution = nullptr;
    t_thread = nullptr;
  }
};

}  // namespace

void set_seed(uint64_t seed) { g_seed = seed; }
uint64_t seed() { return g_seed; }

void run(const std::string& kernel, const GridShape& shape, const std::function<void()>& body) {
  check(t_execution == nullptr, "simulator: kernel ", kernel, " was launched from inside a kernel");
  check(shape.threads > 0 && shape.threads <= 1024 && shape.threads % kWarpLanes == 0,
        "simulator: kernel ", kernel, ": expected a multiple of 32 threads up to 1024, got ",
        shape.threads);
  check(shape.blocks.x > 0 && shape.blocks.y > 0 && shape.blocks.z > 0, "simulator: kernel ",
        kernel, ": expected at least one block, got ", describe(shape.blocks));
  Execution execution(kernel, shape, body);
  ActiveExecution active(execution);
  execution.run();
}

int thread_index() { return t_thread->index; }
Index3 block_index() { return t_thread->block->index; }
Index3 grid_blocks() { return t_execution->shape().blocks; }
int block_threads() { return t_execution->shape().threads; }
SharedMemory shared_memory() {
  return {t_thread->block->arena.base(), t_thread->block->arena.bytes()};
}
CopyQueue& copy_queue() { return t_thread->copies; }
uint32_t draw(uint32_t outcomes) { return t_execution->draw(outcomes); }

void preempt() {
  t_execution->note_progress();
  t_execution->preempt();
}

void wait_for_flag(const char* what, const std::function<bool()>& is_met) {
  t_execution->wait_for_flag(what, is_met);
}

void barrier(const char* instruction, int id, int threads, bool waits) {
  t_execution->barrier(instruction, id, threads, waits);
}

void rendezvous(const char* instruction, void* operands, void (*execute)(Lanes lanes)) {
  t_execution->rendezvous(instruction, operands, execute);
}

void check_aligned(const char* instruction, const void* address, size_t bytes) {
  const size_t excess = reinterpret_cast<uintptr_t>(address) % bytes;
  if (excess != 0) {
    fail(t_execution->where(), instruction, ": expected an address that is a multiple of ", bytes,
         ", got ", address, ", which is ", excess, " too high");
  }
}

void check_in_shared(const char* instruction, const void* address, size_t bytes) {
  const SharedMemory memory = shared_memory();
  const ptrdiff_t offset = static_cast<const char*>(address) - memory.base;
  if (offset < 0 || offset + bytes > memory.bytes) {
    fail(t_execution->where(), instruction, ": expected ", bytes,
         " bytes inside the block's shared memory of ", memory.bytes, " bytes, got offset ",
         offset);
  }
}

}  // namespace pelt::sim
