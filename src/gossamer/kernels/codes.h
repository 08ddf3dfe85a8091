// Sixty-four codes at a time: 16 rows x 4 columns, one byte each, at every level. Include only from files compiled once
// per level.
#pragma once
#include "simd.h"
#include "weight.h"

namespace gsm::GSM_LEVEL {

#if defined(__AVX512F__)

struct b64 { __m512i v; };
inline b64 load64(const uint8_t* p) { return {_mm512_loadu_si512(p)}; }
inline void store64(uint8_t* p, b64 a) { _mm512_storeu_si512(p, a.v); }
inline b64 set64(int byte) { return {_mm512_set1_epi8(static_cast<char>(byte))}; }
inline b64 operator&(b64 a, b64 b) { return {_mm512_and_si512(a.v, b.v)}; }
inline b64 operator|(b64 a, b64 b) { return {_mm512_or_si512(a.v, b.v)}; }
// Shifts 16-bit lanes: bits that cross into the neighbouring byte are for the caller to mask.
template <int N> inline b64 shift_right(b64 a) { return {_mm512_srli_epi16(a.v, N)}; }
template <int N> inline b64 shift_left(b64 a) { return {_mm512_slli_epi16(a.v, N)}; }
// Sets bit N of the bytes whose bit in the 64-bit mask is set; it must have been clear.
template <int N> inline b64 set_bit(b64 a, const uint8_t* mask) {
  uint64_t bits;
  std::memcpy(&bits, mask, 8);
  return {_mm512_mask_add_epi8(a.v, bits, a.v, _mm512_set1_epi8(static_cast<char>(1 << N)))};
}
// table[a & 15] for bytes below 128, 0 for others.
inline b64 lookup16(b64 a, const uint8_t* table) {
  return {_mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(table))), a.v)};
}
inline b64 select_high_nibble(b64 a, int nibble, b64 yes, b64 no) {
  const __mmask64 m = _mm512_cmpeq_epi8_mask(_mm512_and_si512(a.v, _mm512_set1_epi8(static_cast<char>(0xF0))),
                                             _mm512_set1_epi8(static_cast<char>(nibble << 4)));
  return {_mm512_mask_blend_epi8(m, no.v, yes.v)};
}
template <int I> inline f32x16 byte_to_float(b64 a) {
  if constexpr (I == 3) return {_mm512_cvtepi32_ps(_mm512_srli_epi32(a.v, 24))};
  return {_mm512_cvtepi32_ps(_mm512_and_si512(_mm512_srli_epi32(a.v, 8 * I), _mm512_set1_epi32(255)))};
}
template <int I> inline i32x16 byte_to_int(b64 a) {
  return {_mm512_and_si512(_mm512_srli_epi32(a.v, 8 * I), _mm512_set1_epi32(255))};
}
inline f32x16 gather(const float* table, i32x16 at) { return {_mm512_i32gather_ps(at.v, table, 4)}; }
// table[at & 15]
inline f32x16 pick16(f32x16 table, i32x16 at) { return {_mm512_permutexvar_ps(at.v, table.v)}; }
template <int N> inline i32x16 shift_words(b64 a) { return {_mm512_srli_epi32(a.v, N)}; }

#elif defined(__AVX2__)

