// layouts.h as the host's compiler sees it: prints a line for each member.
#include "layouts.h"

#include <cstdio>

namespace {

struct PrintedLines {
  void put(const char* name, int member, int offset, int bytes) {
    std::printf("%d %d %s, member %d\n", offset, bytes, name, member);
  }
};

}  // namespace

int main() {
  alignas(64) static char memory[1 << 16];
  PrintedLines sink;
  pelt::test::Layouts<PrintedLines>{sink, memory}.put_all();
  return 0;
}
