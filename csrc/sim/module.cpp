#include "sim/module.h"

#include <cxxabi.h>

#include <cctype>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "common/check.h"

namespace pelt::sim {
namespace {

// ---- the container of device code ----

struct Wrapper {
  static constexpr uint32_t kMagic = 0x466243b1;
  uint32_t magic;
  uint32_t version;
  const char* container;
  const void* unused;
};

struct Container {
  static constexpr uint32_t kMagic = 0xba55ed50;
  uint32_t magic;
  uint16_t version;
  uint16_t header_bytes;
  uint64_t bytes;  // behind the header
};

struct Entry {
  static constexpr uint16_t kPtx = 1;
  uint16_t kind;
  uint16_t version;
  uint32_t header_bytes;
  uint64_t bytes;             // behind the header
  uint32_t compressed_bytes;  // 0: as it is
};

template <class T>
T read_as(const char* at) {
  T value;
  memcpy(&value, at, sizeof(T));
  return value;
}

// ---- the text ----

// Takes PTX apart into words, names and numbers of directives, and single other characters.
class Words {
 public:
  explicit Words(std::string_view text) : text_(text) {}

  // Empty at the end.
  std::string_view next() {
    skip_blanks();
    size_t length = 0;
    while (length < text_.size() && is_of_word(text_[length])) ++length;
    if (length == 0 && !text_.empty()) length = 1;
    const std::string_view word = text_.substr(0, length);
    text_.remove_prefix(length);
    return word;
  }

  int number() {
    const std::string word(next());
    char* end = nullptr;
    const long value = std::strtol(word.c_str(), &end, 0);
    check(!word.empty() && *end == '\0', "PTX: expected a number, got '", word, "'");
    return static_cast<int>(value);
  }

 private:
  static bool is_of_word(char c) {
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '_' ||
           c == '$' || c == '%' || c == '.';
  }

  void skip_blanks() {
    for (;;) {
      const size_t blanks = text_.find_first_not_of(" \t\r\n");
      text_.remove_prefix(blanks == text_.npos ? text_.size() : blanks);
      const bool is_line = text_.substr(0, 2) == "//";
      if (!is_line && text_.substr(0, 2) != "/*") return;
      const size_t end = text_.find(is_line ? "\n" : "*/");
      text_.remove_prefix(end == text_.npos ? text_.size() : end + (is_line ? 1 : 2));
    }
  }

