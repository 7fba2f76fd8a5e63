// The simulator's CUDA runtime under test: `runtime_test <case>` launches as launchers do, and prints
// what the executor would be asked for, or the error.
#include <cstdio>
#include <functional>
#include <map>
#include <string>

#include "common/launch.h"
#include "sim/device.h"
#include "sim/launch_request.h"
#include "sim/module.h"

namespace pelt::sim {

// In place of the executor.
void run(const LaunchRequest& request) {
  int value = 0;
  memcpy(&value, request.params, sizeof(value));
  check(value != 13, "simulator: a fault with its whole text, and the number ", value);
  std::printf("%s: %d x %d x %d blocks, %d threads, %zu bytes, %s, value %d, ptx %s\n",
              short_name(request.entry).c_str(), request.blocks.x, request.blocks.y,
              request.blocks.z, request.threads, request.shared_bytes,
              request.is_cooperative ? "cooperative" : "alone", value,
              request.ptx.find(request.entry) != request.ptx.npos ? "found" : "missing");
}
void mark_written(const void* /*address*/, size_t bytes) { std::printf("%zu written, ", bytes); }

}  // namespace pelt::sim

namespace pelt::test {
namespace {

struct Params {
  int value = 0;
  char rest[92] = {};
};

template <class T, int kSize>
__global__ void __launch_bounds__(128) bounded(const Params params, T* = nullptr) {}
template <class T>
__global__ void __launch_bounds__(128) single(const Params params) {}
__global__ void unbounded(const Params params) {}

constexpr auto kTwoParameters = bounded<float, 3>;

template <auto kKernel>
void launch_with(LaunchShape shape, int value = 7) {
  Params params;
  params.value = value;
  launch<kKernel>("kernel", shape, nullptr, params);
}

LaunchShape grid(int x, int y = 1, int z = 1, bool is_cooperative = false) {
  LaunchShape shape;
  shape.blocks_x = x, shape.blocks_y = y, shape.blocks_z = z;
  shape.is_cooperative = is_cooperative;
  return shape;
}

LaunchShape block(int threads, size_t shared_bytes = 0) {
  LaunchShape shape;
  shape.threads = threads, shape.shared_bytes = shared_bytes;
  return shape;
}

// Around launch(), which would ask first.
void launch_unasked(size_t shared_bytes) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(1), config.blockDim = dim3(32);
  config.dynamicSmemBytes = shared_bytes;
  Params params;
  void* arguments[] = {&params};
  const auto* function = reinterpret_cast<const void*>(unbounded);
  check_cuda(cudaLaunchKernelExC(&config, function, arguments), "launching");
}

void launch_two_parameters() {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(1), config.blockDim = dim3(32);
  Params params;
  void* second = nullptr;
  void* arguments[] = {&params, &second};
  const auto* function = reinterpret_cast<const void*>(kTwoParameters);
  check_cuda(cudaLaunchKernelExC(&config, function, arguments), "launching");
}

void on(const std::string& device, const std::function<void()>& run) {
  sim::set_device(device);
  run();
}

void print_device() {
  std::printf("%d: %zu bytes, %d multiprocessors, %d and %d resident\n", current_device(),
              max_shared_bytes(), multiprocessors(),
              resident_blocks<unbounded>("unbounded", 256, 0),
              resident_blocks<unbounded>("unbounded", 256, max_shared_bytes()));
}

void clear() {
  int words[3] = {1, 2, 3};
  zero_async(words, 2 * sizeof(int), nullptr);
  std::printf("%d %d %d\n", words[0], words[1], words[2]);
}

// A block of each takes so many KB.
template <int kKilobytes>
struct Config {};
template <class C>
struct Shared;
template <int kKilobytes>
struct Shared<Config<kKilobytes>> {
  char bytes[kKilobytes * 1024];
};

// Runs the first of several configurations that fits; all but the first serve the call.
void first_fit() {
  using Configs = TypeList<Config<32>, Config<200>, Config<120>, Config<64>, Config<56>>;
  run_first_fit_here<Shared>(
      Configs{}, [](auto tag) { return sizeof(Shared<typename decltype(tag)::type>) > 32 * 1024; },
      [](auto tag) {
        launch_with<unbounded>(block(32, sizeof(Shared<typename decltype(tag)::type>)));
      });
}

void rehearsed(const std::function<void()>& run) {
  const Rehearsal rehearsal;
  run();
  std::printf("nothing ran");
}

#define CASE(name, ...) {#name, [] { __VA_ARGS__; }}
const std::map<std::string, std::function<void()>> kCases = {
    CASE(sound, launch_with<single<float>>(grid(5, 6, 7))),
    CASE(cooperative, launch_with<unbounded>(grid(3, 1, 1, true))),
    CASE(too_many_for_cooperative, launch_with<unbounded>(grid(2, 2, 1, true))),
    CASE(large_shared, launch_with<unbounded>(block(1024, 200 * 1024))),
    CASE(unasked_shared, launch_unasked(48 * 1024); launch_unasked(48 * 1024 + 16)),
    CASE(too_much_shared, launch_with<unbounded>(block(32, 227 * 1024 + 16))),
    CASE(no_blocks, launch_with<unbounded>(grid(0))),
    CASE(too_many_blocks, launch_with<unbounded>(grid(1, 65536))),
    CASE(too_many_threads, launch_with<unbounded>(block(1056))),
    CASE(beyond_bounds, launch_with<single<float>>(block(160))),
    CASE(two_parameters, launch_two_parameters()),
    CASE(fault, launch_with<unbounded>(block(32), 13)),
    CASE(H100, on("H100", print_device)),
    CASE(T4, on("T4", print_device)),
    CASE(A100, on("A100", print_device)),
    CASE(L4, on("L4", print_device)),
    CASE(too_old, on("T4", [] { launch_with<unbounded>(block(32)); })),
    CASE(small_shared, on("RTX 4090", [] { launch_with<unbounded>(block(32, 120 * 1024)); })),
    CASE(unknown_device, sim::set_device("H1000")),
    CASE(fit_H100, first_fit()),
    CASE(fit_A100, on("A100", first_fit)),
    CASE(fit_L4, on("L4", first_fit)),
    CASE(fit_nothing, sim::set_device("L4", {0, 40 * 1024, true}); first_fit()),
    CASE(rehearsal, rehearsed(first_fit)),
    CASE(rehearsed_shared,
         on("L4", [] { rehearsed([] { launch_with<unbounded>(block(32, 120 * 1024)); }); })),
    CASE(rehearsed_grid, rehearsed([] { launch_with<unbounded>(grid(1, 65536)); })),
    CASE(old_driver, sim::set_device("L4", {12040, 0, true}); launch_with<unbounded>(block(32))),
    CASE(no_image, sim::set_device("L4", {0, 0, false}); launch_with<unbounded>(block(32))),
    CASE(clear, clear()),
};

}  // namespace
}  // namespace pelt::test

int main(int argc, char** argv) {
  const auto found = argc > 1 ? pelt::test::kCases.find(argv[1]) : pelt::test::kCases.end();
  if (found == pelt::test::kCases.end()) return 2;
  try {
    found->second();
  } catch (const pelt::Error& error) {
    std::printf("error: %s\n", error.what());
  }
  return 0;
}
