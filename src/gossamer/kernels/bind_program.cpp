#include "program.h"

#include <nanobind/nanobind.h>

#include <string>
#include <vector>

#include "bind.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

// A program and the Python objects that its ops point into.
class Recorded {
 public:
  explicit Recorded(int64_t capacity) : program_(capacity) {}
  ~Recorded();

  void begin();
  void end(bool complete);
  void keep(nb::handle object) {
    // A view also stops whoever owns the memory (an array.array, a bytearray) from moving it.
    PyObject* held = PyObject_CheckBuffer(object.ptr()) ? PyMemoryView_FromObject(object.ptr()) : nullptr;
    if (!held) PyErr_Clear();
    kept_.push_back(held ? nb::steal(held) : nb::borrow(object));
  }
  gsm::Program& program() { return program_; }

 private:
  gsm::Program program_;
  std::vector<nb::object> kept_;
};

thread_local Recorded* t_recorded = nullptr;

Recorded::~Recorded() {
  if (t_recorded == this) t_recorded = nullptr;
}

void Recorded::begin() {
  program_.begin();
  t_recorded = this;
}

void Recorded::end(bool complete) {
  program_.end(complete);
  t_recorded = nullptr;
  if (!complete) kept_.clear();
}

}  // namespace

void gsm::keep_if_recording(nb::handle object) {
  if (t_recorded) t_recorded->keep(object);
}

void gsm::refuse_if_recording(const char* name) {
  if (t_recorded) gsm::refuse(std::string(name) + " cannot be recorded in a program; call it outside of the recording");
}

void bind_program(nb::module_& m) {
  nb::class_<Recorded>(m, "Program")
      .def(nb::init<int64_t>(), "capacity"_a)
      .def("begin", &Recorded::begin)
      .def("end", &Recorded::end, "complete"_a)
      .def("run", [](Recorded& r, int64_t tokens) {
        nb::gil_scoped_release free;
        r.program().run(tokens);
      }, "tokens"_a)
      .def_prop_ro("capacity", [](Recorded& r) { return r.program().capacity(); })
      .def("__len__", [](Recorded& r) { return r.program().size(); });
}
