// One operation of a model, the unit of both ways to run: at once, or recorded in a program and replayed.
#pragma once
#include <cstdint>
#include <memory>
#include <utility>

#include "team.h"

namespace gsm {

// Reads and writes arrays by raw pointers (whoever submits a recorded op keeps the arrays alive). `rows` is the length
// of the first axis in this run: the arrays' own when run at once, less when replayed for fewer tokens. What an op
// answers may depend on rows and on step inputs (token ids, positions, ...), never on timing or the thread.
struct Op {
  virtual ~Op() = default;
  // Throws std::invalid_argument when a step input holds what the op cannot take. Called by one thread before
  // anything of the run has been written, each time; team_threads() is then that of the run. It must not run anything.
  virtual void check(int64_t /*rows*/) const {}
  // A phase begins when the one before it, or the op before, is done.
  virtual int phases(int64_t /*rows*/) const { return 1; }
  // Whether a phase is too small to share: the caller then runs it as thread 0 of 1, and no other thread is waited for.
  virtual bool alone(int64_t /*rows*/, int /*phase*/) const { return false; }
  // Into how many shares (1 to 4) the part of each thread is cut in a phase: memory does not serve all threads alike, and
  // of several shares the faster thread takes over what the slower has not begun.
  virtual int pieces(int64_t /*rows*/, int /*phase*/) const { return 1; }
  // Computes share `thread` of `threads` of a phase. `threads` is at most what team_threads() was in the check, and the
  // same in all phases of a run that are not alone (but for the factor `pieces`); it may differ from run to run. Called once for each share, by any
  // thread of the team, which may run several: so a share must neither wait for another nor leave something in memory
  // of the thread for a later one.
  // An exception is carried to the caller; the rest of the run is left out.
  virtual void run(int64_t rows, int phase, int thread, int threads) = 0;
};

// Runs the op on the team, after its check.
void run_now(Op& op, int64_t rows);

// Runs the op now, or appends it to the program that this thread records. Recording throws std::invalid_argument when
// `rows` is no multiple of the program's capacity.
void submit(std::unique_ptr<Op> op, int64_t rows);

// An op of rows * units independent parts, each worth `cost` simple element operations: fn(begin, end) computes a
// contiguous share of them.
template <class Fn>
class PartsOp final : public Op {
 public:
  PartsOp(int64_t units, int64_t cost, Fn fn) : units_(units), cost_(cost), fn_(std::move(fn)) {}
  bool alone(int64_t rows, int) const override { return rows * units_ < 2 || rows * units_ * cost_ < kTeamWork; }
  void run(int64_t rows, int, int thread, int threads) override {
    const Range r = share(rows * units_, thread, threads);
    if (r.begin < r.end) fn_(r.begin, r.end);
  }

 private:
  const int64_t units_, cost_;
  const Fn fn_;
};

template <class Fn>
std::unique_ptr<Op> parts_op(int64_t units, int64_t cost, Fn fn) {
  return std::make_unique<PartsOp<Fn>>(units, cost, std::move(fn));
}

}  // namespace gsm
