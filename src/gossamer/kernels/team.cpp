#include "team.h"

#include <pthread.h>

#include <atomic>
#include <chrono>
#include <cstdlib>
#include <exception>
#include <mutex>
#include <new>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#include "op.h"

namespace gsm {
namespace {

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// How long a thread spins before it sleeps: threads of a run meet within a few microseconds, and the next step of a
// decode comes within a few tens. Longer would burn an idle core, and when there are more threads than cores it would
// keep a core from the very thread that is waited for.
constexpr std::chrono::microseconds kSpin{40};
constexpr int kPausesPerLook = 32;  // pauses between two looks at the clock

// Set in the threads of the team, and in a caller while it runs: a call from inside an op must not wait for the team.
thread_local bool t_inside = false;

// Everything of a run that one thread does, barriers apart; an exception ends the work but not the meeting.
class Run {
 public:
  Run(const Step* steps, size_t count, int64_t tokens) : steps_(steps), count_(count), tokens_(tokens) {}

  template <class Barrier>
  void work(int thread, int threads, const Barrier& barrier) {
    bool first = true, last_alone = false;
    for (size_t i = 0; i < count_; ++i) {
      Op& op = *steps_[i].op;
      const int64_t rows = tokens_ * steps_[i].rows_per_token;
      const int phases = op.phases(rows);
      for (int phase = 0; phase < phases; ++phase) {
        const bool alone = op.alone(rows, phase);
        if (!first && !(alone && last_alone)) barrier();
        first = false;
        last_alone = alone;
        if ((alone && thread != 0) || failed_.load(std::memory_order_relaxed)) continue;
        try {
          op.run(rows, phase, alone ? 0 : thread, alone ? 1 : threads);
        } catch (...) {
          if (!failed_.exchange(true)) error_ = std::current_exception();
        }
      }
    }
  }

  // Once all threads have met for the last time.
  void rethrow() {
    if (failed_.load(std::memory_order_relaxed)) std::rethrow_exception(error_);
  }

 private:
  const Step* const steps_;
  const size_t count_;
  const int64_t tokens_;
  std::atomic<bool> failed_{false};
  std::exception_ptr error_;
};

// The threads advance through epochs together: the caller begins one with a new run, the last to arrive at a barrier
// begins the next. Each worker counts the epochs it has seen.
class Team {
 public:
  explicit Team(int threads) : threads_(threads) {
    try {
      for (int t = 1; t < threads; ++t) workers_.emplace_back([this, t] { serve(t); });
    } catch (const std::system_error&) {
      dismiss();
      throw std::runtime_error("the system does not start " + std::to_string(threads) +
                               " threads for this process; use fewer");
    }
  }

  ~Team() { dismiss(); }

  int threads() const { return threads_; }

  void go(Run& run) {
    run_ = &run;
    advance();
    ++seen_;
    run.work(0, threads_, [this] { meet(seen_); });
    meet(seen_);
  }

 private:
  void dismiss() {
    run_ = nullptr;
    advance();
    for (auto& worker : workers_) worker.join();
  }

  void serve(int t) {
    t_inside = true;
    for (uint32_t seen = 0;;) {
      await(seen);
      ++seen;
      if (!run_) return;
      run_->work(t, threads_, [this, &seen] { meet(seen); });
      meet(seen);
    }
  }

  void meet(uint32_t& seen) {
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == threads_) {
      arrived_.store(0, std::memory_order_relaxed);  // nobody arrives again before the epoch has moved
      advance();
    } else {
      await(seen);
    }
    ++seen;
  }

  // The default order (sequentially consistent) makes sure that either the sleeper sees the new epoch or the one who
  // moves it sees the sleeper.
  void advance() {
    epoch_.fetch_add(1);
    if (sleepers_.load() > 0) epoch_.notify_all();
  }

