// The inner loops of linear layers: see linear.h for the layout. Compiled once per level.
//
// Each output is a sum over column groups in ascending order, whatever the number of tokens in the call or of
// threads: an int8 product is exact within its group; a float product runs in four chains (column mod 4) that
// are joined as (0+1)+(2+3) at the end of the group. So every batch size gives the same bits.
// Bound: memory bytes of the codes at one token; the dot-product rate at many.
#include "linear.h"

#include <algorithm>

#include "simd.h"

namespace gsm::GSM_LEVEL {
namespace {

// ---------------------------------------------------------------- 64 bytes of codes: 16 rows x 4 columns

#if defined(__AVX512F__)

struct b64 { __m512i v; };
inline b64 load64(const uint8_t* p) { return {_mm512_loadu_si512(p)}; }
inline b64 low_nibbles(b64 a) { return {_mm512_and_si512(a.v, _mm512_set1_epi8(15))}; }
inline b64 high_nibbles(b64 a) { return {_mm512_and_si512(_mm512_srli_epi16(a.v, 4), _mm512_set1_epi8(15))}; }
inline b64 add_sixteen(b64 a, const uint8_t* mask) {
  uint64_t bits;
  std::memcpy(&bits, mask, 8);
  return {_mm512_mask_add_epi8(a.v, bits, a.v, _mm512_set1_epi8(16))};
}
inline int32_t four(const int8_t* x) { int32_t r; std::memcpy(&r, x, 4); return r; }
template <bool Wide> inline i32x16 dot4(i32x16 acc, b64 w, const int8_t* x) {
  return {_mm512_dpbusd_epi32(acc.v, w.v, _mm512_set1_epi32(four(x)))};
}
// Byte i of each row's four, as float.
template <int I> inline f32x16 byte_to_float(b64 a) {
  return {_mm512_cvtepi32_ps(_mm512_and_si512(_mm512_srli_epi32(a.v, 8 * I), _mm512_set1_epi32(255)))};
}

#elif defined(__AVX2__)

struct b64 { __m256i lo, hi; };
inline b64 load64(const uint8_t* p) {
  return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)),
          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 32))};
}
inline b64 low_nibbles(b64 a) {
  const __m256i m = _mm256_set1_epi8(15);
  return {_mm256_and_si256(a.lo, m), _mm256_and_si256(a.hi, m)};
}
inline b64 high_nibbles(b64 a) {
  const __m256i m = _mm256_set1_epi8(15);
  return {_mm256_and_si256(_mm256_srli_epi16(a.lo, 4), m), _mm256_and_si256(_mm256_srli_epi16(a.hi, 4), m)};
}
inline __m256i sixteens(const uint8_t* mask) {
  int32_t bits;
  std::memcpy(&bits, mask, 4);
  const __m256i pick = _mm256_setr_epi8(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 2, 3, 3, 3,
                                        3, 3, 3, 3, 3);
  const __m256i bit = _mm256_set1_epi64x(static_cast<int64_t>(0x8040201008040201ull));
  const __m256i spread = _mm256_shuffle_epi8(_mm256_set1_epi32(bits), pick);
  return _mm256_and_si256(_mm256_cmpeq_epi8(_mm256_and_si256(spread, bit), bit), _mm256_set1_epi8(16));
}
inline b64 add_sixteen(b64 a, const uint8_t* mask) {
  return {_mm256_or_si256(a.lo, sixteens(mask)), _mm256_or_si256(a.hi, sixteens(mask + 4))};
}
// maddubs saturates at 16 bits, so codes above 64 take the wide form: (c ^ 128) is c - 128 as a signed byte,
// |c - 128| <= 128 times |x| <= 127 twice fits, and 128 * sum(x) is added back.
template <bool Wide> inline __m256i dot4_half(__m256i acc, __m256i w, __m256i x) {
  const __m256i ones = _mm256_set1_epi16(1);
  if constexpr (!Wide) {
    return _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_maddubs_epi16(w, x), ones));
  } else {
    const __m256i s = _mm256_xor_si256(w, _mm256_set1_epi8(-128));
    const __m256i part = _mm256_maddubs_epi16(_mm256_abs_epi8(s), _mm256_sign_epi8(x, s));
    const __m256i base = _mm256_maddubs_epi16(_mm256_set1_epi8(1), x);  // pair sums of x, exact
    acc = _mm256_add_epi32(acc, _mm256_madd_epi16(part, ones));
    return _mm256_add_epi32(acc, _mm256_madd_epi16(base, _mm256_set1_epi16(128)));
  }
}
template <bool Wide> inline i32x16 dot4(i32x16 acc, b64 w, const int8_t* x) {
  int32_t four;
  std::memcpy(&four, x, 4);
  const __m256i b = _mm256_set1_epi32(four);
  return {dot4_half<Wide>(acc.lo, w.lo, b), dot4_half<Wide>(acc.hi, w.hi, b)};
}
template <int I> inline f32x16 byte_to_float(b64 a) {
  const __m256i m = _mm256_set1_epi32(255);
  return {_mm256_cvtepi32_ps(_mm256_and_si256(_mm256_srli_epi32(a.lo, 8 * I), m)),
          _mm256_cvtepi32_ps(_mm256_and_si256(_mm256_srli_epi32(a.hi, 8 * I), m))};
}

