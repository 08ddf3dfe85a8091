// Sixteen lanes at every level: one zmm, two ymm, or a plain array. Kernels are written once against these
// types; the lane count never changes, so every level adds in the same order.
// Include only from files compiled once per level (GSM_LEVEL is the level's namespace).
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "halves.h"

namespace gsm::GSM_LEVEL {

#if defined(__AVX512F__)

struct f32x16 { __m512 v; };
struct i32x16 { __m512i v; };

inline __mmask16 first(int n) { return static_cast<__mmask16>(n >= 16 ? 0xFFFF : (1u << n) - 1); }
inline f32x16 zero() { return {_mm512_setzero_ps()}; }
inline f32x16 set1(float x) { return {_mm512_set1_ps(x)}; }
inline f32x16 load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline f32x16 load(const f16* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))}; }
inline f32x16 load(const bf16* p) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(
      _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16))};
}
inline f32x16 load(const int8_t* p) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
}
inline void store(float* p, f32x16 a) { _mm512_storeu_ps(p, a.v); }
inline void store(f16* p, f32x16 a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(a.v, 0)); }
// One bit a lane: a >= b, false when either is NaN.
inline uint32_t mask_at_least(f32x16 a, f32x16 b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_GE_OQ); }
inline f32x16 operator+(f32x16 a, f32x16 b) { return {_mm512_add_ps(a.v, b.v)}; }
inline f32x16 operator-(f32x16 a, f32x16 b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline f32x16 operator*(f32x16 a, f32x16 b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline f32x16 operator/(f32x16 a, f32x16 b) { return {_mm512_div_ps(a.v, b.v)}; }
inline f32x16 fma(f32x16 a, f32x16 b, f32x16 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline f32x16 max(f32x16 a, f32x16 b) { return {_mm512_max_ps(a.v, b.v)}; }
inline f32x16 min(f32x16 a, f32x16 b) { return {_mm512_min_ps(a.v, b.v)}; }
inline f32x16 abs(f32x16 a) { return {_mm512_abs_ps(a.v)}; }
inline f32x16 rint(f32x16 a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
// Lanes n.. of `a` become those of `other`.
inline f32x16 keep_first(f32x16 a, int n, f32x16 other) { return {_mm512_mask_blend_ps(first(n), other.v, a.v)}; }
inline f32x16 select_less(f32x16 a, f32x16 b, f32x16 yes, f32x16 no) {
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ), no.v, yes.v)};
}
inline i32x16 to_int(f32x16 a) { return {_mm512_cvtps_epi32(a.v)}; }
inline f32x16 to_float(i32x16 a) { return {_mm512_cvtepi32_ps(a.v)}; }
inline i32x16 set1(int32_t x) { return {_mm512_set1_epi32(x)}; }
inline i32x16 operator+(i32x16 a, i32x16 b) { return {_mm512_add_epi32(a.v, b.v)}; }
inline i32x16 operator-(i32x16 a, i32x16 b) { return {_mm512_sub_epi32(a.v, b.v)}; }
inline i32x16 operator*(i32x16 a, i32x16 b) { return {_mm512_mullo_epi32(a.v, b.v)}; }
// Adds k to the exponent of each lane: a * 2^k for normal results.
inline f32x16 scale_by_power_of_two(f32x16 a, f32x16 k) { return {_mm512_scalef_ps(a.v, k.v)}; }

#elif defined(__AVX2__)

struct f32x16 { __m256 lo, hi; };
struct i32x16 { __m256i lo, hi; };

inline f32x16 zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline f32x16 set1(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline f32x16 load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline f32x16 load(const f16* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))),
          _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8)))};
}
inline __m256 widen_bf16(__m128i h) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16)); }
inline f32x16 load(const bf16* p) {
  return {widen_bf16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))),
          widen_bf16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8)))};
}
inline f32x16 load(const int8_t* p) {
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)))),
          _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p + 8))))};
}
inline void store(float* p, f32x16 a) { _mm256_storeu_ps(p, a.lo); _mm256_storeu_ps(p + 8, a.hi); }
inline void store(f16* p, f32x16 a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(a.lo, 0));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 8), _mm256_cvtps_ph(a.hi, 0));
}
inline uint32_t mask_at_least(f32x16 a, f32x16 b) {
  return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a.lo, b.lo, _CMP_GE_OQ)) |
                               _mm256_movemask_ps(_mm256_cmp_ps(a.hi, b.hi, _CMP_GE_OQ)) << 8);
}
inline f32x16 operator+(f32x16 a, f32x16 b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
inline f32x16 operator-(f32x16 a, f32x16 b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
inline f32x16 operator*(f32x16 a, f32x16 b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
inline f32x16 operator/(f32x16 a, f32x16 b) { return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)}; }
inline f32x16 fma(f32x16 a, f32x16 b, f32x16 c) {
  return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
inline f32x16 max(f32x16 a, f32x16 b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }
inline f32x16 min(f32x16 a, f32x16 b) { return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)}; }
inline f32x16 abs(f32x16 a) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_andnot_ps(sign, a.lo), _mm256_andnot_ps(sign, a.hi)};
}
inline f32x16 rint(f32x16 a) {
  return {_mm256_round_ps(a.lo, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC),
          _mm256_round_ps(a.hi, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
inline __m256 first8(int n) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(n), lane));
}
inline f32x16 keep_first(f32x16 a, int n, f32x16 other) {
  return {_mm256_blendv_ps(other.lo, a.lo, first8(n)), _mm256_blendv_ps(other.hi, a.hi, first8(n - 8))};
}
inline f32x16 select_less(f32x16 a, f32x16 b, f32x16 yes, f32x16 no) {
  return {_mm256_blendv_ps(no.lo, yes.lo, _mm256_cmp_ps(a.lo, b.lo, _CMP_LT_OQ)),
          _mm256_blendv_ps(no.hi, yes.hi, _mm256_cmp_ps(a.hi, b.hi, _CMP_LT_OQ))};
}
inline i32x16 to_int(f32x16 a) { return {_mm256_cvtps_epi32(a.lo), _mm256_cvtps_epi32(a.hi)}; }
inline f32x16 to_float(i32x16 a) { return {_mm256_cvtepi32_ps(a.lo), _mm256_cvtepi32_ps(a.hi)}; }
inline i32x16 set1(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
inline i32x16 operator+(i32x16 a, i32x16 b) { return {_mm256_add_epi32(a.lo, b.lo), _mm256_add_epi32(a.hi, b.hi)}; }
inline i32x16 operator-(i32x16 a, i32x16 b) { return {_mm256_sub_epi32(a.lo, b.lo), _mm256_sub_epi32(a.hi, b.hi)}; }
inline i32x16 operator*(i32x16 a, i32x16 b) {
  return {_mm256_mullo_epi32(a.lo, b.lo), _mm256_mullo_epi32(a.hi, b.hi)};
}
inline __m256 power_of_two(__m256 k) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(k), _mm256_set1_epi32(127)), 23));
}
inline f32x16 scale_by_power_of_two(f32x16 a, f32x16 k) {
  return {_mm256_mul_ps(a.lo, power_of_two(k.lo)), _mm256_mul_ps(a.hi, power_of_two(k.hi))};
}

