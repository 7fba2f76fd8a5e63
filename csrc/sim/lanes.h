// From a function of one lane to an instruction: the table's rows in arithmetic_*.cpp.
#pragma once

#include <cstdint>
#include <cstring>
#include <string>
#include <type_traits>
#include <utility>

#include "sim/program.h"

namespace pelt::sim::lanes {

using s8 = int8_t;
using s16 = int16_t;
using s32 = int32_t;
using s64 = int64_t;
using u8 = uint8_t;
using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;
using f32 = float;

struct f16 {
  u16 bits;
};
struct bf16 {
  u16 bits;
};

template <class T>
constexpr Width width_of() {
  if (std::is_same_v<T, bool>) return Width::kPredicate;
  return sizeof(T) == 8 ? Width::k64 : Width::k32;
}

// How a lane's value stands in its register.
template <class T>
using Stored = std::conditional_t<sizeof(T) == 8, u64, u32>;

template <class T>
T load(const u8* place, int lane) {
  if constexpr (std::is_same_v<T, bool>) {
    return (*reinterpret_cast<const u32*>(place) >> lane) & 1;
  } else if constexpr (sizeof(T) >= 4) {
    return reinterpret_cast<const T*>(place)[lane];
  } else if constexpr (std::is_integral_v<T>) {
    return static_cast<T>(reinterpret_cast<const u32*>(place)[lane]);
  } else {
    return T{static_cast<u16>(reinterpret_cast<const u32*>(place)[lane])};
  }
}

template <class T>
Stored<T> stored(T value) {
  if constexpr (std::is_same_v<T, f32>) {
    u32 bits;
    memcpy(&bits, &value, 4);
    return bits;
  } else if constexpr (std::is_integral_v<T>) {
    return static_cast<Stored<T>>(value);  // extended by its sign or by zeros
  } else {
    return value.bits;
  }
}

// Applies the function to all lanes, which is what the compiler can vectorise, and keeps the
// results of the active ones.
template <auto kFunction>
struct Map;

template <class D, class... S, D (*kFunction)(S...)>
struct Map<kFunction> {
  template <size_t... kIndex>
  static void run(Places values, uint32_t active, std::index_sequence<kIndex...>) {
    if constexpr (std::is_same_v<D, bool>) {
      u32 result = 0;
      for (int lane = 0; lane < kLanes; ++lane) {
        result |= static_cast<u32>(kFunction(load<S>(values[1 + kIndex], lane)...)) << lane;
      }
      u32& bits = *reinterpret_cast<u32*>(values[0]);
      bits = (bits & ~active) | (result & active);
    } else {
      alignas(64) Stored<D> result[kLanes];
      for (int lane = 0; lane < kLanes; ++lane) {
        result[lane] = stored<D>(kFunction(load<S>(values[1 + kIndex], lane)...));
      }
      auto* to = reinterpret_cast<Stored<D>*>(values[0]);
      if (active == kAllLanes) {
        memcpy(to, result, sizeof(result));
      } else {
        for (int lane = 0; lane < kLanes; ++lane) {
          to[lane] = (active >> lane) & 1 ? result[lane] : to[lane];
        }
      }
    }
  }
  static void execute(Places values, uint32_t active) {
    run(values, active, std::index_sequence_for<S...>{});
  }
  static Arithmetic row() { return {&execute, {width_of<D>()}, {width_of<S>()...}}; }
};

template <auto kFunction>
Arithmetic of() {
  return Map<kFunction>::row();
}

using Table = std::unordered_map<std::string, Arithmetic>;
void add_integer_arithmetic(Table& table);
void add_float_arithmetic(Table& table);

}  // namespace pelt::sim::lanes
