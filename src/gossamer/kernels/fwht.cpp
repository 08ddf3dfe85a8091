// Butterflies of the fast Walsh-Hadamard transform: see fwht.h. Compiled once per level.
//
// The first pass over a block takes up to 128 columns into registers: strides 1 to 8 lie inside a vector, 16 to 64
// between vectors. Each later pass joins 2 or 3 strides (radix 4 and 8), so that 4096 columns take 3 passes over the
// first-level cache. H_K then runs across the K rows of the block: the 16 signed sums of each four rows are made once,
// and each of the K outputs adds one of them a four (the four Russians' method).
#include "fwht.h"

#include <algorithm>

#include "simd.h"
#include "team.h"

namespace gsm::GSM_LEVEL {
namespace {

// One butterfly inside a vector: lanes j and j + H, for j with bit H clear, become their sum and their difference.
#if defined(__AVX512F__)

template <int H> inline __m512 partner(__m512 v) {
  if constexpr (H == 8) return _mm512_shuffle_f32x4(v, v, 0x4E);
  else if constexpr (H == 4) return _mm512_shuffle_f32x4(v, v, 0xB1);
  else if constexpr (H == 2) return _mm512_permute_ps(v, 0x4E);
  else return _mm512_permute_ps(v, 0xB1);
}
template <int H> inline f32x16 butterfly(f32x16 a) {
  constexpr __mmask16 upper = H == 8 ? 0xFF00 : H == 4 ? 0xF0F0 : H == 2 ? 0xCCCC : 0xAAAA;
  const __m512 sign = _mm512_mask_blend_ps(upper, _mm512_set1_ps(1.0f), _mm512_set1_ps(-1.0f));
  return {_mm512_fmadd_ps(a.v, sign, partner<H>(a.v))};  // a product with +-1 is exact: this rounds as an addition
}

#elif defined(__AVX2__)

template <int H> inline __m256 butterfly8(__m256 v) {
  __m256 other;
  if constexpr (H == 4) other = _mm256_permute2f128_ps(v, v, 1);
  else if constexpr (H == 2) other = _mm256_permute_ps(v, 0x4E);
  else other = _mm256_permute_ps(v, 0xB1);
  constexpr int upper = H == 4 ? 0xF0 : H == 2 ? 0xCC : 0xAA;
  const __m256 sign = _mm256_blend_ps(_mm256_set1_ps(1.0f), _mm256_set1_ps(-1.0f), upper);
  return _mm256_fmadd_ps(v, sign, other);
}
template <int H> inline f32x16 butterfly(f32x16 a) {
  if constexpr (H == 8) return {_mm256_add_ps(a.lo, a.hi), _mm256_sub_ps(a.lo, a.hi)};
  else return {butterfly8<H>(a.lo), butterfly8<H>(a.hi)};
}

#else

template <int H> inline f32x16 butterfly(f32x16 a) {
  for (int j = 0; j < 16; ++j)
    if (!(j & H)) {
      const float p = a.v[j], q = a.v[j + H];
      a.v[j] = p + q;
      a.v[j + H] = p - q;
    }
  return a;
}

#endif

// The strides 1, 2, ... below 2^Stages.
template <int Stages> inline f32x16 inside(f32x16 a) {
  if constexpr (Stages >= 1) a = butterfly<1>(a);
  if constexpr (Stages >= 2) a = butterfly<2>(a);
  if constexpr (Stages >= 3) a = butterfly<4>(a);
  if constexpr (Stages >= 4) a = butterfly<8>(a);
  return a;
}

template <int R> inline void between(f32x16* v) {
#pragma GCC unroll 4
  for (int h = 1; h < R; h *= 2) {
#pragma GCC unroll 8
    for (int j = 0; j < R; ++j)
      if (!(j & h)) {
        const f32x16 a = v[j], b = v[j + h];
        v[j] = a + b;
        v[j + h] = a - b;
      }
  }
}

// Strides 1 to 8 R over n columns, a multiple of 16 R. `signs` may be null; scaled when `scale` is not 1.
template <int R> void first_pass(float* x, int64_t n, const float* signs, float scale) {
  for (int64_t at = 0; at < n; at += 16 * R) {
    f32x16 v[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      v[r] = load(x + at + 16 * r);
      if (signs) v[r] = v[r] * load(signs + at + 16 * r);
      v[r] = inside<4>(v[r]);
    }
    between<R>(v);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) store(x + at + 16 * r, scale == 1.0f ? v[r] : v[r] * set1(scale));
  }
}

// Blocks of 2, 4 or 8 columns; n is any multiple of them.
template <int Stages> void short_blocks(float* x, int64_t n, const float* signs, float scale) {
  for (int64_t at = 0; at < n; at += 16) {
    const int count = static_cast<int>(std::min<int64_t>(16, n - at));
    f32x16 v = load_first(x + at, count);
    if (signs) v = v * load_first(signs + at, count);
    v = inside<Stages>(v);
    store_first(x + at, scale == 1.0f ? v : v * set1(scale), count);
  }
}

// Strides h, 2h, ... below R h over n columns, a multiple of R h.
template <int R> void pass(float* x, int64_t n, int64_t h, float scale) {
  for (int64_t base = 0; base < n; base += R * h)
    for (int64_t j = base; j < base + h; j += 16) {
      f32x16 v[R];
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) v[r] = load(x + j + r * h);
      between<R>(v);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) store(x + j + r * h, scale == 1.0f ? v[r] : v[r] * set1(scale));
    }
}

