#include "sim/device.h"

#include <algorithm>
#include <atomic>
#include <deque>
#include <mutex>
#include <string_view>

#include "common/check.h"
#include "sim/counters.h"

namespace pelt::sim {
namespace {

// Those that were set. They are never taken down, and stay where they are.
std::deque<Device>& devices() {
  static auto* devices = new std::deque<Device>(std::begin(kDevices), std::end(kDevices));
  return *devices;
}

std::mutex g_mutex;  // of the list
std::atomic<int> g_index{1};
static_assert(std::string_view(kDevices[1].name) == "H100");

constexpr int kCounted = kMostDevices / 2;  // added to a device's number

const Device& find_device(const std::string& name) {
  std::string names;
  for (const Device& device : kDevices) {
    if (name == device.name) return device;
    names += sentence(names.empty() ? "" : ", ", device.name);
  }
  fail("simulator: expected one of the devices ", names, ", got '", name, "'");
}

bool is_same(const Device& one, const Device& other) {
  return one.name == other.name && one.driver == other.driver &&
         one.shared_bytes_per_block == other.shared_bytes_per_block &&
         one.has_image == other.has_image;
}

}  // namespace

const Device& device() {
  const std::lock_guard<std::mutex> lock(g_mutex);
  return devices()[static_cast<size_t>(g_index)];
}

int current_device() { return g_index + (is_counting() ? kCounted : 0); }

void set_device(const std::string& name, const Changes& changes) {
  Device wanted = find_device(name);
  if (changes.driver != 0) wanted.driver = changes.driver;
  if (changes.shared_bytes_per_block != 0) {
    wanted.shared_bytes_per_block = changes.shared_bytes_per_block;
  }
  wanted.has_image = changes.has_image;
  const std::lock_guard<std::mutex> lock(g_mutex);
  const auto found = std::find_if(devices().begin(), devices().end(),
                                  [&](const Device& device) { return is_same(device, wanted); });
  const auto index = static_cast<int>(found - devices().begin());
  check(index < kCounted, "simulator: expected at most ", kCounted, " devices");
  if (found == devices().end()) devices().push_back(wanted);
  g_index = index;
}

}  // namespace pelt::sim
