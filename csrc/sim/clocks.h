// Which accesses are ordered, by vector clocks.
//
// A warp's own time is its epoch, a number that grows at each barrier. Every access is stamped with
// warp, lane and epoch. An earlier access is ordered before one of warp w if w knows of it: because
// the same lane made it, because a barrier of the warp or the block lies between, or because w
// acquired a counter on which somebody who knew of it had released. Whatever else happened to run
// first is a race, also where the numbers came out right.
#pragma once

#include <cstdint>
#include <optional>
#include <unordered_map>

namespace pelt::sim {

// One access, packed into 64 bits, of which 0 means that there was none.
struct Stamp {
  static constexpr int kWarpBits = 20, kEpochBits = 20, kCodeBits = 18, kLaneBits = 6;
  static constexpr uint32_t kManyLanes = 32;  // several lanes read
  static constexpr uint32_t kUnderWay = 33;   // an asynchronous copy that has not been waited for
  static constexpr uint32_t kEarlier = 34;    // before this launch

  uint64_t bits = 0;

  static Stamp of(uint32_t warp, uint32_t lane, uint32_t epoch, uint32_t code) {
    return {(((uint64_t{warp} << kEpochBits | epoch) << kCodeBits | code) << kLaneBits) | lane};
  }
  static Stamp earlier() { return {kEarlier}; }
  static Stamp under_way(Stamp copy) { return {copy.bits >> kLaneBits << kLaneBits | kUnderWay}; }
  uint32_t lane() const { return bits & ((1u << kLaneBits) - 1); }
  uint32_t code() const { return (bits >> kLaneBits) & ((1u << kCodeBits) - 1); }
  uint32_t epoch() const { return (bits >> (kLaneBits + kCodeBits)) & ((1u << kEpochBits) - 1); }
  uint32_t warp() const {
    return static_cast<uint32_t>(bits >> (kLaneBits + kCodeBits + kEpochBits));
  }
  // Warp, epoch and instruction: the same for the lanes of one instruction.
  uint64_t without_lane() const { return bits >> kLaneBits; }
};

// What is known of one warp: all lanes' accesses of epochs before `before`, and those of some lanes
// of epochs before `lanes_before`.
struct Known {
  uint32_t before = 0;
  uint32_t lanes = 0;
  uint32_t lanes_before = 0;
  void join(const Known& other);
  bool covers(uint32_t lane, uint32_t epoch) const {
    return epoch < before || (lane < 32 && ((lanes >> lane) & 1) && epoch < lanes_before);
  }
};

// What is known of all warps. Those of one block, which meet at every barrier, have a table.
class Knowledge {
 public:
  static constexpr uint32_t kBlockWarps = 32;

  explicit Knowledge(uint32_t first_warp_of_block) : first_(first_warp_of_block) {}
  Known& of(uint32_t warp) {
    const uint32_t i = warp - first_;
    return i < kBlockWarps ? block_[i] : others_[warp];
  }
  bool covers(Stamp earlier) const {
    const uint32_t i = earlier.warp() - first_;
    if (i < kBlockWarps) return block_[i].covers(earlier.lane(), earlier.epoch());
    const auto found = others_.find(earlier.warp());
    return found != others_.end() && found->second.covers(earlier.lane(), earlier.epoch());
  }
  void join(const Knowledge& other);

 private:
  uint32_t first_;
  Known block_[kBlockWarps];
  std::unordered_map<uint32_t, Known> others_;
};

class Clock {
 public:
  uint32_t epoch = 1;
  // Accesses of the own warp's other lanes are ordered if they are of an epoch before this one.
  uint32_t joined = 1;

  Clock(uint32_t warp, uint32_t first_warp_of_block)
      : warp_(warp), first_(first_warp_of_block), knowledge_(first_warp_of_block) {}

  bool is_after(Stamp earlier, uint32_t lane) const {
    if (earlier.warp() == warp_) return earlier.lane() == lane || earlier.epoch() < joined;
    return knowledge_.covers(earlier) || (has_acquired(lane) && acquired_->covers(earlier));
  }

  // A barrier of all lanes of the warp: what one has acquired, all know.
  void join_lanes();
  // A release by a lane: adds what it knows to a counter's knowledge. The instruction ends by
  // tick(), so that the lanes of one release together.
  void release(uint32_t lane, Knowledge& counter) const;
  void tick() { ++epoch; }
  // An acquire by one lane, and by all of them.
  void acquire(uint32_t lane, const Knowledge& counter);
  void acquire(const Knowledge& barrier) { knowledge_.join(barrier); }
  // Adds what the warp brings to a barrier of the block.
  void bring(Knowledge& barrier) const;

 private:
  bool has_acquired(uint32_t lane) const { return ((acquirers_ >> lane) & 1) != 0; }

  uint32_t warp_, first_;
  Knowledge knowledge_;
  uint32_t acquirers_ = 0;             // lanes that have acquired since the last barrier
  std::optional<Knowledge> acquired_;  // what they have
};

}  // namespace pelt::sim