#else

struct b64 { uint8_t v[64]; };
inline b64 load64(const uint8_t* p) { b64 r; std::memcpy(r.v, p, 64); return r; }
inline b64 low_nibbles(b64 a) { for (auto& c : a.v) c &= 15; return a; }
inline b64 high_nibbles(b64 a) { for (auto& c : a.v) c >>= 4; return a; }
inline b64 add_sixteen(b64 a, const uint8_t* mask) {
  for (int i = 0; i < 64; ++i) a.v[i] = static_cast<uint8_t>(a.v[i] + 16 * (mask[i / 8] >> (i % 8) & 1));
  return a;
}
template <bool Wide> inline i32x16 dot4(i32x16 acc, b64 w, const int8_t* x) {
  for (int r = 0; r < 16; ++r) {
    int32_t s = 0;
    for (int i = 0; i < 4; ++i) s += w.v[4 * r + i] * x[i];
    acc.v[r] += s;
  }
  return acc;
}
template <int I> inline f32x16 byte_to_float(b64 a) {
  f32x16 r;
  for (int i = 0; i < 16; ++i) r.v[i] = a.v[4 * i + I];
  return r;
}

#endif

// Both halves (columns 0-3 and 4-7) of one block.
template <Code C> struct Block;
template <> struct Block<Code::u4> {
  static constexpr bool wide = false;
  static constexpr int bytes = 64;
  static void read(const uint8_t* codes, const uint8_t*, b64& a, b64& b) {
    const b64 both = load64(codes);
    a = low_nibbles(both);
    b = high_nibbles(both);
  }
};
template <> struct Block<Code::u5> {
  static constexpr bool wide = false;
  static constexpr int bytes = 64;
  static void read(const uint8_t* codes, const uint8_t* high, b64& a, b64& b) {
    const b64 both = load64(codes);
    a = add_sixteen(low_nibbles(both), high);
    b = add_sixteen(high_nibbles(both), high + 8);
  }
};
template <> struct Block<Code::u8> {
  static constexpr bool wide = true;
  static constexpr int bytes = 128;
  static void read(const uint8_t* codes, const uint8_t*, b64& a, b64& b) {
    a = load64(codes);
    b = load64(codes + 64);
  }
};

// ---------------------------------------------------------------- scales and offsets of one (panel, group)

inline f32x16 load_scales(const Weight& w, const uint8_t* base, int64_t index) {
  switch (w.scale) {
    case Scale::f32: return load(reinterpret_cast<const float*>(base) + 16 * index);
    case Scale::f16: return load(reinterpret_cast<const f16*>(base) + 16 * index);
    default: return load(reinterpret_cast<const bf16*>(base) + 16 * index);
  }
}

