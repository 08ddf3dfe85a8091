// What attention needs beside simd.h: dot products of packed codes and of bf16 pairs, with exact integer sums at every
// level. Include only from files compiled once per level.
#pragma once
#include "simd.h"

namespace gsm::GSM_LEVEL {

// Sixteen lanes of four unsigned bytes, sixteen lanes of two bf16, and one such lane in all sixteen places.
#if defined(__AVX512F__)

struct u8x64 { __m512i v; };
struct bf16x32 { __m512i v; };

inline u8x64 load_codes(const uint8_t* p) { return {_mm512_loadu_si512(p)}; }
inline u8x64 low_nibbles(u8x64 a) { return {_mm512_and_si512(a.v, _mm512_set1_epi8(15))}; }
inline u8x64 high_nibbles(u8x64 a) { return {_mm512_and_si512(_mm512_srli_epi16(a.v, 4), _mm512_set1_epi8(15))}; }
inline u8x64 repeat_codes(const int8_t* p) {
  int32_t word;
  std::memcpy(&word, p, 4);
  return {_mm512_set1_epi32(word)};
}
// acc += sum over the four bytes of a lane of unsigned code * signed x.
inline i32x16 dot4(i32x16 acc, u8x64 codes, u8x64 x) { return {_mm512_dpbusd_epi32(acc.v, codes.v, x.v)}; }

inline bf16x32 load_pairs(const uint8_t* p) { return {_mm512_loadu_si512(p)}; }
inline bf16x32 repeat_pair(uint32_t pair) { return {_mm512_set1_epi32(static_cast<int32_t>(pair))}; }
inline bf16x32 keep_bits(bf16x32 a, uint32_t mask) {
  return {_mm512_and_si512(a.v, _mm512_set1_epi32(static_cast<int32_t>(mask)))};
}
// acc += a0 * b0 + a1 * b1; products of bf16 are exact in float32.
inline f32x16 dot2(f32x16 acc, bf16x32 a, bf16x32 b) {
#if defined(__AVX512BF16__)
  return {_mm512_dpbf16_ps(acc.v, reinterpret_cast<__m512bh>(a.v), reinterpret_cast<__m512bh>(b.v))};
#else
  const __m512i high = _mm512_set1_epi32(static_cast<int32_t>(0xFFFF0000u));
  const auto even = [](__m512i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(x, 16)); };
  const auto odd = [&](__m512i x) { return _mm512_castsi512_ps(_mm512_and_si512(x, high)); };
  return {_mm512_fmadd_ps(even(a.v), even(b.v), _mm512_fmadd_ps(odd(a.v), odd(b.v), acc.v))};
#endif
}

// Rounds to nearest even; NaN stays NaN.
inline void store_bf16(uint16_t* p, f32x16 a) {
#if defined(__AVX512BF16__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(a.v)));
#else
  const __m512i u = _mm512_castps_si512(a.v), odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  const __m512i up = _mm512_add_epi32(_mm512_add_epi32(u, odd), _mm512_set1_epi32(0x7FFF));
  const __m512i quiet = _mm512_or_si512(u, _mm512_set1_epi32(0x400000));
  const __m512i best = _mm512_mask_mov_epi32(up, _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q), quiet);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(_mm512_srli_epi32(best, 16)));
#endif
}

inline void store_bytes(int8_t* p, i32x16 a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(a.v));
}
template <int N> inline i32x16 shift_right(i32x16 a) { return {_mm512_srai_epi32(a.v, N)}; }

#elif defined(__AVX2__)

struct u8x64 { __m256i lo, hi; };
struct bf16x32 { __m256i lo, hi; };

