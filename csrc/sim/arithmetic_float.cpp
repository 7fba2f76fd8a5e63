// What each instruction on floats computes in one lane, by its spelled name.
#include <cfenv>
#include <cmath>
#include <limits>

#include "sim/lanes.h"

namespace pelt::sim::lanes {
namespace {

// Of floats: an ordered comparison is false with a NaN, an unordered one (…u) is true.
bool f_equal(f32 a, f32 b) { return a == b; }
bool f_differs(f32 a, f32 b) { return a < b || a > b; }
bool f_less(f32 a, f32 b) { return a < b; }
bool f_at_most(f32 a, f32 b) { return a <= b; }
bool f_greater(f32 a, f32 b) { return a > b; }
bool f_at_least(f32 a, f32 b) { return a >= b; }
bool f_equal_u(f32 a, f32 b) { return !(a < b || a > b); }
bool f_differs_u(f32 a, f32 b) { return a != b; }
bool f_less_u(f32 a, f32 b) { return !(a >= b); }
bool f_at_most_u(f32 a, f32 b) { return !(a > b); }
bool f_greater_u(f32 a, f32 b) { return !(a <= b); }
bool f_at_least_u(f32 a, f32 b) { return !(a < b); }
bool f_is_nan(f32 a, f32 b) { return a != a || b != b; }
bool f_is_number(f32 a, f32 b) { return a == a && b == b; }

// ---- float32 ----

u32 bits_of(f32 a) {
  u32 bits;
  memcpy(&bits, &a, 4);
  return bits;
}
f32 float_of(u32 bits) {
  f32 value;
  memcpy(&value, &bits, 4);
  return value;
}
// Numbers below the normal range become zeros of their sign (.ftz).
f32 flush(f32 a) {
  return (bits_of(a) & 0x7f800000u) == 0 ? float_of(bits_of(a) & 0x80000000u) : a;
}
f32 f_add(f32 a, f32 b) { return a + b; }
f32 f_sub(f32 a, f32 b) { return a - b; }
f32 f_mul(f32 a, f32 b) { return a * b; }
f32 f_fma(f32 a, f32 b, f32 c) { return __builtin_fmaf(a, b, c); }
f32 f_div(f32 a, f32 b) { return a / b; }
f32 f_neg(f32 a) { return float_of(bits_of(a) ^ 0x80000000u); }
f32 f_abs(f32 a) { return float_of(bits_of(a) & 0x7fffffffu); }
// A NaN loses against a number, and -0 is below +0.
f32 f_min(f32 a, f32 b) {
  if (a != a) return b;
  if (b != b) return a;
  return a < b || (a == b && (bits_of(a) >> 31)) ? a : b;
}
f32 f_max(f32 a, f32 b) {
  if (a != a) return b;
  if (b != b) return a;
  return a > b || (a == b && !(bits_of(a) >> 31)) ? a : b;
}
f32 f_sqrt(f32 a) { return __builtin_sqrtf(a); }
f32 f_rcp(f32 a) { return 1.0f / a; }
// The approximate functions by their correctly rounded results; the hardware's differ from these by
// at most 2 units in the last place.
f32 f_rcp_ftz(f32 a) { return flush(1.0f / flush(a)); }
f32 f_sqrt_ftz(f32 a) { return flush(__builtin_sqrtf(flush(a))); }
f32 f_rsqrt_ftz(f32 a) { return flush(static_cast<f32>(1.0 / std::sqrt(flush(a)))); }
f32 f_exp2(f32 a) { return std::exp2(a); }
f32 f_exp2_ftz(f32 a) { return flush(std::exp2(flush(a))); }
f32 f_log2_ftz(f32 a) { return std::log2(flush(a)); }
f32 f_tanh(f32 a) { return std::tanh(a); }
f32 f_copysign(f32 sign, f32 size) {
  return float_of((bits_of(sign) & 0x80000000u) | (bits_of(size) & 0x7fffffffu));
}
f32 f_saturate(f32 a) { return a > 0.0f ? (a < 1.0f ? a : 1.0f) : 0.0f; }  // a NaN becomes 0

u32 move_bits(u32 a) { return a; }
u32 select_bits(u32 a, u32 b, bool p) { return p ? a : b; }

// fma rounded towards minus infinity. The barriers keep the compiler from moving the products out
// of the changed rounding mode.
void fma_down(Places values, uint32_t active) {
  alignas(64) f32 result[kLanes];
  std::fesetround(FE_DOWNWARD);
  asm volatile("" ::: "memory");
  for (int lane = 0; lane < kLanes; ++lane) {
    result[lane] = std::fma(load<f32>(values[1], lane), load<f32>(values[2], lane),
                            load<f32>(values[3], lane));
  }
  asm volatile("" : : "r"(result) : "memory");
  std::fesetround(FE_TONEAREST);
  auto* to = reinterpret_cast<f32*>(values[0]);
  for (int lane = 0; lane < kLanes; ++lane) {
    if ((active >> lane) & 1) to[lane] = result[lane];
  }
}

// ---- conversions ----

bf16 to_bf16(f32 a) {
  u32 bits = bits_of(a);
  if (a != a) return {0x7fff};
  bits += 0x7fff + ((bits >> 16) & 1);
  return {static_cast<u16>(bits >> 16)};
}
f32 from_bf16(bf16 a) { return float_of(static_cast<u32>(a.bits) << 16); }
f16 to_f16(f32 a) {
  if (a != a) return {0x7fff};
  const _Float16 half = static_cast<_Float16>(a);
  f16 result;
  memcpy(&result.bits, &half, 2);
  return result;
}
f32 from_f16(f16 a) {
  _Float16 half;
  memcpy(&half, &a.bits, 2);
  return static_cast<f32>(half);
}
u32 to_bf16x2(f32 high, f32 low) {
  return static_cast<u32>(to_bf16(high).bits) << 16 | to_bf16(low).bits;
}
u32 to_f16x2(f32 high, f32 low) {
  return static_cast<u32>(to_f16(high).bits) << 16 | to_f16(low).bits;
}
// Numbers outside the integer's range become its ends. A NaN becomes 0, or the highest bit of 64.
template <class T>
T to_integer(f32 rounded) {
  if (rounded != rounded) return sizeof(T) == 8 ? static_cast<T>(u64{1} << 63) : T{0};
  constexpr double kLow = static_cast<double>(std::numeric_limits<T>::min());
  constexpr double kHigh = static_cast<double>(std::numeric_limits<T>::max());
  const double value = rounded;
  if (value <= kLow) return std::numeric_limits<T>::min();
  if (value >= kHigh) return std::numeric_limits<T>::max();
  return static_cast<T>(value);
}
template <class T>
T to_integer_nearest(f32 a) {
  return to_integer<T>(std::nearbyint(a));
}
template <class T>
T to_integer_zero(f32 a) {
  return to_integer<T>(std::trunc(a));
}
template <class T>
T to_integer_down(f32 a) {
  return to_integer<T>(std::floor(a));
}
template <class T>
T to_integer_up(f32 a) {
  return to_integer<T>(std::ceil(a));
}
f32 round_nearest(f32 a) { return std::nearbyint(a); }
f32 round_zero(f32 a) { return std::trunc(a); }
f32 round_down(f32 a) { return std::floor(a); }
f32 round_up(f32 a) { return std::ceil(a); }

template <class T>
void add_conversions_to(Table& table, const std::string& type) {
  table["cvt.rni." + type + ".f32"] = of<to_integer_nearest<T>>();
  table["cvt.rzi." + type + ".f32"] = of<to_integer_zero<T>>();
  table["cvt.rmi." + type + ".f32"] = of<to_integer_down<T>>();
  table["cvt.rpi." + type + ".f32"] = of<to_integer_up<T>>();
}

}  // namespace

void add_float_arithmetic(Table& table) {
  table["mov.f32"] = of<move_bits>();
  table["selp.f32"] = of<select_bits>();
  table["add.f32"] = table["add.rn.f32"] = of<f_add>();
  table["sub.f32"] = table["sub.rn.f32"] = of<f_sub>();
  table["mul.f32"] = table["mul.rn.f32"] = of<f_mul>();
  table["fma.rn.f32"] = of<f_fma>();
  table["fma.rm.f32"] = {&fma_down, {Width::k32}, {Width::k32, Width::k32, Width::k32}};
  table["div.rn.f32"] = of<f_div>();
  table["neg.f32"] = of<f_neg>();
  table["abs.f32"] = of<f_abs>();
  table["min.f32"] = of<f_min>();
  table["max.f32"] = of<f_max>();
  table["sqrt.rn.f32"] = of<f_sqrt>();
  table["rcp.rn.f32"] = of<f_rcp>();
  table["rcp.approx.ftz.f32"] = of<f_rcp_ftz>();
  table["sqrt.approx.ftz.f32"] = of<f_sqrt_ftz>();
  table["rsqrt.approx.ftz.f32"] = of<f_rsqrt_ftz>();
  table["ex2.approx.f32"] = of<f_exp2>();
  table["ex2.approx.ftz.f32"] = of<f_exp2_ftz>();
  table["lg2.approx.ftz.f32"] = of<f_log2_ftz>();
  table["tanh.approx.f32"] = of<f_tanh>();
  table["copysign.f32"] = of<f_copysign>();

  table["setp.eq.f32"] = of<f_equal>();
  table["setp.ne.f32"] = of<f_differs>();
  table["setp.lt.f32"] = of<f_less>();
  table["setp.le.f32"] = of<f_at_most>();
  table["setp.gt.f32"] = of<f_greater>();
  table["setp.ge.f32"] = of<f_at_least>();
  table["setp.equ.f32"] = of<f_equal_u>();
  table["setp.neu.f32"] = of<f_differs_u>();
  table["setp.ltu.f32"] = of<f_less_u>();
  table["setp.leu.f32"] = of<f_at_most_u>();
  table["setp.gtu.f32"] = of<f_greater_u>();
  table["setp.geu.f32"] = of<f_at_least_u>();
  table["setp.nan.f32"] = of<f_is_nan>();
  table["setp.num.f32"] = of<f_is_number>();

  table["cvt.sat.f32.f32"] = of<f_saturate>();
  table["cvt.rni.f32.f32"] = of<round_nearest>();
  table["cvt.rzi.f32.f32"] = of<round_zero>();
  table["cvt.rmi.f32.f32"] = of<round_down>();
  table["cvt.rpi.f32.f32"] = of<round_up>();
  add_conversions_to<s32>(table, "s32");
  add_conversions_to<u32>(table, "u32");
  add_conversions_to<s64>(table, "s64");
  add_conversions_to<u64>(table, "u64");
  table["cvt.rn.bf16.f32"] = of<to_bf16>();
  table["cvt.rn.f16.f32"] = of<to_f16>();
  table["cvt.rn.bf16x2.f32"] = of<to_bf16x2>();
  table["cvt.rn.f16x2.f32"] = of<to_f16x2>();
  table["cvt.f32.bf16"] = of<from_bf16>();
  table["cvt.f32.f16"] = of<from_f16>();
}

}  // namespace pelt::sim::lanes

namespace pelt::sim {

const std::unordered_map<std::string, Arithmetic>& arithmetic() {
  static const lanes::Table kTable = [] {
    lanes::Table table;
    lanes::add_integer_arithmetic(table);
    lanes::add_float_arithmetic(table);
    return table;
  }();
  return kTable;
}

}  // namespace pelt::sim
