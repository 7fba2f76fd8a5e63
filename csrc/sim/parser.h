// The state of reading one kernel's PTX.
#pragma once

#include <map>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include "sim/program.h"

namespace pelt::sim {

// Bytes of an element by its type: "f32" is 4.
int element_bytes_of(std::string_view type);

class Parser {
 public:
  Parser(std::string_view ptx, const std::string& entry);
  Program run();

 private:
  void read_files();
  void body_line(std::string_view line);
  void statement(std::string_view text);
  void declare(std::string_view text);
  void source_line(std::string_view text);
  void resolve_branches();

  uint32_t new_register(Width width);
  Operand constant(Width width, uint64_t value);
  Operand operand(std::string_view text, Width width);
  Operand address(std::string_view text, int64_t* offset, bool* is_wide);
  bool is_wide_register(std::string_view text) const;
  static std::vector<std::string_view> elements(std::string_view text);

  // ---- one instruction; parse_instruction.cpp ----

  struct Words {
    std::string_view name;                    // "ld.global.v4.u32"
    std::vector<std::string_view> modifiers;  // "ld", "global", "v4", "u32"
    std::vector<std::string_view> arguments;
    bool has(std::string_view modifier) const;
  };
  void instruction(std::string_view text);
  void arithmetic_instruction(const Words& words);
  void machine_instruction(const Words& words);
  void access(const Words& words);
  void copy_async(const Words& words);
  void load_matrix(const Words& words);
  void mma(const Words& words);
  void shuffle(const Words& words);
  void vote(const Words& words);
  void barrier(const Words& words);

  void add_destinations(std::string_view text, Width width);
  void add_sources(std::string_view text, Width width);
  void set_guard(std::string_view text);
  uint16_t number_of_name(const std::string& name);

  Program program_;
  std::string_view rest_;
  uint32_t line_ = 0;
  int open_scopes_ = 0;
  int kernel_file_ = 0, kernel_line_ = 0;
  Instruction now_;                     // the instruction that is being read
  uint32_t used_bytes_ = ~uint32_t{0};  // of the load that comes next
  std::vector<Operand> operands_;
  std::unordered_map<std::string, uint32_t> registers_;
  std::unordered_map<std::string, uint64_t> symbols_;
  std::unordered_map<std::string, int32_t> labels_;
  std::unordered_map<std::string, uint16_t> names_;
  std::map<std::pair<int, uint64_t>, Operand> constants_;
  std::vector<std::pair<size_t, std::string>> branches_;
};

}  // namespace pelt::sim
