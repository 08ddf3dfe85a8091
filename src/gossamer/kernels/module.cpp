// The compiled module: binds each kernel family. Only gossamer.ops imports it.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "isa.h"
#include "team.h"

namespace nb = nanobind;

void bind_linear(nb::module_& m);
void bind_rows(nb::module_& m);
void bind_attention(nb::module_& m);
void bind_transforms(nb::module_& m);
void bind_program(nb::module_& m);

NB_MODULE(_kernels, m) {
  m.def("isa_supported", [] {
    std::vector<std::string> names;
    for (gsm::Level level : gsm::supported_levels()) names.push_back(gsm::level_name(level));
    return names;
  });
  m.def("isa", [] { return std::string(gsm::level_name(gsm::current_level())); });
  m.def("set_isa", &gsm::set_level, nb::arg("name"));
  m.def("threads", &gsm::team_threads);
  m.def("set_threads", &gsm::set_team_threads, nb::arg("n"));
  bind_linear(m);
  bind_rows(m);
  bind_attention(m);
  bind_transforms(m);
  bind_program(m);
}
