// What kernels and the host share, on the host: `host_test <case>` prints a line of results.
#include <cmath>
#include <cstdio>
#include <functional>
#include <map>
#include <string>

#include "common/type_list.h"
#include "cuda/activation.cuh"
#include "cuda/philox.cuh"

namespace {

using namespace pelt;

void print_philox() {
  const PhiloxWords counters[] = {{{0, 0, 0, 0}},
                                  {{~0u, ~0u, ~0u, ~0u}},
                                  {{0x243f6a88u, 0x85a308d3u, 0x13198a2eu, 0x03707344u}}};
  const uint32_t keys[][2] = {{0, 0}, {~0u, ~0u}, {0xa4093822u, 0x299f31d0u}};
  for (int i = 0; i < 3; ++i) {
    const PhiloxWords words = philox4x32_10(counters[i], keys[i][0], keys[i][1]);
    for (uint32_t word : words.word) std::printf("%08x ", word);
  }
  std::printf("\n");
}

// Every bf16 and f16 there is survives a round trip; ties and limits round as the hardware does.
void print_conversions() {
  int wrong = 0;
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    const float b = to_float(bf16{static_cast<uint16_t>(bits)});
    const float h = to_float(f16{static_cast<uint16_t>(bits)});
    wrong += b == b && round_to<bf16>(b).bits != bits;
    wrong += h == h && round_to<f16>(h).bits != bits;
  }
  std::printf("%d wrong; ", wrong);
  const float values[] = {65519.0f,      65520.0f,    2049.0f, 2051.0f, 5.9604645e-8f,
                          2.9802322e-8f, 2.98024e-8f, 1e-9f,   -0.0f,   NAN};
  for (float value : values) {
    std::printf("%04x/%04x ", round_to<f16>(value).bits, round_to<bf16>(value).bits);
  }
  std::printf("\n");
}

// The largest difference between derivative and central difference, per activation.
void print_activations() {
  for (int a = 0; a < kActivations; ++a) {
    float worst = 0.0f;
    for (float x = -6.03f; x < 6.0f; x += 0.1f) {
      const auto kind = static_cast<Activation>(a);
      const float step = 1e-2f;
      const float slope = (activate(kind, x + step) - activate(kind, x - step)) / (2.0f * step);
      worst = std::fmax(worst, std::fabs(slope - activation_derivative(kind, x)));
    }
    std::printf("%.5f ", worst);
  }
  std::printf("\n");
}

struct Small {};
struct Large {};

void print_first_fit() {
  const bool found = run_first_fit(
      TypeList<Small, Large>{}, [](auto tag) { return sizeof(tag) == 1; },
      [](auto tag) { std::printf("%d ", std::is_same_v<typename decltype(tag)::type, Small>); });
  const bool none = run_first_fit(TypeList<Small>{}, [](auto) { return false; }, [](auto) {});
  std::printf("%d %d\n", found, none);
}

#define CASE(name, ...) {#name, [] { __VA_ARGS__; }}
const std::map<std::string, std::function<void()>> kCases = {
    CASE(philox, print_philox()),
    CASE(conversions, print_conversions()),
    CASE(activations, print_activations()),
    CASE(first_fit, print_first_fit()),
};

}  // namespace

int main(int argc, char** argv) {
  const auto found = argc > 1 ? kCases.find(argv[1]) : kCases.end();
  if (found == kCases.end()) {
    for (const auto& item : kCases) std::printf("%s\n", item.first.c_str());
    return 2;
  }
  found->second();
  return 0;
}
