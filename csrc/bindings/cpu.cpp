#include <array>
#include <string>
#include <vector>

#include "bindings/bind.h"
#include "cpu/isa.h"
#include "cpu/philox.h"
#include "cpu/tile_product.h"

namespace pelt::bindings {

void bind_cpu(py::module_& m) {
  m.def(
      "best_cpu_isa", [] { return std::string(cpu::name_of(cpu::best_isa())); },
      "The instruction set that \"\" stands for.");
  m.def(
      "cpu_isas",
      [] {
        std::vector<std::string> names;
        for (int i = 0; i < cpu::kIsaCount; ++i) {
          const auto isa = static_cast<cpu::Isa>(i);
          if (cpu::is_supported(isa)) names.push_back(cpu::name_of(isa));
        }
        return names;
      },
      "The instruction sets that this module holds and this processor runs, the oldest first.");
  m.def(
      "cpu_isa_notes",
      [] {
        const std::string note = cpu::why_no_tiles();
        return note.empty() ? std::vector<std::string>{} : std::vector<std::string>{note};
      },
      "Why an instruction set that this processor lists is not used, in sentences.");

  m.def(
      "fill_dropout",
      [](Address out, int64_t rows, int64_t columns, int element_bytes, uint64_t kept_bits,
         uint32_t threshold, uint64_t seed, uint64_t first_group, int threads,
         const std::string& isa) {
        const cpu::DropoutFill fill{at(out),   rows, columns,     element_bytes, kept_bits,
                                    threshold, seed, first_group, threads};
        cpu::with_isa(cpu::isa_by_name(isa),
                      [&](auto isa) { cpu::fill_dropout<decltype(isa)::value>(fill); });
      },
      py::kw_only(), py::arg("out"), py::arg("rows"), py::arg("columns"), py::arg("element_bytes"),
      py::arg("kept_bits"), py::arg("threshold"), py::arg("seed"), py::arg("first_group"),
      py::arg("threads"), py::arg("isa") = "", py::call_guard<py::gil_scoped_release>());

  m.def(
      "tile_product",
      [](Address a, Address b, Address c) {
        const cpu::TileProduct product{at<const bf16>(a), at<const bf16>(b), at<float>(c)};
        return cpu::with_isa(cpu::best_isa(), [&](auto isa) {
          return cpu::tile_product<decltype(isa)::value>(product);
        });
      },
      py::kw_only(), py::arg("a"), py::arg("b"), py::arg("c"),
      "c [16, 16] float32 += a [16, 32] times b [16 pairs, 16, 2], both bfloat16, by one "
      "instruction "
      "of AMX or its simulation; false, and nothing happens, where there are no tiles.");

  m.def(
      "philox4x32_10",
      [](std::pair<uint64_t, uint64_t> counter, uint64_t key, const std::string& isa) {
        std::array<uint32_t, 4> words;
        cpu::with_isa(cpu::isa_by_name(isa), [&](auto isa) {
          cpu::philox_block<decltype(isa)::value>({counter.first, counter.second}, key, words);
        });
        return words;
      },
      py::kw_only(), py::arg("counter"), py::arg("key"), py::arg("isa") = "",
      "The four words of one counter and key, given in 64-bit halves, the low one first.");
}

}  // namespace pelt::bindings
