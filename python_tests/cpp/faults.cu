// Small kernels with one fault each, which the simulator has to name. Many of them give the right
// numbers on most runs.
#include "small.cuh"

namespace pelt::test {

// ---- lanes of one warp ----

// There is no barrier between a lane's write and its neighbour's read.
extern "C" __global__ void no_warp_barrier(const Params params) {
  auto& shared = shared_memory_as<Words>();
  const int t = thread_index();
  shared.word[t] = t * 3;
  params.out[t] = shared.word[t ^ 1];
}

// A shuffle keeps lanes together, but it orders no memory.
extern "C" __global__ void shuffle_for_a_barrier(const Params params) {
  auto& shared = shared_memory_as<Words>();
  const int t = thread_index();
  shared.word[t] = t * 3;
  const int other = shfl_xor(t, 1);
  params.out[t] = shared.word[other];
}

// A barrier of half a warp, which the vocabulary has not.
extern "C" __global__ void barrier_of_half_a_warp(const Params params) {
  auto& shared = shared_memory_as<Words>();
  const int t = thread_index();
  shared.word[t] = t;
  if (t % 32 < 16) __syncwarp(0xffff);
  params.out[t] = shared.word[t];
}

// A lane overwrites what its neighbour may not have read yet.
extern "C" __global__ void overwritten_while_read(const Params params) {
  auto& shared = shared_memory_as<Words>();
  const int t = thread_index();
  shared.word[t] = t;
  sync_warp();
  const uint32_t value = shared.word[t ^ 1];
  shared.word[t] = 1000 + value;
  sync_warp();
  params.out[t] = shared.word[t];
}

// ---- warps of one block ----

// There is no barrier between a thread's write and the read in another warp.
extern "C" __global__ void no_barrier(const Params params) {
  auto& shared = shared_memory_as<Words>();
  const int t = thread_index();
  shared.word[t] = t * 3;
  params.out[t] = shared.word[(t + 32) % 128];
}

// A warp's barrier orders nothing of another warp.
extern "C" __global__ void warp_barrier_between_warps(const Params params) {
  auto& shared = shared_memory_as<Words>();
  const int t = thread_index();
  shared.word[t] = t;
  sync_warp();
  params.out[t] = shared.word[(t + 32) % 128];
}

// The third turn has no barrier, so that the fourth one overtakes readers of the second.
extern "C" __global__ void double_buffer_a_barrier_short(const Params params) {
  auto& shared = shared_memory_as<Words>();
  const int t = thread_index();
  uint32_t sum = 0;
  for (int i = 0; i < 4; ++i) {
    shared.word[128 * (i % 2) + t] = i + t;
    if (i != 2) sync_threads();
    sum += shared.word[128 * (i % 2) + (t + 32) % 128];
  }
  params.out[t] = sum;
}

// All threads read one word, twice, and one of them overwrites it before the others need have.
extern "C" __global__ void overwritten_after_reads_by_all(const Params params) {
  auto& shared = shared_memory_as<Words>();
  const int t = thread_index();
  if (t == 0) shared.word[0] = 7;
  sync_threads();
  const volatile Words& words = shared;
  const uint32_t once = words.word[0];
  const uint32_t again = words.word[0];
  sync_warp();
  if (t == 0) shared.word[0] = 8;
  params.out[t] = once + again;
}

// All threads add to one word by a plain read and a plain write.
extern "C" __global__ void count_without_atomic(const Params params) {
  auto& shared = shared_memory_as<Words>();
  const int t = thread_index();
  if (t == 0) shared.word[0] = 0;
  sync_threads();
  shared.word[0] += 1;
  sync_threads();
  if (t == 0) params.out[0] = shared.word[0];
}

// All threads write one word; that they write the same value excuses nothing.
extern "C" __global__ void one_value_from_all_threads(const Params params) {
  auto& shared = shared_memory_as<Words>();
  shared.word[0] = 7;
  sync_threads();
  params.out[thread_index()] = shared.word[0];
}

// A warp returns, and the others wait for it.
extern "C" __global__ void return_before_barrier(const Params params) {
  const int t = thread_index();
  if (t >= 96) return;
  sync_threads();
  params.out[t] = 7;
}

// The first half hands a tile over, and reads the answer without waiting for it.
extern "C" __global__ void arrive_for_a_wait(const Params params) {
  auto& shared = shared_memory_as<Words>();
  const int t = thread_index();
  if (t < 64) {
    shared.word[t] = t;
    named_barrier_arrive<1>(128);
    params.out[t] = shared.word[64 + t];
  } else {
    named_barrier_sync<1>(128);
    shared.word[t] = 2 * shared.word[t - 64];
  }
}

// The two halves of the block do not agree on how many threads meet.
extern "C" __global__ void barrier_for_the_wrong_count(const Params params) {
  const int t = thread_index();
  if (t < 64) {
    named_barrier_sync<1>(64);
  } else {
    named_barrier_sync<1>(128);
  }
  params.out[t] = 7;
}

// ---- blocks ----

// Adding to the counter releases nothing, so what it counts need not be in memory.
extern "C" __global__ void flag_without_release(const Params params) {
  const int block = block_index_x();
  if (thread_index() == 0) {
    params.out[block] = 11 * block;
    atomic_count(params.counters, 1);
    wait_until_at_least(params.counters, grid_blocks_x());
  }
  sync_threads();
  uint32_t sum = 0;
  for (int i = 0; i < grid_blocks_x(); ++i) sum += params.out[i];
  if (thread_index() == 0) params.out[grid_blocks_x() + block] = sum;
}

// One thread's release covers only its own write: the block's barrier before it is missing.
extern "C" __global__ void release_without_barrier(const Params params) {
  const int block = block_index_x(), t = thread_index();
  params.out[block * 64 + t] = 11;
  if (t == 0) {
    atomic_add_release(params.counters, 1);
    wait_until_at_least(params.counters, grid_blocks_x());
  }
  sync_threads();
  uint32_t sum = 0;
  for (int i = 0; i < grid_blocks_x() * 64; ++i) sum += params.out[i];
  if (t == 0) params.out[grid_blocks_x() * 64 + block] = sum;
}

// One thread's acquire covers only its own reads: the block's barrier behind it is missing.
extern "C" __global__ void acquire_without_barrier(const Params params) {
  const int block = block_index_x(), t = thread_index();
  if (t == 0) {
    params.out[block] = 11 * block;
    atomic_add_release(params.counters, 1);
  }
  if (t == 32) wait_until_at_least(params.counters, grid_blocks_x());
  if (t < 32) params.out[grid_blocks_x() + block * 32 + t] = params.out[(block + 1) % 3];
}

// One lane waits for another block, and the others of its warp go on without a barrier.
extern "C" __global__ void a_lane_waits_for_its_warp(const Params params) {
  const int block = block_index_x(), t = thread_index();
  if (block == 0 && t == 0) {
    params.out[0] = 7;
    atomic_add_release(params.counters, 1);
  }
  if (block != 0) {
    if (t == 0) wait_until_at_least(params.counters, 1);
    params.out[block * 64 + t] = params.out[0];
  }
}

// Waits for one block too few. It shows where that block comes last.
extern "C" __global__ void wait_for_a_block_too_few(const Params params) {
  const int block = block_index_x();
  if (thread_index() == 0) {
    params.out[block] = 11 * block;
    atomic_add_release(params.counters, 1);
    wait_until_at_least(params.counters, grid_blocks_x() - 1);
  }
  sync_threads();
  uint32_t sum = 0;
  for (int i = 0; i < grid_blocks_x(); ++i) sum += params.out[i];
  if (thread_index() == 0) params.out[grid_blocks_x() + block] = sum;
}

// The ticket is taken while other warps of the block may still write.
extern "C" __global__ void ticket_without_barrier(const Params params) {
  auto& shared = shared_memory_as<Words>();
  const int block = block_index_x(), t = thread_index();
  params.out[block * 64 + t] = 11;
  if (t == 0) shared.word[0] = take_ticket(params.counters);
  sync_threads();
  if (static_cast<int>(shared.word[0]) + 1 < grid_blocks_x()) return;
  uint32_t sum = 0;
  for (int i = 0; i < grid_blocks_x() * 64; ++i) sum += params.out[i];
  if (t == 0) params.out[grid_blocks_x() * 64] = sum;
}

// Blocks wait for each other. It is sound in a cooperative launch, and is launched as another one.
extern "C" __global__ void flags_alone(const Params params) {
  const int block = block_index_x();
  if (thread_index() == 0) {
    params.out[block] = 11 * block;
    atomic_add_release(params.counters, 1);
    wait_until_at_least(params.counters, grid_blocks_x());
  }
}

// Blocks add to one word by plain reads and writes.
extern "C" __global__ void blocks_add_to_one_word(const Params params) {
  if (thread_index() == 0) params.out[0] += 1;
}

// Blocks write the same value to one word.
extern "C" __global__ void blocks_store_one_value(const Params params) {
  if (thread_index() == 0) params.out[0] = 7;
}

// Blocks write their own numbers to one word, and the last one stays.
extern "C" __global__ void blocks_store_their_numbers(const Params params) {
  if (thread_index() == 0) params.out[0] = block_index_x();
}

// ---- asynchronous copies ----

// A source of 16 bytes is not a multiple of 16.
extern "C" __global__ void copy_from_8_bytes_off(const Params params) {
  auto& shared = shared_memory_as<Words>();
  const int t = thread_index();
  cp_async_16(&shared.word[4 * t], params.in + 2, true);
  cp_async_commit();
  cp_async_wait<0>();
  params.out[t] = shared.word[4 * t];
}

// The same where the copy only writes zeros: the hardware checks the address all the same.
extern "C" __global__ void copy_nothing_from_8_bytes_off(const Params params) {
  auto& shared = shared_memory_as<Words>();
  const int t = thread_index();
  cp_async_16(&shared.word[4 * t], params.in + 2, false);
  cp_async_commit();
  cp_async_wait<0>();
  params.out[t] = shared.word[4 * t];
}

// Reads its own copy without waiting for it.
extern "C" __global__ void copy_without_wait(const Params params) {
  auto& shared = shared_memory_as<Words>();
  const int t = thread_index();
  cp_async_16(&shared.word[4 * t], params.in, true);
  cp_async_commit();
  params.out[t] = shared.word[4 * t];
  cp_async_wait<0>();
}

// The barrier orders the threads, but nobody has waited for the copies.
extern "C" __global__ void barrier_for_a_wait(const Params params) {
  auto& shared = shared_memory_as<Words>();
  const int t = thread_index();
  if (t < 32) cp_async_16(&shared.word[4 * t], params.in + 4 * t, true);
  cp_async_commit();
  sync_threads();
  params.out[t] = shared.word[t];
  cp_async_wait<0>();
}

// Each lane has waited for its own copy, and reads its neighbour's.
extern "C" __global__ void wait_for_a_barrier(const Params params) {
  auto& shared = shared_memory_as<Words>();
  const int t = thread_index();
  cp_async_16(&shared.word[4 * t], params.in, true);
  cp_async_commit();
  cp_async_wait<0>();
  const bool any = vote_any(t == 3);
  params.out[t] = shared.word[4 * (t ^ 1)] + any;
}

// Waits for all groups but the newest, which is the one that it reads.
extern "C" __global__ void wait_for_the_older_stage(const Params params) {
  auto& shared = shared_memory_as<Words>();
  const int t = thread_index();
  for (int stage = 0; stage < 2; ++stage) {
    if (t < 32) cp_async_16(&shared.word[128 * stage + 4 * t], params.in + 4 * t, true);
    cp_async_commit();
  }
  cp_async_wait<1>();
  sync_threads();
  params.out[t] = shared.word[128 + t];
  cp_async_wait<0>();
}

// Each half of a warp has one group of copies, which may be in flight when it is read.
extern "C" __global__ void groups_of_half_warps(const Params params) {
  auto& shared = shared_memory_as<Words>();
  const int t = thread_index();
  if (t < 16) {
    cp_async_16(&shared.word[4 * t], params.in, true);  // of the lower half
    cp_async_commit();
  } else {
    cp_async_16(&shared.word[4 * t], params.in + 4, true);  // of the upper half
    cp_async_commit();
  }
  cp_async_wait<1>();
  if (t < 16) params.out[t] = shared.word[4 * t];
  cp_async_wait<0>();
}

// The next tile is copied to where other warps still read this one.
extern "C" __global__ void refill_while_others_read(const Params params) {
  auto& shared = shared_memory_as<Words>();
  const int t = thread_index();
  if (t < 32) cp_async_16(&shared.word[4 * t], params.in + 4 * t, true);
  cp_async_commit();
  cp_async_wait<0>();
  sync_threads();
  if (t < 32) cp_async_16(&shared.word[4 * t], params.in, true);
  cp_async_commit();
  params.out[t] = shared.word[t];
  cp_async_wait<0>();
}

// Copies to behind the end of shared memory.
extern "C" __global__ void copy_past_the_end(const Params params) {
  auto& shared = shared_memory_as<Words>();
  const int t = thread_index();
  cp_async_16(&shared.word[128 + 4 * t], params.in, true);
  cp_async_commit();
  cp_async_wait<0>();
  params.out[t] = shared.word[128 + 4 * t];
}

// Returns while a copy is still to land, in memory that then belongs to another block.
extern "C" __global__ void return_with_a_copy_under_way(const Params params) {
  auto& shared = shared_memory_as<Words>();
  const int t = thread_index();
  cp_async_16(&shared.word[4 * t], params.in, true);
  cp_async_commit();
  params.out[t] = 7;
}

// ---- memory ----

// A plain load of 16 bytes is not a multiple of 16.
extern "C" __global__ void load_from_8_bytes_off(const Params params) {
  store_16(params.out + 4 * thread_index(), load_16(params.in + 2));
}

// A row of a matrix is no multiple of 16.
extern "C" __global__ void matrix_from_8_bytes_off(const Params params) {
  auto& shared = shared_memory_as<Words>();
  const int t = thread_index();
  for (int i = t; i < 256; i += 32) shared.word[i] = i;
  sync_warp();
  uint32_t rows[1];
  ldmatrix_x1(rows, &shared.word[4 * t + 2]);
  params.out[t] = rows[0];
}

// The last thread's word lies behind shared memory.
extern "C" __global__ void write_past_the_end(const Params params) {
  auto& shared = shared_memory_as<Words>();
  const int t = thread_index();
  shared.word[t + 1] = 7;
  params.out[t] = shared.word[t + 1];
}

// The last thread reads the next tile, which nobody has written.
extern "C" __global__ void read_past_the_tile(const Params params) {
  auto& shared = shared_memory_as<Words>();
  const int t = thread_index();
  shared.word[t] = t;
  sync_threads();
  params.out[t] = shared.word[t + 1];
}

// The last thread reads the next tile, which others write at the time.
extern "C" __global__ void read_past_the_tile_into_the_next(const Params params) {
  auto& shared = shared_memory_as<Words>();
  const int t = thread_index();
  shared.word[t] = t;
  sync_threads();
  shared.word[128 + t] = 100 + t;
  params.out[t] = shared.word[t + 1];
}

// Reads a word behind the end of a tensor.
extern "C" __global__ void read_past_the_tensor(const Params params) {
  const int t = thread_index();
  params.out[t] = params.in[(1 << 20) + t];
}

// Writes a tensor that it was given, and one word more.
extern "C" __global__ void write_past_the_tensor(const Params params) {
  params.out[thread_index() + 1] = 7;
}

// Reads an output before anybody has written it.
extern "C" __global__ void read_an_output(const Params params) { params.out[thread_index()] += 7; }

// Shared memory that nobody has written decides something; any value seems to be right.
extern "C" __global__ void unwritten_flag(const Params params) {
  auto& shared = shared_memory_as<Words>();
  const int t = thread_index();
  params.out[t] = shared.word[t] != 0 ? 7 : 8;
}

// What nobody has written vanishes in a maximum, if it is a NaN.
extern "C" __global__ void unwritten_maximum(const Params params) {
  auto& shared = shared_memory_as<Words>();
  const int t = thread_index();
  params.out[t] = static_cast<uint32_t>(fmaxf(float_from_bits(shared.word[t]), 42.0f));
}

// The read-only path may hold what memory held before the kernel's own write.
extern "C" __global__ void read_only_path_of_written(const Params params) {
  const int t = thread_index();
  store_16(params.out + 4 * t, {{7, 7, 7, 7}});
  sync_threads();
  const Words4 other = load_global_16(params.out + 4 * (t ^ 1));
  store_16(params.out + 512 + 4 * t, other);
}

// The same in the other order.
extern "C" __global__ void written_after_the_read_only_path(const Params params) {
  const int t = thread_index();
  const uint32_t before = load_global_16(params.counters).word[0];
  sync_threads();
  if (t == 0) params.counters[0] = 7;
  params.out[t] = before;
}

// ---- warp-wide instructions ----

// One lane of warp 1 has returned before an instruction that takes all 32.
extern "C" __global__ void return_early(const Params params) {
  const int t = thread_index();
  if (t == 37) return;
  FragmentD d;
  multiply_add<bf16>(d, FragmentA{}, FragmentB{});
  params.out[t] = bits_of(d.r[0]);
}

// Lanes stand at two different shuffles.
extern "C" __global__ void two_shuffles(const Params params) {
  const int t = thread_index();
  params.out[t] = t % 32 < 5 ? shfl(t, 0) : shfl_xor(t, 1);
}

// Lanes stand at shuffles of one kind in two branches.
extern "C" __global__ void shuffle_in_two_branches(const Params params) {
  const int t = thread_index();
  int value;
  if (t % 32 < 16) {
    value = shfl(t, 0);
    params.out[t] = value;
  } else {
    value = shfl(100 + t, 16);
    params.out[t] = 2 * value;
  }
}

// Some lanes skip the shuffle.
extern "C" __global__ void shuffle_in_a_branch(const Params params) {
  const int t = thread_index();
  params.out[t] = t;
  if (params.in[t] % 2 == 0) params.out[t] = shfl(t, 0);
}

// The lanes of a warp stand at barriers in two branches.
extern "C" __global__ void barrier_in_two_branches(const Params params) {
  const int t = thread_index();
  if (t % 32 < 16) {
    params.out[t] = 7;
    sync_threads();  // of the lower half
  } else {
    sync_threads();  // of the upper half
    params.out[t] = 8;
  }
}

// ---- launches: the kernels are sound ----

extern "C" __global__ void store_one(const Params params) {
  const bool is_first = block_index_x() + block_index_y() + block_index_z() + thread_index() == 0;
  if (is_first) params.out[0] = 7;
}

extern "C" __global__ void __launch_bounds__(64) store_with_64_threads(const Params params) {
  params.out[thread_index()] = 7;
}

}  // namespace pelt::test
