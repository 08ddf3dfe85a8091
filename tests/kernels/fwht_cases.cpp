// The fast Walsh-Hadamard transform against sums over the entries of the matrix, on rows of exactly their size.
#include "fwht.h"

#include <cmath>

#include "check.h"
#include "team.h"

namespace {

using check::Block;

// Entry (i, j) of the matrix, unscaled.
int entry(const gsm::Hadamard& h, int64_t i, int64_t j) {
  const int64_t row = i / h.power, column = j / h.power;
  const int outer = h.k == 1 ? 1 : h.rows[static_cast<size_t>(row * (h.k / 4) + column / 4)] >> column % 4 & 1 ? -1 : 1;
  return std::popcount(static_cast<uint64_t>(i % h.power & j % h.power)) % 2 ? -outer : outer;
}

void transform(int64_t rows, int64_t width, int64_t order, bool use_signs, bool transpose, check::Random& random) {
  const gsm::Hadamard* h = gsm::hadamard(order);
  check::expect(h != nullptr, [&] { return "no matrix of order " + std::to_string(order); });
  if (!h) return;
  Block<float> x(rows * width), signs(width);
  for (int64_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(random.below(2001) - 1000);
  for (int64_t i = 0; i < width; ++i) signs[i] = random.below(2) ? 1.0f : -1.0f;
  Block<float> want(rows * width);
  for (int64_t at = 0; at < rows * width; ++at) {
    const int64_t column = at % width, base = at - column % order, i = column % order;
    int64_t total = 0;
    for (int64_t j = 0; j < order; ++j) {
      const int sign = use_signs && !transpose && signs[base % width + j] < 0 ? -1 : 1;
      total += sign * static_cast<int64_t>(x[base + j]) * (transpose ? entry(*h, j, i) : entry(*h, i, j));
    }
    want[at] = static_cast<float>(total) * h->scale;
    if (use_signs && transpose) want[at] *= signs[column];
  }
  for (gsm::Level level : gsm::supported_levels())
    for (int threads : {1, 3}) {
      gsm::set_level(gsm::level_name(level));
      gsm::set_team_threads(threads);
      Block<float> y = x.copy(0, x.size());
      check::fresh([&] { gsm::fwht(y.data(), rows, width, *h, use_signs ? signs.data() : nullptr, transpose); });
      check::expect(check::same(y, want), [&] {
        return "fwht [" + std::to_string(rows) + ", " + std::to_string(width) + "] of order " + std::to_string(order) +
               " at " + gsm::level_name(level) + ", " + std::to_string(threads) + " threads";
      });
    }
}

}  // namespace

void fwht_cases(bool team_only) {
  check::Random random(9);
  transform(130, 512, 256, true, false, random);
  if (team_only) return;
  for (int64_t order : {2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 12, 24, 48, 96, 192, 20, 28, 36, 72, 144, 576, 164})
    for (int mode = 0; mode < 4; ++mode)
      transform(2, order <= 64 ? 3 * order : order, order, mode & 1, mode & 2, random);
  for (int64_t order : {0, 1, 3, 6, 14, 52, 172, -2})
    check::expect(gsm::hadamard(order) == nullptr, [&] { return "a matrix of order " + std::to_string(order); });
}
