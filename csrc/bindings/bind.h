// The Python modules, `_C` with the CPU and the CUDA kernels and `_C_sim` with the CUDA kernels on
// the simulator and the CPU kernels on simulated tiles: how a call of any operator comes from Python.
//
// What is the same for equal calls comes once, as a plan; what changes from call to call, addresses
// above all, as flat lists in the contract's order (pelt_kernels/ops/_native_call.py). This folder
// and everything below it know nothing of torch; shapes and dtypes were checked by the contract.
// Kernels run without the GIL.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include "common/check.h"
#include "cpu/kernels.h"
#if defined(PELT_WITH_CUDA)
#include "common/launch.h"
#endif

namespace pelt::bindings {

namespace py = pybind11;

using Address = uintptr_t;

template <class T = void>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

// The functions that belong to no operator.
void bind_cpu(py::module_& m);

void bind_operators(py::module_& m);

// The CPU kernels of an operator for the instruction set that is the call's form.
template <class Contract>
struct OnCpu {
  using Call = NativeCall<Contract, int64_t>;

  template <class Run>
  static auto with_kernels(const Call& call, Run&& run) {
    return cpu::with_isa(static_cast<cpu::Isa>(call.form),
                         [&](auto isa) { return run(Cpu<Contract, decltype(isa)::value>{}); });
  }
  static std::string why_not(const Call& call) {
    return with_kernels(call, [&](auto kernels) { return kernels.why_not(call); });
  }
  static void forward(const Call& call, Arena& arena) {
    with_kernels(call, [&](auto kernels) { kernels.forward(call, arena); });
  }
  static void backward(const Call& call, Arena& arena) {
    with_kernels(call, [&](auto kernels) { kernels.backward(call, arena); });
  }

  // There are no launches to rehearse.
  static void rehearse(const Call& /*call*/, bool /*is_backward*/) {}

  static int number_of(const std::string& form) { return static_cast<int>(cpu::isa_by_name(form)); }
  static void run_on(Call& call, Address threads) { call.threads = static_cast<int>(threads); }
};

#if defined(PELT_WITH_CUDA)
template <class Contract>
struct OnCuda : Cuda<Contract> {
  using Call = typename Cuda<Contract>::Call;

  static std::string why_not(const NativeCall<Contract, int64_t>& call) {
    const std::string reason = why_not_device();
    return reason.empty() ? Cuda<Contract>::why_not(call) : reason;
  }

  // Throws Error where a launch would be refused. The workspace is there, and nothing touches it.
  static void rehearse(const Call& call, bool is_backward) {
    const Rehearsal rehearsal;
    char memory = 0;
    Arena arena{&memory};
    is_backward ? Cuda<Contract>::backward(call, arena) : Cuda<Contract>::forward(call, arena);
  }

  // Its number among the operator's forms.
  static int number_of(const std::string& form) { return form.empty() ? 0 : std::stoi(form); }
  static void run_on(Call& call, Address stream) { call.stream = at(stream); }
};
#endif

// ---- values of a plan; None leaves what is there ----

template <class T>
std::enable_if_t<std::is_arithmetic_v<T>> read(py::handle from, T& to) {
  if (!from.is_none()) to = from.cast<T>();
}

template <class T>
std::enable_if_t<std::is_enum_v<T>> read(py::handle from, T& to) {
  to = static_cast<T>(from.cast<int>());
}

inline void read(py::handle from, Dropout& to) {
  to = Dropout::with_probability(from.cast<double>(), 0);
}

template <class T, int kLongest>
void read(py::handle from, List<T, kLongest>& to) {
  if (from.is_none()) return;
  to.count = 0;
  for (py::handle item : from) {
    if (to.count < kLongest) read(item, to.at[to.count]);
    ++to.count;
  }
}

// ---- addresses of a call ----

inline Address address_of(PyObject* number) {
  const unsigned long long address = PyLong_AsUnsignedLongLong(number);
  if (address == static_cast<unsigned long long>(-1) && PyErr_Occurred()) {
    throw py::error_already_set();
  }
  return static_cast<Address>(address);
}

// Puts each address of a list into its place.
template <class Pointer>
void place(const py::list& addresses, const std::vector<int>& places, Pointer* to) {
  const size_t count = addresses.size();
  check(count == places.size(), "expected ", places.size(), " addresses, got ", count);
  for (size_t i = 0; i < count; ++i) {
    to[places[i]] = at(address_of(PyList_GET_ITEM(addresses.ptr(), static_cast<Py_ssize_t>(i))));
  }
}

// What is the same for equal calls, and their functions. `Kernels` is OnCuda or OnCpu of a
// contract.
template <class Contract, class Kernels>
class Plan {
  using Call = typename Kernels::Call;
  using WideCall = NativeCall<Contract, int64_t>;
  using InputArgument = std::tuple<int, int, bool>;  // place, dimensions, is it float32

 public:
  Plan(int dtype, const std::string& form, const py::list& sizes,
       const std::vector<InputArgument>& inputs, const std::vector<int>& outputs,
       const py::list& attributes)
      : output_places_(outputs) {
    wide_.dtype = static_cast<DType>(dtype);
    wide_.form = Kernels::number_of(form);
    size_t i = 0;
    Contract::for_each_size([&](auto& size) { read(sizes[i++], size); }, wide_);
    i = 0;
    Contract::for_each_attribute([&](auto& value) { read(attributes[i++], value); }, wide_);
    for (const auto& [place, rank, is_float32] : inputs) {
      input_places_.push_back(place);
      wide_.input[place] = &kThere;
      wide_.rank[place] = static_cast<int8_t>(rank);
      wide_.is_float32[place] = is_float32;
    }
    call_ = narrow(wide_);
  }

