#include "team.h"

#include <pthread.h>

#include <atomic>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <new>
#include <stdexcept>
#include <thread>
#include <vector>

namespace gsm {
namespace {

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

// A worker spins this often before it sleeps: a decode step issues its next call within a few microseconds,
// but an idle process must not burn a core.
constexpr int kSpins = 4000;

class Team {
 public:
  explicit Team(int threads) : threads_(threads) {
    for (int t = 1; t < threads; ++t) workers_.emplace_back([this, t] { work(t); });
  }

  ~Team() {
    stop_.store(true);
    epoch_.fetch_add(1);
    epoch_.notify_all();
    for (auto& worker : workers_) worker.join();
  }

  int threads() const { return threads_; }

  void run(const std::function<void(int, int)>& fn) {
    if (threads_ == 1) {
      fn(0, 1);
      return;
    }
    fn_ = &fn;
    pending_.store(threads_ - 1, std::memory_order_relaxed);
    epoch_.fetch_add(1, std::memory_order_release);
    epoch_.notify_all();
    fn(0, threads_);
    int spins = 0;
    for (int left; (left = pending_.load(std::memory_order_acquire)) != 0;) {
      if (++spins < kSpins) relax();
      else pending_.wait(left, std::memory_order_acquire);
    }
  }

 private:
  void work(int t) {
    uint32_t seen = 0;
    for (;;) {
      int spins = 0;
      while (epoch_.load(std::memory_order_acquire) == seen) {
        if (++spins < kSpins) relax();
        else epoch_.wait(seen, std::memory_order_acquire);
      }
      ++seen;
      if (stop_.load()) return;
      (*fn_)(t, threads_);
      if (pending_.fetch_sub(1, std::memory_order_acq_rel) == 1) pending_.notify_all();
    }
  }

  const int threads_;
  const std::function<void(int, int)>* fn_ = nullptr;
  std::atomic<uint32_t> epoch_{0};
  std::atomic<int> pending_{0};
  std::atomic<bool> stop_{false};
  std::vector<std::thread> workers_;
};

std::mutex g_mutex;
Team* g_team = nullptr;
int g_threads = 1;

void forget_team_in_child() {
  // The child of a fork has none of the threads: drop the old team (its memory is lost on purpose, since its
  // destructor would wait for threads that do not exist) and build a new one at the next call.
  g_team = nullptr;
  new (&g_mutex) std::mutex();
}

void ensure_team() {
  static const int registered = pthread_atfork(nullptr, nullptr, forget_team_in_child);
  (void)registered;
  if (g_team && g_team->threads() != g_threads) {
    delete g_team;
    g_team = nullptr;
  }
  if (!g_team) g_team = new Team(g_threads);
}

}  // namespace

int team_threads() { return g_threads; }

void set_team_threads(int n) {
  if (n < 1 || n > 256) throw std::invalid_argument("threads must lie between 1 and 256");
  std::lock_guard lock(g_mutex);
  g_threads = n;
}

void team_run(const std::function<void(int, int)>& fn) {
  std::lock_guard lock(g_mutex);
  ensure_team();
  g_team->run(fn);
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
