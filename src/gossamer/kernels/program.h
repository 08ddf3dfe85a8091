// A recorded list of ops over arrays at fixed addresses, which the team replays for any number of tokens up to a
// capacity.
#pragma once
#include <cstdint>
#include <memory>
#include <vector>

#include "op.h"

namespace gsm {

class Program {
 public:
  explicit Program(int64_t capacity);  // tokens, at least 1
  ~Program();
  Program(const Program&) = delete;
  Program& operator=(const Program&) = delete;

  // From begin to end, ops that this thread submits are appended here. Throws std::invalid_argument when the thread
  // records already, and when the program has been recorded before.
  void begin();
  // Ends the recording. When it failed, the ops are dropped and the program cannot run.
  void end(bool complete);
  bool recording() const;

  void add(std::unique_ptr<Op> op, int64_t rows);

  // Checks the step inputs, then runs everything for the first `tokens` (0..capacity) tokens. Allocates nothing.
  // One run at a time: the arrays are shared.
  void run(int64_t tokens);

  int64_t capacity() const { return capacity_; }
  int64_t size() const { return static_cast<int64_t>(ops_.size()); }

 private:
  enum class State { empty, recording, ready, broken };
  const int64_t capacity_;
  State state_ = State::empty;
  std::vector<std::unique_ptr<Op>> ops_;
  std::vector<Step> steps_;
};

// The program that the calling thread records, or null.
Program* recorded_program();

}  // namespace gsm
