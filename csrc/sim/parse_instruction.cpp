// One instruction's text to its fields.
#include <algorithm>

#include "common/check.h"
#include "sim/parser.h"
#include "sim/text.h"

namespace pelt::sim {
int element_bytes_of(std::string_view type) {
  if (type == "b8" || type == "u8" || type == "s8") return 1;
  if (type == "b16" || type == "u16" || type == "s16" || type == "f16" || type == "bf16") return 2;
  if (type == "b32" || type == "u32" || type == "s32" || type == "f32") return 4;
  if (type == "b64" || type == "u64" || type == "s64") return 8;
  fail("unknown type '", type, "'");
}

bool Parser::Words::has(std::string_view modifier) const {
  return std::find(modifiers.begin(), modifiers.end(), modifier) != modifiers.end();
}

void Parser::instruction(std::string_view text) {
  now_ = Instruction{};
  operands_.clear();
  now_.line = line_;
  std::swap(now_.used_bytes, used_bytes_);
  now_.source = static_cast<uint32_t>(program_.sources.size() - 1);
  if (text[0] == '@') {
    const size_t end = text.find_first_of(" \t");
    set_guard(text.substr(1, end - 1));
    text = trim(text.substr(end));
  }
  const size_t end = text.find_first_of(" \t");
  Words words;
  words.name = text.substr(0, end);
  words.modifiers = cut(words.name, '.');
  if (end != std::string_view::npos) words.arguments = cut_arguments(text.substr(end));
  now_.name = number_of_name(std::string(words.name));
  const std::string_view first = words.modifiers[0];
  const bool is_machine = first == "ld" || first == "st" || first == "atom" || first == "red" ||
                          first == "cp" || first == "ldmatrix" || first == "mma" ||
                          first == "shfl" || first == "vote" || first == "bar" ||
                          first == "barrier" || first == "bra" || first == "ret" ||
                          first == "exit" || first == "trap" || first == "nanosleep";
  if (is_machine) {
    machine_instruction(words);
  } else {
    arithmetic_instruction(words);
  }
  now_.first_operand = static_cast<uint32_t>(program_.operands.size());
  program_.operands.insert(program_.operands.end(), operands_.begin(), operands_.end());
  program_.code.push_back(now_);
}

void Parser::arithmetic_instruction(const Words& words) {
  static const std::unordered_map<std::string_view, Special> kSpecials = {
      {"%tid.x", Special::kThread},     {"%laneid", Special::kLane},
      {"%ntid.x", Special::kThreads},   {"%ctaid.x", Special::kBlockX},
      {"%ctaid.y", Special::kBlockY},   {"%ctaid.z", Special::kBlockZ},
      {"%nctaid.x", Special::kBlocksX}, {"%nctaid.y", Special::kBlocksY},
      {"%nctaid.z", Special::kBlocksZ}, {"%tid.y", Special::kZero},
      {"%tid.z", Special::kZero},       {"%ntid.y", Special::kOne},
      {"%ntid.z", Special::kOne}};
  std::string name(words.name);
  std::vector<std::string_view> arguments = words.arguments;
  if (words.modifiers[0] == "mov" && arguments.size() == 2) {
    const auto special = kSpecials.find(arguments[1]);
    if (special != kSpecials.end()) {
      now_.kind = Kind::kSpecial;
      now_.variant = static_cast<uint8_t>(special->second);
      return add_destinations(arguments[0], Width::k32);
    }
    if (arguments[0][0] == '{') name += " unpack";
    if (arguments[1][0] == '{') name += " pack";
  }
  const auto found = arithmetic().find(name);
  check(found != arithmetic().end(), "the simulator does not know the instruction ", name);
  const Arithmetic& row = found->second;
  now_.kind = Kind::kArithmetic;
  now_.execute = row.execute;
  std::vector<std::string_view> flat;
  for (std::string_view argument : arguments) {
    const auto parts = elements(argument);
    flat.insert(flat.end(), parts.begin(), parts.end());
  }
  check(flat.size() == row.destinations.size() + row.sources.size(), "expected ",
        row.destinations.size() + row.sources.size(), " operands, got ", flat.size());
  size_t next = 0;
  for (Width width : row.destinations) add_destinations(flat[next++], width);
  for (Width width : row.sources) add_sources(flat[next++], width);
}

void Parser::machine_instruction(const Words& words) {
  const std::string_view first = words.modifiers[0];
  if (first == "ld" || first == "st" || first == "atom" || first == "red") return access(words);
  if (first == "cp") return copy_async(words);
  if (first == "ldmatrix") return load_matrix(words);
  if (first == "mma") return mma(words);
  if (first == "shfl") return shuffle(words);
  if (first == "vote") return vote(words);
  if (first == "bar" || first == "barrier") return barrier(words);
  if (first == "bra") {
    now_.kind = Kind::kBranch;
    branches_.emplace_back(program_.code.size(), std::string(words.arguments.at(0)));
  } else if (first == "trap") {
    now_.kind = Kind::kTrap;
  } else if (first == "nanosleep") {
    now_.kind = Kind::kSleep;
  } else {
    now_.kind = Kind::kReturn;
  }
}

// ld, st, atom, red: an address, and one to four elements.
void Parser::access(const Words& words) {
  static const std::vector<std::string_view> kKnown = {
      "ld",      "st",  "atom",     "red", "global",  "shared",  "param", "nc",  "v2",
      "v4",      "add", "acquire",  "min", "acq_rel", "relaxed", "gpu",   "sys", "cta",
      "release", "max", "volatile", "and", "or",      "exch",    "cas",   "cs"};
  for (size_t n = 0; n + 1 < words.modifiers.size(); ++n) {
    check(std::find(kKnown.begin(), kKnown.end(), words.modifiers[n]) != kKnown.end(),
          "the simulator does not know the instruction ", words.name);
  }
  now_.space = words.has("global")   ? Space::kGlobal
               : words.has("shared") ? Space::kShared
               : words.has("param")  ? Space::kParam
                                     : Space::kGeneric;
  const std::string_view type = words.modifiers.back();
  now_.element_bytes = static_cast<uint8_t>(element_bytes_of(type));
  now_.is_signed = type[0] == 's';
  now_.vector = words.has("v2") ? 2 : words.has("v4") ? 4 : 1;
  now_.acquires = words.has("acquire") || words.has("acq_rel");
  now_.releases = words.has("release") || words.has("acq_rel");
  now_.is_read_only = words.has("nc");
  const std::string_view first = words.modifiers[0];
  const bool is_atomic = first == "atom" || first == "red";
  now_.is_strong =
      is_atomic || now_.acquires || now_.releases || words.has("relaxed") || words.has("volatile");
  const Width width = now_.element_bytes == 8 ? Width::k64 : Width::k32;
  const auto& arguments = words.arguments;
  const auto add_address = [&](std::string_view text) {
    operands_.push_back(address(text, &now_.offset[0], &now_.is_wide[0]));
    ++now_.sources;
  };
  if (first == "ld") {
    now_.kind = Kind::kLoad;
    // A narrow load may go into wide registers.
    now_.is_wide[1] = width == Width::k64 || is_wide_register(elements(arguments.at(0))[0]);
    add_destinations(arguments[0], now_.is_wide[1] ? Width::k64 : Width::k32);
    add_address(arguments.at(1));
    check(now_.destinations == now_.vector, "expected ", int{now_.vector}, " destinations");
  } else if (first == "st") {
    now_.kind = Kind::kStore;
    add_address(arguments.at(0));
    const auto values = elements(arguments.at(1));
    now_.is_wide[1] = width == Width::k64 || is_wide_register(values[0]);
    for (std::string_view value : values) {
      add_sources(value, now_.is_wide[1] ? Width::k64 : Width::k32);
    }
    check(now_.sources == 1 + now_.vector, "expected ", int{now_.vector}, " values");
  } else {
    now_.kind = Kind::kAtomic;
    check(now_.element_bytes == 4 && type != "f32", "expected an atomic of 32-bit integers");
    now_.variant = static_cast<uint8_t>(words.has("add")    ? Atomic::kAdd
                                        : words.has("min")  ? Atomic::kMin
                                        : words.has("max")  ? Atomic::kMax
                                        : words.has("and")  ? Atomic::kAnd
                                        : words.has("or")   ? Atomic::kOr
                                        : words.has("exch") ? Atomic::kExchange
                                                            : Atomic::kCompareAndSwap);
    size_t next = 0;
    if (first == "atom") add_destinations(arguments.at(next++), Width::k32);
    add_address(arguments.at(next++));
    for (; next < arguments.size(); ++next) add_sources(arguments[next], Width::k32);
  }
}

// cp.async.cg.shared.global [shared], [global], 16{, bytes that are read}; and its groups.
void Parser::copy_async(const Words& words) {
  if (words.name == "cp.async.commit_group") {
    now_.kind = Kind::kCommitCopies;
    return;
  }
  if (words.name == "cp.async.wait_group" || words.name == "cp.async.wait_all") {
    now_.kind = Kind::kWaitForCopies;
    // wait_all waits for the copies too that no commit has put into a group.
    const bool has_number = words.name == "cp.async.wait_group";
    now_.offset[0] = has_number ? std::stoll(std::string(words.arguments.at(0))) : -1;
    return;
  }
  check(words.name == "cp.async.cg.shared.global" || words.name == "cp.async.ca.shared.global",
        "the simulator does not know the instruction ", words.name);
  now_.kind = Kind::kCopyAsync;
  now_.vector = 1;
  now_.element_bytes = static_cast<uint8_t>(std::stoi(std::string(words.arguments.at(2))));
  for (int i = 0; i < 2; ++i) {
    operands_.push_back(address(words.arguments.at(i), &now_.offset[i], &now_.is_wide[i]));
    ++now_.sources;
  }
  const bool has_size = words.arguments.size() > 3;
  add_sources(has_size ? words.arguments[3] : words.arguments[2], Width::k32);
}

void Parser::load_matrix(const Words& words) {
  check(words.has("m8n8") && words.has("b16") && words.has("shared"),
        "the simulator does not know the instruction ", words.name);
  now_.kind = Kind::kLoadMatrix;
  now_.space = Space::kShared;
  now_.element_bytes = 16;
  now_.is_transposed = words.has("trans");
  add_destinations(words.arguments.at(0), Width::k32);
  operands_.push_back(address(words.arguments.at(1), &now_.offset[0], &now_.is_wide[0]));
  ++now_.sources;
}

void Parser::mma(const Words& words) {
  now_.is_bf16 = words.has("bf16");
  check(words.name == "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32" ||
            words.name == "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32",
        "the simulator does not know the instruction ", words.name);
  now_.kind = Kind::kMma;
  add_destinations(words.arguments.at(0), Width::k32);
  for (int i = 1; i < 4; ++i) add_sources(words.arguments.at(i), Width::k32);
  check(now_.destinations == 4 && now_.sources == 10, "expected 4, 4, 2 and 4 registers");
}

// shfl.sync.mode.b32 d[|p], a, b, c, lanes
void Parser::shuffle(const Words& words) {
  now_.kind = Kind::kShuffle;
  now_.variant = static_cast<uint8_t>(words.has("up")     ? Shuffle::kUp
                                      : words.has("down") ? Shuffle::kDown
                                      : words.has("bfly") ? Shuffle::kButterfly
                                                          : Shuffle::kIndex);
  const auto results = cut(words.arguments.at(0), '|');
  add_destinations(trim(results[0]), Width::k32);
  add_destinations(results.size() > 1 ? trim(results[1]) : "_", Width::kPredicate);
  for (int i = 1; i < 5; ++i) add_sources(words.arguments.at(i), Width::k32);
}

// vote.sync.mode d, [!]p, lanes
void Parser::vote(const Words& words) {
  now_.kind = Kind::kVote;
  now_.variant = static_cast<uint8_t>(words.has("any")   ? Vote::kAny
                                      : words.has("all") ? Vote::kAll
                                                         : Vote::kBallot);
  check(words.has("any") || words.has("all") || words.has("ballot"),
        "the simulator does not know the instruction ", words.name);
  add_destinations(words.arguments.at(0), words.has("ballot") ? Width::k32 : Width::kPredicate);
  std::string_view source = words.arguments.at(1);
  now_.is_signed = source[0] == '!';
  add_sources(now_.is_signed ? trim(source.substr(1)) : source, Width::kPredicate);
  add_sources(words.arguments.at(2), Width::k32);
}

// bar.sync a{, threads}; bar.arrive a, threads; bar.warp.sync lanes
void Parser::barrier(const Words& words) {
  if (words.has("warp")) {
    now_.kind = Kind::kWarpBarrier;
    return add_sources(words.arguments.at(0), Width::k32);
  }
  check(words.has("sync") || words.has("arrive"), "the simulator does not know the instruction ",
        words.name);
  now_.kind = words.has("sync") ? Kind::kBarrier : Kind::kBarrierArrive;
  for (std::string_view argument : words.arguments) add_sources(argument, Width::k32);
}

// ---- operands ----

void Parser::add_destinations(std::string_view text, Width width) {
  check(now_.sources == 0, "destinations come first");
  for (std::string_view element : elements(text)) {
    operands_.push_back(operand(element, width));
    check(!operands_.back().is_constant(), "expected a register as destination");
    ++now_.destinations;
  }
}

void Parser::add_sources(std::string_view text, Width width) {
  for (std::string_view element : elements(text)) {
    operands_.push_back(operand(element, width));
    ++now_.sources;
  }
}

void Parser::set_guard(std::string_view text) {
  now_.has_guard = true;
  now_.is_guard_negated = text[0] == '!';
  now_.guard = operand(now_.is_guard_negated ? text.substr(1) : text, Width::kPredicate);
}

uint16_t Parser::number_of_name(const std::string& name) {
  const auto found = names_.find(name);
  if (found != names_.end()) return found->second;
  program_.names.push_back(name);
  return names_[name] = static_cast<uint16_t>(program_.names.size() - 1);
}

}  // namespace pelt::sim
