// The simulator under test: `sim_test <case> [seeds]` runs one case under the seeds 1, 2, ... A
// sound kernel prints a line of results for each; an Error's message is printed after "error: ".
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "common/launch.h"
#include "common/type_list.h"
#include "kernels.cuh"

namespace {

using namespace pelt;
using namespace pelt::test;

template <class T>
uint32_t expected_product(int m, int n) {
  float sum = 0.0f;
  for (int k = 0; k < 16; ++k) {
    sum += to_float(round_to<T>(m * 0.37f - k)) * to_float(round_to<T>(n * 1.3f + 0.11f * k));
  }
  return bits_of(sum);
}

// ---- the cases ----

struct Buffers {
  std::vector<uint32_t> in = std::vector<uint32_t>(128 + 4);
  std::vector<uint32_t> out = std::vector<uint32_t>(1024, 0xdeadbeefu);
  int counters[1] = {0};
  uint32_t* in_aligned() {
    auto address = reinterpret_cast<uintptr_t>(in.data());
    return in.data() + (16 - address % 16) % 16 / 4;
  }
};

template <auto kKernel, class Shared>
void run_kernel(const char* name, int threads, int words, int blocks = 1,
                bool is_cooperative = false, bool are_floats = false) {
  Buffers buffers;
  for (int i = 0; i < 128; ++i) buffers.in_aligned()[i] = 1000 + i;
  Params params{buffers.in_aligned(), buffers.out.data(), buffers.counters, 0};
  LaunchShape shape;
  shape.blocks_x = blocks;
  shape.threads = threads;
  shape.shared_bytes = sizeof(Shared);
  shape.is_cooperative = is_cooperative;
  launch<kKernel>(name, shape, nullptr, params);
  for (int i = 0; i < words; ++i) {
    if (are_floats) {
      std::printf("%.4f ", static_cast<double>(float_from_bits(buffers.out[i])));
    } else {
      std::printf("%u ", buffers.out[i]);
    }
  }
  std::printf("\n");
}

template <class T>
void check_products() {
  std::vector<uint32_t> out(4 * 256);
  Params params;
  params.out = out.data();
  LaunchShape shape;
  shape.shared_bytes = sizeof(MatrixTiles<T>);
  launch<multiply_tiles<T>>("multiply_tiles", shape, nullptr, params);
  for (int i = 0; i < 4 * 256; ++i) {
    check(out[i] == expected_product<T>(i / 16 % 16, i % 16), "way ", i / 256, " element (",
          i / 16 % 16, ", ", i % 16, "): expected ",
          float_from_bits(expected_product<T>(i / 16 % 16, i % 16)), ", got ",
          float_from_bits(out[i]));
  }
  std::printf("1024 products equal\n");
}

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
    CASE(exchange, run_kernel<exchange<true>, Words128>("exchange", 128, 128)),
    CASE(no_barrier, run_kernel<exchange<false>, Words128>("no_barrier", 128, 128)),
    CASE(exchange_in_warp, run_kernel<exchange_in_warp<true>, Words128>("in_warp", 128, 128)),
    CASE(no_warp_barrier, run_kernel<exchange_in_warp<false>, Words128>("in_warp", 128, 128)),
    CASE(named_barriers, run_kernel<named_barriers, Words128>("named_barriers", 128, 64)),
    CASE(wrong_count, run_kernel<barrier_for_the_wrong_count, Words128>("wrong_count", 128, 0)),
    CASE(copy, run_kernel<copy_asynchronously<true>, Words128>("copy", 128, 128)),
    CASE(no_wait, run_kernel<copy_asynchronously<false>, Words128>("no_wait", 128, 128)),
    CASE(two_stages, run_kernel<copy_in_two_stages, Words128>("two_stages", 128, 128)),
    CASE(copy_past, run_kernel<copy_past_the_arena, Words128>("copy_past", 64, 0)),
    CASE(write_past, run_kernel<write_past_the_tile, Words128>("write_past", 128, 0)),
    CASE(misaligned, run_kernel<load_misaligned, Words128>("misaligned", 32, 0)),
    CASE(return_early, run_kernel<return_early, Words128>("return_early", 64, 0)),
    CASE(return_before_barrier, run_kernel<return_before_barrier, Words128>("returns", 128, 0)),
    CASE(diverge, run_kernel<diverge, Words128>("diverge", 32, 0)),
    CASE(shuffle_and_vote, run_kernel<shuffle_and_vote, Words128>("shuffle", 64, 64)),
    CASE(count_and_ballot, run_kernel<count_and_ballot, Words128>("counts", 64, 64)),
    CASE(moments, run_kernel<moments, Words128>("moments", 32, 64, 1, false, true)),
    CASE(ldmatrix_narrow, run_kernel<ldmatrix_narrow, MatrixTiles<f16>>("ldmatrix", 32, 128)),
    CASE(products_bf16, check_products<bf16>()),
    CASE(products_f16, check_products<f16>()),
    CASE(flags, run_kernel<gather_from_all_blocks, Words128>("flags", 32, 14, 7, true)),
    CASE(flags_alone, run_kernel<gather_from_all_blocks, Words128>("flags", 32, 14, 7, false)),
    CASE(last_block, run_kernel<last_block_reduces, Words128>("last_block", 32, 8, 7, false)),
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
  const int seeds = argc > 2 ? std::atoi(argv[2]) : 1;
  for (int seed = 1; seed <= seeds; ++seed) {
    sim::set_seed(seed);
    try {
      found->second();
    } catch (const Error& error) {
      std::printf("error: %s\n", error.what());
    }
  }
  return 0;
}