#else

struct f32x16 { float v[16]; };
struct i32x16 { int32_t v[16]; };

#define GSM_LANES for (int i = 0; i < 16; ++i)
inline f32x16 set1(float x) { f32x16 r; GSM_LANES r.v[i] = x; return r; }
inline f32x16 zero() { return set1(0.0f); }
inline f32x16 load(const float* p) { f32x16 r; GSM_LANES r.v[i] = p[i]; return r; }
inline f32x16 load(const f16* p) { f32x16 r; GSM_LANES r.v[i] = to_f32(p[i]); return r; }
inline f32x16 load(const bf16* p) { f32x16 r; GSM_LANES r.v[i] = to_f32(p[i]); return r; }
inline f32x16 load(const int8_t* p) { f32x16 r; GSM_LANES r.v[i] = p[i]; return r; }
inline void store(float* p, f32x16 a) { GSM_LANES p[i] = a.v[i]; }
inline void store(f16* p, f32x16 a) { GSM_LANES p[i] = to_f16(a.v[i]); }
inline uint32_t mask_at_least(f32x16 a, f32x16 b) {
  uint32_t m = 0; GSM_LANES m |= static_cast<uint32_t>(a.v[i] >= b.v[i]) << i; return m;
}
inline f32x16 operator+(f32x16 a, f32x16 b) { GSM_LANES a.v[i] += b.v[i]; return a; }
inline f32x16 operator-(f32x16 a, f32x16 b) { GSM_LANES a.v[i] -= b.v[i]; return a; }
inline f32x16 operator*(f32x16 a, f32x16 b) { GSM_LANES a.v[i] *= b.v[i]; return a; }
inline f32x16 operator/(f32x16 a, f32x16 b) { GSM_LANES a.v[i] /= b.v[i]; return a; }
// Two roundings: a baseline machine has no fused instruction, and emulating one would cost fifty.
inline f32x16 fma(f32x16 a, f32x16 b, f32x16 c) { GSM_LANES c.v[i] += a.v[i] * b.v[i]; return c; }
// As the vector instructions do, the second operand wins when either is NaN.
inline f32x16 max(f32x16 a, f32x16 b) { GSM_LANES a.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i]; return a; }
inline f32x16 min(f32x16 a, f32x16 b) { GSM_LANES a.v[i] = a.v[i] < b.v[i] ? a.v[i] : b.v[i]; return a; }
inline f32x16 abs(f32x16 a) { GSM_LANES a.v[i] = std::fabs(a.v[i]); return a; }
inline f32x16 rint(f32x16 a) { GSM_LANES a.v[i] = std::nearbyint(a.v[i]); return a; }
inline f32x16 keep_first(f32x16 a, int n, f32x16 other) { GSM_LANES if (i >= n) a.v[i] = other.v[i]; return a; }
inline f32x16 select_less(f32x16 a, f32x16 b, f32x16 yes, f32x16 no) {
  f32x16 r; GSM_LANES r.v[i] = a.v[i] < b.v[i] ? yes.v[i] : no.v[i]; return r;
}
// Out of range and NaN give INT_MIN, as the vector instruction does (a plain cast would be undefined).
inline i32x16 to_int(f32x16 a) {
  i32x16 r;
  GSM_LANES r.v[i] = std::fabs(a.v[i]) < 2147483520.0f ? static_cast<int32_t>(std::nearbyint(a.v[i]))
                                                      : std::numeric_limits<int32_t>::min();
  return r;
}
inline f32x16 to_float(i32x16 a) { f32x16 r; GSM_LANES r.v[i] = static_cast<float>(a.v[i]); return r; }
inline i32x16 set1(int32_t x) { i32x16 r; GSM_LANES r.v[i] = x; return r; }
inline i32x16 operator+(i32x16 a, i32x16 b) { GSM_LANES a.v[i] += b.v[i]; return a; }
inline i32x16 operator-(i32x16 a, i32x16 b) { GSM_LANES a.v[i] -= b.v[i]; return a; }
inline i32x16 operator*(i32x16 a, i32x16 b) { GSM_LANES a.v[i] *= b.v[i]; return a; }
inline f32x16 scale_by_power_of_two(f32x16 a, f32x16 k) {
  GSM_LANES a.v[i] = k.v[i] == k.v[i] ? std::ldexp(a.v[i], static_cast<int>(k.v[i])) : k.v[i];
  return a;
}
#undef GSM_LANES

