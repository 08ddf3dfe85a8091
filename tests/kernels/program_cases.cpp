// Programs and the team that runs them: the order of phases, what is left out, exceptions, calls from several threads
// and from inside an op, changes of the team's size, and forks.
#include "program.h"

#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <stdexcept>
#include <thread>
#include <vector>

#include "check.h"
#include "team.h"

namespace {

using check::Block;
using check::expect;
using std::chrono::microseconds;

std::atomic<int> broken_promises{0};  // about the number of shares, see Op::run

// out[i] = a weighted mean of in[i - shift], in[i] and in[i + shift] in the first phase, in = out in the second: wrong
// in some element when a phase begins before the last has ended.
class Blur final : public gsm::Op {
 public:
  Blur(float* in, float* out, int64_t shift, bool small) : in_(in), out_(out), shift_(shift), small_(small) {}
  void check(int64_t) const override { most_ = gsm::team_threads(); }
  int phases(int64_t) const override { return 2; }
  bool alone(int64_t, int phase) const override { return small_ && phase == 1; }
  void run(int64_t rows, int phase, int thread, int threads) override {
    if (phase == 0) threads_ = threads;
    if (threads > most_ || (threads != threads_ && !alone(rows, phase))) ++broken_promises;
    const gsm::Range r = gsm::share(rows, thread, threads);
    const int64_t shift = shift_ % rows;
    for (int64_t i = r.begin; i < r.end; ++i)
      if (phase == 1) in_[i] = out_[i];
      else out_[i] = 0.25f * in_[(i + rows - shift) % rows] + 0.5f * in_[i] + 0.25f * in_[(i + shift) % rows];
  }

 private:
  float *const in_, *const out_;
  const int64_t shift_;
  const bool small_;
  mutable std::atomic<int> most_{0};
  std::atomic<int> threads_{0};
};

constexpr int64_t kCapacity = 24;

void record_blurs(gsm::Program& program, Block<float>& in, Block<float>& out) {
  program.begin();
  for (int64_t shift : {1, 7, 11, 2})
    for (bool small : {false, true})
      gsm::submit(std::make_unique<Blur>(in.data(), out.data(), shift, small), in.size());
  gsm::submit(gsm::parts_op(1, 1, [&out](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) out[i] += 1.0f;
  }), out.size());
  program.end(true);
}

void replay_is_the_same_on_any_team() {
  Block<float> in(3 * kCapacity), out(3 * kCapacity);
  gsm::Program program(kCapacity);
  record_blurs(program, in, out);
  expect(program.size() == 9, [] { return "a program has another number of ops"; });
  for (int64_t tokens : {int64_t{1}, int64_t{2}, int64_t{7}, kCapacity}) {
    Block<float> first;
    for (int threads : {1, 2, 3, 5}) {
      gsm::set_team_threads(threads);
      for (int again = 0; again < 40; ++again) {
        in.fill(-1);
        out.fill(-1);
        for (int64_t i = 0; i < 3 * tokens; ++i) in[i] = static_cast<float>(i * i % 17);
        program.run(tokens);
        if (first.size() == 0) first = out.copy(0, out.size());
        expect(check::same(out, first), [] { return "a replay depends on the number of threads"; });
        bool rest = true;
        for (int64_t i = 3 * tokens; i < in.size(); ++i) rest = rest && out[i] == -1;
        expect(rest, [] { return "a replay touches rows past its tokens"; });
      }
    }
  }
}

template <class Call>
std::string error_of(Call call) {
  try {
    call();
  } catch (const std::exception& error) {
    return error.what();
  }
  return "";
}

// A stalled team may cut the work into fewer shares than it has threads.
bool every_share_runs() {
  std::atomic<int> ran{0}, all{0};
  gsm::team_run([&](int, int threads) {
    ++ran;
    all = threads;
  });
  return ran == all && all >= 1 && all <= gsm::team_threads();
}

class Failing final : public gsm::Op {
 public:
  Failing(int thread, std::atomic<int>& after) : thread_(thread), after_(after) {}
  int phases(int64_t) const override { return 2; }
  void run(int64_t, int phase, int thread, int) override {
    if (phase == 0 && thread == thread_) throw std::runtime_error("thrown by thread " + std::to_string(thread));
    if (phase == 1) ++after_;
  }

 private:
  const int thread_;
  std::atomic<int>& after_;
};

void exceptions_reach_the_caller() {
  for (int threads : {1, 2, 4}) {
    gsm::set_team_threads(threads);
    for (int thrower = 0; thrower < threads; ++thrower) {
      std::atomic<int> after{0};
      Failing op(thrower, after);
      const std::string error = error_of([&] { gsm::run_now(op, 8); });
      if (error.empty() && thrower > 0) continue;  // fewer shares than threads, for once
      expect(error == "thrown by thread " + std::to_string(thrower), [&] { return "an exception became: " + error; });
      expect(after == 0, [] { return "phases ran after an exception"; });
    }
    expect(every_share_runs(), [] { return "the team does not work after an exception"; });
  }
}

