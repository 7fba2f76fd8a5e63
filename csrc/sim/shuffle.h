// Host bodies of cuda/shuffle.cuh. Each lane leaves its operands where it waits, and the last one
// to arrive computes the results of all; a lane that is missing is reported as a deadlock.
#pragma once

#include <cstdint>
#include <type_traits>

#include "sim/executor.h"

namespace pelt {
namespace sim_detail {

template <class T>
struct Shuffle {
  T value;
  int argument;  // the lane mask, or the source lane
  T result;
};

}  // namespace sim_detail

template <class T>
inline T shfl_xor(T value, int lane_mask) {
  static_assert(sizeof(T) == 4 && std::is_trivially_copyable_v<T>,
                "shuffles move 32-bit registers");
  using Operands = sim_detail::Shuffle<T>;
  Operands own{value, lane_mask, T{}};
  sim::rendezvous("shfl_xor", &own, [](sim::Lanes lanes) {
    for (int lane = 0; lane < sim::kWarpLanes; ++lane) {
      auto* to = static_cast<Operands*>(lanes[lane]);
      to->result = static_cast<const Operands*>(lanes[(lane ^ to->argument) % 32])->value;
    }
  });
  return own.result;
}

template <class T>
inline T shfl(T value, int source_lane) {
  static_assert(sizeof(T) == 4 && std::is_trivially_copyable_v<T>,
                "shuffles move 32-bit registers");
  using Operands = sim_detail::Shuffle<T>;
  Operands own{value, source_lane, T{}};
  sim::rendezvous("shfl", &own, [](sim::Lanes lanes) {
    for (int lane = 0; lane < sim::kWarpLanes; ++lane) {
      auto* to = static_cast<Operands*>(lanes[lane]);
      to->result = static_cast<const Operands*>(lanes[to->argument % 32])->value;
    }
  });
  return own.result;
}

inline bool vote_any(bool holds) {
  bool flag = holds;
  sim::rendezvous("vote_any", &flag, [](sim::Lanes lanes) {
    bool any = false;
    for (int lane = 0; lane < sim::kWarpLanes; ++lane) any |= *static_cast<bool*>(lanes[lane]);
    for (int lane = 0; lane < sim::kWarpLanes; ++lane) *static_cast<bool*>(lanes[lane]) = any;
  });
  return flag;
}

inline uint32_t vote_ballot(bool holds) {
  uint32_t own = holds;
  sim::rendezvous("vote_ballot", &own, [](sim::Lanes lanes) {
    uint32_t ballot = 0;
    for (int lane = 0; lane < sim::kWarpLanes; ++lane) {
      ballot |= *static_cast<uint32_t*>(lanes[lane]) << lane;
    }
    for (int lane = 0; lane < sim::kWarpLanes; ++lane) {
      *static_cast<uint32_t*>(lanes[lane]) = ballot;
    }
  });
  return own;
}

inline int count_bits(uint32_t bits) { return __builtin_popcount(bits); }

}  // namespace pelt