  void await(uint32_t seen) {
    if (moves(seen)) return;  // most waits end here, before the clock is read
    const auto end = std::chrono::steady_clock::now() + kSpin;
    while (std::chrono::steady_clock::now() < end)
      if (moves(seen)) return;
    sleepers_.fetch_add(1);
    while (epoch_.load() == seen) epoch_.wait(seen);
    sleepers_.fetch_sub(1, std::memory_order_relaxed);
  }

  bool moves(uint32_t seen) const {
    for (int i = 0; i < kPausesPerLook; ++i) {
      if (epoch_.load(std::memory_order_acquire) != seen) return true;
      relax();
    }
    return false;
  }

  const int threads_;
  Run* run_ = nullptr;
  uint32_t seen_ = 0;  // the caller's
  // A line of memory each: spinning on one must not slow down writes to another.
  alignas(64) std::atomic<uint32_t> epoch_{0};
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<int> sleepers_{0};
  std::vector<std::thread> workers_;
};

std::mutex g_mutex;
Team* g_team = nullptr;
std::atomic<int> g_threads{1};

void forget_team_in_child() {
  // The child of a fork has none of the threads: drop the old team (its memory is lost on purpose, since its
  // destructor would wait for threads that do not exist) and build a new one at the next call.
  g_team = nullptr;
  new (&g_mutex) std::mutex();
}

// With the mutex held.
Team& the_team() {
  static const int registered = pthread_atfork(nullptr, nullptr, forget_team_in_child);
  (void)registered;
  if (g_team && g_team->threads() != g_threads) {
    delete g_team;
    g_team = nullptr;
  }
  if (!g_team) g_team = new Team(g_threads);
  return *g_team;
}

bool alone_throughout(const Step* steps, size_t count, int64_t tokens) {
  if (count != 1) return false;  // a program is worth the team
  const int64_t rows = tokens * steps[0].rows_per_token;
  for (int phase = 0, phases = steps[0].op->phases(rows); phase < phases; ++phase)
    if (!steps[0].op->alone(rows, phase)) return false;
  return true;
}

class FunctionOp final : public Op {
 public:
  explicit FunctionOp(const std::function<void(int, int)>& fn) : fn_(fn) {}
  void run(int64_t, int, int thread, int threads) override { fn_(thread, threads); }

 private:
  const std::function<void(int, int)>& fn_;
};

}  // namespace

int team_threads() { return t_inside ? 1 : g_threads.load(std::memory_order_relaxed); }

void set_team_threads(int n) {
  if (n < 1 || n > 256) throw std::invalid_argument("threads must lie between 1 and 256");
  g_threads = n;
}

void team_steps(const Step* steps, size_t count, int64_t tokens) {
  Run run(steps, count, tokens);
  if (t_inside || alone_throughout(steps, count, tokens)) {
    run.work(0, 1, [] {});
  } else {
    std::lock_guard lock(g_mutex);
    Team& team = the_team();
    t_inside = true;
    team.go(run);
    t_inside = false;
  }
  run.rethrow();
}

void team_run(const std::function<void(int, int)>& fn) {
  FunctionOp op(fn);
  const Step step{&op, 1};
  team_steps(&step, 1, 1);
}

void run_now(Op& op, int64_t rows) {
  op.check(rows);
  const Step step{&op, rows};
  if (rows > 0) team_steps(&step, 1, 1);
}

void* thread_scratch(int slot, size_t bytes) {
  struct Slot {
    void* memory = nullptr;
    size_t size = 0;
    ~Slot() { std::free(memory); }
  };
  static thread_local Slot slots[2];
  Slot& s = slots[slot];
  if (s.size < bytes) {
    std::free(s.memory);
    s.size = (bytes + bytes / 4 + 63) / 64 * 64;
    s.memory = std::aligned_alloc(64, s.size);
    if (!s.memory) {
      s.size = 0;
      throw std::bad_alloc();
    }
  }
  return s.memory;
}

}  // namespace gsm
