// A kernel as the machine runs it: parsed once from PTX, with registers as places in a warp's
// register file, immediates in a table of constants and branch targets as indices.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "sim/launch_request.h"

namespace pelt::sim {

constexpr int kLanes = 32;
constexpr uint32_t kAllLanes = ~uint32_t{0};

// Generic addresses of shared memory and of parameters begin here, where no memory of the host lies.
constexpr uint64_t kSharedWindow = uint64_t{1} << 62;
constexpr uint64_t kParamWindow = uint64_t{1} << 61;

// A register holds its value for all 32 lanes: a predicate as one bit each, numbers of up to 32
// bits as a uint32_t each (narrower ones extended by zeros), numbers of 64 bits as a uint64_t each.
enum class Width : uint8_t { kPredicate, k32, k64 };
constexpr uint32_t kPlaceBytes[] = {4, 4 * kLanes, 8 * kLanes};
constexpr uint32_t bytes_of(Width width) { return kPlaceBytes[static_cast<int>(width)]; }

// Where an operand's 32 values stand: a byte offset into the warp's registers or, with the highest
// bit, into the kernel's constants. The parser puts a register's number until places are chosen.
struct Operand {
  static constexpr uint32_t kConstant = uint32_t{1} << 31;
  uint32_t place = 0;
  bool is_constant() const { return (place & kConstant) != 0; }
};

enum class Kind : uint8_t {
  kArithmetic,  // lane by lane; arithmetic.cpp has the table
  kSpecial,     // mov from %tid.x and its kind
  kLoad,
  kStore,
  kAtomic,
  kCopyAsync,
  kCommitCopies,
  kWaitForCopies,
  kLoadMatrix,
  kMma,
  kShuffle,
  kVote,
  kWarpBarrier,
  kBarrier,
  kBarrierArrive,
  kSleep,
  kBranch,
  kReturn,
  kTrap,
};

enum class Space : uint8_t { kGeneric, kGlobal, kShared, kParam };
enum class Special : uint8_t {
  kThread,
  kLane,
  kThreads,
  kBlockX,
  kBlockY,
  kBlockZ,
  kBlocksX,
  kBlocksY,
  kBlocksZ,
  kZero,  // the y and z of a thread: blocks are one-dimensional
  kOne,
};
enum class Shuffle : uint8_t { kUp, kDown, kButterfly, kIndex };
enum class Vote : uint8_t { kAny, kAll, kBallot };
enum class Atomic : uint8_t { kAdd, kMin, kMax, kAnd, kOr, kExchange, kCompareAndSwap };

// The values of an instruction's operands: destinations first, then sources.
using Places = uint8_t* const*;
// Computes a destination in the active lanes; the other lanes keep what they hold.
using Execute = void (*)(Places values, uint32_t active);

struct Instruction {
  Kind kind = Kind::kTrap;
  Space space = Space::kGeneric;
  uint8_t destinations = 0;
  uint8_t sources = 0;
  uint8_t vector = 1;  // elements of a load or store
  uint8_t element_bytes = 4;
  uint8_t variant = 0;  // Special, Shuffle, Vote or Atomic
  bool has_guard = false;
  bool is_guard_negated = false;
  bool is_signed = false;  // a load extends by the sign
  bool is_wide[2] = {};    // an address stands in 64 bits; a load's destinations do
  bool is_strong = false;  // atomic, acquire, release, volatile: no race with its kind
  bool acquires = false;
  bool releases = false;
  bool is_read_only = false;   // ld.global.nc
  bool is_transposed = false;  // ldmatrix
  bool is_bf16 = false;        // mma; f16 otherwise
  Operand guard;
  uint32_t first_operand = 0;  // in Program::operands
  int32_t target = -1;         // of a branch
  int64_t offset[2] = {};      // added to addresses; wait_group's number
  Execute execute = nullptr;
  uint32_t used_bytes = ~uint32_t{0};  // of what a load brings, as a mask: nvcc may read more
  uint16_t name = 0;                   // in Program::names
  uint32_t line = 0;                   // in the module's PTX
  uint32_t source = 0;                 // in Program::sources
};

// A line of C++, and the line of the kernel itself into which it was inlined.
struct Source {
  int file = 0;
  int line = 0;
  int kernel_file = 0;
  int kernel_line = 0;
  bool operator==(const Source& other) const {
    return file == other.file && line == other.line && kernel_file == other.kernel_file &&
           kernel_line == other.kernel_line;
  }
};

struct Program {
  std::string kernel;  // demangled and short
  std::vector<Instruction> code;
  std::vector<Operand> operands;
  std::vector<std::string> names;  // spelled instructions: "add.s32"
  std::vector<Source> sources;
  std::unordered_map<int, std::string> files;  // that sources name
  std::vector<uint8_t> constants;
  std::vector<Width> registers;  // by number, before places are chosen
  size_t register_bytes = 0;     // of one warp
  size_t param_bytes = 0;
  size_t static_shared_bytes = 0;
  std::string_view ptx;  // the module's text

  const Operand* operands_of(const Instruction& i) const { return &operands[i.first_operand]; }
  // "file.cu:12 (in the kernel's line 40)", from the module's table of files.
  std::string describe_source(uint32_t source) const;
};

// Parses a kernel. Throws Error with the line for whatever is not known: nothing is guessed.
Program parse(std::string_view ptx, const std::string& entry);

// Gives each register a place in the register file; registers that are never needed at the same
// time share one, so that a warp's registers stay in the processor's cache.
void choose_places(Program& program);

// The arithmetic instructions by their spelled names.
struct Arithmetic {
  Execute execute;
  std::vector<Width> destinations;
  std::vector<Width> sources;
};
const std::unordered_map<std::string, Arithmetic>& arithmetic();

}  // namespace pelt::sim
