#include "sim/counters.h"

#include <algorithm>

#include "sim/program.h"

namespace pelt::sim {
namespace {

constexpr uint64_t kSectorBytes = 32;

thread_local bool t_is_counting = false;
thread_local bool t_has_checks = true;
thread_local std::vector<LaunchCount> t_counts;

}  // namespace

// Accesses are aligned and of 16 bytes at most, so a lane touches one sector.
uint64_t TrafficMeter::touch(const uint64_t (&addresses)[32], uint32_t lanes, bool is_write,
                             uint32_t block, Traffic* traffic) {
  uint64_t sectors[kLanes];
  int count = 0;
  for (int lane = 0; lane < kLanes; ++lane) {
    if (!((lanes >> lane) & 1)) continue;
    const uint64_t sector = addresses[lane] / kSectorBytes;
    int seen = count;  // lanes mostly go upwards: the last sectors first
    while (seen > 0 && sectors[seen - 1] != sector) --seen;
    if (seen == 0) sectors[count++] = sector;
  }
  for (int n = 0; n < count; ++n) {
    const uint64_t sector = sectors[n];
    Mark& mark = marks_[sector];
    uint32_t& last = is_write ? mark.writer : mark.reader;
    if (last == block + 1) continue;
    ++(is_write ? traffic->cache_written : traffic->cache_read);
    if (last == 0) ++(is_write ? traffic->memory_written : traffic->memory_read);
    last = block + 1;
  }
  return static_cast<uint64_t>(count);
}

void add_wavefronts(const uint64_t (&addresses)[32], uint32_t lanes, size_t bytes,
                    CodeCount* count) {
  constexpr int kBanks = 32;
  const int together = static_cast<int>(std::min<size_t>(32, 128 / bytes));
  const int words = static_cast<int>(std::max<size_t>(1, bytes / 4));
  for (int first = 0; first < kLanes; first += together) {
    uint64_t in_bank[kBanks][kLanes];
    int words_in[kBanks] = {}, most = 0;
    for (int lane = first; lane < first + together; ++lane) {
      if (!((lanes >> lane) & 1)) continue;
      for (int w = 0; w < words; ++w) {
        const uint64_t word = addresses[lane] / 4 + static_cast<uint64_t>(w);
        const int bank = static_cast<int>(word % kBanks);
        int seen = words_in[bank];
        while (seen > 0 && in_bank[bank][seen - 1] != word) --seen;
        if (seen == 0) in_bank[bank][words_in[bank]++] = word;
        most = std::max(most, words_in[bank]);
      }
    }
    count->wavefronts += static_cast<uint64_t>(most);
    count->least_wavefronts += most > 0;
  }
}

void start_counting(bool without_checks) {
  t_is_counting = true;
  t_has_checks = !without_checks;
  t_counts.clear();
}

std::vector<LaunchCount> stop_counting() {
  t_is_counting = false;
  t_has_checks = true;
  return std::move(t_counts);
}

bool is_counting() { return t_is_counting; }
bool has_checks() { return t_has_checks; }

LaunchCount& count_of_launch(const Program& program, const LaunchRequest& request) {
  if (!t_is_counting) t_counts.clear();
  t_counts.push_back({&program,
                      request.blocks,
                      request.threads,
                      request.shared_bytes + program.static_shared_bytes,
                      request.blocks_per_multiprocessor,
                      {},
                      {}});
  t_counts.back().code.resize(program.code.size());
  return t_counts.back();
}

}  // namespace pelt::sim
