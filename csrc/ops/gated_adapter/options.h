// What of a call a kernel is compiled for. Options that are decided at run time cost instructions in
// the loops over elements and hold most of a kernel's code, so the calls that methods make have
// kernels of their own; the others are served by one that asks for everything.
#pragma once

#include "ops/gated_adapter/params.h"

namespace pelt::gated_adapter {

enum class Choice { kNo, kEither };  // compiled without it, or decided at run time

template <Choice kChoice>
PELT_HOST_DEVICE bool decide(bool at_run_time) {
  return kChoice == Choice::kEither && at_run_time;
}

// kUsual_: a learned gate, dropout of the adapter's output. kRest_: norms, skipped rows, ranks that
// are no multiple of 8, and widths that are no multiple of a chunk.
template <Choice kUsual_, Choice kRest_>
struct Options {
  static constexpr bool kIsListed = kRest_ == Choice::kNo;

  PELT_HOST_DEVICE static bool has_pre_norm(const Call& in) {
    return decide<kRest_>(gated_adapter::has_pre_norm(in));
  }
  PELT_HOST_DEVICE static bool has_post_norm(const Call& in) {
    return decide<kRest_>(gated_adapter::has_post_norm(in));
  }
  PELT_HOST_DEVICE static bool has_skip(const Call& in) {
    return decide<kRest_>(gated_adapter::has_skip(in));
  }
  PELT_HOST_DEVICE static bool has_learned_gate(const Call& in) {
    return decide<kUsual_>(gated_adapter::has_learned_gate(in));
  }
  PELT_HOST_DEVICE static bool has_pooled_gate(const Call& in) {
    return decide<kUsual_>(gated_adapter::has_pooled_gate(in));
  }
  PELT_HOST_DEVICE static bool has_dropout(const Call& in) {
    return decide<kUsual_>(in.dropout.is_active());
  }

  // Are the kernels of these options right for the call.
  static bool serve(const Call& in) {
    if (!kIsListed) return true;
    const bool has_usual = gated_adapter::has_learned_gate(in) || in.dropout.is_active();
    if (kUsual_ == Choice::kNo && has_usual) return false;
    const bool has_rest = gated_adapter::has_pre_norm(in) || gated_adapter::has_post_norm(in) ||
                          gated_adapter::has_skip(in);
    return !has_rest && in.R % 8 == 0 && in.D % kChunk == 0;
  }
};

using Plain = Options<Choice::kNo, Choice::kNo>;
using Usual = Options<Choice::kEither, Choice::kNo>;
using General = Options<Choice::kEither, Choice::kEither>;

}  // namespace pelt::gated_adapter
