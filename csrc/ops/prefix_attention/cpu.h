// prefix_attention on the CPU: what forward and backward of one call are given.
#pragma once

#include <cstdint>

#include "common/parameter.h"
#include "cpu/isa.h"

namespace pelt::prefix_attention {

constexpr int kMaxSegments = 4;

struct CpuSegment {
  Parameter k;                     // [P_i, G, E] | [A_i, P_i, G, E]
  Parameter v;                     // the same
  const int64_t* index = nullptr;  // [B], with a table
  int64_t length = 0;              // P_i
  float* dk = nullptr;             // [chunks, P_i, G, E] | [A_i, P_i, G, E], zero at first
  float* dv = nullptr;
};

struct CpuInputs {
  cpu::Isa isa = cpu::Isa::kBaseline;  // whose kernels serve it
  bool is_float32 = false;             // q, k, v, out and their gradients; else bfloat16
  int64_t B = 0, H = 0, G = 0, S = 0, N = 0, E = 0;
  const void* q = nullptr;  // [B, H, S, E], with strides in elements and the last one 1
  const void* k = nullptr;  // [B, G, N, E]
  const void* v = nullptr;  // [B, G, N, E]
  int64_t q_strides[3] = {};
  int64_t k_strides[3] = {};
  int64_t v_strides[3] = {};
  CpuSegment prefix[kMaxSegments];
  int segments = 0;
  Parameter gate;  // [B] | [B, H]
  bool has_gate_per_head = false;
  const bool* key_mask = nullptr;    // [B, N]
  const int64_t* lengths = nullptr;  // [B]
  Parameter bias;                    // [B, H, S, N] | [1, H, S, N] | [B, 1, S, N] | [1, 1, S, N]
  int64_t bias_strides[2] = {};      // of B and H, in elements; 0 where one serves all
  bool is_causal = false;
  float scale = 1.0f;
  float kept = 1.0f;       // 1 / (1 - p), what dropout multiplies the kept probabilities by
  uint32_t threshold = 0;  // floor(p 2^32); 0: no dropout
  uint64_t seed = 0;
  int threads = 1;
};

struct CpuBackward {
  const void* dout = nullptr;  // [B, H, S, E]
  const void* out = nullptr;   // [B, H, S, E]
  const float* lse = nullptr;  // [B, H, S]
  void* dq = nullptr;          // [B, H, S, E]
  void* dk = nullptr;          // [B, G, N, E]
  void* dv = nullptr;          // [B, G, N, E]
  float* dgate = nullptr;      // [B, H], each head's part
  float* dbias = nullptr;      // [B or 1, H, S, N], each head's part, zero at first
  // The batch is cut into this many parts, each with its own sums for the shared prefixes; the
  // caller adds them in order. It depends on B alone, so the threads do not change a bit.
  int64_t chunks = 1;
};

template <cpu::Isa kIsa>
void forward_on_cpu(const CpuInputs& in, void* out, float* lse);  // [B, H, S, E], [B, H, S]

template <cpu::Isa kIsa>
void backward_on_cpu(const CpuInputs& in, const CpuBackward& grad);

}  // namespace pelt::prefix_attention
