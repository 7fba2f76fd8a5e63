// The tile registers of AMX: eight of 16 rows x 64 bytes, and one instruction that multiplies them.
//
//   C [16, 16] float32 += A [16, 32] bfloat16  B,   B in pairs of rows: [16 pairs, 16 columns, 2]
//
// PELT_SIMULATED_TILES gives the same functions in plain C++, with the instruction's rounding, so
// that the kernels written with them are tested on any processor. A kernel includes this header
// where PELT_HAS_TILES says so; a thread needs a TileScope while it uses tiles.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/dtype.h"

#if defined(PELT_SIMULATED_TILES) || defined(__AMX_BF16__)
#define PELT_HAS_TILES 1
#endif

namespace pelt::cpu {
namespace {

constexpr int64_t kTileSide = 16;   // rows of a tile, and float32 numbers in a row
constexpr int64_t kTileDepth = 32;  // bfloat16 numbers in a row

#if defined(PELT_SIMULATED_TILES)

struct Tile {
  uint32_t word[kTileSide][kTileSide];
};
thread_local Tile simulated_tiles[8];

// Tiles begin as NaN, so that a kernel that reads one before it wrote it shows.
struct TileScope {
  TileScope() { std::memset(simulated_tiles, 0xff, sizeof simulated_tiles); }  // all NaN
};

template <int kTile>
inline void tile_zero() {
  simulated_tiles[kTile] = {};
}

template <int kTile>
inline void tile_load(const void* from, int64_t stride_bytes) {
  for (int64_t row = 0; row < kTileSide; ++row) {
    std::memcpy(simulated_tiles[kTile].word[row],
                static_cast<const char*>(from) + row * stride_bytes, 64);
  }
}

template <int kTile>
inline void tile_store(void* to, int64_t stride_bytes) {
  for (int64_t row = 0; row < kTileSide; ++row) {
    std::memcpy(static_cast<char*>(to) + row * stride_bytes, simulated_tiles[kTile].word[row], 64);
  }
}

// The instruction takes subnormal numbers for zero, and gives zero for them.
inline float without_subnormals(float x) {
  return (pelt::bits_of(x) & 0x7f800000u) == 0 ? float_from_bits(pelt::bits_of(x) & 0x80000000u)
                                               : x;
}

// The halves of all pairs have a sum each, rounded to float32 after every product; those are added
// to each other, and the result to C. A product of two bfloat16 numbers and its sum with a float32
// are so short that rounding them to float64 in between changes nothing.
template <int kC, int kA, int kB>
inline void tile_multiply() {
  const Tile &a = simulated_tiles[kA], &b = simulated_tiles[kB];
  auto half = [](uint32_t word, int i) {
    return static_cast<double>(
        without_subnormals(float_from_bits(i == 0 ? word << 16 : word & 0xffff0000u)));
  };
  for (int64_t m = 0; m < kTileSide; ++m) {
    float sum[2][kTileSide] = {};
    for (int64_t k = 0; k < kTileSide; ++k) {
      for (int i = 0; i < 2; ++i) {
        const double left = half(a.word[m][k], i);
        for (int64_t n = 0; n < kTileSide; ++n) {
          sum[i][n] = without_subnormals(
              static_cast<float>(static_cast<double>(sum[i][n]) + left * half(b.word[k][n], i)));
        }
      }
    }
    for (int64_t n = 0; n < kTileSide; ++n) {
      uint32_t& c = simulated_tiles[kC].word[m][n];
      const float before = without_subnormals(float_from_bits(c));
      c = pelt::bits_of(without_subnormals(before + without_subnormals(sum[0][n] + sum[1][n])));
    }
  }
}

#elif defined(__AMX_BF16__)

// Configures all eight tiles whole, and gives them back, so that the system has nothing to save
// when the thread is interrupted outside.
struct TileScope {
  TileScope() {
    struct alignas(64) Config {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } config;
    for (int i = 0; i < 8; ++i) config.row_bytes[i] = 64, config.rows[i] = kTileSide;
    asm volatile("ldtilecfg %0" ::"m"(config));
  }
  ~TileScope() { asm volatile("tilerelease" ::: "memory"); }
  TileScope(const TileScope&) = delete;
  TileScope& operator=(const TileScope&) = delete;
};

template <int kTile>
inline void tile_zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(kTile));
}

template <int kTile>
inline void tile_load(const void* from, int64_t stride_bytes) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride_bytes), "i"(kTile)
               : "memory");
}

template <int kTile>
inline void tile_store(void* to, int64_t stride_bytes) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride_bytes), "i"(kTile)
               : "memory");
}

template <int kC, int kA, int kB>
inline void tile_multiply() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kC), "i"(kA), "i"(kB));
}

#else

struct TileScope {
  TileScope() {}
};

#endif

}  // namespace
}  // namespace pelt::cpu