inline u8x64 load_codes(const uint8_t* p) {
  return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)),
          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 32))};
}
inline u8x64 low_nibbles(u8x64 a) {
  const __m256i mask = _mm256_set1_epi8(15);
  return {_mm256_and_si256(a.lo, mask), _mm256_and_si256(a.hi, mask)};
}
inline u8x64 high_nibbles(u8x64 a) { return low_nibbles({_mm256_srli_epi16(a.lo, 4), _mm256_srli_epi16(a.hi, 4)}); }
inline u8x64 repeat_codes(const int8_t* p) {
  int32_t word;
  std::memcpy(&word, p, 4);
  return {_mm256_set1_epi32(word), _mm256_set1_epi32(word)};
}
// In 16-bit halves: the instruction that multiplies bytes would saturate.
inline __m256i dot4(__m256i acc, __m256i codes, __m256i x) {
  const __m256i even = _mm256_madd_epi16(_mm256_and_si256(codes, _mm256_set1_epi16(255)),
                                         _mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8));
  const __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(codes, 8), _mm256_srai_epi16(x, 8));
  return _mm256_add_epi32(acc, _mm256_add_epi32(even, odd));
}
inline i32x16 dot4(i32x16 acc, u8x64 codes, u8x64 x) {
  return {dot4(acc.lo, codes.lo, x.lo), dot4(acc.hi, codes.hi, x.hi)};
}

inline bf16x32 load_pairs(const uint8_t* p) {
  const u8x64 a = load_codes(p);
  return {a.lo, a.hi};
}
inline bf16x32 repeat_pair(uint32_t pair) {
  const __m256i v = _mm256_set1_epi32(static_cast<int32_t>(pair));
  return {v, v};
}
inline bf16x32 keep_bits(bf16x32 a, uint32_t mask) {
  const __m256i m = _mm256_set1_epi32(static_cast<int32_t>(mask));
  return {_mm256_and_si256(a.lo, m), _mm256_and_si256(a.hi, m)};
}
inline __m256 dot2(__m256 acc, __m256i a, __m256i b) {
  const __m256i high = _mm256_set1_epi32(static_cast<int32_t>(0xFFFF0000u));
  const auto even = [](__m256i x) { return _mm256_castsi256_ps(_mm256_slli_epi32(x, 16)); };
  const auto odd = [&](__m256i x) { return _mm256_castsi256_ps(_mm256_and_si256(x, high)); };
  return _mm256_fmadd_ps(even(a), even(b), _mm256_fmadd_ps(odd(a), odd(b), acc));
}
inline f32x16 dot2(f32x16 acc, bf16x32 a, bf16x32 b) { return {dot2(acc.lo, a.lo, b.lo), dot2(acc.hi, a.hi, b.hi)}; }

inline void store_bf16(uint16_t* p, f32x16 a) {
  float lanes[16];
  store(lanes, a);
  for (int i = 0; i < 16; ++i) p[i] = to_bf16(lanes[i]).bits;
}

inline void store_bytes(int8_t* p, i32x16 a) {
  alignas(32) int32_t lanes[16];
  _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), a.lo);
  _mm256_store_si256(reinterpret_cast<__m256i*>(lanes + 8), a.hi);
  for (int i = 0; i < 16; ++i) p[i] = static_cast<int8_t>(lanes[i]);
}
template <int N> inline i32x16 shift_right(i32x16 a) {
  return {_mm256_srai_epi32(a.lo, N), _mm256_srai_epi32(a.hi, N)};
}

#else

struct u8x64 { uint8_t v[64]; };
struct bf16x32 { uint32_t v[16]; };

inline u8x64 load_codes(const uint8_t* p) { u8x64 r; std::memcpy(r.v, p, 64); return r; }
inline u8x64 low_nibbles(u8x64 a) { for (uint8_t& x : a.v) x &= 15; return a; }
inline u8x64 high_nibbles(u8x64 a) { for (uint8_t& x : a.v) x >>= 4; return a; }
inline u8x64 repeat_codes(const int8_t* p) {
  u8x64 r;
  for (int i = 0; i < 64; i += 4) std::memcpy(r.v + i, p, 4);
  return r;
}
inline i32x16 dot4(i32x16 acc, u8x64 codes, u8x64 x) {
  for (int i = 0; i < 64; ++i) acc.v[i / 4] += codes.v[i] * static_cast<int8_t>(x.v[i]);
  return acc;
}

