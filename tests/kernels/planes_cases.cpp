// Products with bit planes against sums over single bits, every array of exactly its size.
#include "planes.h"

#include <functional>
#include <vector>

#include "check.h"
#include "team.h"

namespace {

using check::Block;

void multiply(int bits, int64_t rows, int64_t cols, int64_t group, int64_t tokens, int x_bits, check::Random& random) {
  gsm::Planes w;
  w.rows = rows;
  w.cols = cols;
  w.group = group;
  w.bits = bits;
  w.zero = 1;
  w.step = 2;
  const int64_t panels = w.panels(), groups = w.groups();
  std::vector<Block<uint8_t>> planes;  // noise past the last column, which must not matter
  for (int b = 0; b < bits; ++b) {
    Block<uint8_t>& plane = planes.emplace_back(w.plane_bytes());
    for (int64_t i = 0; i < plane.size(); ++i) plane[i] = static_cast<uint8_t>(random.bits());
    w.plane[b] = plane.data();
  }
  Block<float> scales(panels * groups * 16), x_scale(tokens);
  for (int64_t i = 0; i < scales.size(); ++i) scales[i] = random.uniform(0.5f, 2.0f);
  for (int64_t i = 0; i < tokens; ++i) x_scale[i] = random.uniform(0.5f, 2.0f);
  w.scales = scales.data();
  Block<int8_t> x(tokens * cols);
  for (int64_t i = 0; i < x.size(); ++i)
    x[i] = static_cast<int8_t>(random.below(int64_t{1} << x_bits) - (int64_t{1} << (x_bits - 1)));

  Block<int32_t> want(tokens * panels * groups * 16);
  Block<double> product(tokens * rows), size(tokens * rows);
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t row = 0; row < panels * 16; ++row)
      for (int64_t k = 0; k < cols; ++k) {
        int code = 0;
        for (int b = 0; b < bits; ++b) {
          const int64_t at = ((row / 16 * w.blocks() + k / 16) * 4 + k % 16 / 4) * 64 + row % 16 * 4 + k % 4;
          code |= (planes[static_cast<size_t>(b)][at / 8] >> at % 8 & 1) << b;
        }
        const int64_t place = (row / 16 * groups + k / group) * 16 + row % 16;
        want[t * panels * groups * 16 + place] += code * x[t * cols + k];
        if (row >= rows) continue;
        const double term = static_cast<double>(w.step * code - w.zero) * x[t * cols + k] * scales[place] * x_scale[t];
        product[t * rows + row] += term;
        size[t * rows + row] += std::fabs(term);
      }

  Block<float> first;
  for (gsm::Level level : gsm::supported_levels())
    for (gsm::PlanesPath path : {gsm::PlanesPath::mask, gsm::PlanesPath::lookup, gsm::PlanesPath::popcount,
                                 gsm::PlanesPath::vpopcnt})
      for (int threads : {1, 3}) {
        gsm::set_level(gsm::level_name(level));
        if (!gsm::planes_path_runs(path)) continue;
        gsm::set_team_threads(threads);
        const auto what = [&] {
          return "planes " + std::to_string(bits) + " bits [" + std::to_string(rows) + ", " + std::to_string(cols) +
                 "] groups of " + std::to_string(group) + ", " + std::to_string(tokens) + " tokens, path " +
                 std::to_string(static_cast<int>(path)) + " at " + gsm::level_name(level);
        };
        Block<int32_t> sums(want.size());
        Block<float> y(tokens * rows);
        check::fresh([&] {
          gsm::planes_sums(w, path, x.data(), tokens, sums.data());
          gsm::planes_linear(w, path, x.data(), x_scale.data(), tokens, y.data());
        });
        bool exact = true, near = true;
        for (int64_t i = 0; i < want.size(); ++i) exact = exact && sums[i] == want[i];
        for (int64_t i = 0; i < y.size(); ++i) near = near && std::fabs(y[i] - product[i]) <= 1e-6 * size[i];
        check::expect(exact, [&] { return what() + ": the integers differ"; });
        check::expect(near, [&] { return what() + ": the product differs"; });
        if (first.size() == 0 || path == gsm::PlanesPath::mask) first = y.copy(0, y.size());
        check::expect(check::same(y, first), [&] { return what() + ": the bits differ from another path's"; });
      }
}

}  // namespace

void planes_cases(bool team_only) {
  check::Random random(11);
  multiply(2, 200, 128, 64, 9, 8, random);
  if (team_only) return;
  for (int bits = 1; bits <= 8; ++bits)
    for (int64_t cols : {1, 15, 65, 144})
      multiply(bits, bits % 2 ? 17 : 48, cols, bits % 3 ? 32 : 80, 6, bits % 2 ? 4 : 8, random);
  for (int64_t tokens : {1, 4, 16, 21}) multiply(3, 20, 1100, 1040, tokens, 7, random);
  for (int x_bits = 1; x_bits <= 8; ++x_bits) multiply(1, 33, 100, 48, 2, x_bits, random);
}