  std::string_view text_;
};

// The bytes of `.f32`, `.b8` and so on: the number behind the letters, in bits.
size_t bytes_of_type(std::string_view type) {
  const size_t digits = type.find_first_of("0123456789");
  check(digits != type.npos, "PTX: expected a parameter's type, got '", type, "'");
  return std::strtoul(std::string(type.substr(digits)).c_str(), nullptr, 10) / 8;
}

// The parameters between the parentheses, laid out one after the other.
void read_parameters(Words& words, KernelHeader& header) {
  for (std::string_view word = words.next(); word == ".param"; word = words.next()) {
    size_t alignment = 0, bytes = 0;
    for (word = words.next(); !word.empty() && word[0] == '.'; word = words.next()) {
      if (word == ".align") {
        alignment = static_cast<size_t>(words.number());
      } else if (word != ".ptr" && word != ".global") {
        bytes = bytes_of_type(word);
      }
    }
    if (alignment == 0) alignment = bytes;
    check(alignment > 0, "PTX: expected the type of parameter '", word, "'");
    const size_t offset = (header.parameter_bytes + alignment - 1) / alignment * alignment;
    header.parameters.push_back({std::string(word), offset});
    word = words.next();  // what follows the name
    if (word == "[") {
      bytes *= static_cast<size_t>(words.number());
      words.next();
      word = words.next();
    }
    header.parameter_bytes = offset + bytes;
    if (word != ",") break;
  }
}

// The directives between the parameters and the instructions.
void read_limits(Words& words, KernelHeader& header) {
  for (std::string_view word = words.next(); word != "{" && !word.empty(); word = words.next()) {
    if (word == ".maxntid" || word == ".reqntid") header.most_threads = words.number();
    if (word == ".minnctapersm") header.blocks_per_multiprocessor = words.number();
  }
}

}  // namespace

Module read_fat_binary(const void* wrapper) {
  const auto outer = read_as<Wrapper>(static_cast<const char*>(wrapper));
  if (outer.magic != Wrapper::kMagic) {
    return {"",
            sentence("expected a fat binary's number ", Wrapper::kMagic, ", got ", outer.magic)};
  }
  const auto container = read_as<Container>(outer.container);
  if (container.magic != Container::kMagic) {
    return {"", sentence("expected a container's number ", Container::kMagic, ", got ",
                         container.magic)};
  }
  const char* at = outer.container + container.header_bytes;
  const char* end = at + container.bytes;
  int entries = 0;
  while (at < end) {
    const auto entry = read_as<Entry>(at);
    const char* content = at + entry.header_bytes;
    if (entry.kind == Entry::kPtx && entry.compressed_bytes != 0) {
      return {"", "its PTX is compressed; nvcc needs --no-compress"};
    }
    if (entry.kind == Entry::kPtx) return {{content, strnlen(content, entry.bytes)}, ""};
    at = content + entry.bytes;
    ++entries;
  }
  return {"", sentence("it has ", entries, " pieces of device code and none is PTX; nvcc needs ",
                       "-gencode arch=compute_80,code=compute_80")};
}

KernelHeader read_header(std::string_view ptx, std::string_view entry) {
  KernelHeader header;
  constexpr std::string_view kTarget = ".target", kEntry = ".entry", kSm = "sm_";
  const size_t target = ptx.find(kTarget);
  check(target != ptx.npos, "PTX: expected .target, and there is none");
  const std::string_view architecture = Words(ptx.substr(target + kTarget.size())).next();
  check(architecture.substr(0, kSm.size()) == kSm, "PTX: expected .target sm_..., got '",
        architecture, "'");
  header.capability = std::atoi(std::string(architecture.substr(kSm.size())).c_str());
  for (size_t at = ptx.find(kEntry); at != ptx.npos; at = ptx.find(kEntry, at + 1)) {
    Words words(ptx.substr(at + kEntry.size()));
    if (words.next() != entry) continue;
    std::string_view word = words.next();
    if (word == "(") read_parameters(words, header);
    if (word != "{") read_limits(words, header);
    return header;
  }
  fail("PTX: expected a kernel '", entry, "', and there is none");
}

std::string short_name(const std::string& entry) {
  int status = 0;
  char* demangled = abi::__cxa_demangle(entry.c_str(), nullptr, nullptr, &status);
  if (demangled == nullptr) return entry;
  std::string_view whole = demangled;
  // The parameters are what the last parenthesis closes.
  int depth = 0;
  for (size_t i = whole.size(); i-- > 0;) {
    if (whole[i] == ')') ++depth;
    if (whole[i] == '(' && --depth == 0) {
      whole = whole.substr(0, i);
      break;
    }
  }
  constexpr std::string_view kVoid = "void ", kUnnamed = "(anonymous namespace)";
  if (whole.substr(0, kVoid.size()) == kVoid) whole.remove_prefix(kVoid.size());
  std::string name;
  for (size_t i = 0; i < whole.size(); ++i) {
    if (whole.substr(i, kUnnamed.size()) == kUnnamed) {
      i += kUnnamed.size() + 1;  // and the two colons
    } else if (whole.substr(i, 2) == "::") {
      while (!name.empty() && (std::isalnum(name.back()) || name.back() == '_')) name.pop_back();
      ++i;
    } else if (whole.substr(i, 2) != " >") {
      name += whole[i];
    }
  }
  std::free(demangled);
  return name;
}

}  // namespace pelt::sim