inline bf16x32 load_pairs(const uint8_t* p) { bf16x32 r; std::memcpy(r.v, p, 64); return r; }
inline bf16x32 repeat_pair(uint32_t pair) { bf16x32 r; for (uint32_t& x : r.v) x = pair; return r; }
inline bf16x32 keep_bits(bf16x32 a, uint32_t mask) { for (uint32_t& x : a.v) x &= mask; return a; }
inline f32x16 dot2(f32x16 acc, bf16x32 a, bf16x32 b) {
  f32x16 even, odd, x, y;
  for (int i = 0; i < 16; ++i) {
    even.v[i] = std::bit_cast<float>(a.v[i] << 16);
    x.v[i] = std::bit_cast<float>(b.v[i] << 16);
    odd.v[i] = std::bit_cast<float>(a.v[i] & 0xFFFF0000u);
    y.v[i] = std::bit_cast<float>(b.v[i] & 0xFFFF0000u);
  }
  return fma(even, x, fma(odd, y, acc));
}

inline void store_bf16(uint16_t* p, f32x16 a) { for (int i = 0; i < 16; ++i) p[i] = to_bf16(a.v[i]).bits; }
inline void store_bytes(int8_t* p, i32x16 a) { for (int i = 0; i < 16; ++i) p[i] = static_cast<int8_t>(a.v[i]); }
template <int N> inline i32x16 shift_right(i32x16 a) { for (int32_t& x : a.v) x >>= N; return a; }

#endif

// The first n lanes (of four bytes each); never touches memory past them.
inline u8x64 load_codes_first(const uint8_t* p, int n) {
  if (n >= 16) return load_codes(p);
  uint8_t lanes[64] = {};
  std::memcpy(lanes, p, static_cast<size_t>(n) * 4);
  return load_codes(lanes);
}
inline bf16x32 load_pairs_first(const uint8_t* p, int n) {
  if (n >= 16) return load_pairs(p);
  uint8_t lanes[64] = {};
  std::memcpy(lanes, p, static_cast<size_t>(n) * 4);
  return load_pairs(lanes);
}

inline int32_t sum(i32x16 a) {
  int32_t lanes[16], total = 0;
  std::memcpy(lanes, &a, sizeof lanes);
  for (int32_t x : lanes) total += x;
  return total;
}

// Lanes low..high-1 of `a`; the others become those of `other`.
inline f32x16 keep_between(f32x16 a, int low, int high, f32x16 other) {
  if (low > 0) a = keep_first(other, low, a);
  return high < 16 ? keep_first(a, high < 0 ? 0 : high, other) : a;
}

// A signed 16-bit number as 256 * high + low with both in a signed byte: |x| <= kPlanes.
constexpr float kPlanes = 127 * 256 + 127;
struct Planes { i32x16 high, low; };
inline Planes planes(i32x16 x) {
  const i32x16 h = shift_right<8>(x + set1(int32_t{128}));
  return {h, x - h * set1(int32_t{256})};
}

// e^x for x <= 0 (or NaN): relative error at most 2^-22 + |x| 2^-24, 0 below -87.3. The argument is not split in two
// as in exp(): a weight's error is its size times |x| 2^-24, which never passes 2^-25 of the largest weight.
inline f32x16 exp_weight(f32x16 x) {
  const f32x16 low = set1(-87.3365f);
  const f32x16 t = max(low, x) * set1(1.44269504088896341f);  // max returns x when x is NaN
  const f32x16 k = rint(t), r = t - k;
  f32x16 p = set1(1.54035304e-4f);
  p = fma(p, r, set1(1.33335581e-3f));
  p = fma(p, r, set1(9.61812911e-3f));
  p = fma(p, r, set1(5.55041087e-2f));
  p = fma(p, r, set1(2.40226507e-1f));
  p = fma(p, r, set1(6.93147181e-1f));
  p = fma(p, r, set1(1.0f));
  return select_less(x, low, zero(), scale_by_power_of_two(p, k));
}

}  // namespace gsm::GSM_LEVEL
