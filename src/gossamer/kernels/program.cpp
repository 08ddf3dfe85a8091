#include "program.h"

#include <stdexcept>
#include <string>


namespace gsm {
namespace {

thread_local Program* t_program = nullptr;

[[noreturn]] void refuse(const std::string& sentence) { throw std::invalid_argument(sentence); }

}  // namespace

Program* recorded_program() { return t_program; }

Program::Program(int64_t capacity) : capacity_(capacity) {
  if (capacity < 1 || capacity > INT32_MAX) refuse("a program needs a capacity from 1 to 2147483647 tokens");
}

Program::~Program() {
  if (t_program == this) t_program = nullptr;
}

bool Program::recording() const { return state_ == State::recording; }

void Program::begin() {
  if (t_program) refuse("another program is being recorded; end that recording first");
  if (state_ != State::empty) refuse("a program is recorded once; make a new one");
  state_ = State::recording;
  t_program = this;
}

void Program::end(bool complete) {
  if (t_program != this) refuse("this program is not being recorded by this thread");
  t_program = nullptr;
  state_ = complete ? State::ready : State::broken;
  if (!complete) {
    steps_.clear();
    ops_.clear();
  }
}

void Program::add(std::unique_ptr<Op> op, int64_t rows) {
  if (rows < capacity_ || rows % capacity_)
    refuse("an operation on " + std::to_string(rows) + " rows cannot be recorded in a program of " +
           std::to_string(capacity_) + " tokens; give it arrays of that many rows, or of a multiple");
  steps_.push_back({op.get(), rows / capacity_});
  ops_.push_back(std::move(op));
}

void Program::run(int64_t tokens) {
  if (state_ == State::recording || t_program) refuse("a program cannot run while one is being recorded");
  if (state_ == State::empty) refuse("the program is empty; record it first");
  if (state_ == State::broken) refuse("the program's recording failed; record a new one");
  if (tokens < 0 || tokens > capacity_)
    refuse("the program was recorded for up to " + std::to_string(capacity_) + " tokens and cannot run " +
           std::to_string(tokens));
  if (tokens == 0) return;
  const Turn turn;
  for (const Step& step : steps_) step.op->check(tokens * step.rows_per_token);
  team_steps(steps_.data(), steps_.size(), tokens);
}

void submit(std::unique_ptr<Op> op, int64_t rows) {
  if (t_program) {
    t_program->add(std::move(op), rows);
  } else {
    run_now(*op, rows);
  }
}

}  // namespace gsm