inline f32x16 load_offsets(const Weight& w, const uint8_t* base, int64_t index) {
  switch (w.offset) {
    case Offset::min_f32: return load(reinterpret_cast<const float*>(base) + 16 * index);
    case Offset::min_f16: return load(reinterpret_cast<const f16*>(base) + 16 * index);
    case Offset::min_bf16: return load(reinterpret_cast<const bf16*>(base) + 16 * index);
    default: {
      float z[16];
      for (int r = 0; r < 16; ++r)
        z[r] = w.offset == Offset::zero_u8 ? base[16 * index + r]
                                           : (r < 8 ? base[8 * index + r] & 15 : base[8 * index + r - 8] >> 4);
      return load(z);
    }
  }
}

inline bool has_zero_point(const Weight& w) { return w.offset == Offset::zero_u4 || w.offset == Offset::zero_u8; }
inline bool has_minimum(const Weight& w) { return w.offset != Offset::symmetric && !has_zero_point(w); }

inline void finish(const Weight& w, int64_t panel, f32x16 total, float* y) {
  const int64_t row = 16 * panel;
  const int n = static_cast<int>(std::min<int64_t>(16, w.rows - row));
  if (w.bias) total = total + load_first(w.bias + row, n);
  store_first(y + row, total, n);
}

// ---------------------------------------------------------------- int8 dot

template <Code C, int MB>
void int8_tile(const Weight& w, const Prepared& x, int64_t m0, int64_t panel, float* y) {
  const int64_t blocks = w.blocks(), groups = w.groups(), per_group = w.group / 8;
  const uint8_t* codes = w.codes + panel * blocks * Block<C>::bytes;
  const uint8_t* high = w.high + panel * blocks * 16;
  const int zero = zero_code(w);
  f32x16 total[MB];
  const int8_t* xm[MB];
  for (int m = 0; m < MB; ++m) {
    total[m] = gsm::GSM_LEVEL::zero();
    xm[m] = x.int8 + (m0 + m) * x.stride;
  }
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t end = std::min(blocks, (g + 1) * per_group);
    i32x16 acc[MB];
    for (int m = 0; m < MB; ++m) acc[m] = set1(static_cast<int32_t>(-zero * x.sums_int[(m0 + m) * groups + g]));
    for (int64_t b = g * per_group; b < end; ++b) {
      b64 first, second;
      Block<C>::read(codes + b * Block<C>::bytes, high + b * 16, first, second);
      for (int m = 0; m < MB; ++m) acc[m] = dot4<Block<C>::wide>(acc[m], first, xm[m] + 8 * b);
      for (int m = 0; m < MB; ++m) acc[m] = dot4<Block<C>::wide>(acc[m], second, xm[m] + 8 * b + 4);
    }
    const int64_t index = panel * groups + g;
    const f32x16 scale = load_scales(w, w.scales, index);
    if (w.offset == Offset::symmetric) {
      for (int m = 0; m < MB; ++m) total[m] = fma(to_float(acc[m]), scale, total[m]);
    } else {
      const f32x16 offset = load_offsets(w, w.offsets, index);
      if (has_zero_point(w)) {
        const i32x16 z = to_int(offset);
        for (int m = 0; m < MB; ++m) {
          const i32x16 exact = acc[m] - z * set1(x.sums_int[(m0 + m) * groups + g]);
          total[m] = fma(to_float(exact), scale, total[m]);
        }
      } else {
        for (int m = 0; m < MB; ++m) {
          total[m] = fma(to_float(acc[m]), scale, total[m]);
          total[m] = fma(-offset, set1(static_cast<float>(x.sums_int[(m0 + m) * groups + g])), total[m]);
        }
      }
    }
  }
  for (int m = 0; m < MB; ++m) finish(w, panel, total[m] * set1(x.int8_scale[m0 + m]), y + (m0 + m) * w.rows);
}

// ---------------------------------------------------------------- float32

