// One persistent team of threads. Work is cut into at most as many shares as there are threads, at boundaries that the
// ops choose so that results depend neither on their number nor on which thread computes what.
#pragma once
#include <cstddef>
#include <cstdint>
#include <functional>

namespace gsm {

struct Op;

// How many threads the next run has; in an op's run, 1.
int team_threads();
void set_team_threads(int n);  // 1..256, throws std::invalid_argument otherwise

// One op of a run: it sees rows = tokens * rows_per_token.
struct Step {
  Op* op;
  int64_t rows_per_token;
};

// While it lives, the team is this thread's: runs of other threads wait, and team_threads() does not change.
class Turn {
 public:
  Turn();
  ~Turn();
  Turn(const Turn&) = delete;
  Turn& operator=(const Turn&) = delete;

 private:
  const bool first_;  // false within another turn of this thread, and in an op's run
};

// Runs the steps one after the other on the whole team, the caller included, in a turn. Their checks are the caller's.
// An exception of an op is rethrown here; what follows it is left out. From inside an op, everything runs on the
// calling thread.
void team_steps(const Step* steps, size_t count, int64_t tokens);

// Calls fn(share, shares) once for every share, on the whole team, the caller included; returns when all are done.
void team_run(const std::function<void(int, int)>& fn);

// The contiguous share of [0, n) that thread `t` of `threads` takes.
struct Range {
  int64_t begin, end;
};
static inline Range share(int64_t n, int t, int threads) { return {n * t / threads, n * (t + 1) / threads}; }

// Below this many simple element operations (about a microsecond) a phase is not worth sharing.
constexpr int64_t kTeamWork = 1 << 15;

// Calls fn(begin, end) for contiguous shares of [0, n): on the whole team when `work` element operations pay for it.
template <class Fn>
inline void team_share(int64_t n, int64_t work, const Fn& fn) {
  if (n < 2 || work < kTeamWork || team_threads() == 1) {
    if (n > 0) fn(int64_t{0}, n);
    return;
  }
  const auto part = [n, &fn](int t, int threads) {
    const Range r = share(n, t, threads);
    if (r.begin < r.end) fn(r.begin, r.end);
  };
  team_run(std::ref(part));  // a reference fits in std::function without an allocation
}

// 64-byte aligned memory of the calling thread, at least `bytes` long, kept until the thread ends; the contents are
// undefined, and a later call with the same slot (0..1) may move it. Grows only, so a steady step allocates nothing.
void* thread_scratch(int slot, size_t bytes);

}  // namespace gsm
