// The machine: blocks, warps and lanes of one launch, and the order in which they run.
//
// A warp's lanes that stand at the same instruction run together, as a group. Of several groups the
// one furthest behind goes first, so that diverged lanes meet again; under some seeds the one
// furthest ahead does, so that nothing may count on that. At a warp-wide instruction a group waits
// for the lanes that the instruction names.
#pragma once

#include <memory>
#include <unordered_map>
#include <vector>

#include "sim/clocks.h"
#include "sim/counters.h"
#include "sim/memory.h"
#include "sim/program.h"
#include "sim/random.h"

namespace pelt::sim {

struct Group {
  int32_t at = 0;
  uint32_t lanes = 0;
  bool waits = false;  // at a warp-wide instruction, for its other lanes
  // The launch's progress when the group last looked at a flag that is not up; 0: awake.
  uint64_t asleep_since = 0;
};

struct PendingCopy {
  uint32_t lane;
  uint32_t to;
  uint32_t bytes;
  int group;
  Stamp stamp;
  uint8_t data[16];
};

struct Block;

struct Warp {
  Warp(Block& of_block, int number, uint32_t id, uint32_t first_warp, size_t register_bytes);

  Block& block;
  int index;    // in the block
  uint32_t id;  // in the launch
  Clock clock;
  std::vector<Group> groups;
  uint32_t returned = 0;   // lanes
  int barrier = -1;        // that the warp waits at
  uint64_t looked_at = 0;  // the launch's progress when a lane last looked at a flag
  int looks = 0;           // since that progress
  std::vector<PendingCopy> copies;
  int open_group[kLanes] = {};  // each lane's group of copies, which its next commit closes
  struct Aligned {
    alignas(64) uint8_t bytes[64];
  };
  std::vector<Aligned> storage;
  uint8_t* registers() { return storage.data()->bytes; }
  bool is_done() const { return returned == kAllLanes; }
};

struct Barrier {
  explicit Barrier(uint32_t first_warp) : knowledge(first_warp) {}
  int expected = 0;  // threads
  int arrived = 0;
  std::vector<Warp*> waiting;
  Knowledge knowledge;
};

struct Block {
  Dim3 index;
  uint32_t first_warp = 0;
  std::vector<uint8_t> shared;
  Shadow shadow;
  std::vector<Barrier> barriers;
  std::vector<std::unique_ptr<Warp>> warps;
  int running = 0;  // warps that have not returned
};

class Machine : public CodeFacts {
 public:
  Machine(const Program& program, const LaunchRequest& request, uint64_t seed);
  void run();

  bool is_strong(uint32_t code) const override { return program_.code[code].is_strong; }
  bool is_read_only(uint32_t code) const override { return program_.code[code].is_read_only; }

 private:
  static constexpr int kBlocksAtOnce = 2;  // of a launch that is not cooperative
  static constexpr int kBarriers = 16;

  // What an instruction is carried out with.
  struct Step {
    Warp& warp;
    const Instruction& i;
    const Operand* operands;
    uint32_t code;
    uint32_t active;
    const uint8_t* constants;
    uint8_t* place(int n) const { return at(operands[n]); }
    uint8_t* at(Operand operand) const {
      return operand.is_constant()
                 ? const_cast<uint8_t*>(constants) + (operand.place & ~Operand::kConstant)
                 : warp.registers() + operand.place;
    }
    const uint32_t* lanes32(int n) const { return reinterpret_cast<const uint32_t*>(place(n)); }
    uint64_t address(int source, int which, int lane) const;
  };

  // ---- scheduling ----
  void start_block(int linear);
  bool run_some_warp();
  void run_warp(Warp& warp, int budget);
  Group* choose_group(Warp& warp);
  bool can_run(const Warp& warp) const;
  bool can_run(const Group& group) const { return !group.waits && group.asleep_since != progress_; }
  static void merge_groups(Warp& warp);
  std::string describe_deadlock() const;
  static std::string describe(const Warp& warp);  // "block 0,0,0, warp 1"

  // ---- instructions; each leaves the group's position to step() but those that change it ----
  // False: the warp or the group has to wait at this instruction.
  bool step(Warp& warp, Group& group);
  bool branch(Group& group, const Step& step);
  bool leave(Group& group, const Step& step);
  bool gather(const Step& step, Group& group);
  bool barrier(const Step& step);
  void special(const Step& step);
  bool load(const Step& step, Group& group);
  void store(const Step& step);
  void atomic(const Step& step);
  void copy_async(const Step& step);
  void land_copies(const Step& step);
  void load_matrix(const Step& step);
  void mma(const Step& step);
  void shuffle(const Step& step);
  void vote(const Step& step);

  // ---- memory ----
  enum class Use { kRead, kWrite, kAtomic };
  // The bytes behind an address after all checks.
  uint8_t* reach(const Step& step, Use use, Space space, uint64_t address, size_t bytes, int lane);
  uint8_t* reach_shared(const Step& step, Use use, uint64_t address, size_t bytes, int lane);
  uint8_t* reach_global(const Step& step, Use use, uint64_t address, size_t bytes, int lane);
  Access access(const Step& step, int lane) const;
  bool touch(Shadow& shadow, const Step& step, Use use, uint64_t address, size_t bytes, int lane,
             Finding* finding);
  // Counts one access of a warp, where launches are counted.
  void count_access(const Step& step, Space space, const uint64_t (&addresses)[kLanes],
                    size_t bytes, bool is_write);
  static bool is_shared(Space space, uint64_t address) {
    return space == Space::kShared || (space == Space::kGeneric && address >= kSharedWindow);
  }

  [[noreturn]] void fault(const Step& step, int lane, const Finding& finding) const;
  [[noreturn]] void fault(const Step& step, int lane, const std::string& text) const;
  std::string where(uint32_t code) const;

  const Program& program_;
  const LaunchRequest& request_;
  Random random_;
  bool furthest_first_;
  std::vector<std::unique_ptr<Block>> alive_;
  std::vector<int> order_;  // of blocks
  size_t next_block_ = 0;
  uint64_t progress_ = 1;  // grows with whatever a waiting warp may wait for
  bool yields_ = false;    // the running warp lets another one go first
  uint32_t warps_per_block_;
  std::unordered_map<uint64_t, Knowledge> counters_;  // by the address that was released on
  LaunchCount& count_;
  TrafficMeter meter_;
  const bool is_counting_, has_checks_;
};

}  // namespace pelt::sim