// The eight columns of a block as float codes, column c in w[c].
template <Code C> inline void block_floats(const uint8_t* codes, const uint8_t* high, f32x16 zero_point, f32x16* out) {
  b64 a, b;
  Block<C>::read(codes, high, a, b);
  out[0] = byte_to_float<0>(a) - zero_point;
  out[1] = byte_to_float<1>(a) - zero_point;
  out[2] = byte_to_float<2>(a) - zero_point;
  out[3] = byte_to_float<3>(a) - zero_point;
  out[4] = byte_to_float<0>(b) - zero_point;
  out[5] = byte_to_float<1>(b) - zero_point;
  out[6] = byte_to_float<2>(b) - zero_point;
  out[7] = byte_to_float<3>(b) - zero_point;
}

// Joins the four chains of a group, scales the sum and adds it to the totals.
template <int MB>
inline void group_end(const Weight& w, const Prepared& x, int64_t m0, int64_t panel, int64_t g,
                      const f32x16 (&chain)[MB][4], f32x16 (&total)[MB]) {
  const int64_t groups = w.groups(), index = panel * groups + g;
  const f32x16 scale = load_scales(w, w.scales, index);
  const f32x16 offset = w.offset == Offset::symmetric ? zero() : load_offsets(w, w.offsets, index);
  for (int m = 0; m < MB; ++m) {
    f32x16 sum = (chain[m][0] + chain[m][1]) + (chain[m][2] + chain[m][3]);
    const f32x16 x_sum = set1(w.offset == Offset::symmetric ? 0.0f : x.sums_f32[(m0 + m) * groups + g]);
    if (has_zero_point(w)) sum = fma(-offset, x_sum, sum);
    total[m] = fma(sum, scale, total[m]);
    if (has_minimum(w)) total[m] = fma(-offset, x_sum, total[m]);
  }
}

template <Code C, int MB>
void float_tile(const Weight& w, const Prepared& x, int64_t m0, int64_t panel, float* y) {
  const int64_t blocks = w.blocks(), groups = w.groups(), per_group = w.group / 8;
  const uint8_t* codes = w.codes + panel * blocks * Block<C>::bytes;
  const uint8_t* high = w.high + panel * blocks * 16;
  const f32x16 zero_point = set1(static_cast<float>(zero_code(w)));
  f32x16 total[MB];
  for (int m = 0; m < MB; ++m) total[m] = zero();
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t end = std::min(blocks, (g + 1) * per_group);
    f32x16 chain[MB][4];
    for (int m = 0; m < MB; ++m)
      for (int c = 0; c < 4; ++c) chain[m][c] = zero();
    for (int64_t b = g * per_group; b < end; ++b) {
      f32x16 column[8];
      block_floats<C>(codes + b * Block<C>::bytes, high + b * 16, zero_point, column);
      for (int m = 0; m < MB; ++m) {
        const float* xb = x.f32 + (m0 + m) * x.stride + 8 * b;
        for (int c = 0; c < 8; ++c) chain[m][c & 3] = fma(column[c], set1(xb[c]), chain[m][c & 3]);
      }
    }
    group_end(w, x, m0, panel, g, chain, total);
  }
  for (int m = 0; m < MB; ++m) finish(w, panel, total[m], y + (m0 + m) * w.rows);
}

// Weights that are plain numbers.
template <class T> struct Plain {
  static f32x16 column(const uint8_t* panel, int64_t k) { return load(reinterpret_cast<const T*>(panel) + 16 * k); }
};
template <> struct Plain<bf16> {  // stored in pairs: even column in the low half of each 32-bit lane
  static f32x16 column(const uint8_t* panel, int64_t k) {
    const bf16* p = reinterpret_cast<const bf16*>(panel) + 32 * (k / 2) + (k & 1);
    float v[16];
    for (int r = 0; r < 16; ++r) v[r] = to_f32(p[2 * r]);
    return load(v);
  }
};

