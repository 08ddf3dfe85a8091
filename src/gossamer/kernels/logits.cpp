#include "logits.h"

#include <cmath>
#include <cstring>
#include <limits>

#include "simd.h"
#include "team.h"

namespace gsm::GSM_LEVEL {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();

// Eight doubles; the compiler splits them into what the level has. Only products, sums and comparisons are used,
// each rounded once, so every level gives the same bits.
typedef double f64x8 __attribute__((vector_size(64)));
typedef float floats8 __attribute__((vector_size(32)));
typedef int64_t i64x8 __attribute__((vector_size(64)));

struct Doubles {
  f64x8 v;
};

inline void set(Doubles& a, double x) { a.v = f64x8{x, x, x, x, x, x, x, x}; }

// Lanes n.. are -infinity, whose exponential is zero.
inline void read(Doubles& a, const float* p, int64_t n) {
  floats8 lanes = {-kInf, -kInf, -kInf, -kInf, -kInf, -kInf, -kInf, -kInf};
  if (n >= 8) {
    std::memcpy(&lanes, p, sizeof lanes);
  } else {
    std::memcpy(&lanes, p, static_cast<size_t>(n) * sizeof(float));
  }
  a.v = __builtin_convertvector(lanes, f64x8);
}

inline double total(const Doubles& a) {
  return ((a.v[0] + a.v[4]) + (a.v[2] + a.v[6])) + ((a.v[1] + a.v[5]) + (a.v[3] + a.v[7]));
}

// e^x for x <= 0 to about one unit in the last place; zero below -708; NaN stays NaN.
inline void exp_in_place(Doubles& a) {
  // Adding 1.5 * 2^52 rounds to an integer k, which then sits in the low bits of the sum.
  const double magic = 0x1.8p52;
  const f64x8 x = a.v;
  const f64x8 shifted = x * 0x1.71547652b82fep0 + magic;
  const f64x8 k = shifted - magic;
  const f64x8 r = (x - k * 0x1.62e42fefa3000p-1) - k * 0x1.3de6af278ece6p-42;
  f64x8 p = r * (1.0 / 6227020800.0) + (1.0 / 479001600.0);
  p = p * r + (1.0 / 39916800.0);
  p = p * r + (1.0 / 3628800.0);
  p = p * r + (1.0 / 362880.0);
  p = p * r + (1.0 / 40320.0);
  p = p * r + (1.0 / 5040.0);
  p = p * r + (1.0 / 720.0);
  p = p * r + (1.0 / 120.0);
  p = p * r + (1.0 / 24.0);
  p = p * r + (1.0 / 6.0);
  p = p * r + 0.5;
  p = p * r + 1.0;
  p = p * r + 1.0;
  const i64x8 scaled = reinterpret_cast<i64x8>(p) + (reinterpret_cast<i64x8>(shifted) << 52);
  f64x8 y = reinterpret_cast<f64x8>(scaled);
  y = x < -708.0 ? f64x8{} : y;
  a.v = x == x ? y : x;
}

int64_t first_at_least(const float* x, int64_t n, float threshold) {
  for (int64_t i = 0; i < n; i += 16) {
    const f32x16 v = load_first(x + i, static_cast<int>(n - i < 16 ? n - i : 16), -kInf);
    const uint32_t mask = mask_at_least(v, set1(threshold));
    if (mask) return i + __builtin_ctz(mask);
  }
  return n;  // NaN threshold
}

void divergence_row(const float* base, const float* other, double* kl, uint8_t* same_top, int64_t vocab) {
  const float top_base = row_max(base, vocab), top_other = row_max(other, vocab);
  *same_top = first_at_least(base, vocab, top_base) == first_at_least(other, vocab, top_other) && top_base == top_base;
  Doubles sum_base, sum_other, cross, b, o, mb, mo;
  set(sum_base, 0.0);
  set(sum_other, 0.0);
  set(cross, 0.0);
  set(mb, top_base);
  set(mo, top_other);
  for (int64_t i = 0; i < vocab; i += 8) {
    read(b, base + i, vocab - i);
    read(o, other + i, vocab - i);
    b.v -= mb.v;
    o.v -= mo.v;
    const f64x8 difference = b.v - o.v;
    exp_in_place(b);
    exp_in_place(o);
    sum_base.v += b.v;
    sum_other.v += o.v;
    // Where the base has no mass the term is zero, even against a -infinity.
    cross.v += b.v == 0.0 ? f64x8{} : b.v * difference;
  }
  const double zb = total(sum_base), zo = total(sum_other);
  const double value = total(cross) / zb - (std::log(zb) - std::log(zo));
  *kl = value < 0.0 ? 0.0 : value;  // rounding alone can make it negative
}

}  // namespace

float row_max(const float* x, int64_t n) {
  f32x16 top = set1(-kInf);
  uint32_t numbers = 0xFFFF;
  for (int64_t i = 0; i < n; i += 16) {
    const f32x16 v = load_first(x + i, static_cast<int>(n - i < 16 ? n - i : 16), -kInf);
    numbers &= mask_at_least(v, set1(-kInf));  // false for NaN alone
    top = max(top, v);
  }
  return numbers == 0xFFFF ? max(top) : std::numeric_limits<float>::quiet_NaN();
}

double sum_exp(const float* x, int64_t n, double top, double factor) {
  Doubles sum, v;
  set(sum, 0.0);
  for (int64_t i = 0; i < n; i += 8) {
    read(v, x + i, n - i);
    v.v = (v.v - top) * factor;
    exp_in_place(v);
    sum.v += v.v;
  }
  return total(sum);
}

int64_t gather_at_least(const float* x, int64_t n, float threshold, int32_t first, Candidate* out) {
  int64_t count = 0;
  for (int64_t i = 0; i < n; i += 16) {
    const int lane = static_cast<int>(n - i < 16 ? n - i : 16);
    uint32_t mask = mask_at_least(load_first(x + i, lane, -kInf), set1(threshold));
    if (lane < 16) mask &= (1u << lane) - 1;  // a threshold of -infinity also matches the fill
    for (; mask; mask &= mask - 1) {
      const int64_t at = i + __builtin_ctz(mask);
      out[count++] = {x[at], static_cast<int32_t>(first + at)};
    }
  }
  return count;
}

void nll(const float* logits, const int32_t* targets, double* out, int64_t rows, int64_t vocab) {
  team_share(rows, rows * vocab * 8, [=](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m) {
      const float* x = logits + m * vocab;
      const double top = row_max(x, vocab);
      out[m] = std::log(sum_exp(x, vocab, top, 1.0)) + (top - static_cast<double>(x[targets[m]]));
    }
  });
}

void divergence(const float* base, const float* other, double* kl, uint8_t* same_top, int64_t rows, int64_t vocab) {
  team_share(rows, rows * vocab * 16, [=](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m)
      divergence_row(base + m * vocab, other + m * vocab, kl + m, same_top + m, vocab);
  });
}

}  // namespace gsm::GSM_LEVEL
