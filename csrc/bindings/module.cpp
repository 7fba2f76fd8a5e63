#include "bindings/bind.h"
#include "ops/gated_adapter/contract.h"
#include "ops/lora_linear/contract.h"
#include "ops/masked_weight/contract.h"
#include "ops/prefix_attention/contract.h"
#include "ops/symmetric_kl/contract.h"

#if defined(PELT_SIM)
#include "sim/executor.h"
#endif

namespace pelt::bindings {

namespace {

// What the module was made of, for bug reports and benchmark records.
py::dict build_info() {
  py::dict info;
  info["compiler"] = __VERSION__;
#if defined(PELT_WITH_CUDA)
  info["cuda"] = true;
#else
  info["cuda"] = false;
#endif
  return info;
}

}  // namespace

PYBIND11_MODULE(PELT_MODULE, m) {
#if defined(PELT_SIM)
  m.doc() =
      "The CUDA kernels on the simulator, CPU memory in and out, and the CPU kernels on simulated "
      "tiles.";
  m.def("set_seed", &sim::set_seed, py::arg("seed"),
        "Seeds the order of threads, warps and blocks. A sound kernel's results do not depend on "
        "it.");
#else
  m.doc() = "The compiled kernels.";
#endif
  bind_cpu(m);
  m.def("build_info", &build_info, "What the module was made of.");
  bind_operator<gated_adapter::Contract>(m, "gated_adapter");
  bind_operator<lora_linear::Contract>(m, "lora_linear");
  bind_operator<masked_weight::Contract>(m, "masked_weight");
  bind_operator<prefix_attention::Contract>(m, "prefix_attention");
  bind_operator<symmetric_kl::Contract>(m, "symmetric_kl");
}

}  // namespace pelt::bindings
