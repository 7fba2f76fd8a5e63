// Which kernels serve a call. There is one family so far, for sm_80 and everything after it.
#include "common/arena.h"
#include "common/check.h"
#include "ops/masked_weight/params.h"

namespace pelt::masked_weight {
namespace {

constexpr int kZeroed = kDigits * kBins + 1;  // forward's counts and arrivals

ForwardParams forward_params(const Call& call, int blocks, Arena& arena) {
  ForwardParams p{call};
  p.counts = arena.take<int>(kZeroed);
  p.arrivals = p.counts + kDigits * kBins;
  p.equal = arena.take<int>(static_cast<int64_t>(blocks) * kWarps);
  p.keys = arena.take<uint32_t>(entries_of(call));
  return p;
}

BackwardParams backward_params(const Call& call, Arena& arena) {
  BackwardParams p{call};
  p.column_tiles = (call.Din + kTileColumns - 1) / kTileColumns;
  auto bands_of = [&](int rows) { return (call.Dout + rows - 1) / rows; };
  while (p.band_rows > kTileRows &&
         static_cast<int64_t>(p.column_tiles) * bands_of(p.band_rows) < multiprocessors()) {
    p.band_rows /= 2;
  }
  p.row_bands = bands_of(p.band_rows);
  const int64_t rows = call.Dout, columns = call.Din, ranks2 = call.R2 + 1;
  p.du_partial = arena.take<float>(p.column_tiles * rows * call.R);
  p.dv_partial = arena.take<float>(p.row_bands * columns * call.R);
  p.da_partial = arena.take<float>(p.column_tiles * rows * ranks2);
  p.db_partial = arena.take<float>(p.row_bands * columns * ranks2);
  return p;
}

}  // namespace
}  // namespace pelt::masked_weight

namespace pelt {

using namespace masked_weight;

template <>
std::string Cuda<Contract>::why_not(const NativeCall<Contract, int64_t>& call) {
  constexpr int64_t kLimit = int64_t{1} << 31;
  if (call.Dout * call.Din >= kLimit) {
    return sentence("it counts entries in 32 bits, so Dout Din must be below ", kLimit,
                    ", and it is ", call.Dout * call.Din);
  }
  constexpr int64_t kMaxRank = 1 << 20;
  if (call.R >= kMaxRank || call.R2 >= kMaxRank) {
    return sentence("its ranks must be below ", kMaxRank, ", and they are R=", call.R,
                    " and R2=", call.R2);
  }
  return "";
}

template <>
void Cuda<Contract>::forward(const Call& call, Arena& arena) {
  const int blocks = forward_blocks_sm80(call);
  const ForwardParams p = forward_params(call, blocks, arena);
  if (arena.only_counts) return;
  zero_async(p.counts, sizeof(int) * kZeroed, call.stream);
  launch_forward_sm80(p, blocks);
}

template <>
void Cuda<Contract>::backward(const Call& call, Arena& arena) {
  const BackwardParams p = backward_params(call, arena);
  if (!arena.only_counts) launch_backward_sm80(p);
}

}  // namespace pelt
