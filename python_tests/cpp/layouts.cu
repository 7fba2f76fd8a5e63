// layouts.h as nvcc's device compiler sees it.
#include "layouts.h"
#include "small.cuh"

namespace pelt::test {

struct WrittenNumbers {
  uint32_t* out;

  __device__ void put(const char* /*name*/, int /*member*/, int offset, int bytes) {
    *out++ = static_cast<uint32_t>(offset);
    *out++ = static_cast<uint32_t>(bytes);
  }
};

// Writes offset and size of each member, in one lane.
extern "C" __global__ void write_layouts(const Params params) {
  if (thread_index() != 0) return;
  WrittenNumbers sink{params.out};
  Layouts<WrittenNumbers>{sink, reinterpret_cast<char*>(params.out)}.put_all();
}

}  // namespace pelt::test
