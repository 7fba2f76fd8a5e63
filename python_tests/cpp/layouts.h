// Where the members of kernels' parameters lie, as the compiler that includes this sees it: nvcc's
// device compiler in layouts.cu, the host's in layouts.cpp. A launcher writes what a kernel reads,
// so both have to find the same.
//
// Structured bindings name all members of a struct: with a new one this does not compile until it
// stands here.
#pragma once

#include "ops/gated_adapter/params.h"
#include "ops/lora_linear/params.h"
#include "ops/masked_weight/params.h"
#include "ops/prefix_attention/params.h"
#include "ops/symmetric_kl/params.h"

namespace pelt::test {

// Calls sink.put(name, member, offset, bytes) for each member; the first one is the struct itself.
// Nothing is read or written at `memory`.
template <class Sink>
struct Layouts {
  Sink& sink;
  char* memory;

  template <class T>
  PELT_HOST_DEVICE const T& at_memory() const {
    return *reinterpret_cast<const T*>(memory);
  }

  template <class T, class... Members>
  PELT_HOST_DEVICE void put(const char* name, const T& of, const Members&... members) const {
    int member = 0;
    sink.put(name, member++, static_cast<int>(alignof(T)), static_cast<int>(sizeof(T)));
    (sink.put(name, member++,
              static_cast<int>(reinterpret_cast<const char*>(&members) -
                               reinterpret_cast<const char*>(&of)),
              static_cast<int>(sizeof(members))),
     ...);
  }

  // The part of a call that every operator has.
  template <class Contract>
  PELT_HOST_DEVICE void put_tensors(const char* name, const NativeCall<Contract, int>& of) const {
    const CallTensors<Contract>& tensors = of;
    const auto& [dtype, form, threads, input, is_float32, rank, stride, output, doutput, grad,
                 stream] = tensors;
    put(name, of, tensors, dtype, form, threads, input, is_float32, rank, stride, output, doutput,
        grad, stream);
  }

  PELT_HOST_DEVICE void put_gated_adapter() const {
    using namespace gated_adapter;
    const auto& call = at_memory<Call>();
    put_tensors("gated_adapter: tensors", call);
    const Contract::Sizes<int>& sizes = call;
    const auto& [B, S, D, R, M, M_up] = sizes;
    put("gated_adapter: sizes", call, sizes, B, S, D, R, M, M_up);
    const Contract::Attributes& attributes = call;
    const auto& [activation, pooling, residual_from, scale_value, pre_norm_eps, post_norm_eps,
                 dropout, skip_below] = attributes;
    put("gated_adapter: attributes", call, attributes, activation, pooling, residual_from,
        scale_value, pre_norm_eps, post_norm_eps, dropout, skip_below);
    const auto& round = at_memory<RoundParams>();
    {
      const auto& [weight] = round;
      const auto& [from, to, count] = weight[0];
      put("gated_adapter: RoundParams", round, weight, from, to, count);
    }
    const auto& forward = at_memory<ForwardParams>();
    {
      const auto& [in, w_down, w_up, arrivals, gate_partial, gate_sums, residual_shift, tiling,
                   wave_tiles] = forward;
      put("gated_adapter: ForwardParams", forward, in, w_down, w_up, arrivals, gate_partial,
          gate_sums, residual_shift, tiling, wave_tiles);
    }
    const auto& backward = at_memory<BackwardParams>();
    const auto& [in, w_down, w_up, dh, a, du, factor_parts, dlogit_parts, row_scalars, tile_sums,
                 norm_partial, norm_slots, arrivals, gate_partial, tickets, weight_partial, tiling,
                 wave_tiles, rank_stride, weight_tiling, members, column_tiles, rank_tiles, splits,
                 layer_blocks] = backward;
    put("gated_adapter: BackwardParams", backward, in, w_down, w_up, dh, a, du, factor_parts,
        dlogit_parts, row_scalars, tile_sums, norm_partial, norm_slots, arrivals, gate_partial,
        tickets, weight_partial, tiling, wave_tiles, rank_stride, weight_tiling, members,
        column_tiles, rank_tiles, splits, layer_blocks);
  }

  PELT_HOST_DEVICE void put_lora_linear() const {
    using namespace lora_linear;
    const auto& call = at_memory<Call>();
    put_tensors("lora_linear: tensors", call);
    const Contract::Sizes<int>& sizes = call;
    const auto& [B, S, Din, Dout, R_i, M_i, size_i, N_i] = sizes;
    put("lora_linear: sizes", call, sizes, B, S, Din, Dout, R_i, M_i, size_i, N_i);
    const Contract::Attributes& attributes = call;
    const auto& [transposed, offsets, scales, poolings, extra_poolings, dropout] = attributes;
    put("lora_linear: attributes", call, attributes, transposed, offsets, scales, poolings,
        extra_poolings, dropout);
    put_linear();
    put_single();
  }

