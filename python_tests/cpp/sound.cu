// Small kernels without a fault, over the device vocabulary. Their numbers are known, and must come
// out under every order of warps and blocks.
#include "small.cuh"

namespace pelt::test {

// ---- barriers ----

// Reads its neighbour's word, 32 threads away, so that warps depend on each other.
extern "C" __global__ void exchange(const Params params) {
  auto& shared = shared_memory_as<Words>();
  const int t = thread_index();
  shared.word[t] = t * 3;
  sync_threads();
  params.out[t] = shared.word[(t + 32) % 128];
}

// The same inside a warp.
extern "C" __global__ void exchange_in_warp(const Params params) {
  auto& shared = shared_memory_as<Words>();
  const int t = thread_index();
  shared.word[t] = t * 3;
  sync_warp();
  params.out[t] = shared.word[t ^ 1];
}

// Two tiles in turn: a barrier lies between a tile's reads and its next writes.
extern "C" __global__ void double_buffer(const Params params) {
  auto& shared = shared_memory_as<Words>();
  const int t = thread_index();
  uint32_t sum = 0;
  for (int i = 0; i < 4; ++i) {
    shared.word[128 * (i % 2) + t] = i + t;
    sync_threads();
    sum += shared.word[128 * (i % 2) + (t + 32) % 128];
  }
  params.out[t] = sum;
}

// Two halves of the block, each with a barrier of its own; then a hand-over from one to the other.
extern "C" __global__ void named_barriers(const Params params) {
  auto& shared = shared_memory_as<Words>();
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

// Lanes take different ways, and meet again before they exchange words.
extern "C" __global__ void diverge_and_meet(const Params params) {
  const int t = thread_index();
  uint32_t value = 0;
  if (t % 4 == 0) {
    for (int i = 0; i <= t % 32; ++i) value += params.in[i];
  } else if (t % 4 == 1) {
    value = params.in[t] * 2;
  }
  sync_warp();
  params.out[t] = shfl(value, t % 32 / 4 * 4 + 1) + shfl_xor(value, 1);
}

// ---- asynchronous copies ----

extern "C" __global__ void copy_asynchronously(const Params params) {
  auto& shared = shared_memory_as<Words>();
  const int t = thread_index();
  if (t < 32) cp_async_16(&shared.word[4 * t], params.in + 4 * t, t % 4 != 3);
  cp_async_commit();
  cp_async_wait<0>();
  sync_threads();
  params.out[t] = shared.word[t];
}

// Two stages in flight; waits for the first one only, and reads it.
extern "C" __global__ void copy_in_two_stages(const Params params) {
  auto& shared = shared_memory_as<Words>();
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

// ---- warp-wide instructions ----

extern "C" __global__ void shuffle_and_vote(const Params params) {
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
extern "C" __global__ void count_and_ballot(const Params params) {
  auto& shared = shared_memory_as<Words>();
  const int t = thread_index();
  if (t == 0) shared.word[0] = 0;
  sync_threads();
  const uint32_t lanes = vote_ballot(t % 3 == 0);
  if (t % 3 == 0) atomic_count(reinterpret_cast<int*>(&shared.word[0]), 2);
  atomic_count(params.counters, 1);
  sync_threads();
  params.out[t] = lanes % 1009 * 1000000 + static_cast<uint32_t>(count_bits(lanes)) * 10000 +
                  shared.word[0] * 100 + static_cast<uint32_t>(params.counters[0]);
}

// Each lane adds its own values; mean and deviation of all of them come out in every lane.
extern "C" __global__ void moments(const Params params) {
  Moments own;
  for (int i = 0; i < 3; ++i) own.add(10000.0f + lane_index() * 3 + i);
  const Moments all = group_moments<32>(own);
  params.out[2 * lane_index()] = bits_of(all.mean);
  params.out[2 * lane_index() + 1] = bits_of(all.squares / all.count);
}

// ---- matrices ----

template <class T>
struct MatrixTiles {
  T a[16][16 + kTilePad];    // [m, k]
  T a_t[16][16 + kTilePad];  // [k, m]
  T b[16][16 + kTilePad];    // [n, k]
  T b_t[16][16 + kTilePad];  // [k, n]
};

// D = A B^T by all four ways of loading; in is A and B [2, 16, 16] in float32, out [4, 16, 16].
template <class T>
__device__ void multiply_tiles(const Params& params) {
  auto& shared = shared_memory_as<MatrixTiles<T>>();
  for (int i = thread_index(); i < 256; i += 32) {
    const int row = i / 16, k = i % 16;
    shared.a[row][k] = shared.a_t[k][row] = round_to<T>(float_from_bits(params.in[i]));
    shared.b[row][k] = shared.b_t[k][row] = round_to<T>(float_from_bits(params.in[256 + i]));
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

extern "C" __global__ void multiply_bf16(const Params params) { multiply_tiles<bf16>(params); }
extern "C" __global__ void multiply_f16(const Params params) { multiply_tiles<f16>(params); }

// The matrix [16, 16] of the numbers 16 i + j, by the narrow loads.
extern "C" __global__ void ldmatrix_narrow(const Params params) {
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

// Every pattern of 16 bits that is a number, by way of float32 and back: each block counts those
// that come back as another one.
extern "C" __global__ void convert_back_and_forth(const Params params) {
  auto& shared = shared_memory_as<Words>();
  auto* wrong = reinterpret_cast<int*>(&shared.word[0]);
  if (thread_index() == 0) *wrong = 0;
  sync_threads();
  const auto bits = static_cast<uint16_t>(block_index_x() * 1024 + thread_index());
  const float b = to_float(bf16{bits}), h = to_float(f16{bits});
  if (b == b && round_to<bf16>(b).bits != bits) atomic_count(wrong, 1);
  if (h == h && round_to<f16>(h).bits != bits) atomic_count(wrong, 1);
  sync_threads();
  if (thread_index() == 0) params.out[block_index_x()] = *wrong;
}

// The floats in `in` as f16 and bf16.
extern "C" __global__ void round_floats(const Params params) {
  const float value = float_from_bits(params.in[thread_index()]);
  params.out[2 * thread_index()] = round_to<f16>(value).bits;
  params.out[2 * thread_index() + 1] = round_to<bf16>(value).bits;
}

// Philox of three counters and keys, in [3, 6].
extern "C" __global__ void draw_philox(const Params params) {
  const int t = thread_index();
  if (t >= 3) return;
  const uint32_t* in = params.in + 6 * t;
  const PhiloxWords words = philox4x32_10({{in[0], in[1], in[2], in[3]}}, in[4], in[5]);
  for (int i = 0; i < 4; ++i) params.out[4 * t + i] = words.word[i];
}

// Activation block_index_x() of the numbers from -6 on, and its derivative.
extern "C" __global__ void derive_activations(const Params params) {
  const auto kind = static_cast<Activation>(block_index_x());
  const int i = block_index_x() * 128 + thread_index();
  const float x = float_from_bits(params.in[thread_index()]);
  params.out[2 * i] = bits_of(activate(kind, x));
  params.out[2 * i + 1] = bits_of(activation_derivative(kind, x));
}

// ---- between blocks ----

// Every block publishes a word and waits for all the others'.
extern "C" __global__ void gather_from_all_blocks(const Params params) {
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

// Every thread publishes its own word by itself, and waits for all the others'.
extern "C" __global__ void gather_from_all_threads(const Params params) {
  const int block = block_index_x(), t = thread_index(), blocks = grid_blocks_x();
  params.out[block * 64 + t] = block * 64 + t;
  atomic_add_release(params.counters, 1);
  wait_until_at_least(params.counters, 64 * blocks);
  params.out[(blocks + block) * 64 + t] = params.out[(block + 1) % blocks * 64 + (t ^ 33)];
}

// Threads of the first block hand a word each to those of the second, by a flag for
// each, which is -1 at first.
extern "C" __global__ void flag_for_each_thread(const Params params) {
  const int t = thread_index();
  int* flag = reinterpret_cast<int*>(params.out) + 128 + t;
  if (block_index_x() == 0) {
    params.out[t] = 3 * t;
    atomic_add_release(flag, 1);
  } else {
    wait_until_at_least(flag, 0);
    params.out[64 + t] = params.out[t];
  }
}

// The block that draws the last ticket adds up what all threads of the others left.
extern "C" __global__ void last_block_reduces(const Params params) {
  auto& shared = shared_memory_as<Words>();
  const int block = block_index_x(), t = thread_index();
  params.out[block * 64 + t] = 11 * block;
  sync_threads();  // the ticket releases what the whole block wrote
  if (t == 0) shared.word[0] = take_ticket(params.counters);
  sync_threads();  // which every thread reads
  if (static_cast<int>(shared.word[0]) + 1 < grid_blocks_x()) return;
  uint32_t sum = 0;
  for (int i = 0; i < grid_blocks_x(); ++i) sum += params.out[i * 64 + t];
  params.out[grid_blocks_x() * 64 + t] = sum;
}

}  // namespace pelt::test