void wrong_use_is_refused() {
  gsm::Program program(8);
  const auto nothing = [] { return gsm::parts_op(1, 1, [](int64_t, int64_t) {}); };
  const auto told = [](const std::string& error, const char* needle) {
    expect(error.find(needle) != std::string::npos, [&] { return "'" + error + "' does not say '" + needle + "'"; });
  };
  told(error_of([] { gsm::Program none(0); }), "capacity");
  told(error_of([&] { program.run(1); }), "record it first");
  told(error_of([&] { program.end(true); }), "not being recorded");
  program.begin();
  told(error_of([&] { gsm::submit(nothing(), 9); }), "of 8 tokens");
  told(error_of([&] { gsm::submit(nothing(), 0); }), "of 8 tokens");
  told(error_of([&] { program.run(1); }), "cannot run while");
  gsm::Program second(4);
  told(error_of([&] { second.begin(); }), "another program");
  std::thread([&] { gsm::submit(nothing(), 9); }).join();  // other threads run at once
  program.end(true);
  expect(program.size() == 0, [] { return "a refused op was recorded"; });
  told(error_of([&] { program.begin(); }), "recorded once");
  told(error_of([&] { program.run(9); }), "up to 8 tokens");
  told(error_of([&] { program.run(-1); }), "up to 8 tokens");
  second.begin();
  gsm::submit(nothing(), 4);
  second.end(false);
  told(error_of([&] { second.run(1); }), "recording failed");
  {
    gsm::Program left(4);
    left.begin();
  }
  expect(!gsm::recorded_program(), [] { return "a program that is gone is still recorded"; });
}

void inside_an_op_calls_run_alone() {
  gsm::set_team_threads(3);
  std::atomic<int> inner{0}, wrong{0};
  gsm::team_run([&](int, int) {
    gsm::team_run([&](int thread, int threads) {
      ++inner;
      wrong += thread != 0 || threads != 1;
    });
    wrong += gsm::team_threads() != 1;
  });
  expect(inner >= 1 && inner <= 3 && wrong == 0, [] { return "a call from inside an op does not run alone"; });
  expect(gsm::team_threads() == 3, [] { return "the number of threads is lost"; });
}

void callers_take_turns() {
  std::vector<std::thread> callers;
  std::atomic<int> wrong{0};
  for (int c = 0; c < 3; ++c)
    callers.emplace_back([c, &wrong] {
      Block<float> in(kCapacity), out(kCapacity);
      gsm::Program program(kCapacity);
      record_blurs(program, in, out);
      Block<float> first;
      for (int i = 0; i < 60; ++i) {
        if (c == 0) gsm::set_team_threads(1 + i % 4);
        for (int64_t j = 0; j < in.size(); ++j) in[j] = static_cast<float>(j);
        program.run(kCapacity);
        if (first.size() == 0) first = out.copy(0, out.size());
        wrong += !check::same(out, first);
      }
    });
  for (std::thread& caller : callers) caller.join();
  expect(wrong == 0, [] { return "callers disturb each other"; });
}

// Threads that sleep must be woken: pauses longer than the spin, between runs and inside of them.
void sleepers_wake() {
  gsm::set_team_threads(3);
  for (int pause : {0, 20, 40, 60, 500})
    for (int late = 0; late < 3; ++late) {
      std::atomic<int> ran{0}, all{0};
      gsm::team_run([&](int thread, int threads) {
        if (thread == late) std::this_thread::sleep_for(microseconds(pause));
        ++ran;
        all = threads;
      });
      expect(ran == all, [] { return "a run ended without all its shares"; });
      std::this_thread::sleep_for(microseconds(pause));
    }
}

// With more busy threads than cores the team soon gets smaller, and when they have ended it gets its size back.
void busy_cores_make_the_team_smaller() {
  gsm::set_team_threads(2);
  const auto comes_to = [](int want) {
    std::atomic<int> shares{0};
    const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(20);
    while (shares != want && std::chrono::steady_clock::now() < end)
      gsm::team_run([&](int, int threads) {
        shares = threads;
        for (volatile int i = 0; i < 100000; i = i + 1) {}
      });
    return shares == want;
  };
  expect(comes_to(2), [] { return "a team never uses all its threads"; });
  std::atomic<bool> stop{false};
  std::vector<std::thread> busy;
  for (unsigned i = 0; i < 2 * std::thread::hardware_concurrency(); ++i)
    busy.emplace_back([&stop] {
      while (!stop.load(std::memory_order_relaxed)) {}
    });
  expect(comes_to(1), [] { return "a team waits for its threads among busy programs"; });
  stop = true;
  for (std::thread& thread : busy) thread.join();
  expect(comes_to(2), [] { return "a team stays small for ever"; });
}

// A child has its parent's programs and threads of its own.
void children_run(int threads) {
  gsm::set_team_threads(threads);
  Block<float> in(kCapacity), out(kCapacity);
  gsm::Program program(kCapacity);
  record_blurs(program, in, out);
  in.fill(2);
  program.run(kCapacity);
  const Block<float> want = out.copy(0, kCapacity);
  std::fflush(stdout);
  const pid_t child = fork();
  if (child == 0) {
    in.fill(2);
    program.run(kCapacity);
    _exit(check::same(out, want) ? 0 : 1);
  }
  int status = -1;
  waitpid(child, &status, 0);
  expect(WIFEXITED(status) && WEXITSTATUS(status) == 0, [] { return "a forked child cannot replay"; });
  in.fill(2);
  program.run(kCapacity);
  expect(check::same(out, want), [] { return "the parent cannot replay after a fork"; });
}

}  // namespace

void program_cases(bool team_only) {
  replay_is_the_same_on_any_team();
  exceptions_reach_the_caller();
  inside_an_op_calls_run_alone();
  callers_take_turns();
  expect(broken_promises == 0, [] { return "an op saw another number of threads than it was told"; });
  sleepers_wake();
  busy_cores_make_the_team_smaller();
  wrong_use_is_refused();
  // ThreadSanitizer does not support threads in the child of a process that had threads.
  if (!team_only)
    for (int threads : {1, 3}) children_run(threads);
}
