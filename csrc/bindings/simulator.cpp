#include <array>
#include <optional>
#include <string>
#include <string_view>
#include <tuple>
#include <unordered_set>
#include <vector>

#include "bindings/bind.h"
#include "sim/counters.h"
#include "sim/device.h"
#include "sim/kernels.h"
#include "sim/launch_request.h"
#include "sim/limits.h"
#include "sim/module.h"
#include "sim/program.h"

namespace pelt::bindings {

namespace {

using Span = std::tuple<Address, size_t, bool>;  // address, bytes, is written

void give(const std::vector<Span>& memory) {
  for (const auto& [address, bytes, is_written] : memory) {
    sim::give_memory(at(address), bytes, is_written);
  }
}

// Takes all memory back, however the scope ends.
struct Given {
  explicit Given(const std::vector<Span>& memory) { give(memory); }
  ~Given() { sim::take_back_memory(); }
};

// The same text at a place where it stays: the executor keeps what it made of a text by its place.
std::string_view kept(const std::string& text) {
  static std::unordered_set<std::string> texts;  // under the GIL
  return *texts.insert(text).first;
}

void run_ptx(const std::string& ptx, const std::string& entry, const std::array<int, 3>& blocks,
             int threads, size_t shared_bytes, std::optional<size_t> granted_bytes,
             bool is_cooperative, const py::bytes& params, const std::vector<Span>& memory) {
  const std::string parameters = params;
  const sim::KernelHeader header = sim::read_header(ptx, entry);
  check(parameters.size() == header.parameter_bytes, "run_ptx: expected the ",
        header.parameter_bytes, " bytes of parameters that ", entry, " declares, got ",
        parameters.size());
  sim::LaunchRequest request;
  request.ptx = kept(ptx);
  request.entry = entry;
  request.blocks = {blocks[0], blocks[1], blocks[2]};
  request.threads = threads;
  request.shared_bytes = shared_bytes;
  request.is_cooperative = is_cooperative;
  request.params = parameters.data();
  const sim::Refusal refusal =
      sim::check_launch(header, request, granted_bytes.value_or(shared_bytes));
  check(refusal.status == cudaSuccess, refusal.text);
  py::gil_scoped_release release;
  const Given given(memory);
  sim::run(request);
}

// What the launches since start_counting() did; instructions that were never issued are left out.
py::list stop_counting() {
  py::list launches;
  for (const sim::LaunchCount& count : sim::stop_counting()) {
    const sim::Program& program = *count.program;
    py::list instructions;
    for (size_t n = 0; n < count.code.size(); ++n) {
      const sim::CodeCount& code = count.code[n];
      if (code.issued == 0) continue;
      const sim::Instruction& instruction = program.code[n];
      instructions.append(py::make_tuple(
          program.names[instruction.name], program.describe_source(instruction.source), code.issued,
          code.lanes, code.bytes, code.sectors, code.wavefronts, code.least_wavefronts));
    }
    py::dict row;
    row["kernel"] = program.kernel;
    row["blocks"] = py::make_tuple(count.blocks.x, count.blocks.y, count.blocks.z);
    row["threads"] = count.threads;
    row["shared_bytes"] = count.shared_bytes;
    row["blocks_per_multiprocessor"] = count.blocks_per_multiprocessor;
    row["cache_sectors_read"] = count.traffic.cache_read;
    row["cache_sectors_written"] = count.traffic.cache_written;
    row["memory_sectors_read"] = count.traffic.memory_read;
    row["memory_sectors_written"] = count.traffic.memory_written;
    row["instructions"] = instructions;
    launches.append(row);
  }
  return launches;
}

py::list devices() {
  py::list rows;
  for (const sim::Device& device : sim::kDevices) {
    py::dict row;
    row["name"] = device.name;
    row["capability"] = py::make_tuple(device.capability / 10, device.capability % 10);
    row["shared_bytes_per_block"] = device.shared_bytes_per_block;
    row["shared_bytes_per_multiprocessor"] = device.shared_bytes_per_multiprocessor;
    row["multiprocessors"] = device.multiprocessors;
    row["threads_per_multiprocessor"] = device.threads_per_multiprocessor;
    row["blocks_per_multiprocessor"] = device.blocks_per_multiprocessor;
    rows.append(row);
  }
  return rows;
}

}  // namespace

PYBIND11_MODULE(_C_sim, m) {
  m.doc() =
      "The CUDA kernels on the simulator, CPU memory in and out, and the CPU kernels on simulated "
      "tiles.";
  bind_cpu(m);
  bind_operators(m);
  m.def("set_seed", &sim::set_seed, py::arg("seed"),
        "Seeds the order of threads, warps and blocks. A sound kernel's results do not depend on "
        "it.");
  m.def(
      "set_device",
      [](const std::string& name, int driver, size_t shared_bytes, bool has_image) {
        sim::set_device(name, {driver, shared_bytes, has_image});
      },
      py::arg("name"), py::kw_only(), py::arg("driver") = 0, py::arg("shared_bytes") = 0,
      py::arg("has_image") = true,
      "Lets kernels run within the limits of this GPU, by default H100. For tests it may have a "
      "`driver` for another CUDA (12040 is 12.4), less shared memory for a block, and no image of "
      "the kernels in this module.");
  m.def("start_counting", &sim::start_counting, py::arg("without_checks") = false,
        "Counts what this thread's launches do; without checks they run several times faster.");
  m.def("stop_counting", &stop_counting,
        "The launches since start_counting(), each with the sectors of 32 bytes that it moves and "
        "its instructions as (name, source, issued, lanes, bytes, sectors, wavefronts, "
        "least wavefronts).");
  m.def(
      "instructions",
      [] {
        py::list names;
        for (const auto& [name, row] : sim::arithmetic()) names.append(name);
        return names;
      },
      "The arithmetic instructions that the simulator knows.");
  m.def("kernels", &sim::kernel_names, "The kernels in this module by their short names.");
  m.def(
      "ptx_of",
      [](const std::string& name) {
        const sim::KernelText text = sim::text_of(name);
        return py::make_tuple(text.ptx, text.entry);
      },
      py::arg("name"), "The text that holds a kernel, and the kernel's name in it.");
  m.def(
      "replace_ptx",
      [](const std::string& name, const std::string& ptx) {
        sim::replace_text(name, ptx.empty() ? std::string_view() : kept(ptx));
      },
      py::arg("name"), py::arg("ptx"),
      "Lets a kernel run from another text; from its own again if that is empty.");
  m.def("devices", &devices, "The GPUs that set_device knows, and their limits.");
  m.def("give_memory", &give, py::arg("memory"),
        "Lets kernels touch these [(address, bytes, is_written)] until take_back_memory().");
  m.def("take_back_memory", &sim::take_back_memory, "Lets kernels touch no memory any more.");
  m.def("run_ptx", &run_ptx, py::arg("ptx"), py::arg("entry"), py::kw_only(),
        py::arg("blocks") = std::array<int, 3>{1, 1, 1}, py::arg("threads") = 32,
        py::arg("shared_bytes") = 0, py::arg("granted_bytes") = py::none(),
        py::arg("is_cooperative") = false, py::arg("params") = py::bytes(),
        py::arg("memory") = std::vector<Span>{},
        "Runs one kernel of a PTX text on the memory [(address, bytes, is_written)]. Shared memory "
        "up to `granted_bytes` was asked for, by default as much as the launch takes.");
}

}  // namespace pelt::bindings
