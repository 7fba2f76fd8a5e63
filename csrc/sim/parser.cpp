// Text to program. A kernel's PTX is read line by line; each instruction is looked up by its
// spelled name, in the table of arithmetic or among those that the machine carries out itself.
#include "sim/parser.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "common/check.h"
#include "sim/module.h"
#include "sim/text.h"

namespace pelt::sim {
namespace {

int64_t number(std::string_view text) {
  const std::string copy(text);
  char* end = nullptr;
  const int64_t value = copy[0] == '-' ? std::strtoll(copy.c_str(), &end, 0)
                                       : static_cast<int64_t>(std::strtoull(copy.c_str(), &end, 0));
  check(!copy.empty() && *end == '\0', "expected a number, got '", text, "'");
  return value;
}

Width width_of_register(std::string_view type) {
  if (type == ".pred") return Width::kPredicate;
  return type == ".b64" || type == ".u64" || type == ".s64" || type == ".f64" ? Width::k64
                                                                              : Width::k32;
}

}  // namespace

Parser::Parser(std::string_view ptx, const std::string& entry) {
  program_.ptx = ptx;
  program_.kernel = short_name(entry);
  const std::string head = ".entry " + entry;
  size_t at = ptx.find(head + "(");
  if (at == std::string_view::npos) at = ptx.find(head + "\n");
  check(at != std::string_view::npos, "simulator: the module has no kernel ", program_.kernel);
  line_ = static_cast<uint32_t>(std::count(ptx.begin(), ptx.begin() + static_cast<long>(at), '\n'));
  rest_ = ptx.substr(at);
  const KernelHeader header = read_header(ptx, entry);
  for (const KernelParameter& parameter : header.parameters) {
    symbols_[parameter.name] = kParamWindow + parameter.offset;
  }
  program_.param_bytes = header.parameter_bytes;
}

// The table of files stands behind the last kernel, before what debuggers read.
void Parser::read_files() {
  constexpr std::string_view kFile = ".file\t";
  const std::string_view ptx = program_.ptx;
  size_t at = ptx.rfind(".entry");
  if (at == std::string_view::npos) at = 0;
  while ((at = ptx.find(kFile, at)) != std::string_view::npos) {
    at += kFile.size();
    const size_t begin = ptx.find('"', at) + 1, end = ptx.find('"', begin);
    if (begin == 0 || end == std::string_view::npos) return;
    std::string path(ptx.substr(begin, end - begin));
    const size_t root = path.rfind("csrc/");
    program_.files[std::stoi(std::string(ptx.substr(at, 8)))] =
        root == std::string::npos ? path : path.substr(root);
    at = end;
  }
}

Program Parser::run() {
  read_files();
  program_.sources.push_back({});
  bool in_body = false;
  while (!rest_.empty()) {
    const size_t end = std::min(rest_.find('\n'), rest_.size());
    std::string_view line = rest_.substr(0, end);
    rest_ = rest_.substr(std::min(end + 1, rest_.size()));
    ++line_;
    line = trim(line.substr(0, line.find("//")));
    try {
      if (!in_body) {
        in_body = line == "{";  // the head was read by read_header
      } else if (line == "}" && open_scopes_ == 0) {
        resolve_branches();
        return std::move(program_);
      } else {
        body_line(line);
      }
    } catch (const Error& error) {
      fail("simulator: kernel ", program_.kernel, ", PTX line ", line_, ": ", error.what(),
           "; in '", line, "'");
    }
  }
  fail("simulator: kernel ", program_.kernel, ": its PTX has no end");
}

void Parser::body_line(std::string_view line) {
  if (line.empty()) return;
  if (starts_with(line, ".loc")) return source_line(line.substr(4));
  if (line.back() == ':' && line.find(' ') == std::string_view::npos) {
    labels_[std::string(line.substr(0, line.size() - 1))] =
        static_cast<int32_t>(program_.code.size());
    return;
  }
  // Inline assembly stands in braces of its own, in which it may declare registers.
  size_t begin = 0;
  for (size_t i = 0; i <= line.size(); ++i) {
    const char c = i < line.size() ? line[i] : ';';
    const bool is_scope = (c == '{' || c == '}') && trim(line.substr(begin, i - begin)).empty();
    if (c != ';' && !is_scope) continue;
    if (is_scope) open_scopes_ += c == '{' ? 1 : -1;
    const std::string_view text = trim(line.substr(begin, i - begin));
    begin = i + 1;
    if (!text.empty()) statement(text);
  }
}

void Parser::statement(std::string_view text) {
  if (starts_with(text, ".reg")) return declare(trim(text.substr(4)));
  constexpr std::string_view kUsed = ".pragma \"used_bytes_mask ";
  if (starts_with(text, kUsed)) {
    const std::string_view mask = text.substr(kUsed.size());
    used_bytes_ = static_cast<uint32_t>(number(mask.substr(0, mask.find('"'))));
    return;
  }
  if (starts_with(text, ".pragma")) return;
  check(text[0] != '.', "a declaration that the simulator does not know");
  instruction(text);
}

void Parser::declare(std::string_view text) {
  const size_t end = text.find_first_of(" \t");
  const Width width = width_of_register(text.substr(0, end));
  for (std::string_view name : cut_arguments(text.substr(end))) {
    const size_t angle = name.find('<');
    if (angle == std::string_view::npos) {
      registers_[std::string(name)] = new_register(width);
      continue;
    }
    const std::string prefix(name.substr(0, angle));
    const int64_t count = number(name.substr(angle + 1, name.find('>') - angle - 1));
    for (int64_t i = 0; i < count; ++i) {
      registers_[prefix + std::to_string(i)] = new_register(width);
    }
  }
}

uint32_t Parser::new_register(Width width) {
  program_.registers.push_back(width);
  return static_cast<uint32_t>(program_.registers.size() - 1);
}

// ".loc file line column[, function_name X, inlined_at file line column]"
void Parser::source_line(std::string_view text) {
  Source source;
  const std::string copy(text);
  if (std::sscanf(copy.c_str(), "%d %d", &source.file, &source.line) != 2) return;
  const bool is_inlined = copy.find("inlined_at") != std::string::npos;
  if (!is_inlined && source.line != 0) {
    kernel_file_ = source.file;
    kernel_line_ = source.line;
  }
  source.kernel_file = kernel_file_;
  source.kernel_line = kernel_line_;
  if (source.line == 0 || source == program_.sources.back()) return;
  program_.sources.push_back(source);
}

void Parser::resolve_branches() {
  for (const auto& [at, label] : branches_) {
    const auto found = labels_.find(label);
    check(found != labels_.end(), "no label ", label);
    program_.code[at].target = found->second;
  }
}

// ---- operands ----

Operand Parser::constant(Width width, uint64_t value) {
  const auto key = std::make_pair(static_cast<int>(width), value);
  const auto found = constants_.find(key);
  if (found != constants_.end()) return found->second;
  std::vector<uint8_t>& bytes = program_.constants;
  // 64-bit lanes first need their alignment.
  bytes.resize((bytes.size() + 7) / 8 * 8);
  const Operand operand{static_cast<uint32_t>(bytes.size()) | Operand::kConstant};
  const size_t lane_bytes = width == Width::k64 ? 8 : 4;
  if (width == Width::kPredicate) value = value != 0 ? kAllLanes : 0;
  for (uint32_t i = 0; i < bytes_of(width) / lane_bytes; ++i) {
    const auto* from = reinterpret_cast<const uint8_t*>(&value);
    bytes.insert(bytes.end(), from, from + lane_bytes);
  }
  constants_[key] = operand;
  return operand;
}

Operand Parser::operand(std::string_view text, Width width) {
  if (text == "_") return {new_register(width)};  // a destination that nobody reads
  const auto found = registers_.find(std::string(text));
  if (found != registers_.end()) {
    check(program_.registers[found->second] == width, "'", text, "' is not as wide as expected");
    return {found->second};
  }
  const auto symbol = symbols_.find(std::string(text));
  if (symbol != symbols_.end()) return constant(width, symbol->second);
  if (text.find("dynamic_shared_memory") != std::string_view::npos) return constant(width, 0);
  if (starts_with(text, "0f") || starts_with(text, "0F")) {
    return constant(width, std::stoul(std::string(text.substr(2)), nullptr, 16));
  }
  check(!text.empty() && (std::isdigit(text[0]) || text[0] == '-'), "unknown operand '", text, "'");
  return constant(width, static_cast<uint64_t>(number(text)));
}

std::vector<std::string_view> Parser::elements(std::string_view text) {
  if (text[0] != '{') return {text};
  return cut_arguments(text.substr(1, text.size() - 2));
}

// "[base+offset]"; tells whether the base is an address of 64 bits.
Operand Parser::address(std::string_view text, int64_t* offset, bool* is_wide) {
  check(text.front() == '[' && text.back() == ']', "expected an address, got '", text, "'");
  text = trim(text.substr(1, text.size() - 2));
  const size_t plus = text.find('+');
  const std::string_view base = trim(text.substr(0, plus));
  *offset = plus == std::string_view::npos ? 0 : number(trim(text.substr(plus + 1)));
  const auto found = registers_.find(std::string(base));
  const bool is_register = found != registers_.end();
  *is_wide = !is_register || program_.registers[found->second] == Width::k64;
  return operand(base, *is_wide ? Width::k64 : Width::k32);
}

bool Parser::is_wide_register(std::string_view text) const {
  const auto found = registers_.find(std::string(text));
  return found != registers_.end() && program_.registers[found->second] == Width::k64;
}

Program parse(std::string_view ptx, const std::string& entry) {
  Program program = Parser(ptx, entry).run();
  choose_places(program);
  return program;
}

std::string Program::describe_source(uint32_t source) const {
  const auto name_of = [&](int file) {
    const auto found = files.find(file);
    return found == files.end() ? std::string("?") : found->second;
  };
  const Source& s = sources[source];
  if (s.line == 0) return "?";
  std::string text = sentence(name_of(s.file), ":", s.line);
  if (s.kernel_line != 0 && (s.kernel_file != s.file || s.kernel_line != s.line)) {
    text += sentence(" in ", name_of(s.kernel_file), ":", s.kernel_line);
  }
  return text;
}

}  // namespace pelt::sim
