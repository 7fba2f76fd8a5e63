// Philox4x32-10 on as many counters at once as a vector has 64-bit lanes.
//
// Each 32-bit word sits in a lane of 64 bits, so that a product of two words is one instruction and
// its halves are a shift away. The upper half of a lane may hold anything: multiplying reads the
// lower halves only.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace pelt::cpu {
namespace {

#if defined(__AVX512F__)
constexpr int kPhiloxBytes = 64;
#elif defined(__AVX2__)
constexpr int kPhiloxBytes = 32;
#else
constexpr int kPhiloxBytes = 16;
#endif

typedef uint64_t PhiloxLanes __attribute__((vector_size(kPhiloxBytes)));
constexpr int kPhiloxWidth = kPhiloxBytes / 8;
constexpr int kPhiloxChains = 4;  // independent vectors, to fill the multiplier's latency
constexpr int kPhiloxGroups = kPhiloxWidth * kPhiloxChains;

// The product of the lower halves of each lane, all 64 bits of it.
inline PhiloxLanes multiply_words(PhiloxLanes a, PhiloxLanes b) {
#if defined(__AVX512F__)
  // Under a mask of ones, because gcc 12 warns about the plain one's undefined pass-through.
  return (PhiloxLanes)_mm512_maskz_mul_epu32(0xff, (__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return (PhiloxLanes)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
  return (PhiloxLanes)_mm_mul_epu32((__m128i)a, (__m128i)b);
#else
  return (a & 0xffffffffu) * (b & 0xffffffffu);
#endif
}

// The four words of each counter (group + i, counter_high) for i in [0, kPhiloxGroups), in order.
inline void philox_words(uint64_t group, uint64_t counter_high, uint64_t key, uint32_t* words) {
  PhiloxLanes lane, c0[kPhiloxChains], c1[kPhiloxChains], c2[kPhiloxChains], c3[kPhiloxChains];
  for (int i = 0; i < kPhiloxWidth; ++i) lane[i] = static_cast<uint64_t>(i);
  for (int j = 0; j < kPhiloxChains; ++j) {
    c0[j] = lane + (group + static_cast<uint64_t>(j * kPhiloxWidth));
    c1[j] = c0[j] >> 32;
    c2[j] = PhiloxLanes{} + counter_high;
    c3[j] = c2[j] >> 32;
  }
  const PhiloxLanes multiplier0 = PhiloxLanes{} + 0xd2511f53u;
  const PhiloxLanes multiplier1 = PhiloxLanes{} + 0xcd9e8d57u;
  uint32_t key0 = static_cast<uint32_t>(key), key1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    for (int j = 0; j < kPhiloxChains; ++j) {
      const PhiloxLanes product0 = multiply_words(c0[j], multiplier0);
      const PhiloxLanes product1 = multiply_words(c2[j], multiplier1);
      c0[j] = (product1 >> 32) ^ c1[j] ^ key0;
      c2[j] = (product0 >> 32) ^ c3[j] ^ key1;
      c1[j] = product1;
      c3[j] = product0;
    }
    key0 += 0x9e3779b9u;
    key1 += 0xbb67ae85u;
  }
  // Words of a counter stand in lanes of four vectors; memory has them side by side.
  for (int j = 0; j < kPhiloxChains; ++j) {
    const PhiloxLanes low = (c0[j] & 0xffffffffu) | (c1[j] << 32);
    const PhiloxLanes high = (c2[j] & 0xffffffffu) | (c3[j] << 32);
    for (int i = 0; i < kPhiloxWidth; ++i) {
      uint32_t* to = words + 4 * (j * kPhiloxWidth + i);
      for (int w = 0; w < 2; ++w) {
        to[w] = static_cast<uint32_t>(low[i] >> (32 * w));
        to[2 + w] = static_cast<uint32_t>(high[i] >> (32 * w));
      }
    }
  }
}

}  // namespace
}  // namespace pelt::cpu
