// The device vocabulary. A kernel includes this file and nothing below it.
//
// This is the one place that decides whether an instruction is PTX (nvcc) or its host body
// (the simulator, PELT_SIM). What is built from instructions is written once, in the second list.
#pragma once

#if defined(PELT_SIM)
#include "sim/atomics.h"
#include "sim/barrier.h"
#include "sim/cp_async.h"
#include "sim/exp2.h"
#include "sim/index.h"
#include "sim/keywords.h"
#include "sim/ldmatrix.h"
#include "sim/memory.h"
#include "sim/mma.h"
#include "sim/opaque.h"
#include "sim/shuffle.h"
#else
#include "cuda/atomics.cuh"
#include "cuda/barrier.cuh"
#include "cuda/cp_async.cuh"
#include "cuda/exp2.cuh"
#include "cuda/index.cuh"
#include "cuda/ldmatrix.cuh"
#include "cuda/memory.cuh"
#include "cuda/mma.cuh"
#include "cuda/opaque.cuh"
#include "cuda/shuffle.cuh"
#endif

#include "cuda/activation.cuh"
#include "cuda/fragment.cuh"
#include "cuda/philox.cuh"
#include "cuda/reduce.cuh"
#include "cuda/swizzle.cuh"
#include "cuda/vector.cuh"