  PELT_HOST_DEVICE void put_linear() const {
    using namespace lora_linear;
    const auto& linear = at_memory<Linear>();
    {
      const auto& [dtype, B, S, Din, Dout, ranks, branches, gates, x, mask, y, s, dy, dx, dropout,
                   branch, gate] = linear;
      put("lora_linear: Linear", linear, dtype, B, S, Din, Dout, ranks, branches, gates, x, mask, y,
          s, dy, dx, dropout, branch, gate);
    }
    const auto& one = at_memory<Branch>();
    {
      const auto& [a, b, a_index, b_index, gate, learned_gate, R, size, offset, first, scale, M, N,
                   has_a_index, has_b_index, has_gate_per_row, da, db, dgate] = one;
      put("lora_linear: Branch", one, a, b, a_index, b_index, gate, learned_gate, R, size, offset,
          first, scale, M, N, has_a_index, has_b_index, has_gate_per_row, da, db, dgate);
    }
    const auto& learned = at_memory<Gate>();
    const auto& [weight, bias, value, pooling, branch, dweight, dbias, dvalue] = learned;
    put("lora_linear: Gate", learned, weight, bias, value, pooling, branch, dweight, dbias, dvalue);
  }

  // SingleForwardParams and SingleBackwardParams, which derive from SingleParams.
  PELT_HOST_DEVICE void put_single() const {
    using namespace lora_linear;
    const auto& forward = at_memory<SingleForwardParams>();
    const SingleParams& single = forward;
    const auto& [in, tiling, from, weight, to, depth, columns, tile_columns, column_tiles, keys] =
        single;
    put("lora_linear: SingleForwardParams", forward, single, in, tiling, from, weight, to, depth,
        columns, tile_columns, column_tiles, keys, forward.bias);
    const auto& backward = at_memory<SingleBackwardParams>();
    const SingleParams& base = backward;
    put("lora_linear: SingleBackwardParams", backward, base, backward.ds, backward.dots);
  }

  PELT_HOST_DEVICE void put_masked_weight() const {
    using namespace masked_weight;
    const auto& call = at_memory<Call>();
    put_tensors("masked_weight: tensors", call);
    const Contract::Sizes<int>& sizes = call;
    const auto& [Dout, Din, R, R2] = sizes;
    put("masked_weight: sizes", call, sizes, Dout, Din, R, R2);
    const Contract::Attributes& attributes = call;
    const auto& [keep, beta, alpha1, alpha2] = attributes;
    put("masked_weight: attributes", call, attributes, keep, beta, alpha1, alpha2);
    const auto& forward = at_memory<ForwardParams>();
    {
      const auto& [in, counts, arrivals, equal, keys] = forward;
      put("masked_weight: ForwardParams", forward, in, counts, arrivals, equal, keys);
    }
    const auto& backward = at_memory<BackwardParams>();
    const auto& [in, du, dv, da, db, column_tiles, row_bands, band_rows] = backward;
    put("masked_weight: BackwardParams", backward, in, du, dv, da, db, column_tiles, row_bands,
        band_rows);
  }

  PELT_HOST_DEVICE void put_prefix_attention() const {
    using namespace prefix_attention;
    const auto& call = at_memory<CudaInputs>();
    put_tensors<Contract>("prefix_attention: tensors", call);
    const Contract::Sizes<int>& sizes = call;
    const auto& [B, H, S, E, G, N, P_i, A_i] = sizes;
    put("prefix_attention: sizes", call, sizes, B, H, S, E, G, N, P_i, A_i);
    const Contract::Attributes& attributes = call;
    const auto& [is_causal, scale, dropout] = attributes;
    put("prefix_attention: attributes", call, attributes, is_causal, scale, dropout);
    put("prefix_attention: Inputs", call, call.P, call.first, call.prefixes, call.bias_batch_stride,
        call.bias_head_stride, call.dropout_keys);
    const auto& forward = at_memory<ForwardParams>();
    {
      const auto& [in, own_out, own_lse] = forward;
      put("prefix_attention: ForwardParams", forward, in, own_out, own_lse);
    }
    const auto& backward = at_memory<BackwardParams>();
    const auto& [in, own_dq, row_lse, row_delta, gate_partial, prefix, padded_rows, row_tiles,
                 prefix_blocks, own_tiles] = backward;
    put("prefix_attention: BackwardParams", backward, in, own_dq, row_lse, row_delta, gate_partial,
        prefix, padded_rows, row_tiles, prefix_blocks, own_tiles);
  }

  PELT_HOST_DEVICE void put_symmetric_kl() const {
    using namespace symmetric_kl;
    const auto& call = at_memory<Call>();
    put_tensors("symmetric_kl: tensors", call);
    const Contract::Sizes<int>& sizes = call;
    const auto& [T, C] = sizes;
    put("symmetric_kl: sizes", call, sizes, T, C);
    const auto& forward = at_memory<ForwardParams>();
    const auto& [in, ticket, rows] = forward;
    put("symmetric_kl: ForwardParams", forward, in, ticket, rows);
  }

  PELT_HOST_DEVICE void put_all() const {
    put_gated_adapter();
    put_lora_linear();
    put_masked_weight();
    put_prefix_attention();
    put_symmetric_kl();
  }
};

}  // namespace pelt::test
