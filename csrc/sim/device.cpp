#include "sim/device.h"

#include <atomic>
#include <string_view>

#include "common/check.h"

namespace pelt::sim {
namespace {

constexpr int find_device(std::string_view name) {
  for (int i = 0; i < kDeviceCount; ++i) {
    if (kDevices[i].name == name) return i;
  }
  return -1;
}

constexpr int kDefault = find_device("H100");
static_assert(kDefault >= 0);

std::atomic<int> g_device{kDefault};

}  // namespace

int current_device() { return g_device; }

void set_device(const std::string& name) {
  const int found = find_device(name);
  std::string names;
  for (const Device& device : kDevices) names += sentence(names.empty() ? "" : ", ", device.name);
  check(found >= 0, "simulator: expected one of the devices ", names, ", got '", name, "'");
  g_device = found;
}

}  // namespace pelt::sim
