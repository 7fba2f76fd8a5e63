#include "bindings/bind.h"
#include "ops/gated_adapter/contract.h"
#include "ops/lora_linear/contract.h"
#include "ops/masked_weight/contract.h"
#include "ops/prefix_attention/contract.h"
#include "ops/symmetric_kl/contract.h"

namespace pelt::bindings {

namespace {

// What the module was made of, for bug reports and benchmark records.
py::dict build_info() {
  py::dict info;
  info["compiler"] = __VERSION__;
#if defined(PELT_WITH_CUDA)
  info["cuda"] = true;
  info["cuda_capabilities"] = image_capabilities();
#else
  info["cuda"] = false;
#endif
  return info;
}

}  // namespace

void bind_operators(py::module_& m) {
  m.def("build_info", &build_info, "What the module was made of.");
  bind_operator<gated_adapter::Contract>(m, "gated_adapter");
  bind_operator<lora_linear::Contract>(m, "lora_linear");
  bind_operator<masked_weight::Contract>(m, "masked_weight");
  bind_operator<prefix_attention::Contract>(m, "prefix_attention");
  bind_operator<symmetric_kl::Contract>(m, "symmetric_kl");
}

}  // namespace pelt::bindings
