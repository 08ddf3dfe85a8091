#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <functional>
#include <mutex>
#include <stdexcept>
#include <string>

#include "probe.h"
#include "team.h"

namespace gsm {
namespace {

constexpr int64_t kStep = 256;  // floats; every share is a multiple of the widest pattern

std::mutex g_mutex;
float* g_memory = nullptr;
int64_t g_bytes = 0;

void release() {
  if (g_memory) munmap(g_memory, static_cast<size_t>(g_bytes));
  g_memory = nullptr;
  g_bytes = 0;
}

void hold(int64_t bytes) {
  if (g_bytes == bytes) return;
  release();
  void* memory = mmap(nullptr, static_cast<size_t>(bytes), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED)
    throw std::invalid_argument("the bandwidth probe cannot get " + std::to_string(bytes) + " bytes; ask for fewer");
  madvise(memory, static_cast<size_t>(bytes), MADV_HUGEPAGE);
  g_memory = static_cast<float*>(memory);
  g_bytes = bytes;
  const int64_t steps = bytes / 4 / kStep;
  // Each thread touches what it will read, so that the pages are near it.
  const auto touch = [&](int t, int threads) {
    const Range r = share(steps, t, threads);
    std::fill(g_memory + r.begin * kStep, g_memory + r.end * kStep, 1.0f);
  };
  team_run(std::ref(touch));
}

}  // namespace

double read_bandwidth(int64_t bytes, double seconds) {
  using Clock = std::chrono::steady_clock;
  const int64_t most = static_cast<int64_t>(sysconf(_SC_PHYS_PAGES)) * sysconf(_SC_PAGESIZE) / 2;
  if (bytes < (1 << 20) || bytes > most)
    throw std::invalid_argument("the bandwidth probe takes from 1048576 to " + std::to_string(most) +
                                " bytes here, not " + std::to_string(bytes));
  if (!(seconds >= 0.0 && seconds <= 600.0))
    throw std::invalid_argument("the bandwidth probe takes from 0 to 600 seconds");
  std::lock_guard lock(g_mutex);
  bytes = (bytes + 4 * kStep - 1) / (4 * kStep) * (4 * kStep);
  hold(bytes);
  const int64_t steps = bytes / 4 / kStep;
  double best = 0.0;
  const auto start = Clock::now();
  do {
    for (const ReadPattern pattern : kReadPatterns) {
      const auto read = [&](int t, int threads) {
        const Range r = share(steps, t, threads);
        [[maybe_unused]] const volatile float sink =  // volatile, so that the reads are not dropped
            read_all(g_memory + r.begin * kStep, (r.end - r.begin) * kStep, pattern);
      };
      const auto began = Clock::now();
      team_run(std::ref(read));
      best = std::max(best, static_cast<double>(bytes) / std::chrono::duration<double>(Clock::now() - began).count());
    }
  } while (std::chrono::duration<double>(Clock::now() - start).count() < seconds);
  return best / 1e9;
}

double dot_peak(const std::string& kind, double seconds) {
  using Clock = std::chrono::steady_clock;
  Dot which;
  if (kind == "int8") which = Dot::int8;
  else if (kind == "bf16") which = Dot::bf16;
  else if (kind == "f32") which = Dot::f32;
  else throw std::invalid_argument("the arithmetic probe knows int8, bf16 and f32, not '" + kind + "'");
  if (!(seconds >= 0.0 && seconds <= 600.0))
    throw std::invalid_argument("the arithmetic probe takes from 0 to 600 seconds");
  std::lock_guard lock(g_mutex);
  int64_t operations[256];  // of each thread; a team has no more
  int members = 1;
  const auto timed = [&](int64_t steps) {
    const auto work = [&](int t, int threads) {
      volatile float sink = 1.0f;  // what the compiler cannot know
      float keep = sink;
      operations[t] = dot_steps(which, steps, &keep);
      sink = keep;
      if (t == 0) members = threads;
    };
    const auto began = Clock::now();
    team_run(std::ref(work));
    return std::chrono::duration<double>(Clock::now() - began).count();
  };
  constexpr int64_t kFirst = 1 << 14;
  timed(kFirst);  // wakes the team and raises the clock
  const int64_t steps = std::max<int64_t>(1, static_cast<int64_t>(kFirst * 0.004 / std::max(timed(kFirst), 1e-7)));
  timed(steps);
  double best = 0.0;
  const auto start = Clock::now();
  do {
    const double took = timed(steps);
    double all = 0.0;
    for (int t = 0; t < members; ++t) all += static_cast<double>(operations[t]);
    best = std::max(best, all / took);
  } while (std::chrono::duration<double>(Clock::now() - start).count() < seconds);
  return best / 1e9;
}

void probe_release() {
  std::lock_guard lock(g_mutex);
  release();
}

}  // namespace gsm
