// Memory as kernels see it: which bytes there are, which are written, and who touched them last.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "sim/clocks.h"

namespace pelt::sim {

// What a check found; the machine adds kernel, line, block, warp and lane.
struct Finding {
  std::string text;
  Stamp other{};  // the access that it disagrees with, if any
};

struct Access {
  Stamp stamp;
  uint32_t lane = 0;
  const Clock* clock = nullptr;
  bool is_strong = false;
  bool is_read_only = false;
};

// Tells about the instruction of an earlier access.
struct CodeFacts {
  virtual bool is_strong(uint32_t code) const = 0;
  virtual bool is_read_only(uint32_t code) const = 0;

 protected:
  ~CodeFacts() = default;
};

// The last accesses to each cell of a range. A cell is four bytes, or as few as the narrowest
// access that was seen: elements of two bytes in one word may belong to different threads.
class Shadow {
 public:
  void start(uint64_t address, size_t bytes, bool is_written);
  void mark_written(uint64_t address, size_t bytes);
  // A new launch: everything that was written is ordered before it.
  void forget_accesses();

  // Each returns false with a finding at the first cell that the access must not touch.
  bool read(uint64_t address, size_t bytes, const Access& access, const CodeFacts& facts,
            Finding* finding);
  bool write(uint64_t address, size_t bytes, const Access& access, const CodeFacts& facts,
             Finding* finding);
  // Without a check: what was written before is written by somebody else now.
  void set_writer(uint64_t address, size_t bytes, Stamp stamp);

 private:
  struct Cell {
    Stamp write;
    Stamp read, other_read;  // by the warp that read last, and by another one before it
  };
  void refine(uint64_t address, size_t bytes);
  size_t index_of(uint64_t address) const { return (address - begin_) >> shift_; }
  static void note_read(Cell& cell, const Access& access);

  uint64_t begin_ = 0;
  int shift_ = 2;
  std::vector<Cell> cells_;
};

// A range of global memory.
struct Range {
  uint64_t begin = 0;
  uint64_t end = 0;
  Shadow shadow;
};

class GlobalMemory {
 public:
  void give(uint64_t address, size_t bytes, bool is_written);
  void mark_written(uint64_t address, size_t bytes);
  void take_back() { ranges_.clear(); }
  void start_launch();
  // The range that holds all the bytes, or null. Keeps the last answer, which is mostly the next.
  Range* find(uint64_t address, size_t bytes);
  // "which lies 12 bytes behind ..." for a message.
  std::string describe(uint64_t address) const;

 private:
  std::vector<Range> ranges_;  // by address, apart from each other
  size_t last_ = 0;
};

GlobalMemory& global_memory();

}  // namespace pelt::sim
