// Small kernels over the device vocabulary: sound ones, and ones with a planted fault. The
// simulator's tests run them; nvcc compiles the same text.
#pragma once

#include "cuda/device.cuh"

namespace pelt::test {

struct Params {
  const uint32_t* in = nullptr;
  uint32_t* out = nullptr;
  int* counters = nullptr;
  int size = 0;
};

// ---- barriers ----

struct Words128 {
  uint32_t word[128];
};

// Reads its neighbour's word, 32 threads away, so that warps depend on each other.
template <bool kHasBarrier>
__global__ void exchange(const Params params) {
  auto& shared = shared_memory_as<Words128>();
  const int t = thread_index();
  shared.word[t] = t * 3;
  if (kHasBarrier) sync_threads();
  params.out[t] = shared.word[(t + 32) % 128];
}

// The same inside a warp.
template <bool kHasBarrier>
__global__ void exchange_in_warp(const Params params) {
  auto& shared = shared_memory_as<Words128>();
  const int t = thread_index();
  shared.word[t] = t * 3;
  if (kHasBarrier) sync_warp();
  params.out[t] = shared.word[t ^ 1];
}

// Two halves of the block, each with a barrier of its own; then a hand-over from one to the other.
__global__ void named_barriers(const Params params) {
  auto& shared = shared_memory_as<Words128>();
  const int t = thread_index();
  shared.word[t] = t;
  if (t < 64) {
    named_barrier_sync<1>(64);
    const uint32_t mirrored = shared.word[63 - t];
    named_barrier_sync<1>(64);
    shared.word[t] = mirrored;
    named_barrier_arrive<2>(128);
  } else {
    named_barrier_sync<2>(128);
    params.out[t - 64] = shared.word[t - 64];
  }
}

__global__ void barrier_for_the_wrong_count(const Params) {
  if (thread_index() < 64) {
    named_barrier_sync<1>(64);
  } else {
    named_barrier_sync<1>(128);
  }
}

// ---- asynchronous copies ----

template <bool kHasWait>
__global__ void copy_asynchronously(const Params params) {
  auto& shared = shared_memory_as<Words128>();
  const int t = thread_index();
  if (t < 32) cp_async_16(&shared.word[4 * t], params.in + 4 * t, t % 4 != 3);
  cp_async_commit();
  if (kHasWait) cp_async_wait<0>();
  sync_threads();
  params.out[t] = shared.word[t];
}

// Two stages in flight; waits for the first one only, and reads it.
__global__ void copy_in_two_stages(const Params params) {
  auto& shared = shared_memory_as<Words128>();
  const int t = thread_index();
  for (int stage = 0; stage < 2; ++stage) {
    if (t < 16) cp_async_16(&shared.word[64 * stage + 4 * t], params.in + 64 * stage + 4 * t, true);
    cp_async_commit();
  }
  cp_async_wait<1>();
  sync_threads();
  if (t < 64) params.out[t] = shared.word[t];
  cp_async_wait<0>();
  sync_threads();
  if (t >= 64) params.out[t] = shared.word[t];
}

__global__ void copy_past_the_arena(const Params params) {
  auto& shared = shared_memory_as<Words128>();
  cp_async_16(&shared.word[4 * thread_index()], params.in, true);
}

// ---- memory ----

__global__ void write_past_the_tile(const Params) {
  auto& shared = shared_memory_as<Words128>();
  volatile uint32_t* words = shared.word;
  words[thread_index() + 1] = 7;
}

__global__ void load_misaligned(const Params params) {
  params.out[0] = load_16(params.in + thread_index()).word[0];
}

// ---- warp-wide instructions ----

__global__ void return_early(const Params params) {
  if (thread_index() == 37) return;
  FragmentD d;
  multiply_add<bf16>(d, FragmentA{}, FragmentB{});
  params.out[thread_index()] = bits_of(d.r[0]);
}

__global__ void return_before_barrier(const Params) {
  if (thread_index() >= 96) return;
  sync_threads();
}

__global__ void diverge(const Params params) {
  const uint32_t value = thread_index();
  params.out[value] = value % 32 < 5 ? shfl(value, 0) : shfl_xor(value, 1);
}

__global__ void shuffle_and_vote(const Params params) {
  const int t = thread_index();
  const float sum = warp_sum(static_cast<float>(t));
  const float quad = group_sum<4>(static_cast<float>(t));
  const int third = shfl(t, 3);
  const bool any = vote_any(t == 40);
  params.out[t] = static_cast<uint32_t>(sum) * 100000 + static_cast<uint32_t>(quad) * 100 +
                  static_cast<uint32_t>(third) % 32 * 10 + (any ? 1 : 0);
}

// Two warps count their multiples of 3 in shared memory, themselves in global memory, and by
// ballot.
__global__ void count_and_ballot(const Params params) {
  auto& words = shared_memory_as<Words128>();
  const int t = thread_index();
  if (t == 0) words.word[0] = 0;
  sync_threads();
  const uint32_t lanes = vote_ballot(t % 3 == 0);
  if (t % 3 == 0) atomic_count(reinterpret_cast<int*>(&words.word[0]), 2);
  atomic_count(params.counters, 1);
  sync_threads();
  params.out[t] = lanes % 1009 * 1000000 + static_cast<uint32_t>(count_bits(lanes)) * 10000 +
                  words.word[0] * 100 + static_cast<uint32_t>(params.counters[0]);
}

// Each lane adds its own values; mean and deviation of all of them come out in every lane.
__global__ void moments(const Params params) {
  Moments own;
  for (int i = 0; i < 3; ++i) own.add(10000.0f + lane_index() * 3 + i);
  const Moments all = group_moments<32>(own);
  params.out[2 * lane_index()] = bits_of(all.mean);
  params.out[2 * lane_index() + 1] = bits_of(all.squares / all.count);
}

template <class T>
struct MatrixTiles {
  T a[16][16 + kTilePad];    // [m, k]
  T a_t[16][16 + kTilePad];  // [k, m]
  T b[16][16 + kTilePad];    // [n, k]
  T b_t[16][16 + kTilePad];  // [k, n]
};

// D = A B by all four ways of loading; out is [4][16][16].
template <class T>
__global__ void multiply_tiles(const Params params) {
  auto& shared = shared_memory_as<MatrixTiles<T>>();
  for (int i = thread_index(); i < 256; i += 32) {
    const int row = i / 16, k = i % 16;
    const T a = round_to<T>(row * 0.37f - k), b = round_to<T>(row * 1.3f + 0.11f * k);
    shared.a[row][k] = shared.a_t[k][row] = a;
    shared.b[row][k] = shared.b_t[k][row] = b;
  }
  sync_warp();
  constexpr int kStride = 16 + kTilePad;
  for (int way = 0; way < 4; ++way) {
    const FragmentA a =
        way & 1 ? load_a_transposed(&shared.a_t[0][0], kStride) : load_a(&shared.a[0][0], kStride);
    FragmentB b[2];
    if (way & 2) {
      load_b_pair_transposed(b, &shared.b_t[0][0], kStride);
    } else {
      load_b_pair(b, &shared.b[0][0], kStride);
    }
    for (int half = 0; half < 2; ++half) {
      FragmentD d;
      multiply_add<T>(d, a, b[half]);
      for (int i = 0; i < 4; ++i) {
        params.out[way * 256 + FragmentD::row(i) * 16 + 8 * half + FragmentD::column(i)] =
            bits_of(d.r[i]);
      }
    }
  }
}

__global__ void ldmatrix_narrow(const Params params) {
  auto& shared = shared_memory_as<MatrixTiles<f16>>();
  const int lane = lane_index();
  for (int i = lane; i < 256; i += 32) shared.a[i / 16][i % 16].bits = static_cast<uint16_t>(i);
  sync_warp();
  uint32_t one[1], two[2];
  ldmatrix_x1(one, &shared.a[lane % 8][0]);
  params.out[lane] = one[0];
  ldmatrix_x1_trans(one, &shared.a[lane % 8][0]);
  params.out[32 + lane] = one[0];
  ldmatrix_x2(two, &shared.a[lane % 8 + lane / 8 % 2 * 8][8]);
  params.out[64 + lane] = two[1];
  ldmatrix_x2_trans(two, &shared.a[lane % 8 + lane / 8 % 2 * 8][8]);
  params.out[96 + lane] = two[1];
}

// ---- arithmetic ----

__global__ void derive_activations(const Params params) {
  const auto kind = static_cast<Activation>(params.size);
  const float x = float_from_bits(params.in[thread_index()]);
  float factor[4];
  Dropout::with_probability(0.5, 1).factors_of_4(4 * thread_index(), factor);
  params.out[thread_index()] =
      bits_of(activate(kind, x) + activation_derivative(kind, x) * factor[0]);
}

// ---- between blocks ----

// Every block publishes a word and waits for all the others'.
__global__ void gather_from_all_blocks(const Params params) {
  const int block = block_index_x();
  if (thread_index() == 0) {
    params.out[block] = 11 * block;
    atomic_add_release(params.counters, 1);
    wait_until_at_least(params.counters, grid_blocks_x());
  }
  sync_threads();
  uint32_t sum = 0;
  for (int i = 0; i < grid_blocks_x(); ++i) sum += params.out[i];
  if (thread_index() == 0) params.out[grid_blocks_x() + block] = sum;
}

// The block that draws the last ticket adds up what the others left.
__global__ void last_block_reduces(const Params params) {
  const int block = block_index_x();
  if (thread_index() != 0) return;
  params.out[block] = 11 * block;
  if (take_ticket(params.counters) + 1 < grid_blocks_x()) return;
  uint32_t sum = 0;
  for (int i = 0; i < grid_blocks_x(); ++i) sum += params.out[i];
  params.out[grid_blocks_x()] = sum;
}

}  // namespace pelt::test
