// The numbers of the calling thread, its lane, warp and block, and the size of the grid. Blocks of
// the project are one-dimensional, so a thread has one number.
#pragma once

namespace pelt {

__device__ __forceinline__ int thread_index() { return static_cast<int>(threadIdx.x); }
__device__ __forceinline__ int lane_index() { return static_cast<int>(threadIdx.x % 32); }
__device__ __forceinline__ int warp_index() { return static_cast<int>(threadIdx.x / 32); }
__device__ __forceinline__ int block_index_x() { return static_cast<int>(blockIdx.x); }
__device__ __forceinline__ int block_index_y() { return static_cast<int>(blockIdx.y); }
__device__ __forceinline__ int block_index_z() { return static_cast<int>(blockIdx.z); }
__device__ __forceinline__ int grid_blocks_x() { return static_cast<int>(gridDim.x); }
__device__ __forceinline__ int grid_blocks_y() { return static_cast<int>(gridDim.y); }
__device__ __forceinline__ int grid_blocks_z() { return static_cast<int>(gridDim.z); }

}  // namespace pelt
