// The device vocabulary. A kernel includes this file and nothing below it.
#pragma once

#include "cuda/activation.cuh"
#include "cuda/atomics.cuh"
#include "cuda/barrier.cuh"
#include "cuda/cp_async.cuh"
#include "cuda/exp2.cuh"
#include "cuda/fragment.cuh"
#include "cuda/index.cuh"
#include "cuda/ldmatrix.cuh"
#include "cuda/memory.cuh"
#include "cuda/mma.cuh"
#include "cuda/opaque.cuh"
#include "cuda/philox.cuh"
#include "cuda/reduce.cuh"
#include "cuda/shuffle.cuh"
#include "cuda/swizzle.cuh"
#include "cuda/vector.cuh"