// H_power on each `power` columns of the n; the last pass multiplies by `scale`.
void sylvester(float* x, int64_t n, int64_t power, const float* signs, float scale) {
  switch (power) {
    case 1: return short_blocks<0>(x, n, signs, scale);
    case 2: return short_blocks<1>(x, n, signs, scale);
    case 4: return short_blocks<2>(x, n, signs, scale);
    case 8: return short_blocks<3>(x, n, signs, scale);
    case 16: return first_pass<1>(x, n, signs, scale);
    case 32: return first_pass<2>(x, n, signs, scale);
    case 64: return first_pass<4>(x, n, signs, scale);
    case 128: return first_pass<8>(x, n, signs, scale);
    default: break;
  }
  first_pass<8>(x, n, signs, 1.0f);
  for (int64_t h = 128; h < power;) {
    const int64_t left = power / h;
    const int radix = left == 2 ? 2 : left == 4 || left == 16 ? 4 : 8;
    const float factor = left == radix ? scale : 1.0f;
    if (radix == 2) pass<2>(x, n, h, factor);
    else if (radix == 4) pass<4>(x, n, h, factor);
    else pass<8>(x, n, h, factor);
    h *= radix;
  }
}

// x [k, power] = scale * H_k x, with the rows of H_k as bits (see Hadamard).
void across(float* x, const Hadamard& h, const std::vector<uint8_t>& bits) {
  alignas(64) float sums[kMaxPaley / 4][16][16];  // [four rows][which are negated][lane]
  const int groups = h.k / 4;
  const f32x16 scale = set1(h.scale);
  for (int64_t j = 0; j < h.power; j += 16) {
    const int count = static_cast<int>(std::min<int64_t>(16, h.power - j));
    for (int g = 0; g < groups; ++g) {
      const float* row = x + 4 * g * h.power + j;
      const f32x16 a = load_first(row, count), b = load_first(row + h.power, count);
      const f32x16 c = load_first(row + 2 * h.power, count), d = load_first(row + 3 * h.power, count);
      const f32x16 front[4] = {a + b, b - a, a - b, -(a + b)}, back[4] = {c + d, d - c, c - d, -(c + d)};
#pragma GCC unroll 16
      for (int s = 0; s < 16; ++s) store(sums[g][s], front[s % 4] + back[s / 4]);
    }
    for (int i = 0; i < h.k; i += 4) {
      const uint8_t* which = bits.data() + i * groups;
      f32x16 y[4];
#pragma GCC unroll 4
      for (int r = 0; r < 4; ++r) y[r] = load(sums[0][which[r * groups]]);
      for (int g = 1; g < groups; ++g) {
#pragma GCC unroll 4
        for (int r = 0; r < 4; ++r) y[r] = y[r] + load(sums[g][which[r * groups + g]]);
      }
#pragma GCC unroll 4
      for (int r = 0; r < 4; ++r) store_first(x + (i + r) * h.power + j, y[r] * scale, count);
    }
  }
}

}  // namespace

void fwht_row(float* x, int64_t width, const Hadamard& h, const float* signs, bool transpose) {
  const float* before = transpose ? nullptr : signs;
  if (h.k == 1 && h.power <= 128) {
    sylvester(x, width, h.power, before, h.scale);
  } else {
    for (int64_t at = 0; at < width; at += h.order) {
      sylvester(x + at, h.order, h.power, before ? before + at : nullptr, h.k == 1 ? h.scale : 1.0f);
      if (h.k > 1) across(x + at, h, transpose ? h.columns : h.rows);
    }
  }
  if (!transpose || !signs) return;
  for (int64_t at = 0; at < width; at += 16) {
    const int count = static_cast<int>(std::min<int64_t>(16, width - at));
    store_first(x + at, load_first(x + at, count) * load_first(signs + at, count), count);
  }
}

void fwht(float* x, int64_t rows, int64_t width, const Hadamard& h, const float* signs, bool transpose) {
  team_share(rows, rows * width * 2, [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m) GSM_LEVEL::fwht_row(x + m * width, width, h, signs, transpose);
  });
}

}  // namespace gsm::GSM_LEVEL
