// Host bodies of cuda/index.cuh: the numbers of the fiber that runs.
#pragma once

#include "sim/executor.h"

namespace pelt {

inline int thread_index() { return sim::thread_index(); }
inline int lane_index() { return sim::thread_index() % sim::kWarpLanes; }
inline int warp_index() { return sim::thread_index() / sim::kWarpLanes; }
inline int block_index_x() { return sim::block_index().x; }
inline int block_index_y() { return sim::block_index().y; }
inline int block_index_z() { return sim::block_index().z; }
inline int grid_blocks_x() { return sim::grid_blocks().x; }
inline int grid_blocks_y() { return sim::grid_blocks().y; }
inline int grid_blocks_z() { return sim::grid_blocks().z; }

}  // namespace pelt
