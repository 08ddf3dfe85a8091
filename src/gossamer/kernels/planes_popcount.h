// The bit-serial route: 64 columns of a row in a word, for weights and activations alike. Included by planes.cpp only.
//
// A plane keeps 4 columns of 16 rows in a word; 16 such words are turned into 16 words of 64 columns, one a row. The
// columns of a word come in the order of its bytes: byte i holds columns 4i..4i+3, then 32+4i..32+4i+3, which the
// activations follow. A panel is turned once for all tokens.
#pragma once
#include <bit>

#include "planes.h"
#include "planes_bytes.h"

namespace gsm::GSM_LEVEL {
namespace {

// The nibbles of 32 bits, each in the low half of a byte.
inline uint64_t spread_nibbles(uint64_t m) {
  m = (m | m << 16) & 0x0000FFFF0000FFFFull;
  m = (m | m << 8) & 0x00FF00FF00FF00FFull;
  return (m | m << 4) & 0x0F0F0F0F0F0F0F0Full;
}

// Bit a of each of 64 activations; bit k for activation k.
inline uint64_t bit_of_each(const int8_t* x, int a) {
#if defined(__AVX512F__)
  return _mm512_movepi8_mask(_mm512_sll_epi16(_mm512_loadu_si512(x), _mm_cvtsi32_si128(7 - a)));
#elif defined(__AVX2__)
  const __m128i up = _mm_cvtsi32_si128(7 - a);
  const __m256i* p = reinterpret_cast<const __m256i*>(x);
  const auto low = static_cast<uint32_t>(_mm256_movemask_epi8(_mm256_sll_epi16(_mm256_loadu_si256(p), up)));
  const auto high = static_cast<uint32_t>(_mm256_movemask_epi8(_mm256_sll_epi16(_mm256_loadu_si256(p + 1), up)));
  return low | static_cast<uint64_t>(high) << 32;
#else
  uint64_t bits = 0;
  for (int k = 0; k < 64; ++k) bits |= static_cast<uint64_t>(static_cast<uint8_t>(x[k]) >> a & 1) << k;
  return bits;
#endif
}

#if defined(__AVX512F__)

inline __m512i gather_bytes(__m512i words) {  // 8 words of 8 bytes, transposed
  const __m512i pair = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15));
  alignas(64) static constexpr uint16_t kOrder[32] = {0, 8,  16, 24, 1, 9,  17, 25, 2, 10, 18, 26, 3, 11, 19, 27,
                                                      4, 12, 20, 28, 5, 13, 21, 29, 6, 14, 22, 30, 7, 15, 23, 31};
  return _mm512_permutexvar_epi16(_mm512_load_si512(kOrder), _mm512_shuffle_epi8(words, pair));
}
// 16 words of a plane (fewer blocks than 4: zeros) to the words of rows 0, 2, .. 14, 1, 3, .. 15.
inline void turn(const uint8_t* plane, int64_t blocks, uint64_t* rows) {
  const auto lines = [&](int64_t first) {
    const int64_t n = std::clamp<int64_t>(blocks - first, 0, 2);
    return static_cast<__mmask8>(n == 2 ? 0xFF : n == 1 ? 0x0F : 0);
  };
  const __m512i a = gather_bytes(_mm512_maskz_loadu_epi64(lines(0), plane));
  const __m512i b = gather_bytes(_mm512_maskz_loadu_epi64(lines(2), plane + 64));
  const __m512i low = _mm512_set1_epi8(15);
  const __m512i even = _mm512_ternarylogic_epi32(low, a, _mm512_slli_epi16(b, 4), 0xCA);  // low ? a : b << 4
  const __m512i odd = _mm512_ternarylogic_epi32(low, _mm512_srli_epi16(a, 4), b, 0xCA);
  _mm512_storeu_si512(rows, even);
  _mm512_storeu_si512(rows + 8, odd);
}

template <bool Instruction> inline __m512i count_bits(__m512i a) {
  if constexpr (Instruction) {
    // In assembler because the level may not assume the instruction: planes_path_runs asks the machine for it.
    __m512i n;
    asm("vpopcntq %1, %0" : "=v"(n) : "v"(a));
    return n;
  }
  const __m512i table = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4));
  const __m512i low = _mm512_set1_epi8(15);
  const __m512i n = _mm512_add_epi8(_mm512_shuffle_epi8(table, _mm512_and_si512(a, low)),
                                    _mm512_shuffle_epi8(table, _mm512_and_si512(_mm512_srli_epi16(a, 4), low)));
  return _mm512_sad_epu8(n, _mm512_setzero_si512());
}
// total[16] += 2^shift * the dot product of each row with x, whose top plane is negative.
template <int A, bool Instruction>
inline void count(const uint64_t* rows, int64_t n, const uint64_t* x, int shift, int64_t* total) {
  __m512i even[A], odd[A];
  for (int a = 0; a < A; ++a) even[a] = odd[a] = _mm512_setzero_si512();
  for (int64_t w = 0; w < n; ++w) {
    const __m512i e = _mm512_loadu_si512(rows + 16 * w), o = _mm512_loadu_si512(rows + 16 * w + 8);
#pragma GCC unroll 8
    for (int a = 0; a < A; ++a) {
      const __m512i bits = _mm512_set1_epi64(static_cast<int64_t>(x[8 * w + a]));
      even[a] = _mm512_add_epi64(even[a], count_bits<Instruction>(_mm512_and_si512(e, bits)));
      odd[a] = _mm512_add_epi64(odd[a], count_bits<Instruction>(_mm512_and_si512(o, bits)));
    }
  }
  __m512i e = _mm512_sub_epi64(_mm512_setzero_si512(), even[A - 1]);
  __m512i o = _mm512_sub_epi64(_mm512_setzero_si512(), odd[A - 1]);
#pragma GCC unroll 8
  for (int a = A - 2; a >= 0; --a) {
    e = _mm512_add_epi64(_mm512_add_epi64(e, e), even[a]);
    o = _mm512_add_epi64(_mm512_add_epi64(o, o), odd[a]);
  }
  const __m128i up = _mm_cvtsi32_si128(shift);
  _mm512_storeu_si512(total, _mm512_add_epi64(_mm512_loadu_si512(total), _mm512_sll_epi64(e, up)));
  _mm512_storeu_si512(total + 8, _mm512_add_epi64(_mm512_loadu_si512(total + 8), _mm512_sll_epi64(o, up)));
}

