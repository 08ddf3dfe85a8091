#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <list>
#include <optional>
#include <vector>

#include "bind.h"
#include "fwht.h"
#include "planes.h"

namespace nb = nanobind;
using namespace nb::literals;
using gsm::Array;
using gsm::Buffer;
using gsm::refuse;

namespace {

void fwht(nb::handle x_, int64_t block, nb::handle signs_, bool transpose) {
  const Array<float> x(x_, "x");
  x.need_dims(2);
  const int64_t width = x.size(1);
  const gsm::Hadamard* h = gsm::hadamard(block);
  if (!h)
    refuse("a Hadamard transform of " + std::to_string(block) + " columns is not available; choose a block from 2 to " +
           std::to_string(gsm::kMaxHadamard) + " that is a power of two, or one times 12, 20, 28, 36 or another Paley "
           "order up to " + std::to_string(gsm::kMaxPaley));
  if (width % block)
    refuse("x has " + std::to_string(width) + " columns, no multiple of the block " + std::to_string(block));
  std::optional<Array<const float>> signs;
  if (!signs_.is_none()) {
    signs.emplace(signs_, "signs");
    signs->need_shape({width});
    for (int64_t i = 0; i < width; ++i)
      if (const float d = signs->data()[i]; d != 1.0f && d != -1.0f)
        refuse("signs[" + std::to_string(i) + "] is " + std::to_string(d) + "; each sign must be 1 or -1");
  }
  nb::gil_scoped_release free;
  gsm::fwht(x.data(), x.size(0), width, *h, signs ? signs->data() : nullptr, transpose);
}

struct PathName {
  const char* name;
  gsm::PlanesPath path;
};
constexpr PathName kPaths[] = {{"mask", gsm::PlanesPath::mask},
                               {"lookup", gsm::PlanesPath::lookup},
                               {"popcount", gsm::PlanesPath::popcount},
                               {"vpopcnt", gsm::PlanesPath::vpopcnt}};

// The arguments that planes_linear and planes_sums share, checked.
struct PlanesCall {
  gsm::Planes w;
  std::list<Buffer> held;  // a Buffer stays where it was made
  Buffer x;
  gsm::PlanesPath path;

  PlanesCall(nb::list planes, int64_t rows, int64_t cols, int64_t group, nb::handle x_, const std::string& name)
      : x(x_, "x", false) {
    const auto bits = static_cast<int64_t>(planes.size());
    if (bits < 1 || bits > 8) refuse("planes holds " + std::to_string(bits) + " arrays; give one a bit, from 1 to 8");
    if (rows < 1 || cols < 1 || rows > INT32_MAX || cols > INT32_MAX)
      refuse("a matrix of " + std::to_string(rows) + " x " + std::to_string(cols) +
             " cannot be multiplied; both must lie between 1 and 2147483647");
    if (group < 16 || group % 16 || group > gsm::kMaxPlanesGroup)
      refuse("group is " + std::to_string(group) + "; it must be a multiple of 16 from 16 to " +
             std::to_string(gsm::kMaxPlanesGroup));
    w.rows = rows;
    w.cols = cols;
    w.group = group;
    w.bits = static_cast<int>(bits);
    for (int i = 0; i < w.bits; ++i) {
      const Buffer& plane = held.emplace_back(planes[static_cast<size_t>(i)], "a plane", false);
      const int64_t need = w.plane_bytes(), padded = (need + 63) / 64 * 64;
      if (plane.format() != 'B') refuse("planes must hold uint8 values");
      if (plane.dims() != 1 || (plane.size(0) != need && plane.size(0) != padded))
        refuse("plane " + std::to_string(i) + " has the shape " + plane.shape() + "; " + std::to_string(rows) + " x " +
               std::to_string(cols) + " bits take [" + std::to_string(padded) + "]");
      w.plane[i] = static_cast<const uint8_t*>(plane.data());
    }
    if (x.format() != 'b') refuse("x must hold int8 values");
    x.need_dims(2);
    x.need_shape({x.size(0), cols});
    bool known = name == "auto";
    for (const PathName& p : kPaths)
      if (name == p.name) {
        path = p.path;
        known = true;
        if (!gsm::planes_path_runs(path))
          refuse("the path '" + name + "' needs an instruction that this machine or level lacks; choose auto or mask");
      }
    if (!known) refuse("the path '" + name + "' is unknown; it must be auto, mask, lookup, popcount or vpopcnt");
    if (name == "auto")
      path = gsm::planes_best_path(w.bits, x.size(0), gsm::planes_of(values(), x.count()));
  }
  const int8_t* values() const { return static_cast<const int8_t*>(x.data()); }
};

void planes_linear(nb::list planes, int64_t rows, int64_t cols, int64_t group, nb::handle scales_, int zero, int step,
                   nb::handle x_, nb::handle x_scale_, nb::handle out_, const std::string& path) {
  PlanesCall call(planes, rows, cols, group, x_, path);
  const int64_t tokens = call.x.size(0);
  const Array<const float> scales(scales_, "scales"), x_scale(x_scale_, "x_scale");
  const Array<float> out(out_, "out");
  if (scales.dims() != 1 || scales.size(0) < call.w.panels() * call.w.groups() * 16)
    refuse("scales has the shape " + scales.shape() + "; it must have at least [" +
           std::to_string(call.w.panels() * call.w.groups() * 16) + "]: panels x groups x 16");
  if (step != 1 && step != 2) refuse("step is " + std::to_string(step) + "; it must be 1 or 2");
  if (const int most = step * ((1 << call.w.bits) - 1); zero < 0 || zero > most)
    refuse("zero is " + std::to_string(zero) + "; it must lie between 0 and " + std::to_string(most));
  x_scale.need_shape({tokens});
  out.need_shape({tokens, rows});
  call.w.scales = scales.data();
  call.w.zero = zero;
  call.w.step = step;
  nb::gil_scoped_release free;
  gsm::planes_linear(call.w, call.path, call.values(), x_scale.data(), tokens, out.data());
}

void planes_sums(nb::list planes, int64_t rows, int64_t cols, int64_t group, nb::handle x_, nb::handle out_,
                 const std::string& path) {
  PlanesCall call(planes, rows, cols, group, x_, path);
  const Array<int32_t> out(out_, "out");
  out.need_shape({call.x.size(0), call.w.panels(), call.w.groups(), 16});
  nb::gil_scoped_release free;
  gsm::planes_sums(call.w, call.path, call.values(), call.x.size(0), out.data());
}

std::vector<std::string> planes_paths() {
  std::vector<std::string> names;
  for (const PathName& p : kPaths)
    if (gsm::planes_path_runs(p.path)) names.emplace_back(p.name);
  return names;
}

}  // namespace

void bind_transforms(nb::module_& m) {
  m.def("fwht", &fwht, "x"_a, "block"_a, "signs"_a.none() = nb::none(), "transpose"_a = false);
  m.def("planes_linear", &planes_linear, "planes"_a, "rows"_a, "cols"_a, "group"_a, "scales"_a, "zero"_a, "step"_a,
        "x"_a, "x_scale"_a, "out"_a, "path"_a = "auto");
  m.def("planes_sums", &planes_sums, "planes"_a, "rows"_a, "cols"_a, "group"_a, "x"_a, "out"_a, "path"_a = "auto");
  m.def("planes_paths", &planes_paths);
}
