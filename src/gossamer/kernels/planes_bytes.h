// 64 bytes, 16 rows by 4: the unit in which bit planes are multiplied. Included by planes.cpp only.
#pragma once
#include <cstdint>
#include <cstring>

#include "simd.h"

namespace gsm::GSM_LEVEL {
namespace {

inline uint64_t word_at(const uint8_t* p) {
  uint64_t bits;
  std::memcpy(&bits, p, 8);
  return bits;
}
inline int32_t four_at(const int8_t* x) {
  int32_t r;
  std::memcpy(&r, x, 4);
  return r;
}

#if defined(__AVX512F__)

constexpr int kMaxMaskBits = 8;  // codes of so many bits can be multiplied at once

struct bytes { __m512i v; };
inline bytes no_bytes() { return {_mm512_setzero_si512()}; }
inline bytes load_bytes(const uint8_t* p) { return {_mm512_loadu_si512(p)}; }
inline bytes add_bytes(bytes a, bytes b) { return {_mm512_add_epi8(a.v, b.v)}; }
// Adds `value` to the bytes whose bit is set: byte 4r + i for bit 4r + i.
inline bytes add_where(bytes a, const uint8_t* word, int value) {
  return {_mm512_mask_add_epi8(a.v, word_at(word), a.v, _mm512_set1_epi8(static_cast<char>(value)))};
}
// acc row r += the sum of a's bytes 4r + i times x[i].
inline i32x16 dot4(i32x16 acc, bytes a, const int8_t* x) {
  return {_mm512_dpbusd_epi32(acc.v, a.v, _mm512_set1_epi32(four_at(x)))};
}
// Byte 16h + r = nibble r of word h of a block.
inline bytes nibbles(const uint8_t* block) {
  const __m512i z = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(block)));
  return {_mm512_ternarylogic_epi32(z, _mm512_slli_epi16(z, 4), _mm512_set1_epi8(15), 0xA8)};  // (a | b) & c
}
// Byte 16h + r = entry index[16h + r] of the table at 16h.
inline bytes look_up(bytes table, bytes index) { return {_mm512_shuffle_epi8(table.v, index.v)}; }
// acc row r += factor * the sum over h of byte 16h + r, unsigned.
template <int Factor> inline i32x16 add_words(i32x16 acc, bytes a) {
  const __m512i lanes = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const __m512i turn = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
  const __m512i rows = _mm512_shuffle_epi8(_mm512_permutexvar_epi32(lanes, a.v), turn);
  return {_mm512_dpbusd_epi32(acc.v, rows, _mm512_set1_epi8(Factor))};
}
inline i32x16 load_ints(const int32_t* p) { return {_mm512_loadu_si512(p)}; }
inline void store_ints(int32_t* p, i32x16 a) { _mm512_storeu_si512(p, a.v); }
inline i32x16 shift_left(i32x16 a, int n) { return {_mm512_sll_epi32(a.v, _mm_cvtsi32_si128(n))}; }

#elif defined(__AVX2__)

constexpr int kMaxMaskBits = 7;  // two products of 8-bit codes would saturate the 16 bits in which maddubs adds them

