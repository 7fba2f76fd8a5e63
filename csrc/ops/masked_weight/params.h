// masked_weight: y = mask ⊙ W with W = w0 + beta u v, and mask = 1 at the `keep` highest scores
// |W| + alpha1 a b + alpha2 (row 1ᵀ + 1 colᵀ).
//
// Plain pointers, sizes and numbers, filled in by the binding. Shapes are the contract's
// (pelt_kernels/ops/masked_weight/contract.py), in its letters.
#pragma once

#include <cstdint>
#include <string>

#include "common/dtype.h"
#include "common/launch.h"
#include "common/parameter.h"

namespace pelt::masked_weight {

struct Inputs {
  DType dtype = DType::kBF16;
  int Dout = 0;
  int Din = 0;
  int R = 0;
  int R2 = 0;

  const void* w0 = nullptr;  // [Dout, Din]
  Parameter u;               // [Dout, R]
  Parameter v;               // [R, Din]
  Parameter a;               // [Dout, R2]
  Parameter b;               // [R2, Din]
  Parameter row;             // [Dout]
  Parameter col;             // [Din]

  int64_t keep = 0;
  float beta = 1.0f;
  float alpha1 = 1.0f;
  float alpha2 = 1.0f;

  PELT_HOST_DEVICE int64_t entries() const { return static_cast<int64_t>(Dout) * Din; }
};

// A threshold is found in three digits of the scores' bits, from the top.
constexpr int kDigits = 3;
constexpr int kBins = 2048;

struct ForwardParams {
  Inputs in;
  void* y = nullptr;         // [Dout, Din], at first W
  bool* mask = nullptr;      // [Dout, Din]
  uint32_t* keys = nullptr;  // [Dout, Din], numbers in the order of the scores
  int* counts = nullptr;     // [kDigits, kBins]: how many keys have a digit; zero at first
  int* arrivals = nullptr;   // blocks that have come to the barriers of the grid; zero at first
  int* equal = nullptr;      // for each warp of the grid: its keys that are the threshold
};

struct BackwardParams {
  Inputs in;
  const void* dy = nullptr;    // [Dout, Din]
  const bool* mask = nullptr;  // [Dout, Din]

  void* dw0 = nullptr;  // [Dout, Din]
  ParameterGrad du;     // [Dout, R]
  ParameterGrad dv;     // [R, Din]
  ParameterGrad da;     // [Dout, R2]
  ParameterGrad db;     // [R2, Din]
  ParameterGrad drow;   // [Dout]
  ParameterGrad dcol;   // [Din]

  // Sums over one block's columns or rows; the second kernel adds them in order. Those of row and
  // col are one more rank of a and b, whose other factor is 1.
  float* du_partial = nullptr;  // [column tiles, Dout, R]
  float* dv_partial = nullptr;  // [row bands, R, Din]
  float* da_partial = nullptr;  // [column tiles, Dout, R2 + 1]
  float* db_partial = nullptr;  // [row bands, R2 + 1, Din]
  int column_tiles = 0;
  int row_bands = 0;
};

// Why the kernels refuse a call, with numbers; empty if they serve it.
std::string why_not(int64_t Dout, int64_t Din, int64_t R, int64_t R2);

// Bytes of device memory that a launch needs beside its inputs and outputs.
int64_t forward_workspace_bytes(const Inputs& in);
int64_t backward_workspace_bytes(const Inputs& in);

void launch_masked_weight_fwd(const ForwardParams& params, void* workspace, Stream stream);
void launch_masked_weight_bwd(const BackwardParams& params, void* workspace, Stream stream);

// One for each architecture's files; launch.cpp chooses.
void launch_masked_weight_fwd_sm80(ForwardParams params, void* workspace, Stream stream);
void launch_masked_weight_bwd_sm80(BackwardParams params, void* workspace, Stream stream);

}  // namespace pelt::masked_weight