struct b64 { __m256i lo, hi; };
inline b64 load64(const uint8_t* p) {
  return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)),
          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 32))};
}
inline void store64(uint8_t* p, b64 a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), a.lo);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 32), a.hi);
}
inline b64 set64(int byte) {
  const __m256i v = _mm256_set1_epi8(static_cast<char>(byte));
  return {v, v};
}
inline b64 operator&(b64 a, b64 b) { return {_mm256_and_si256(a.lo, b.lo), _mm256_and_si256(a.hi, b.hi)}; }
inline b64 operator|(b64 a, b64 b) { return {_mm256_or_si256(a.lo, b.lo), _mm256_or_si256(a.hi, b.hi)}; }
template <int N> inline b64 shift_right(b64 a) { return {_mm256_srli_epi16(a.lo, N), _mm256_srli_epi16(a.hi, N)}; }
template <int N> inline b64 shift_left(b64 a) { return {_mm256_slli_epi16(a.lo, N), _mm256_slli_epi16(a.hi, N)}; }
inline __m256i spread_bits(const uint8_t* mask, int bit_value) {
  int32_t bits;
  std::memcpy(&bits, mask, 4);
  const __m256i pick = _mm256_setr_epi8(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 2, 3, 3, 3,
                                        3, 3, 3, 3, 3);
  const __m256i bit = _mm256_set1_epi64x(static_cast<int64_t>(0x8040201008040201ull));
  const __m256i spread = _mm256_shuffle_epi8(_mm256_set1_epi32(bits), pick);
  return _mm256_and_si256(_mm256_cmpeq_epi8(_mm256_and_si256(spread, bit), bit),
                          _mm256_set1_epi8(static_cast<char>(bit_value)));
}
template <int N> inline b64 set_bit(b64 a, const uint8_t* mask) {
  return {_mm256_or_si256(a.lo, spread_bits(mask, 1 << N)), _mm256_or_si256(a.hi, spread_bits(mask + 4, 1 << N))};
}
inline b64 lookup16(b64 a, const uint8_t* table) {
  const __m256i t = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(table)));
  return {_mm256_shuffle_epi8(t, a.lo), _mm256_shuffle_epi8(t, a.hi)};
}
inline b64 select_high_nibble(b64 a, int nibble, b64 yes, b64 no) {
  const __m256i mask = _mm256_set1_epi8(static_cast<char>(0xF0)), want = _mm256_set1_epi8(static_cast<char>(nibble << 4));
  return {_mm256_blendv_epi8(no.lo, yes.lo, _mm256_cmpeq_epi8(_mm256_and_si256(a.lo, mask), want)),
          _mm256_blendv_epi8(no.hi, yes.hi, _mm256_cmpeq_epi8(_mm256_and_si256(a.hi, mask), want))};
}
template <int I> inline i32x16 byte_to_int(b64 a) {
  const __m256i m = _mm256_set1_epi32(255);
  return {_mm256_and_si256(_mm256_srli_epi32(a.lo, 8 * I), m), _mm256_and_si256(_mm256_srli_epi32(a.hi, 8 * I), m)};
}
template <int I> inline f32x16 byte_to_float(b64 a) { return to_float(byte_to_int<I>(a)); }
inline f32x16 gather(const float* table, i32x16 at) {
  return {_mm256_i32gather_ps(table, at.lo, 4), _mm256_i32gather_ps(table, at.hi, 4)};
}
inline __m256 pick16_half(f32x16 t, __m256i at) {
  const __m256 low = _mm256_permutevar8x32_ps(t.lo, at), high = _mm256_permutevar8x32_ps(t.hi, at);
  return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(at, 28)));  // bit 3 chooses
}
inline f32x16 pick16(f32x16 table, i32x16 at) { return {pick16_half(table, at.lo), pick16_half(table, at.hi)}; }
template <int N> inline i32x16 shift_words(b64 a) { return {_mm256_srli_epi32(a.lo, N), _mm256_srli_epi32(a.hi, N)}; }

#else

struct b64 { uint8_t v[64]; };
inline b64 load64(const uint8_t* p) { b64 r; std::memcpy(r.v, p, 64); return r; }
inline void store64(uint8_t* p, b64 a) { std::memcpy(p, a.v, 64); }
inline b64 set64(int byte) { b64 r; std::memset(r.v, byte, 64); return r; }
inline b64 operator&(b64 a, b64 b) { for (int i = 0; i < 64; ++i) a.v[i] &= b.v[i]; return a; }
inline b64 operator|(b64 a, b64 b) { for (int i = 0; i < 64; ++i) a.v[i] |= b.v[i]; return a; }
template <int N> inline b64 shift_right(b64 a) {
  for (int i = 0; i < 64; i += 2) {
    const int x = (a.v[i] | a.v[i + 1] << 8) >> N;
    a.v[i] = static_cast<uint8_t>(x);
    a.v[i + 1] = static_cast<uint8_t>(x >> 8);
  }
  return a;
}
template <int N> inline b64 shift_left(b64 a) {
  for (int i = 0; i < 64; i += 2) {
    const int x = (a.v[i] | a.v[i + 1] << 8) << N;
    a.v[i] = static_cast<uint8_t>(x);
    a.v[i + 1] = static_cast<uint8_t>(x >> 8);
  }
  return a;
}
template <int N> inline b64 set_bit(b64 a, const uint8_t* mask) {
  for (int i = 0; i < 64; ++i) a.v[i] = static_cast<uint8_t>(a.v[i] | (mask[i / 8] >> (i % 8) & 1) << N);
  return a;
}
inline b64 lookup16(b64 a, const uint8_t* table) {
  for (auto& c : a.v) c = c < 128 ? table[c & 15] : 0;
  return a;
}
inline b64 select_high_nibble(b64 a, int nibble, b64 yes, b64 no) {
  for (int i = 0; i < 64; ++i) no.v[i] = a.v[i] >> 4 == nibble ? yes.v[i] : no.v[i];
  return no;
}
template <int I> inline i32x16 byte_to_int(b64 a) {
  i32x16 r;
  for (int i = 0; i < 16; ++i) r.v[i] = a.v[4 * i + I];
  return r;
}
template <int I> inline f32x16 byte_to_float(b64 a) { return to_float(byte_to_int<I>(a)); }
inline f32x16 gather(const float* table, i32x16 at) {
  f32x16 r;
  for (int i = 0; i < 16; ++i) r.v[i] = table[at.v[i]];
  return r;
}
inline f32x16 pick16(f32x16 table, i32x16 at) {
  f32x16 r;
  for (int i = 0; i < 16; ++i) r.v[i] = table.v[at.v[i] & 15];
  return r;
}
template <int N> inline i32x16 shift_words(b64 a) {
  i32x16 r;
  for (int i = 0; i < 16; ++i) {
    uint32_t u;
    std::memcpy(&u, a.v + 4 * i, 4);
    r.v[i] = static_cast<int32_t>(u >> N);
  }
  return r;
}