template <class T, int MB>
void plain_tile(const Weight& w, const Prepared& x, int64_t m0, int64_t panel, float* y) {
  const uint8_t* values = w.codes + panel * panel_bytes_codes(w);
  f32x16 chain[MB][4];
  for (int m = 0; m < MB; ++m)
    for (int c = 0; c < 4; ++c) chain[m][c] = zero();
  const float* xm = x.f32 + m0 * x.stride;
  int64_t k = 0;
  for (; k + 4 <= w.cols; k += 4) {
    f32x16 column[4];
    for (int c = 0; c < 4; ++c) column[c] = Plain<T>::column(values, k + c);
    for (int m = 0; m < MB; ++m)
      for (int c = 0; c < 4; ++c) chain[m][c] = fma(column[c], set1(xm[m * x.stride + k + c]), chain[m][c]);
  }
  for (; k < w.cols; ++k)
    for (int m = 0; m < MB; ++m)
      chain[m][k & 3] = fma(Plain<T>::column(values, k), set1(xm[m * x.stride + k]), chain[m][k & 3]);
  for (int m = 0; m < MB; ++m)
    finish(w, panel, (chain[m][0] + chain[m][1]) + (chain[m][2] + chain[m][3]), y + (m0 + m) * w.rows);
}

// ---------------------------------------------------------------- bf16 dot

#if defined(__AVX512BF16__)

inline f32x16 dot2(f32x16 acc, __m512i w, const bf16* x) {
  int32_t pair;
  std::memcpy(&pair, x, 4);
  return {_mm512_dpbf16_ps(acc.v, reinterpret_cast<__m512bh>(w), reinterpret_cast<__m512bh>(_mm512_set1_epi32(pair)))};
}

// Sixteen bf16 values twice over: vpermw reads five index bits, so the bit above a nibble does not matter.
inline __m512i nibble_table(int step, int zero) {
  alignas(64) uint16_t table[32];
  for (int i = 0; i < 32; ++i) table[i] = to_bf16(static_cast<float>(step * (i & 15) - zero)).bits;
  return _mm512_load_si512(table);
}

// The column pairs of a block as bf16, and where in the block's prepared input (kPairOrder) each finds its partner.
// A 16-bit lane of codes holds four nibbles; looking each up leaves a pair of columns in every 32-bit lane. A byte
// is its two nibbles, 16 h + l, looked up apart and multiplied with the same input: bf16 has no room for both.
template <Code C> struct Pairs;
template <> struct Pairs<Code::u4> {
  static constexpr int count = 4;
  static constexpr int input[4] = {0, 2, 4, 6};
  __m512i table;
  explicit Pairs(int zero) : table(nibble_table(1, zero)) {}
  void read(const uint8_t* codes, __m512i* pair) const {
    const __m512i packed = _mm512_loadu_si512(codes);
    pair[0] = _mm512_permutexvar_epi16(packed, table);
    pair[1] = _mm512_permutexvar_epi16(_mm512_srli_epi16(packed, 4), table);
    pair[2] = _mm512_permutexvar_epi16(_mm512_srli_epi16(packed, 8), table);
    pair[3] = _mm512_permutexvar_epi16(_mm512_srli_epi16(packed, 12), table);
  }
};
template <> struct Pairs<Code::u8> {
  static constexpr int count = 8;
  static constexpr int input[8] = {0, 0, 4, 4, 2, 2, 6, 6};
  __m512i low, high;
  explicit Pairs(int zero) : low(nibble_table(1, 0)), high(nibble_table(16, zero)) {}
  void read(const uint8_t* codes, __m512i* pair) const {
    for (int half = 0; half < 2; ++half) {
      const __m512i packed = _mm512_loadu_si512(codes + 64 * half);
      pair[4 * half] = _mm512_permutexvar_epi16(packed, low);
      pair[4 * half + 1] = _mm512_permutexvar_epi16(_mm512_srli_epi16(packed, 4), high);
      pair[4 * half + 2] = _mm512_permutexvar_epi16(_mm512_srli_epi16(packed, 8), low);
      pair[4 * half + 3] = _mm512_permutexvar_epi16(_mm512_srli_epi16(packed, 12), high);
    }
  }
};

