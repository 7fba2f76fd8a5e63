// Whether this module's kernels run on a GPU. All of them are compiled for the same architectures, so
// that one which does nothing answers for all.
#include <sstream>
#include <string>

#include "common/device.h"

// For which compute capabilities there is machine code, as 80_90, because nvcc takes a definition with
// commas for several. The simulator's module has PTX of this one.
#if !defined(PELT_CUDA_ARCHS)
#define PELT_CUDA_ARCHS 80
#endif
#define PELT_TEXT_OF(tokens) #tokens
#define PELT_TEXT(macro) PELT_TEXT_OF(macro)

namespace pelt {

namespace {

__global__ void image_sm80() {}

// Of 80, 8.0.
std::string capability_name(int number) { return sentence(number / 10, ".", number % 10); }

// CUDA 12.4 is 12040.
std::string version_name(int number) { return sentence(number / 1000, ".", number % 1000 / 10); }

std::string why_not_driver() {
  int driver = 0, runtime = 0;
  check_cuda(cudaDriverGetVersion(&driver), "cudaDriverGetVersion");
  check_cuda(cudaRuntimeGetVersion(&runtime), "cudaRuntimeGetVersion");
  // A driver serves all versions with its major number.
  if (driver / 1000 >= runtime / 1000) return "";
  return sentence("this build needs a driver for CUDA ", version_name(runtime),
                  driver == 0 ? ", and there is none"
                              : sentence(", and the driver is for CUDA ", version_name(driver)));
}

std::string why_not_image() {
  constexpr int kNeeded = 80;
  const int capability = device().capability;
  const cudaError_t status = load_kernel(reinterpret_cast<const void*>(image_sm80));
  if (status == cudaSuccess && capability >= kNeeded) return "";
  return sentence("this build holds kernels for compute capability ", image_capabilities(),
                  "; the GPU is ", device().name, ", compute capability ",
                  capability_name(capability),
                  capability < kNeeded ? "" : sentence(" (", cudaGetErrorName(status), ")"));
}

}  // namespace

std::string image_capabilities() {
  std::istringstream archs(PELT_TEXT(PELT_CUDA_ARCHS));
  std::string names;
  for (std::string arch; std::getline(archs, arch, '_');) {
    names += sentence(names.empty() ? "" : ", ", capability_name(std::stoi(arch)));
  }
  return names;
}

std::string why_not_device() {
  static OfEachDevice<std::string> reasons;
  const std::string reason = why_not_driver();
  return reason.empty() ? reasons.get([](int) { return why_not_image(); }) : reason;
}

}  // namespace pelt