#endif

inline f32x16 operator-(f32x16 a) { return zero() - a; }

// Loads the first n (0..16) elements and fills the rest with `fill`; never touches memory past p[n-1].
template <class T>
inline f32x16 load_first(const T* p, int n, float fill = 0.0f) {
  if (n >= 16) return load(p);
  T lanes[16] = {};
  std::memcpy(lanes, p, static_cast<size_t>(n) * sizeof(T));
  return keep_first(load(lanes), n, set1(fill));
}
inline void store_first(float* p, f32x16 a, int n) {
  if (n >= 16) return store(p, a);
  float lanes[16];
  store(lanes, a);
  std::memcpy(p, lanes, static_cast<size_t>(n) * sizeof(float));
}

// Sum of the lanes in one fixed tree: lane i with i+8, then +4, +2, +1.
inline float sum(f32x16 a) {
  float v[16];
  store(v, a);
  for (int width = 8; width; width /= 2)
    for (int i = 0; i < width; ++i) v[i] += v[i + width];
  return v[0];
}
inline float max(f32x16 a) {
  float v[16];
  store(v, a);
  float m = v[0];
  for (int i = 1; i < 16; ++i) m = v[i] > m ? v[i] : m;
  return m;
}

// e^x to about 2 units in the last place; 0 below -87.3, e^88 above 88; NaN stays NaN.
inline f32x16 exp(f32x16 x) {
  const f32x16 low = set1(-87.3365f);
  // max/min return their second operand when x is NaN, so NaN is carried past the clamps explicitly.
  const f32x16 clamped = min(set1(88.0f), max(low, x));
  const f32x16 k = rint(clamped * set1(1.44269504088896341f));
  f32x16 r = fma(k, set1(-0.693145751953125f), clamped);
  r = fma(k, set1(-1.42860682030941723e-6f), r);
  f32x16 p = set1(1.0f / 5040.0f);
  p = fma(p, r, set1(1.0f / 720.0f));
  p = fma(p, r, set1(1.0f / 120.0f));
  p = fma(p, r, set1(1.0f / 24.0f));
  p = fma(p, r, set1(1.0f / 6.0f));
  p = fma(p, r, set1(0.5f));
  p = fma(p, r, set1(1.0f));
  p = fma(p, r, set1(1.0f));
  return select_less(x, low, zero(), scale_by_power_of_two(p, k));
}

// tanh x = E / (E + 2) with E = e^2x - 1, which keeps its relative accuracy near zero; NaN stays NaN.
inline f32x16 tanh(f32x16 x) {
  const f32x16 y = min(set1(20.0f), max(set1(-20.0f), x + x));
  const f32x16 k = rint(y * set1(1.44269504088896341f));
  f32x16 r = fma(k, set1(-0.693145751953125f), y);
  r = fma(k, set1(-1.42860682030941723e-6f), r);
  f32x16 p = set1(1.0f / 5040.0f);
  p = fma(p, r, set1(1.0f / 720.0f));
  p = fma(p, r, set1(1.0f / 120.0f));
  p = fma(p, r, set1(1.0f / 24.0f));
  p = fma(p, r, set1(1.0f / 6.0f));
  p = fma(p, r, set1(0.5f));
  const f32x16 power = scale_by_power_of_two(set1(1.0f), k);
  const f32x16 e = fma(power, fma(r * r, p, r), power - set1(1.0f));
  return e / (e + set1(2.0f));
}

}  // namespace gsm::GSM_LEVEL
