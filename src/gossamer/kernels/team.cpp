#include "team.h"

#include <pthread.h>
#include <sys/resource.h>

#include <algorithm>
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
#include <utility>
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

// How long a thread spins before it sleeps: the phases of a run follow each other within a few microseconds, and the
// steps of a decode within a few tens. Longer would burn an idle core, and when there are more threads than cores it
// would keep a core from the very thread that is waited for.
using Clock = std::chrono::steady_clock;
constexpr std::chrono::microseconds kSpin{40};
constexpr int kPausesPerLook = 32;  // pauses between two looks at the clock

// A wait for the others that is longer than this, and than half of the caller's own share, while the system took cores
// away from this process: a thread was stopped in the middle of its share, for other programs want the cores too. Work
// is then cut into half as many shares for kCaution times as long, so that little of the time is lost in such waits.
constexpr std::chrono::microseconds kStall{500};
constexpr int kCaution = 8;

constexpr int kMaxPieces = 4;  // see Op::pieces

long preemptions() {
  rusage used;
  return getrusage(RUSAGE_SELF, &used) == 0 ? used.ru_nivcsw : 0;
}

thread_local bool t_inside = false;  // in an op's run, which must not wait for the team
thread_local int t_threads = 0;      // the team's size in a turn of this thread

// The first exception of a run; what comes after it is left out.
class Failure {
 public:
  void call(Op& op, int64_t rows, int phase, int thread, int threads) {
    if (failed_.load(std::memory_order_relaxed)) return;
    const bool before = std::exchange(t_inside, true);
    try {
      op.run(rows, phase, thread, threads);
    } catch (...) {
      if (!failed_.exchange(true)) error_ = std::current_exception();
    }
    t_inside = before;
  }
  void rethrow() const {
    if (failed_.load(std::memory_order_relaxed)) std::rethrow_exception(error_);
  }

 private:
  std::atomic<bool> failed_{false};
  std::exception_ptr error_;
};