template <Code C, int MB>
void bf16_coded_tile(const Weight& w, const Prepared& x, int64_t m0, int64_t panel, float* y) {
  const int64_t blocks = w.blocks(), groups = w.groups(), per_group = w.group / 8;
  const uint8_t* codes = w.codes + panel * blocks * Block<C>::bytes;
  const Pairs<C> pairs(zero_code(w));
  f32x16 total[MB];
  for (int m = 0; m < MB; ++m) total[m] = zero();
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t end = std::min(blocks, (g + 1) * per_group);
    f32x16 chain[MB][4];
    for (int m = 0; m < MB; ++m)
      for (int c = 0; c < 4; ++c) chain[m][c] = zero();
    for (int64_t b = g * per_group; b < end; ++b) {
      __m512i pair[Pairs<C>::count];
      pairs.read(codes + b * Block<C>::bytes, pair);
      for (int m = 0; m < MB; ++m) {
        const bf16* xb = x.pairs + (m0 + m) * x.stride + 8 * b;
        for (int i = 0; i < Pairs<C>::count; ++i)
          chain[m][i & 3] = dot2(chain[m][i & 3], pair[i], xb + Pairs<C>::input[i]);
      }
    }
    group_end(w, x, m0, panel, g, chain, total);
  }
  for (int m = 0; m < MB; ++m) finish(w, panel, total[m], y + (m0 + m) * w.rows);
}

template <int MB>
void bf16_plain_tile(const Weight& w, const Prepared& x, int64_t m0, int64_t panel, float* y) {
  const int64_t pairs = (w.cols + 1) / 2;
  const uint8_t* values = w.codes + panel * panel_bytes_codes(w);
  f32x16 chain[MB][4];
  for (int m = 0; m < MB; ++m)
    for (int c = 0; c < 4; ++c) chain[m][c] = zero();
  for (int64_t p = 0; p < pairs; p += 4)
    for (int c = 0; c < 4 && p + c < pairs; ++c) {
      const __m512i column = _mm512_loadu_si512(values + 64 * (p + c));
      for (int m = 0; m < MB; ++m)
        chain[m][c] = dot2(chain[m][c], column, x.plain + (m0 + m) * x.stride + 2 * (p + c));
    }
  for (int m = 0; m < MB; ++m)
    finish(w, panel, (chain[m][0] + chain[m][1]) + (chain[m][2] + chain[m][3]), y + (m0 + m) * w.rows);
}

#endif

// ---------------------------------------------------------------- tiles over tokens

using Tile = void (*)(const Weight&, const Prepared&, int64_t, int64_t, float*);

// Tokens per tile, so that accumulators stay in registers.
#if defined(__AVX512F__)
constexpr int kIntTile = 8, kFloatTile = 4;
#elif defined(__AVX2__)
constexpr int kIntTile = 2, kFloatTile = 1;
#else
constexpr int kIntTile = 2, kFloatTile = 1;
#endif

struct Tiles {
  Tile full, half, quarter, one;
  int size;  // tokens of `full`; `half` takes size/2, `quarter` size/4
};

template <template <int> class Make, int Size> constexpr Tiles tiles() {
  return {Make<Size>::run, Make<(Size >= 2 ? Size / 2 : 1)>::run, Make<(Size >= 4 ? Size / 4 : 1)>::run, Make<1>::run,
          Size};
}
template <Code C> struct IntTiles {
  template <int MB> struct Make { static constexpr Tile run = int8_tile<C, MB>; };
};
template <Code C> struct FloatTiles {
  template <int MB> struct Make { static constexpr Tile run = float_tile<C, MB>; };
};
template <class T> struct PlainTiles {
  template <int MB> struct Make { static constexpr Tile run = plain_tile<T, MB>; };
};

#if defined(__AVX512BF16__)
struct Bf16 {
  template <int MB> struct Nibbles { static constexpr Tile run = bf16_coded_tile<Code::u4, MB>; };
  template <int MB> struct Bytes { static constexpr Tile run = bf16_coded_tile<Code::u8, MB>; };
  template <int MB> struct Values { static constexpr Tile run = bf16_plain_tile<MB>; };
};
#endif

