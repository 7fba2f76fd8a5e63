// Vectors of floats, and loads and stores of them from float32 and bfloat16 memory.
//
// Compiler vectors rather than intrinsics: one source for every instruction set. Compiled once for
// each of them (see isa.h), so everything is in an unnamed namespace.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/dtype.h"

#if defined(__AVX512BF16__) || defined(__AVX2__)
#include <immintrin.h>
#endif

namespace pelt::cpu {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

constexpr int kWidth = kVectorBytes / 4;
typedef float Vector __attribute__((vector_size(kVectorBytes)));
typedef int32_t Ints __attribute__((vector_size(kVectorBytes)));
typedef uint32_t Words __attribute__((vector_size(kVectorBytes)));
typedef uint16_t Halves __attribute__((vector_size(kVectorBytes / 2)));

// A block of a product's result, in registers.
template <int kRows, int kVectors>
using Sums = Vector[kRows][kVectors];

constexpr int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

// One number in every lane. Subtracting zero gives every value back, -0 included, so the compiler
// drops it; adding zero would turn -0 into 0, and be an instruction at every broadcast.
inline Vector splat(float value) { return value - Vector{}; }

inline Vector from_bits(Words bits) {
  Vector v;
  std::memcpy(&v, &bits, sizeof v);
  return v;
}

inline Words bits_of(Vector v) {
  Words bits;
  std::memcpy(&bits, &v, sizeof bits);
  return bits;
}

// ---- memory ----

inline Vector load(const float* from) {
  Vector v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

// 16-bit numbers as 32-bit words, zeros in the upper halves.
inline Words widen(Halves halves) {
#if defined(__AVX512F__)
  // gcc 12 widens a vector of 512 bits in two parts. Under a mask of ones, because it warns about
  // the plain instruction's undefined pass-through.
  return (Words)_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)halves);
#else
  return __builtin_convertvector(halves, Words);
#endif
}

inline Words load_halves(const bf16* from) {
  Halves halves;
  std::memcpy(&halves, from, sizeof halves);
  return widen(halves);
}

inline Vector load(const bf16* from) { return from_bits(load_halves(from) << 16); }

inline void store(float* to, Vector v) { std::memcpy(to, &v, sizeof v); }

// Rounds to the nearest bfloat16, ties to even. A NaN must not be rounded up into infinity, so it
// becomes one fixed NaN.
inline Halves to_halves(Vector v) {
#if defined(__AVX512BF16__)
  return (Halves)_mm512_cvtneps_pbh((__m512)v);
#else
  const Words bits = bits_of(v);
  const Words rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const Words words = (v == v) ? rounded : (Words{} + 0x7fffu);
#if defined(__AVX2__) && !defined(__AVX512F__)
  // gcc 12 narrows element by element; the words fit, so saturation changes nothing.
  const __m256i packed = _mm256_packus_epi32((__m256i)words, (__m256i)words);
  return (Halves)_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08));
#else
  return __builtin_convertvector(words, Halves);
#endif
#endif
}

inline void store(bf16* to, Vector v) {
  const Halves halves = to_halves(v);
  std::memcpy(to, &halves, sizeof halves);
}

#if defined(__AVX512F__)

// The first `count` elements, 0 behind them.
inline Vector load_part(const float* from, int64_t count) {
  return (Vector)_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), from);
}

inline Vector load_part(const bf16* from, int64_t count) {
  const __m256i halves = _mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << count) - 1), from);
  return from_bits(widen((Halves)halves) << 16);
}

inline void store_part(float* to, Vector v, int64_t count) {
  _mm512_mask_storeu_ps(to, static_cast<__mmask16>((1u << count) - 1), (__m512)v);
}

inline void store_part(bf16* to, Vector v, int64_t count) {
  _mm256_mask_storeu_epi16(to, static_cast<__mmask16>((1u << count) - 1), (__m256i)to_halves(v));
}

#else

template <class T>
inline Vector load_part(const T* from, int64_t count) {
  T whole[kWidth] = {};
  std::memcpy(whole, from, static_cast<size_t>(count) * sizeof(T));
  return load(whole);
}

template <class T>
inline void store_part(T* to, Vector v, int64_t count) {
  T whole[kWidth];
  store(whole, v);
  std::memcpy(to, whole, static_cast<size_t>(count) * sizeof(T));
}

#endif

// Calls visit(column, part) for each vector of a row: whole ones, and a last part. `part` loads and
// stores: the body is compiled twice, and only the last vector of a row pays for its mask.
struct Whole {
  template <class T>
  Vector load_from(const T* from) const {
    return load(from);
  }
  template <class T>
  void store_to(T* to, Vector v) const {
    store(to, v);
  }
};

struct Part {
  int64_t count;
  template <class T>
  Vector load_from(const T* from) const {
    return load_part(from, count);
  }
  template <class T>
  void store_to(T* to, Vector v) const {
    store_part(to, v, count);
  }
};

template <class Visit>
inline void for_vectors(int64_t columns, Visit&& visit) {
  int64_t column = 0;
  for (; column + kWidth <= columns; column += kWidth) visit(column, Whole{});
  if (column < columns) visit(column, Part{columns - column});
}

// ---- across lanes ----

// The sum over the lanes, in halves: an order that does not depend on the compiler.
inline float sum_of(Vector v) {
  float lanes[kWidth];
  store(lanes, v);
  for (int half = kWidth / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return lanes[0];
}

// Lane i is lane index[i] of a followed by b.
inline Vector shuffle(Vector a, Vector b, Ints index) {
#if defined(__clang__)  // has shuffles by constants only
  float lanes[2 * kWidth];
  store(lanes, a);
  store(lanes + kWidth, b);
  Vector v;
  for (int i = 0; i < kWidth; ++i) v[i] = lanes[index[i]];
  return v;
#else
  return __builtin_shuffle(a, b, index);
#endif
}

// Transposes kWidth vectors in place: each step swaps the off-diagonal halves of smaller blocks.
inline void transpose(Vector (&rows)[kWidth]) {
  Ints lane;
  for (int i = 0; i < kWidth; ++i) lane[i] = i;
#pragma GCC unroll 4
  for (int step = kWidth / 2; step > 0; step /= 2) {
    const Ints is_high = (lane & step) != 0;
    const Ints to_low = is_high ? lane - step + kWidth : lane;
    const Ints to_high = is_high ? lane + kWidth : lane + step;
#pragma GCC unroll 16
    for (int i = 0; i < kWidth; ++i) {
      if (i & step) continue;
      const Vector low = rows[i], high = rows[i + step];
      rows[i] = shuffle(low, high, to_low);
      rows[i + step] = shuffle(low, high, to_high);
    }
  }
}

}  // namespace
}  // namespace pelt::cpu
