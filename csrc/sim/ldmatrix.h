// Host bodies of cuda/ldmatrix.cuh: the exact layout of the PTX manual.
#pragma once

#include <cstdint>
#include <cstring>

#include "sim/executor.h"

namespace pelt {
namespace sim_detail {

// The address of row r of matrix m comes from lane 8 m + r. Lane l receives, of each matrix, the
// elements (l / 4, 2 (l % 4)) and (l / 4, 2 (l % 4) + 1); transposed, row and column change places.
template <int kMatrices, bool kTransposed>
struct LoadMatrix {
  const void* row;
  uint32_t* result;

  static void execute(sim::Lanes lanes) {
    for (int m = 0; m < kMatrices; ++m) {
      uint16_t matrix[8][8];
      for (int r = 0; r < 8; ++r) {
        memcpy(matrix[r], static_cast<const LoadMatrix*>(lanes[8 * m + r])->row, 16);
      }
      for (int lane = 0; lane < sim::kWarpLanes; ++lane) {
        const int i = lane / 4, j = 2 * (lane % 4);
        const uint32_t low = kTransposed ? matrix[j][i] : matrix[i][j];
        const uint32_t high = kTransposed ? matrix[j + 1][i] : matrix[i][j + 1];
        static_cast<LoadMatrix*>(lanes[lane])->result[m] = low | high << 16;
      }
    }
  }
};

template <int kMatrices, bool kTransposed>
inline void load_matrices(const char* instruction, uint32_t* result, const void* row) {
  // Lanes beyond the last matrix pass an address that the hardware ignores.
  if (sim::thread_index() % sim::kWarpLanes < 8 * kMatrices) {
    sim::check_aligned(instruction, row, 16);
    sim::check_in_shared(instruction, row, 16);
  }
  LoadMatrix<kMatrices, kTransposed> operands{row, result};
  sim::rendezvous(instruction, &operands, &LoadMatrix<kMatrices, kTransposed>::execute);
}

}  // namespace sim_detail

inline void ldmatrix_x1(uint32_t (&result)[1], const void* row) {
  sim_detail::load_matrices<1, false>("ldmatrix_x1", result, row);
}
inline void ldmatrix_x2(uint32_t (&result)[2], const void* row) {
  sim_detail::load_matrices<2, false>("ldmatrix_x2", result, row);
}
inline void ldmatrix_x4(uint32_t (&result)[4], const void* row) {
  sim_detail::load_matrices<4, false>("ldmatrix_x4", result, row);
}
inline void ldmatrix_x1_trans(uint32_t (&result)[1], const void* row) {
  sim_detail::load_matrices<1, true>("ldmatrix_x1_trans", result, row);
}
inline void ldmatrix_x2_trans(uint32_t (&result)[2], const void* row) {
  sim_detail::load_matrices<2, true>("ldmatrix_x2_trans", result, row);
}
inline void ldmatrix_x4_trans(uint32_t (&result)[4], const void* row) {
  sim_detail::load_matrices<4, true>("ldmatrix_x4_trans", result, row);
}

}  // namespace pelt