Tiles choose(const Weight& w, Path path) {
  if (path == Path::int8_dot) {
    if (w.code == Code::u4) return tiles<IntTiles<Code::u4>::Make, kIntTile>();
    if (w.code == Code::u5) return tiles<IntTiles<Code::u5>::Make, kIntTile>();
    return tiles<IntTiles<Code::u8>::Make, kIntTile>();
  }
#if defined(__AVX512BF16__)
  if (path == Path::bf16_dot) {
    if (w.code == Code::u4) return tiles<Bf16::Nibbles, 4>();
    return w.code == Code::u8 ? tiles<Bf16::Bytes, 4>() : tiles<Bf16::Values, 4>();
  }
#endif
  switch (w.code) {
    case Code::u4: return tiles<FloatTiles<Code::u4>::Make, kFloatTile>();
    case Code::u5: return tiles<FloatTiles<Code::u5>::Make, kFloatTile>();
    case Code::u8: return tiles<FloatTiles<Code::u8>::Make, kFloatTile>();
    case Code::f16: return tiles<PlainTiles<f16>::Make, kFloatTile>();
    case Code::bf16: return tiles<PlainTiles<bf16>::Make, kFloatTile>();
    default: return tiles<PlainTiles<float>::Make, kFloatTile>();
  }
}

}  // namespace

Path linear_path(const Weight& w, Input input) {
  if (input == Input::int8_token) return w.coded() ? Path::int8_dot : Path::f32;
#if defined(__AVX512BF16__)
  if (input == Input::bf16 && (w.code == Code::u4 || w.code == Code::u8 || w.code == Code::bf16)) return Path::bf16_dot;
#else
  (void)input;
#endif
  return Path::f32;
}

void linear_panels(const Weight& w, Path path, const Prepared& x, int64_t tokens, int64_t first_panel,
                   int64_t last_panel, float* y) {
  const Tiles t = choose(w, path);
  for (int64_t panel = first_panel; panel < last_panel; ++panel) {
    int64_t m = 0;
    for (; m + t.size <= tokens; m += t.size) t.full(w, x, m, panel, y);
    for (; m + t.size / 2 <= tokens && t.size >= 2; m += t.size / 2) t.half(w, x, m, panel, y);
    for (; m + t.size / 4 <= tokens && t.size >= 4; m += t.size / 4) t.quarter(w, x, m, panel, y);
    for (; m < tokens; ++m) t.one(w, x, m, panel, y);
  }
}

// int8/token: s = max|x| / 127 and q = rint(x / s); a token with a NaN or an infinity gets s = NaN, so that its
// outputs are NaN as they would be in float.
void quantize_token(const float* x, int64_t cols, int64_t stride, int8_t* q, float* scale) {
  f32x16 peak = zero(), poison = zero();
  for (int64_t k = 0; k < cols; k += 16) {
    const f32x16 v = load_first(x + k, static_cast<int>(std::min<int64_t>(16, cols - k)));
    peak = max(abs(v), peak);
    poison = fma(v, zero(), poison);  // 0 * inf and 0 * NaN are NaN
  }
  const float s = max(peak) / 127.0f;
  const bool finite = sum(poison) == 0.0f;
  *scale = finite ? s : std::numeric_limits<float>::quiet_NaN();
  if (!finite || s == 0.0f) {
    std::memset(q, 0, static_cast<size_t>(stride));
    return;
  }
  const f32x16 divisor = set1(s), top = set1(127.0f);
  for (int64_t k = 0; k < cols; k += 16) {
    const int n = static_cast<int>(std::min<int64_t>(16, cols - k));
    // A subnormal s is rounded coarsely, so the quotient can pass 127.
    const f32x16 r = max(-top, min(top, rint(load_first(x + k, n) / divisor)));
    float v[16];
    store(v, r);
    for (int i = 0; i < n; ++i) q[k + i] = static_cast<int8_t>(v[i]);
  }
  std::memset(q + cols, 0, static_cast<size_t>(stride - cols));
}

}  // namespace gsm::GSM_LEVEL