// The caller leads: it publishes one phase after the other, each cut into as many shares as there are threads (fewer
// after a stall), or a few times as many. A thread takes its own shares, and while it waits any that nobody has taken. So
// a thread that the system does not let run holds up nobody unless it stopped in the middle of a share, where a barrier
// for all threads would wait for a time slice in every phase.
class Team {
 public:
  explicit Team(int threads)
      : threads_(threads), seats_(static_cast<size_t>(threads)), taken_(static_cast<size_t>(threads) * kMaxPieces) {
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

  // Called before the phases of an op, all of which are cut into equally many shares.
  void begin_op() {
    if (next_shares_ < threads_ && Clock::now() >= restore_) next_shares_ = threads_;
    shares_ = next_shares_;
  }

  void phase(Op& op, int64_t rows, int phase, Failure& failure) {
    if (shares_ == 1) return failure.call(op, rows, phase, 0, 1);
    const Clock::time_point start = Clock::now();
    op_.store(&op, std::memory_order_relaxed);
    rows_.store(rows, std::memory_order_relaxed);
    phase_.store(phase, std::memory_order_relaxed);
    failure_.store(&failure, std::memory_order_relaxed);
    const int pieces = std::clamp(op.pieces(rows, phase), 1, kMaxPieces), last = std::exchange(last_cut_, shares_ * pieces);
    // Shares that the phase before did not have count as taken in it, for a thread that is late may still try.
    for (int i = last; i < last_cut_; ++i)
      taken_[static_cast<size_t>(i)].phase.store(number_, std::memory_order_relaxed);
    pieces_.store(pieces, std::memory_order_relaxed);
    left_.store(last_cut_, std::memory_order_relaxed);
    cut_.store(last_cut_, std::memory_order_release);
    announce(++number_);
    take_own(0, number_);
    Clock::time_point idle{};
    wait([this] { return left_.load(std::memory_order_acquire) == 0; }, number_, 0, idle);
    if (idle == Clock::time_point{}) return;
    const Clock::time_point now = Clock::now();
    if (now - idle <= kStall || 2 * (now - idle) <= idle - start) return;
    const long before = preemptions_;
    preemptions_ = preemptions();
    if (preemptions_ == before) return;  // the shares are uneven, no more
    next_shares_ = (shares_ + 1) / 2;
    restore_ = now + kCaution * (now - idle);
  }

 private:
  // On lines of memory of their own, so that taking one's share disturbs nobody.
  struct alignas(64) Seat {
    std::atomic<uint32_t> asleep{0};  // whether the thread of this number sleeps, or is about to
  };
  struct alignas(64) Taken {
    std::atomic<uint64_t> phase{0};  // the last one whose share of this number was taken
  };
  static constexpr uint64_t kStop = ~uint64_t{0};

  void serve(int t) {
    Clock::time_point idle;
    for (uint64_t seen = 0;;) {
      wait([this, seen] { return number_now_.load(std::memory_order_acquire) != seen; }, seen, t, idle);
      seen = number_now_.load(std::memory_order_acquire);
      if (seen == kStop) return;
      take_own(t, seen);
    }
  }

  void dismiss() {
    announce(kStop);
    for (auto& worker : workers_) worker.join();
  }

  // A thread's own shares from the first to the last, which follow each other in memory.
  void take_own(int t, uint64_t phase_number) {
    const int pieces = pieces_.load(std::memory_order_relaxed);
    for (int i = 0; i < pieces; ++i) take(t * pieces + i, phase_number);
  }

  // What others have left: their last shares first, since they take the first ones.
  void take_left(int t, uint64_t phase_number) {
    const int pieces = pieces_.load(std::memory_order_relaxed);
    for (int i = 1; i < threads_; ++i)
      for (int k = pieces; k-- > 0;) take((t + i) % threads_ * pieces + k, phase_number);
  }

  // Runs a share of a phase, unless it was taken. What a phase consists of is read first and may be that of a later one
  // already, but then all shares of this one have been taken and the exchange fails.
  void take(int number, uint64_t phase_number) {
    Op* const op = op_.load(std::memory_order_relaxed);
    const int64_t rows = rows_.load(std::memory_order_relaxed);
    const int shares = cut_.load(std::memory_order_acquire), phase = phase_.load(std::memory_order_relaxed);
    Failure* const failure = failure_.load(std::memory_order_relaxed);
    if (number >= shares) return;
    std::atomic<uint64_t>& taken = taken_[static_cast<size_t>(number)].phase;
    uint64_t last = taken.load(std::memory_order_relaxed);
    if (last >= phase_number) return;
    if (!taken.compare_exchange_strong(last, phase_number, std::memory_order_acq_rel)) return;
    failure->call(*op, rows, phase, number, shares);
    if (left_.fetch_sub(1) == 1) wake(seats_[0]);
  }

  // Spins, runs what shares of the phase are left, spins, sleeps. `idle` is set to when nothing was left to do, if the
  // wait went on from there.
  template <class Done>
  void wait(const Done& done, uint64_t phase_number, int t, Clock::time_point& idle) {
    if (soon(done)) return;  // most waits end here, before the clock is read
    if (t < cut_.load(std::memory_order_relaxed)) take_left(t, phase_number);
    idle = Clock::now();
    while (Clock::now() < idle + kSpin)
      if (soon(done)) return;
    Seat& seat = seats_[static_cast<size_t>(t)];
    while (!done()) {
      // In the default order (sequentially consistent) either the sleeper sees what it waits for, or whoever brings it
      // about sees the sleeper.
      if (t != 0) sleepers_.fetch_add(1);
      seat.asleep.store(1);
      if (done()) wake(seat);
      else seat.asleep.wait(1);
    }
  }

  template <class Done>
  static bool soon(const Done& done) {
    for (int i = 0; i < kPausesPerLook; ++i) {
      if (done()) return true;
      relax();
    }
    return false;
  }

  void announce(uint64_t number) {
    number_now_.store(number);
    if (sleepers_.load() > 0)
      for (int t = 1; t < threads_; ++t) wake(seats_[static_cast<size_t>(t)]);
  }

  void wake(Seat& seat) {
    if (seat.asleep.load() == 0 || seat.asleep.exchange(0) == 0) return;
    if (&seat != &seats_[0]) sleepers_.fetch_sub(1);
    seat.asleep.notify_one();
  }

  const int threads_;
  std::vector<Seat> seats_;
  std::vector<Taken> taken_;  // of each share
  uint64_t number_ = 0;                             // the caller's, as all up to preemptions_
  int shares_ = threads_, next_shares_ = threads_;  // of this op, of the next one, before they are cut into pieces
  int last_cut_ = 0;                                // how many shares the last phase had
  Clock::time_point restore_{};                     // when they become as many as there are threads again
  long preemptions_ = preemptions();
  std::atomic<Op*> op_{nullptr};
  std::atomic<int64_t> rows_{0};
  std::atomic<int> phase_{0}, cut_{0}, pieces_{1};
  std::atomic<Failure*> failure_{nullptr};
  alignas(64) std::atomic<uint64_t> number_now_{0};
  alignas(64) std::atomic<int> left_{0};  // shares of the phase that are not done
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

// In a turn.
Team& the_team() {
  static const int registered = pthread_atfork(nullptr, nullptr, forget_team_in_child);
  (void)registered;
  if (g_team && g_team->threads() != t_threads) {
    delete g_team;
    g_team = nullptr;
  }
  if (!g_team) g_team = new Team(t_threads);
  return *g_team;
}

// Calls one(op, rows, phase) for each phase.
template <class One>
void each_phase(const Step* steps, size_t count, int64_t tokens, const One& one) {
  for (size_t i = 0; i < count; ++i) {
    Op& op = *steps[i].op;
    const int64_t rows = tokens * steps[i].rows_per_token;
    for (int phase = 0, phases = op.phases(rows); phase < phases; ++phase) one(op, rows, phase);
  }
}

// So small that the team need not even exist.
bool alone_throughout(const Step* steps, size_t count, int64_t tokens) {
  if (count != 1) return false;
  bool alone = true;
  each_phase(steps, count, tokens, [&](Op& op, int64_t rows, int phase) { alone = alone && op.alone(rows, phase); });
  return alone;
}

class FunctionOp final : public Op {
 public:
  explicit FunctionOp(const std::function<void(int, int)>& fn) : fn_(fn) {}
  void run(int64_t, int, int thread, int threads) override { fn_(thread, threads); }

 private:
  const std::function<void(int, int)>& fn_;
};

}  // namespace

int team_threads() { return t_inside ? 1 : t_threads ? t_threads : g_threads.load(std::memory_order_relaxed); }

void set_team_threads(int n) {
  if (n < 1 || n > 256) throw std::invalid_argument("threads must lie between 1 and 256");
  g_threads = n;
}

Turn::Turn() : first_(!t_inside && t_threads == 0) {
  if (!first_) return;
  g_mutex.lock();
  t_threads = g_threads;
}

Turn::~Turn() {
  if (!first_) return;
  t_threads = 0;
  g_mutex.unlock();
}

void team_steps(const Step* steps, size_t count, int64_t tokens) {
  const Turn turn;
  Failure failure;
  const auto here = [&](Op& op, int64_t rows, int phase) { failure.call(op, rows, phase, 0, 1); };
  if (t_inside || alone_throughout(steps, count, tokens)) {
    each_phase(steps, count, tokens, here);
  } else {
    Team& team = the_team();
    each_phase(steps, count, tokens, [&](Op& op, int64_t rows, int phase) {
      if (phase == 0) team.begin_op();
      if (op.alone(rows, phase)) here(op, rows, phase);
      else team.phase(op, rows, phase, failure);
    });
  }
  failure.rethrow();
}

void team_run(const std::function<void(int, int)>& fn) {
  FunctionOp op(fn);
  const Step step{&op, 1};
  team_steps(&step, 1, 1);
}

void run_now(Op& op, int64_t rows) {
  const Turn turn;
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
