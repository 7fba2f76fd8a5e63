// CUDA's words for a host compiler: kernels are written once and compiled by both.
#pragma once

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __restrict__ __restrict
#define __grid_constant__
#define __launch_bounds__(...)