#endif

// Where the codes of one panel begin.
struct Fields {
  const uint8_t *q8, *q4, *q2, *q1;
};

inline Fields panel_fields(const Weight& w, int64_t panel) {
  const int64_t cell = panel * w.blocks();
  const auto at = [cell](const uint8_t* p, int64_t bytes) { return p ? p + bytes * cell : nullptr; };
  return {at(w.q8, 256), at(w.q4, 128), at(w.q2, 64), at(w.q1, 32)};
}

// The codes of half a block (8 columns): v[0] has columns 0-3, v[1] columns 4-7.
template <int B> inline void read_half(const Fields& f, int64_t half, b64* v) {
  if constexpr (B == 8) {
    v[0] = load64(f.q8 + 128 * half);
    v[1] = load64(f.q8 + 128 * half + 64);
  } else {
    constexpr int low = B & 4;
    if constexpr (B & 4) {
      const b64 both = load64(f.q4 + 64 * half);
      v[0] = both & set64(15);
      v[1] = shift_right<4>(both) & set64(15);
    }
    if constexpr (B & 2) {
      const b64 u = load64(f.q2 + 64 * (half / 2));
      b64 a, b;
      if constexpr (low == 4) {
        if (half & 1) a = u, b = shift_right<2>(u);
        else a = shift_left<4>(u), b = shift_left<2>(u);
        v[0] = v[0] | (a & set64(0x30));
        v[1] = v[1] | (b & set64(0x30));
      } else {
        if (half & 1) a = shift_right<4>(u), b = shift_right<6>(u);
        else a = u, b = shift_right<2>(u);
        v[0] = a & set64(3);
        v[1] = b & set64(3);
      }
    }
    if constexpr (B == 1) v[0] = v[1] = set64(0);
    if constexpr (B & 1) {
      v[0] = set_bit<B - 1>(v[0], f.q1 + 16 * half);
      v[1] = set_bit<B - 1>(v[1], f.q1 + 16 * half + 8);
    }
  }
}

inline void read_half(int bits, const Fields& f, int64_t half, b64* v) {
  switch (bits) {
    case 1: return read_half<1>(f, half, v);
    case 2: return read_half<2>(f, half, v);
    case 3: return read_half<3>(f, half, v);
    case 4: return read_half<4>(f, half, v);
    case 5: return read_half<5>(f, half, v);
    case 6: return read_half<6>(f, half, v);
    case 7: return read_half<7>(f, half, v);
    default: return read_half<8>(f, half, v);
  }
}

#if defined(__AVX512F__)

// A table of 16-bit values for codes of B bits, in registers.
template <int B> struct Words {
  static constexpr int count = B <= 5 ? 1 : 1 << (B - 5);
  __m512i t[count];
  explicit Words(const uint16_t* table) {
    for (int i = 0; i < count; ++i) t[i] = _mm512_loadu_si512(table + 32 * i);
  }
  // Each 16-bit lane of `at` holds a code; what stands above the bits of the table is left out.
  __m512i operator()(__m512i at) const {
    if constexpr (B <= 5) return _mm512_permutexvar_epi16(at, t[0]);
    else if constexpr (B == 6) return _mm512_permutex2var_epi16(t[0], at, t[1]);
    else {
      const __mmask32 odd = _mm512_test_epi16_mask(at, _mm512_set1_epi16(64));
      const __m512i low = _mm512_mask_blend_epi16(odd, _mm512_permutex2var_epi16(t[0], at, t[1]),
                                                  _mm512_permutex2var_epi16(t[2], at, t[3]));
      if constexpr (B == 7) return low;
      else {
        const __m512i high = _mm512_mask_blend_epi16(odd, _mm512_permutex2var_epi16(t[4], at, t[5]),
                                                     _mm512_permutex2var_epi16(t[6], at, t[7]));
        return _mm512_mask_blend_epi16(_mm512_test_epi16_mask(at, _mm512_set1_epi16(128)), low, high);
      }
    }
  }
  // The pairs of columns (0, 2) and (1, 3) of four.
  __m512i even(b64 v) const { return (*this)(_mm512_and_si512(v.v, _mm512_set1_epi16(255))); }
  __m512i odd(b64 v) const { return (*this)(_mm512_srli_epi16(v.v, 8)); }
};

#endif

// table[code] for codes of `bits` bits and a table of 2^bits (at least 16) bytes.
inline b64 lookup(b64 a, const uint8_t* table, int bits) {
  if (bits <= 4) return lookup16(a, table);
  const b64 low = a & set64(15);
  b64 r = lookup16(low, table);
  for (int part = 1; part < 1 << (bits - 4); ++part) r = select_high_nibble(a, part, lookup16(low, table + 16 * part), r);
  return r;
}

}  // namespace gsm::GSM_LEVEL