  // Why the kernels refuse the call on the current device. `wanted` are the sets of gradients that
  // backward may be asked for, in the order of the inputs; without `is_launched` there is no row, so
  // that nothing would be launched.
  std::string why_not(bool is_launched, const std::vector<std::vector<bool>>& wanted) const {
    const std::string reason = Kernels::why_not(wide_);
    if (!reason.empty() || !is_launched) return reason;
    Call call = call_;
    for (int place : output_places_) {
      call.output[place] = &there_;
      call.doutput[place] = &there_;
    }
    try {
      Kernels::rehearse(call, /*is_backward=*/false);
      for (const std::vector<bool>& set : wanted) Kernels::rehearse(wanting(call, set), true);
    } catch (const Error& error) {
      return error.what();
    }
    return "";
  }

  // Which gradients are wanted is told in the order of the inputs.
  int64_t workspace_bytes(bool is_backward, const std::vector<bool>& wanted, Address run_on) const {
    Call call = wanting(call_, wanted);
    Kernels::run_on(call, run_on);
    Arena arena{nullptr, /*only_counts=*/true};
    is_backward ? Kernels::backward(call, arena) : Kernels::forward(call, arena);
    return arena.used;
  }

  void forward(const py::list& inputs, const py::object& strides, const py::list& outputs,
               Address workspace, uint64_t seed, Address run_on) const {
    const Call call = with_tensors(inputs, strides, outputs, seed, run_on);
    Arena arena{at<char>(workspace)};
    py::gil_scoped_release release;
    Kernels::forward(call, arena);
  }

  void backward(const py::list& inputs, const py::object& strides, const py::list& outputs,
                const py::list& doutputs, const py::list& grads, Address workspace, uint64_t seed,
                Address run_on) const {
    Call call = with_tensors(inputs, strides, outputs, seed, run_on);
    place(doutputs, output_places_, call.doutput);
    place(grads, input_places_, call.grad);
    Arena arena{at<char>(workspace)};
    py::gil_scoped_release release;
    Kernels::backward(call, arena);
  }

 private:
  // What a tensor that is there points to while there are no tensors.
  static constexpr char kThere = 0;
  mutable char there_ = 0;

  Call wanting(Call call, const std::vector<bool>& wanted) const {
    for (size_t i = 0; i < wanted.size(); ++i) {
      if (wanted[i]) call.grad[input_places_.at(i)] = &there_;
    }
    return call;
  }

  static Call narrow(const WideCall& wide) {
    if constexpr (std::is_same_v<Call, WideCall>) {
      return wide;
    } else {
      return Call(wide);
    }
  }

  Call with_tensors(const py::list& inputs, const py::object& strides, const py::list& outputs,
                    uint64_t seed, Address run_on) const {
    Call call = call_;
    place(inputs, input_places_, call.input);
    place(outputs, output_places_, call.output);
    if (!strides.is_none()) {
      size_t i = 0;
      for (py::handle of_tensor : strides) {
        int64_t* to = call.stride[input_places_.at(i++)];
        int left = 3;
        for (py::handle step : of_tensor) {
          if (left-- > 0) *to++ = static_cast<int64_t>(PyLong_AsLongLong(step.ptr()));
        }
      }
    }
    if constexpr (Contract::kHasSeed) call.dropout.seed = seed;
    Kernels::run_on(call, run_on);
    return call;
  }

  WideCall wide_;
  Call call_;
  std::vector<int> input_places_;  // of the inputs that are there
  std::vector<int> output_places_;
};

template <class Contract, class Kernels>
void bind_plan(py::module_& m, const std::string& name) {
  using P = Plan<Contract, Kernels>;
  py::class_<P>(m, name.c_str(), py::module_local())
      .def(py::init<int, const std::string&, const py::list&,
                    const std::vector<std::tuple<int, int, bool>>&, const std::vector<int>&,
                    const py::list&>(),
           py::kw_only(), py::arg("dtype"), py::arg("form"), py::arg("sizes"), py::arg("inputs"),
           py::arg("outputs"), py::arg("attributes"))
      .def("why_not", &P::why_not, py::arg("is_launched") = false,
           py::arg("wanted") = std::vector<std::vector<bool>>{})
      .def("workspace_bytes", &P::workspace_bytes, py::arg("is_backward"), py::arg("wanted"),
           py::arg("run_on"))
      .def("forward", &P::forward, py::arg("inputs"), py::arg("strides"), py::arg("outputs"),
           py::arg("workspace"), py::arg("seed"), py::arg("run_on"))
      .def("backward", &P::backward, py::arg("inputs"), py::arg("strides"), py::arg("outputs"),
           py::arg("doutputs"), py::arg("grads"), py::arg("workspace"), py::arg("seed"),
           py::arg("run_on"));
}

// `<operator>_cpu` and, with CUDA kernels, `<operator>_cuda`.
template <class Contract>
void bind_operator(py::module_& m, const std::string& name) {
  bind_plan<Contract, OnCpu<Contract>>(m, name + "_cpu");
#if defined(PELT_WITH_CUDA)
  bind_plan<Contract, OnCuda<Contract>>(m, name + "_cuda");
#endif
}

}  // namespace pelt::bindings