#else

inline void transpose_bytes(uint64_t* t) {  // 8 words of 8 bytes
  constexpr uint64_t masks[3] = {0x00000000FFFFFFFFull, 0x0000FFFF0000FFFFull, 0x00FF00FF00FF00FFull};
  for (int round = 0, d = 4; d; ++round, d /= 2)
    for (int i = 0; i < 8; ++i)
      if (!(i & d)) {
        const uint64_t p = t[i], q = t[i + d], m = masks[round];
        t[i] = (p & m) | (q & m) << 8 * d;
        t[i + d] = (p >> 8 * d & m) | (q & ~m);
      }
}
inline void turn(const uint8_t* plane, int64_t blocks, uint64_t* rows) {
  uint64_t words[16] = {};
  std::memcpy(words, plane, static_cast<size_t>(std::min<int64_t>(blocks, 4)) * 32);
  transpose_bytes(words);
  transpose_bytes(words + 8);
  constexpr uint64_t low = 0x0F0F0F0F0F0F0F0Full;
  for (int j = 0; j < 8; ++j) {
    rows[j] = (words[j] & low) | (words[8 + j] & low) << 4;
    rows[8 + j] = (words[j] >> 4 & low) | (words[8 + j] & ~low);
  }
}

#if defined(__AVX2__)
inline __m256i count_bits(__m256i a) {
  const __m256i table = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4));
  const __m256i low = _mm256_set1_epi8(15);
  const __m256i n = _mm256_add_epi8(_mm256_shuffle_epi8(table, _mm256_and_si256(a, low)),
                                    _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(a, 4), low)));
  return _mm256_sad_epu8(n, _mm256_setzero_si256());
}
#endif

template <int A, bool>
inline void count(const uint64_t* rows, int64_t n, const uint64_t* x, int shift, int64_t* total) {
#if defined(__AVX2__)
  for (int part = 0; part < 16; part += 4) {  // four rows: one vector a plane of x
    __m256i sums[A];
    for (int a = 0; a < A; ++a) sums[a] = _mm256_setzero_si256();
    for (int64_t w = 0; w < n; ++w) {
      const __m256i row = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(rows + 16 * w + part));
#pragma GCC unroll 8
      for (int a = 0; a < A; ++a) {
        const __m256i bits = _mm256_set1_epi64x(static_cast<int64_t>(x[8 * w + a]));
        sums[a] = _mm256_add_epi64(sums[a], count_bits(_mm256_and_si256(row, bits)));
      }
    }
    __m256i sum = _mm256_sub_epi64(_mm256_setzero_si256(), sums[A - 1]);
    for (int a = A - 2; a >= 0; --a) sum = _mm256_add_epi64(_mm256_add_epi64(sum, sum), sums[a]);
    __m256i* const to = reinterpret_cast<__m256i*>(total + part);
    _mm256_storeu_si256(to, _mm256_add_epi64(_mm256_loadu_si256(to), _mm256_sll_epi64(sum, _mm_cvtsi32_si128(shift))));
  }
#else
  for (int64_t w = 0; w < n; ++w)
    for (int r = 0; r < 16; ++r)
      for (int a = 0; a < A; ++a) {
        const int64_t value = int64_t{1} << (a + shift);
        total[r] += (a == A - 1 ? -value : value) * std::popcount(rows[16 * w + r] & x[8 * w + a]);
      }
#endif
}

#endif

using Count = void (*)(const uint64_t* rows, int64_t n, const uint64_t* x, int shift, int64_t* total);

template <bool Instruction> Count count_of(int x_bits) {
  switch (x_bits) {
    case 1: return count<1, Instruction>;
    case 2: return count<2, Instruction>;
    case 3: return count<3, Instruction>;
    case 4: return count<4, Instruction>;
    case 5: return count<5, Instruction>;
    case 6: return count<6, Instruction>;
    case 7: return count<7, Instruction>;
    default: return count<8, Instruction>;
  }
}

}  // namespace
}  // namespace gsm::GSM_LEVEL
