// What each instruction on integers, bits and predicates computes in one lane, by its spelled name.
#include "sim/lanes.h"

namespace pelt::sim::lanes {
namespace {

// ---- integers: signed ones wrap as unsigned ones do ----

template <class T>
T move(T a) {
  return a;
}
template <class T>
T add(T a, T b) {
  return a + b;
}
template <class T>
T sub(T a, T b) {
  return a - b;
}
template <class T>
T mul(T a, T b) {
  return a * b;
}
template <class T>
T mad(T a, T b, T c) {
  return a * b + c;
}
template <class T>
T neg(T a) {
  return -a;
}
template <class T>
T bit_and(T a, T b) {
  return a & b;
}
template <class T>
T bit_or(T a, T b) {
  return a | b;
}
template <class T>
T bit_xor(T a, T b) {
  return a ^ b;
}
template <class T>
T bit_not(T a) {
  return ~a;
}
template <class T>
T select(T a, T b, bool p) {
  return p ? a : b;
}
template <class T>
T smaller(T a, T b) {
  return a < b ? a : b;
}
template <class T>
T larger(T a, T b) {
  return a > b ? a : b;
}
template <class T>
T absolute(T a) {
  using U = std::make_unsigned_t<T>;
  return static_cast<T>(a < 0 ? U{0} - static_cast<U>(a) : static_cast<U>(a));
}

template <class Wide, class T>
Wide mul_wide(T a, T b) {
  return static_cast<Wide>(a) * b;
}
template <class Wide, class T>
Wide mad_wide(T a, T b, Wide c) {
  return static_cast<Wide>(static_cast<u64>(static_cast<Wide>(a) * b) + static_cast<u64>(c));
}
template <class Wide, class T>
T mul_high(T a, T b) {
  return static_cast<T>((static_cast<Wide>(a) * b) >> (8 * sizeof(T)));
}
template <class Wide, class T>
T mad_high(T a, T b, T c) {
  return static_cast<T>(static_cast<std::make_unsigned_t<T>>(mul_high<Wide, T>(a, b)) +
                        static_cast<std::make_unsigned_t<T>>(c));
}

// A quotient by 0 is unspecified in PTX; all bits set is what the hardware gives.
template <class T>
T divide(T a, T b) {
  if (b == 0) return static_cast<T>(-1);
  if (std::is_signed_v<T> && b == static_cast<T>(-1)) {
    return static_cast<T>(0 - static_cast<std::make_unsigned_t<T>>(a));
  }
  return a / b;
}
template <class T>
T remainder(T a, T b) {
  if (b == 0) return a;
  if (std::is_signed_v<T> && b == static_cast<T>(-1)) return 0;
  return a % b;
}

// Shifts by more than the width give 0, or the sign.
template <class T>
T shift_left(T a, u32 n) {
  return n >= 8 * sizeof(T) ? T{0} : static_cast<T>(a << (n & (8 * sizeof(T) - 1)));
}
template <class T>
T shift_right(T a, u32 n) {
  constexpr u32 kBits = 8 * sizeof(T);
  if (std::is_signed_v<T>) return static_cast<T>(a >> (n < kBits ? n : kBits - 1));
  return n >= kBits ? T{0} : static_cast<T>(a >> (n & (kBits - 1)));
}
template <bool kWraps>
u32 funnel_left(u32 low, u32 high, u32 n) {
  n = kWraps ? n & 31 : (n < 32 ? n : 32);
  const u64 both = static_cast<u64>(high) << 32 | low;
  return static_cast<u32>((both << n) >> 32);
}
template <bool kWraps>
u32 funnel_right(u32 low, u32 high, u32 n) {
  n = kWraps ? n & 31 : (n < 32 ? n : 32);
  const u64 both = static_cast<u64>(high) << 32 | low;
  return static_cast<u32>(both >> n);
}

u32 bit_field_insert(u32 a, u32 b, u32 position, u32 length) {
  position &= 255;
  length &= 255;
  if (position >= 32 || length == 0) return b;
  const u32 ones = length >= 32 ? ~u32{0} : (u32{1} << length) - 1;
  const u32 mask = ones << position;
  return (b & ~mask) | ((a << position) & mask);
}
u32 bit_field_extract(u32 a, u32 position, u32 length) {
  position &= 255;
  length &= 255;
  if (position >= 32 || length == 0) return 0;
  return (a >> position) & (length >= 32 ? ~u32{0} : (u32{1} << length) - 1);
}
u32 permute_bytes(u32 a, u32 b, u32 selector) {
  const u64 bytes = static_cast<u64>(b) << 32 | a;
  u32 result = 0;
  for (int i = 0; i < 4; ++i) {
    const u32 choice = (selector >> (4 * i)) & 15;
    u32 byte = static_cast<u32>(bytes >> (8 * (choice & 7))) & 255;
    if (choice & 8) byte = byte & 128 ? 255 : 0;  // the sign of the chosen byte
    result |= byte << (8 * i);
  }
  return result;
}
template <class T>
u32 count_ones(T a) {
  return static_cast<u32>(__builtin_popcountll(a));
}
u32 leading_zeros(u32 a) { return a == 0 ? 32 : static_cast<u32>(__builtin_clz(a)); }
u32 reverse_bits(u32 a) {
  u32 result = 0;
  for (int i = 0; i < 32; ++i) result |= ((a >> i) & 1) << (31 - i);
  return result;
}

// The three-input logic of sm_50 and later: bit i of the result is bit (a b c) of the table.
u32 logic3(u32 a, u32 b, u32 c, u32 table) {
  u32 result = 0;
  for (u32 row = 0; row < 8; ++row) {
    const u32 ones = (row & 4 ? a : ~a) & (row & 2 ? b : ~b) & (row & 1 ? c : ~c);
    if ((table >> row) & 1) result |= ones;
  }
  return result;
}

bool not_predicate(bool a) { return !a; }
bool both(bool a, bool b) { return a && b; }
bool either(bool a, bool b) { return a || b; }
bool one_of(bool a, bool b) { return a != b; }

// Conversions cut, extend by the source's sign, or round to nearest.
template <class D, class S>
D convert(S a) {
  return static_cast<D>(a);
}

// ---- comparisons ----

template <class T>
bool equal(T a, T b) {
  return a == b;
}
template <class T>
bool less(T a, T b) {
  return a < b;
}
template <class T>
bool at_most(T a, T b) {
  return a <= b;
}
template <class T>
bool differs(T a, T b) {
  return a != b;
}
template <class T>
bool greater(T a, T b) {
  return a > b;
}
template <class T>
bool at_least(T a, T b) {
  return a >= b;
}

// Shared memory lies in a window of the generic addresses.
u64 shared_to_generic(u64 a) { return a + kSharedWindow; }
u64 generic_to_shared(u64 a) { return a - kSharedWindow; }

// mov between a register and the halves of a wider one ----

u32 pack16(u16 low, u16 high) { return static_cast<u32>(high) << 16 | low; }
u64 pack32(u32 low, u32 high) { return static_cast<u64>(high) << 32 | low; }

template <class Wide, class Half>
void unpack(Places values, uint32_t active) {
  alignas(64) Stored<Half> low[kLanes], high[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) {
    const Wide both = load<Wide>(values[2], lane);
    low[lane] = static_cast<Half>(both);
    high[lane] = static_cast<Half>(both >> (8 * sizeof(Half)));
  }
  auto* to_low = reinterpret_cast<Stored<Half>*>(values[0]);
  auto* to_high = reinterpret_cast<Stored<Half>*>(values[1]);
  for (int lane = 0; lane < kLanes; ++lane) {
    if (!((active >> lane) & 1)) continue;
    to_low[lane] = low[lane];
    to_high[lane] = high[lane];
  }
}

// What there is for signed and unsigned integers of each size.
template <class T>
void add_type(Table& table, const std::string& type) {
  using U = std::make_unsigned_t<T>;
  table["mov." + type] = of<move<U>>();
  table["add." + type] = of<add<U>>();
  table["sub." + type] = of<sub<U>>();
  table["mul.lo." + type] = of<mul<U>>();
  table["mad.lo." + type] = of<mad<U>>();
  table["div." + type] = of<divide<T>>();
  table["rem." + type] = of<remainder<T>>();
  table["min." + type] = of<smaller<T>>();
  table["max." + type] = of<larger<T>>();
  table["shr." + type] = of<shift_right<T>>();
  table["selp." + type] = of<select<U>>();
  table["setp.eq." + type] = of<equal<T>>();
  table["setp.ne." + type] = of<differs<T>>();
  table["setp.lt." + type] = of<less<T>>();
  table["setp.le." + type] = of<at_most<T>>();
  table["setp.gt." + type] = of<greater<T>>();
  table["setp.ge." + type] = of<at_least<T>>();
  if (std::is_signed_v<T>) {
    table["neg." + type] = of<neg<U>>();
    table["abs." + type] = of<absolute<T>>();
  }
}

// What there is for bits of each size.
template <class T>
void add_bits(Table& table, const std::string& type) {
  table["mov." + type] = of<move<T>>();
  table["and." + type] = of<bit_and<T>>();
  table["or." + type] = of<bit_or<T>>();
  table["xor." + type] = of<bit_xor<T>>();
  table["not." + type] = of<bit_not<T>>();
  table["shl." + type] = of<shift_left<T>>();
  table["shr." + type] = of<shift_right<T>>();
  table["selp." + type] = of<select<T>>();
  table["setp.eq." + type] = of<equal<T>>();
  table["setp.ne." + type] = of<differs<T>>();
}

template <class From>
void add_conversions(Table& table, const std::string& from) {
  table["cvt.s8." + from] = of<convert<s8, From>>();
  table["cvt.u8." + from] = of<convert<u8, From>>();
  table["cvt.s16." + from] = of<convert<s16, From>>();
  table["cvt.u16." + from] = of<convert<u16, From>>();
  table["cvt.s32." + from] = of<convert<s32, From>>();
  table["cvt.u32." + from] = of<convert<u32, From>>();
  table["cvt.s64." + from] = of<convert<s64, From>>();
  table["cvt.u64." + from] = of<convert<u64, From>>();
  table["cvt.rn.f32." + from] = of<convert<f32, From>>();
}

}  // namespace

void add_integer_arithmetic(Table& table) {
  add_type<s16>(table, "s16");
  add_type<u16>(table, "u16");
  add_type<s32>(table, "s32");
  add_type<u32>(table, "u32");
  add_type<s64>(table, "s64");
  add_type<u64>(table, "u64");
  add_bits<u16>(table, "b16");
  add_bits<u32>(table, "b32");
  add_bits<u64>(table, "b64");
  add_conversions<s8>(table, "s8");
  add_conversions<u8>(table, "u8");
  add_conversions<s16>(table, "s16");
  add_conversions<u16>(table, "u16");
  add_conversions<s32>(table, "s32");
  add_conversions<u32>(table, "u32");
  add_conversions<s64>(table, "s64");
  add_conversions<u64>(table, "u64");

  table["mul.hi.s32"] = of<mul_high<s64, s32>>();
  table["mul.hi.u32"] = of<mul_high<u64, u32>>();
  table["mul.hi.s64"] = of<mul_high<__int128, s64>>();
  table["mul.hi.u64"] = of<mul_high<unsigned __int128, u64>>();
  table["mul.wide.s16"] = of<mul_wide<s32, s16>>();
  table["mul.wide.u16"] = of<mul_wide<u32, u16>>();
  table["mul.wide.s32"] = of<mul_wide<s64, s32>>();
  table["mul.wide.u32"] = of<mul_wide<u64, u32>>();
  table["mad.hi.s32"] = of<mad_high<s64, s32>>();
  table["mad.hi.u32"] = of<mad_high<u64, u32>>();
  table["mad.wide.s32"] = of<mad_wide<s64, s32>>();
  table["mad.wide.u32"] = of<mad_wide<u64, u32>>();

  table["lop3.b32"] = of<logic3>();
  table["shf.l.wrap.b32"] = of<funnel_left<true>>();
  table["shf.l.clamp.b32"] = of<funnel_left<false>>();
  table["shf.r.wrap.b32"] = of<funnel_right<true>>();
  table["shf.r.clamp.b32"] = of<funnel_right<false>>();
  table["bfi.b32"] = of<bit_field_insert>();
  table["bfe.u32"] = of<bit_field_extract>();
  table["prmt.b32"] = of<permute_bytes>();
  table["popc.b32"] = of<count_ones<u32>>();
  table["popc.b64"] = of<count_ones<u64>>();
  table["clz.b32"] = of<leading_zeros>();
  table["brev.b32"] = of<reverse_bits>();

  table["mov.pred"] = of<move<bool>>();
  table["and.pred"] = of<both>();
  table["or.pred"] = of<either>();
  table["xor.pred"] = of<one_of>();
  table["not.pred"] = of<not_predicate>();

  for (const char* space : {"shared", "global", "param"}) {
    const bool is_shared = std::string(space) == "shared";
    const std::string name = space;
    table["cvta." + name + ".u64"] = is_shared ? of<shared_to_generic>() : of<move<u64>>();
    table["cvta.to." + name + ".u64"] = is_shared ? of<generic_to_shared>() : of<move<u64>>();
  }
  table["mov.b32 pack"] = of<pack16>();
  table["mov.b64 pack"] = of<pack32>();
  table["mov.b32 unpack"] = {&unpack<u32, u16>, {Width::k32, Width::k32}, {Width::k32}};
  table["mov.b64 unpack"] = {&unpack<u64, u32>, {Width::k32, Width::k32}, {Width::k64}};
}

}  // namespace pelt::sim::lanes
