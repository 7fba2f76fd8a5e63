// Dropout without a stored mask: Philox4x32-10 as a function of seed and element index.
//
// The contract, shared by every backend. For the element with linear index e (int64) of the tensor
// that dropout is applied to: counter = (low32(e / 4), high32(e / 4), 0, 0), key = (low32(seed),
// high32(seed)); the element's word is output[e % 4]. It is kept iff word >= floor(p 2^32), and
// then scaled by 1 / (1 - p). Plain integer arithmetic: the host compiles the same code.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace pelt {

struct PhiloxWords {
  uint32_t word[4];
};

// The upper half of a product of two words: one instruction on a GPU.
PELT_HOST_DEVICE uint32_t high_product(uint32_t a, uint32_t b) {
  return static_cast<uint32_t>(static_cast<uint64_t>(a) * b >> 32);
}

// Ten rounds on the counter, by the constants of Salmon et al. 2011.
PELT_HOST_DEVICE PhiloxWords philox4x32_10(PhiloxWords counter, uint32_t key0, uint32_t key1) {
  constexpr uint32_t kMultiplier0 = 0xd2511f53u, kMultiplier1 = 0xcd9e8d57u;
  constexpr uint32_t kWeyl0 = 0x9e3779b9u, kWeyl1 = 0xbb67ae85u;
  uint32_t* c = counter.word;
  for (int round = 0; round < 10; ++round) {
    const uint32_t high0 = high_product(kMultiplier0, c[0]), low0 = kMultiplier0 * c[0];
    const uint32_t high1 = high_product(kMultiplier1, c[2]), low1 = kMultiplier1 * c[2];
    c[0] = high1 ^ c[1] ^ key0;
    c[1] = low1;
    c[2] = high0 ^ c[3] ^ key1;
    c[3] = low0;
    key0 += kWeyl0;
    key1 += kWeyl1;
  }
  return counter;
}

// The keys of the ten rounds. As a kernel's parameter they are operands in constant memory, where
// keys computed from the seed would be twenty registers, or twenty additions for each call.
struct PhiloxKeys {
  uint32_t word[20] = {};

  static PhiloxKeys of(uint64_t seed) {
    PhiloxKeys keys;
    for (uint32_t round = 0; round < 10; ++round) {
      keys.word[2 * round] = static_cast<uint32_t>(seed) + round * 0x9e3779b9u;
      keys.word[2 * round + 1] = static_cast<uint32_t>(seed >> 32) + round * 0xbb67ae85u;
    }
    return keys;
  }
};

// The same words from prepared keys.
PELT_HOST_DEVICE PhiloxWords philox4x32_10(PhiloxWords counter, const PhiloxKeys& keys) {
  constexpr uint32_t kMultiplier0 = 0xd2511f53u, kMultiplier1 = 0xcd9e8d57u;
  uint32_t* c = counter.word;
  for (int round = 0; round < 10; ++round) {
    const uint32_t high0 = high_product(kMultiplier0, c[0]), low0 = kMultiplier0 * c[0];
    const uint32_t high1 = high_product(kMultiplier1, c[2]), low1 = kMultiplier1 * c[2];
    c[0] = high1 ^ c[1] ^ keys.word[2 * round];
    c[1] = low1;
    c[2] = high0 ^ c[3] ^ keys.word[2 * round + 1];
    c[3] = low0;
  }
  return counter;
}

struct Dropout {
  uint64_t seed = 0;
  uint32_t threshold = 0;  // floor(p 2^32); 0 keeps everything
  float keep_scale = 1.0f;

  PELT_HOST_DEVICE static Dropout with_probability(double p, uint64_t seed) {
    return {seed, static_cast<uint32_t>(p * 4294967296.0), static_cast<float>(1.0 / (1.0 - p))};
  }

  PELT_HOST_DEVICE bool is_active() const { return threshold != 0; }

  // The factors (0 or 1 / (1 - p)) of the four elements from `element`, a multiple of 4, on.
  PELT_HOST_DEVICE void factors_of_4(int64_t element, float (&factor)[4]) const {
    const uint64_t group = static_cast<uint64_t>(element) / 4;
    const PhiloxWords words =
        philox4x32_10({{static_cast<uint32_t>(group), static_cast<uint32_t>(group >> 32), 0, 0}},
                      static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
    for (int i = 0; i < 4; ++i) factor[i] = words.word[i] >= threshold ? keep_scale : 0.0f;
  }
};

}  // namespace pelt
