// Places for registers. nvcc's PTX names each value anew, thousands of them in a kernel; few are
// needed at the same time. A register gets a place from the first point at which it is needed to
// the last one, and the next register takes the place over.
//
// What is needed is decided for one lane's path through the program. That is enough, because the
// lanes of a place are separate: a lane that runs elsewhere finds its own values untouched.
#include <algorithm>

#include "sim/program.h"

namespace pelt::sim {
namespace {

struct Block {
  int begin = 0, end = 0;
  std::vector<int> next;
  std::vector<uint64_t> used, defined, needed_before, needed_after;
};

// Calls visit(i) for each member.
template <class Visit>
void for_members(const std::vector<uint64_t>& set, Visit&& visit) {
  for (size_t w = 0; w < set.size(); ++w) {
    for (uint64_t rest = set[w]; rest != 0; rest &= rest - 1) {
      visit(static_cast<uint32_t>(64 * w) + static_cast<uint32_t>(__builtin_ctzll(rest)));
    }
  }
}

bool test(const std::vector<uint64_t>& set, uint32_t i) { return (set[i / 64] >> (i % 64)) & 1; }
void insert(std::vector<uint64_t>& set, uint32_t i) { set[i / 64] |= uint64_t{1} << (i % 64); }

// A destination under a guard keeps its old value in some lanes, so that value is needed.
template <class Use, class Define>
void visit(const Program& program, const Instruction& i, Use use, Define define) {
  const Operand* operands = program.operands_of(i);
  for (int n = 0; n < i.sources; ++n) {
    const Operand& operand = operands[i.destinations + n];
    if (!operand.is_constant()) use(operand.place);
  }
  if (i.has_guard) {
    use(i.guard.place);
    for (int n = 0; n < i.destinations; ++n) use(operands[n].place);
  }
  for (int n = 0; n < i.destinations; ++n) define(operands[n].place);
}

std::vector<Block> cut_into_blocks(const Program& program) {
  const int count = static_cast<int>(program.code.size());
  std::vector<char> is_first(count + 1, 0);
  is_first[0] = 1;
  for (int at = 0; at < count; ++at) {
    const Instruction& i = program.code[at];
    if (i.kind == Kind::kBranch) is_first[i.target] = 1;
    if (i.kind == Kind::kBranch || i.kind == Kind::kReturn) is_first[at + 1] = 1;
  }
  std::vector<Block> blocks;
  std::vector<int> block_of(count + 1, -1);
  for (int at = 0; at < count; ++at) {
    if (is_first[at]) blocks.push_back({at, at, {}, {}, {}, {}, {}});
    blocks.back().end = at + 1;
    block_of[at] = static_cast<int>(blocks.size()) - 1;
  }
  for (Block& block : blocks) {
    const Instruction& last = program.code[block.end - 1];
    if (last.kind == Kind::kBranch) block.next.push_back(block_of[last.target]);
    const bool goes_on =
        (last.kind != Kind::kBranch && last.kind != Kind::kReturn) || last.has_guard;
    if (goes_on && block.end < count) block.next.push_back(block_of[block.end]);
  }
  return blocks;
}

void find_needed(const Program& program, std::vector<Block>& blocks) {
  const size_t words = program.registers.size() / 64 + 1;
  for (Block& block : blocks) {
    for (auto* set : {&block.used, &block.defined, &block.needed_before, &block.needed_after}) {
      set->assign(words, 0);
    }
    for (int at = block.begin; at < block.end; ++at) {
      visit(
          program, program.code[at],
          [&](uint32_t r) {
            if (!test(block.defined, r)) insert(block.used, r);
          },
          [&](uint32_t r) { insert(block.defined, r); });
    }
    block.needed_before = block.used;
  }
  for (bool has_changed = true; has_changed;) {
    has_changed = false;
    for (auto block = blocks.rbegin(); block != blocks.rend(); ++block) {
      for (int next : block->next) {
        for (size_t w = 0; w < words; ++w) block->needed_after[w] |= blocks[next].needed_before[w];
      }
      for (size_t w = 0; w < words; ++w) {
        const uint64_t needed = block->used[w] | (block->needed_after[w] & ~block->defined[w]);
        has_changed |= needed != block->needed_before[w];
        block->needed_before[w] = needed;
      }
    }
  }
}

struct Span {
  int first = -1, last = -1;
  void cover(int at) {
    if (first < 0 || at < first) first = at;
    if (at > last) last = at;
  }
};

// From the first to the last instruction at which each register is needed, whatever lies between.
std::vector<Span> spans_of(const Program& program, const std::vector<Block>& blocks) {
  std::vector<Span> spans(program.registers.size());
  for (const Block& block : blocks) {
    for_members(block.needed_before, [&](uint32_t r) { spans[r].cover(block.begin); });
    for_members(block.needed_after, [&](uint32_t r) { spans[r].cover(block.end); });
    for (int at = block.begin; at < block.end; ++at) {
      const auto cover = [&](uint32_t r) { spans[r].cover(at); };
      visit(program, program.code[at], cover, cover);
    }
  }
  return spans;
}

}  // namespace

void choose_places(Program& program) {
  std::vector<Block> blocks = cut_into_blocks(program);
  find_needed(program, blocks);
  const std::vector<Span> spans = spans_of(program, blocks);
  std::vector<uint32_t> order;
  for (uint32_t r = 0; r < spans.size(); ++r) {
    if (spans[r].first >= 0) order.push_back(r);
  }
  std::sort(order.begin(), order.end(),
            [&](uint32_t a, uint32_t b) { return spans[a].first < spans[b].first; });
  std::vector<uint32_t> place_of(spans.size(), 0);
  std::vector<uint32_t> free_places[3];
  std::vector<std::vector<uint32_t>> ends(program.code.size() + 2);
  int freed = 0;
  size_t bytes = 0;
  for (uint32_t r : order) {
    // A destination may not take the place of a source of the same instruction: warp-wide ones
    // write some lanes before they have read all.
    for (; freed < spans[r].first; ++freed) {
      for (uint32_t old : ends[freed]) {
        free_places[static_cast<int>(program.registers[old])].push_back(place_of[old]);
      }
    }
    const int width = static_cast<int>(program.registers[r]);
    if (free_places[width].empty()) {
      bytes = (bytes + 63) / 64 * 64;
      place_of[r] = static_cast<uint32_t>(bytes);
      bytes += kPlaceBytes[width];
    } else {
      place_of[r] = free_places[width].back();
      free_places[width].pop_back();
    }
    ends[spans[r].last].push_back(r);
  }
  program.register_bytes = (bytes + 63) / 64 * 64;
  for (Operand& operand : program.operands) {
    if (!operand.is_constant()) operand.place = place_of[operand.place];
  }
  for (Instruction& i : program.code) {
    if (i.has_guard) i.guard.place = place_of[i.guard.place];
  }
}

}  // namespace pelt::sim
