#include <optional>

#include "bind.h"
#include "fwht.h"

namespace nb = nanobind;
using namespace nb::literals;
using gsm::Array;
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

}  // namespace

void bind_transforms(nb::module_& m) {
  m.def("fwht", &fwht, "x"_a, "block"_a, "signs"_a.none() = nb::none(), "transpose"_a = false);
}
