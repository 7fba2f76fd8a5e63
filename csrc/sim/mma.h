// Host body of cuda/mma.cuh: products are exact in float32, sums are float32 in the order of k.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "sim/executor.h"

namespace pelt {
namespace sim_detail {

template <class T>
struct MatrixMultiply {
  float* d;
  const uint32_t* a;
  const uint32_t* b;

  static void execute(sim::Lanes lanes) {
    float a[16][16];  // [m, k]
    float b[16][8];   // [k, n]
    for (int lane = 0; lane < sim::kWarpLanes; ++lane) {
      const auto* own = static_cast<const MatrixMultiply*>(lanes[lane]);
      const int i = lane / 4, j = 2 * (lane % 4);
      for (int r = 0; r < 4; ++r) {
        const Float2 pair = unpack<T>(own->a[r]);
        a[i + 8 * (r % 2)][j + 8 * (r / 2)] = pair.low;
        a[i + 8 * (r % 2)][j + 8 * (r / 2) + 1] = pair.high;
      }
      for (int r = 0; r < 2; ++r) {
        const Float2 pair = unpack<T>(own->b[r]);
        b[j + 8 * r][i] = pair.low;
        b[j + 8 * r + 1][i] = pair.high;
      }
    }
    float d[16][8];  // [m, n]
    each_element(lanes, [&](float& register_value, int m, int n) { d[m][n] = register_value; });
    for (int m = 0; m < 16; ++m) {
      for (int k = 0; k < 16; ++k) {
        for (int n = 0; n < 8; ++n) d[m][n] += a[m][k] * b[k][n];
      }
    }
    each_element(lanes, [&](float& register_value, int m, int n) { register_value = d[m][n]; });
  }

  template <class Visit>
  static void each_element(sim::Lanes lanes, Visit&& visit) {
    for (int lane = 0; lane < sim::kWarpLanes; ++lane) {
      float* d = static_cast<MatrixMultiply*>(lanes[lane])->d;
      for (int r = 0; r < 4; ++r) visit(d[r], lane / 4 + 8 * (r / 2), 2 * (lane % 4) + r % 2);
    }
  }
};

}  // namespace sim_detail

template <class T>
inline void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  sim_detail::MatrixMultiply<T> operands{d, a, b};
  sim::rendezvous("mma_m16n8k16", &operands, &sim_detail::MatrixMultiply<T>::execute);
}

}  // namespace pelt