struct bytes { __m256i lo, hi; };
inline bytes no_bytes() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
inline bytes load_bytes(const uint8_t* p) {
  return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)),
          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 32))};
}
inline bytes add_bytes(bytes a, bytes b) { return {_mm256_add_epi8(a.lo, b.lo), _mm256_add_epi8(a.hi, b.hi)}; }
inline __m256i where_set(const uint8_t* half_word, int value) {
  int32_t bits;
  std::memcpy(&bits, half_word, 4);
  const __m256i pick = _mm256_setr_epi8(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 2, 3, 3, 3,
                                        3, 3, 3, 3, 3);
  const __m256i bit = _mm256_set1_epi64x(static_cast<int64_t>(0x8040201008040201ull));
  const __m256i spread = _mm256_and_si256(_mm256_shuffle_epi8(_mm256_set1_epi32(bits), pick), bit);
  return _mm256_and_si256(_mm256_cmpeq_epi8(spread, bit), _mm256_set1_epi8(static_cast<char>(value)));
}
inline bytes add_where(bytes a, const uint8_t* word, int value) {
  return add_bytes(a, {where_set(word, value), where_set(word + 4, value)});
}
inline i32x16 dot4(i32x16 acc, bytes a, const int8_t* x) {
  const __m256i b = _mm256_set1_epi32(four_at(x)), one = _mm256_set1_epi16(1);
  return {_mm256_add_epi32(acc.lo, _mm256_madd_epi16(_mm256_maddubs_epi16(a.lo, b), one)),
          _mm256_add_epi32(acc.hi, _mm256_madd_epi16(_mm256_maddubs_epi16(a.hi, b), one))};
}
inline __m256i nibbles16(const uint8_t* p) {
  const __m256i z = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return _mm256_and_si256(_mm256_or_si256(z, _mm256_slli_epi16(z, 4)), _mm256_set1_epi8(15));
}
inline bytes nibbles(const uint8_t* block) { return {nibbles16(block), nibbles16(block + 16)}; }
inline bytes look_up(bytes table, bytes index) {
  return {_mm256_shuffle_epi8(table.lo, index.lo), _mm256_shuffle_epi8(table.hi, index.hi)};
}
inline __m256i both_halves(__m256i a) {
  return _mm256_add_epi16(_mm256_cvtepu8_epi16(_mm256_castsi256_si128(a)),
                          _mm256_cvtepu8_epi16(_mm256_extracti128_si256(a, 1)));
}
template <int Factor> inline i32x16 add_words(i32x16 acc, bytes a) {
  const __m256i sum = _mm256_mullo_epi16(_mm256_add_epi16(both_halves(a.lo), both_halves(a.hi)),
                                         _mm256_set1_epi16(Factor));  // at most 4 * 255 * 32
  return {_mm256_add_epi32(acc.lo, _mm256_cvtepu16_epi32(_mm256_castsi256_si128(sum))),
          _mm256_add_epi32(acc.hi, _mm256_cvtepu16_epi32(_mm256_extracti128_si256(sum, 1)))};
}
inline i32x16 load_ints(const int32_t* p) {
  return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)),
          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 8))};
}
inline void store_ints(int32_t* p, i32x16 a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), a.lo);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 8), a.hi);
}
inline i32x16 shift_left(i32x16 a, int n) {
  const __m128i count = _mm_cvtsi32_si128(n);
  return {_mm256_sll_epi32(a.lo, count), _mm256_sll_epi32(a.hi, count)};
}

#else

constexpr int kMaxMaskBits = 8;

struct bytes { uint8_t v[64]; };
inline bytes no_bytes() { return {}; }
inline bytes load_bytes(const uint8_t* p) {
  bytes a;
  std::memcpy(a.v, p, 64);
  return a;
}
inline bytes add_bytes(bytes a, const bytes& b) {
  for (int i = 0; i < 64; ++i) a.v[i] = static_cast<uint8_t>(a.v[i] + b.v[i]);
  return a;
}
inline bytes add_where(bytes a, const uint8_t* word, int value) {
  for (int i = 0; i < 64; ++i) a.v[i] = static_cast<uint8_t>(a.v[i] + (word[i / 8] >> i % 8 & 1 ? value : 0));
  return a;
}
inline i32x16 dot4(i32x16 acc, const bytes& a, const int8_t* x) {
  for (int r = 0; r < 16; ++r)
    for (int i = 0; i < 4; ++i) acc.v[r] += a.v[4 * r + i] * x[i];
  return acc;
}
inline bytes nibbles(const uint8_t* block) {
  bytes a;
  for (int i = 0; i < 64; ++i) a.v[i] = i % 2 ? block[i / 2] >> 4 : block[i / 2] & 15;
  return a;
}
inline bytes look_up(const bytes& table, const bytes& index) {
  bytes a;
  for (int i = 0; i < 64; ++i) a.v[i] = table.v[i / 16 * 16 + index.v[i]];
  return a;
}
template <int Factor> inline i32x16 add_words(i32x16 acc, const bytes& a) {
  for (int i = 0; i < 64; ++i) acc.v[i % 16] += Factor * a.v[i];
  return acc;
}
inline i32x16 load_ints(const int32_t* p) {
  i32x16 a;
  std::memcpy(a.v, p, 64);
  return a;
}
inline void store_ints(int32_t* p, const i32x16& a) { std::memcpy(p, a.v, 64); }
inline i32x16 shift_left(i32x16 a, int n) {
  for (int32_t& v : a.v) v *= 1 << n;
  return a;
}

#endif

}  // namespace
}  // namespace gsm::GSM_LEVEL
