// The inner loop of every linear layer: P panels of weights times T tokens.
//
// Columns are cut into segments (a group of weights or of inputs; 256 columns where nothing else cuts). Each output has
// one chain a segment, in column order; the segment's sum is scaled and added to the output's total in segment
// order. The shape of a tile changes nothing in that, so every batch size and thread count gives the same bits.
#pragma once
#include "codes.h"
#include "expand.h"
#include "linear.h"

// Tiles live in registers only when their loops are unrolled; a level without vectors would compile for a minute.
#if defined(__AVX2__)
#define GSM_UNROLL _Pragma("GCC unroll 8")
#else
#define GSM_UNROLL
#endif

namespace gsm::GSM_LEVEL {

// ---------------------------------------------------------------- kinds of multiplication
// A step multiplies 4 bytes of input per token: 4 int8 columns, 2 bf16 columns or 1 float column.

#if defined(__AVX512F__)
using Bits = __m512i;
inline Bits broadcast(const uint8_t* p) {
  int32_t v;
  std::memcpy(&v, p, 4);
  return _mm512_set1_epi32(v);
}
#elif defined(__AVX2__)
using Bits = __m256i;
inline Bits broadcast(const uint8_t* p) {
  int32_t v;
  std::memcpy(&v, p, 4);
  return _mm256_set1_epi32(v);
}
#else
struct Bits { uint8_t v[4]; };
inline Bits broadcast(const uint8_t* p) { Bits b; std::memcpy(b.v, p, 4); return b; }
#endif

// Unsigned bytes times signed bytes.
template <bool Wide> struct ByteDot {
  using Sum = i32x16;
  using Vec = b64;
  static constexpr int steps = 2;  // a half block
  static constexpr bool integer = true;
  static Sum init(int32_t v) { return set1(v); }
  static f32x16 value(Sum s) { return to_float(s); }
#if defined(__AVX512F__)
  static Sum dot(Sum acc, Vec w, Bits x) { return {_mm512_dpbusd_epi32(acc.v, w.v, x)}; }
#elif defined(__AVX2__)
  // maddubs saturates at 16 bits, so bytes above 128 take another form: (c ^ 128) is c - 128 as a signed byte,
  // |c - 128| <= 128 times |x| <= 127 twice fits, and 128 * sum(x) is added back.
  static __m256i half(__m256i acc, __m256i w, __m256i x) {
    const __m256i ones = _mm256_set1_epi16(1);
    if constexpr (!Wide) return _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_maddubs_epi16(w, x), ones));
    const __m256i s = _mm256_xor_si256(w, _mm256_set1_epi8(-128));
    const __m256i part = _mm256_maddubs_epi16(_mm256_abs_epi8(s), _mm256_sign_epi8(x, s));
    const __m256i base = _mm256_maddubs_epi16(_mm256_set1_epi8(1), x);  // pair sums of x, exact
    acc = _mm256_add_epi32(acc, _mm256_madd_epi16(part, ones));
    return _mm256_add_epi32(acc, _mm256_madd_epi16(base, _mm256_set1_epi16(128)));
  }
  static Sum dot(Sum acc, Vec w, Bits x) { return {half(acc.lo, w.lo, x), half(acc.hi, w.hi, x)}; }
#else
  static Sum dot(Sum acc, const Vec& w, Bits x) {
    for (int r = 0; r < 16; ++r)
      for (int i = 0; i < 4; ++i) acc.v[r] += w.v[4 * r + i] * static_cast<int8_t>(x.v[i]);
    return acc;
  }
#endif
};

struct FloatDot {
  using Sum = f32x16;
  using Vec = f32x16;
  static constexpr int steps = 8;
  static constexpr bool integer = false;
  static Sum init(int32_t) { return zero(); }
  static f32x16 value(Sum s) { return s; }
#if defined(__AVX512F__)
  static Sum dot(Sum acc, Vec w, Bits x) { return {_mm512_fmadd_ps(w.v, _mm512_castsi512_ps(x), acc.v)}; }
#elif defined(__AVX2__)
  static Sum dot(Sum acc, Vec w, Bits x) {
    return {_mm256_fmadd_ps(w.lo, _mm256_castsi256_ps(x), acc.lo), _mm256_fmadd_ps(w.hi, _mm256_castsi256_ps(x), acc.hi)};
  }
#else
  static Sum dot(Sum acc, const Vec& w, Bits x) {
    float v;
    std::memcpy(&v, x.v, 4);
    return fma(w, set1(v), acc);
  }
#endif
};

#if defined(__AVX512BF16__)
struct PairDot {
  using Sum = f32x16;
  using Vec = __m512i;
  static constexpr int steps = 4;
  static constexpr bool integer = false;
  static Sum init(int32_t) { return zero(); }
  static f32x16 value(Sum s) { return s; }
  static Sum dot(Sum acc, Vec w, Bits x) {
    return {_mm512_dpbf16_ps(acc.v, reinterpret_cast<__m512bh>(w), reinterpret_cast<__m512bh>(x))};
  }
};
#endif

// ---------------------------------------------------------------- where weights come from
// A source opens a half block of one panel and hands out its vectors, one a step. `ahead` is how many bytes later in
// memory the codes lie that are fetched meanwhile: the hardware's own prefetch stops at each page.

template <int N> inline void fetch(const void* p, int64_t ahead) {
GSM_UNROLL
  for (int i = 0; i < N; i += 64) __builtin_prefetch(static_cast<const uint8_t*>(p) + ahead + i);
}

// Bytes as they are stored (8 bits) or as expand_bytes left them; `first` is the half block at which they begin.
struct Bytes {
  using Dot = ByteDot<true>;
  static constexpr int parts = 1;
  const uint8_t* codes;
  int64_t first, ahead;
  using Half = const uint8_t*;
  Half open(int, int64_t half) const {
    const uint8_t* at = codes + 128 * (half - first);
    if (ahead) fetch<128>(at, ahead);
    return at;
  }
  static b64 vec(Half h, int step) { return load64(h + 64 * step); }
};

template <int B> inline void fetch_half(int64_t half, const Fields& ahead) {
  if constexpr (B == 8) fetch<128>(ahead.q8 + 128 * half, 0);
  if constexpr (B & 4) __builtin_prefetch(ahead.q4 + 64 * half);
  if constexpr (B & 2) __builtin_prefetch(ahead.q2 + 32 * half);
  if constexpr (B & 1) __builtin_prefetch(ahead.q1 + 16 * half);
}

template <int B> struct Stored {  // codes of B < 8 bits, unpacked in registers
  using Dot = ByteDot<false>;
  static constexpr int parts = 1;
  Fields f, ahead;
  struct Half { b64 v[2]; };
  Half open(int, int64_t half) const {
    Half h;
    fetch_half<B>(half, ahead);
    read_half<B>(f, half, h.v);
    return h;
  }
  static b64 vec(const Half& h, int step) { return h.v[step]; }
};

template <int Parts> struct Looked {  // 4-bit codes that stand for bytes of a table, or for two
  using Dot = ByteDot<true>;
  static constexpr int parts = Parts;
  Fields f, ahead;
  const uint8_t* table;
  struct Half { b64 v[2]; };
  Half open(int part, int64_t half) const {
    Half h;
    if (part == 0) fetch_half<4>(half, ahead);
    read_half<4>(f, half, h.v);
    h.v[0] = lookup16(h.v[0], table + 16 * part);
    h.v[1] = lookup16(h.v[1], table + 16 * part);
    return h;
  }
  static b64 vec(const Half& h, int step) { return h.v[step]; }
};

struct TwoBytes {  // what expand_bytes left of codes that stand for two bytes
  using Dot = ByteDot<true>;
  static constexpr int parts = 2;
  const uint8_t* codes[2];
  int64_t first;
  using Half = const uint8_t*;
  Half open(int part, int64_t half) const { return codes[part] + 128 * (half - first); }
  static b64 vec(Half h, int step) { return load64(h + 64 * step); }
};

struct Halves {  // float16 as it is stored
  using Dot = FloatDot;
  static constexpr int parts = 1;
  const f16* values;
  int64_t ahead;
  using Half = const f16*;
  Half open(int, int64_t half) const {
    const f16* at = values + 128 * half;
    if (ahead) fetch<256>(at, ahead);
    return at;
  }
  static f32x16 vec(Half h, int step) { return load(h + 16 * step); }
};

struct FloatNibbles {  // 4-bit codes
  using Dot = FloatDot;
  static constexpr int parts = 1;
  const uint8_t* codes;
  int64_t ahead;
  f32x16 table;
  struct Half {
    b64 packed;
    f32x16 table;
  };
  Half open(int, int64_t half) const {
    __builtin_prefetch(codes + 64 * half + ahead);
    return {load64(codes + 64 * half), table};
  }
  static f32x16 vec(const Half& h, int step) {
    switch (step) {
      case 0: return pick16(h.table, shift_words<0>(h.packed));
      case 1: return pick16(h.table, shift_words<8>(h.packed));
      case 2: return pick16(h.table, shift_words<16>(h.packed));
      case 3: return pick16(h.table, shift_words<24>(h.packed));
      case 4: return pick16(h.table, shift_words<4>(h.packed));
      case 5: return pick16(h.table, shift_words<12>(h.packed));
      case 6: return pick16(h.table, shift_words<20>(h.packed));
      default: return pick16(h.table, shift_words<28>(h.packed));
    }
  }
};

struct FloatBytes {  // 8-bit codes that stand for step * code - zero
  using Dot = FloatDot;
  static constexpr int parts = 1;
  const uint8_t* codes;
  int64_t ahead;
  float step, zero;
  struct Half {
    const uint8_t* codes;
    f32x16 step, zero;
  };
  Half open(int, int64_t half) const {
    const uint8_t* at = codes + 128 * half;
    fetch<128>(at, ahead);
    return {at, set1(step), set1(zero)};
  }
  static f32x16 vec(const Half& h, int step) {
    const b64 v = load64(h.codes + 64 * (step / 4));
    f32x16 c;
    switch (step % 4) {
      case 0: c = byte_to_float<0>(v); break;
      case 1: c = byte_to_float<1>(v); break;
      case 2: c = byte_to_float<2>(v); break;
      default: c = byte_to_float<3>(v);
    }
    return h.step * c - h.zero;  // whole numbers, so exact
  }
};

struct Floats {
  using Dot = FloatDot;
  static constexpr int parts = 1;
  const float* values;
  int64_t first, ahead;
  using Half = const float*;
  Half open(int, int64_t half) const {
    const float* at = values + 128 * (half - first);
    if (ahead) fetch<512>(at, ahead);
    return at;
  }
  static f32x16 vec(Half h, int step) { return load(h + 16 * step); }
};

#if defined(__AVX512BF16__)
struct PairValues {
  using Dot = PairDot;
  static constexpr int parts = 1;
  const uint16_t* values;
  int64_t first, ahead;
  using Half = const uint16_t*;
  Half open(int, int64_t half) const {
    const uint16_t* at = values + 128 * (half - first);
    if (ahead) fetch<256>(at, ahead);
    return at;
  }
  static __m512i vec(Half h, int step) { return _mm512_loadu_si512(h + 32 * step); }
};

// 4-bit codes: shifting by 0, 4, 8, 12 brings the pairs (0,2) (4,6) (1,3) (5,7) into place, and the table takes no
// notice of the bits above a nibble.
struct PairNibbles {
  using Dot = PairDot;
  static constexpr int parts = 1;
  const uint8_t* codes;
  int64_t ahead;
  const Words<4>* words;
  struct Half {
    __m512i packed;
    const Words<4>* words;
  };
  Half open(int, int64_t half) const {
    __builtin_prefetch(codes + 64 * half + ahead);
    return {_mm512_loadu_si512(codes + 64 * half), words};
  }
  static __m512i vec(const Half& h, int step) {
    switch (step) {
      case 0: return (*h.words)(h.packed);
      case 1: return (*h.words)(_mm512_srli_epi16(h.packed, 4));
      case 2: return (*h.words)(_mm512_srli_epi16(h.packed, 8));
      default: return (*h.words)(_mm512_srli_epi16(h.packed, 12));
    }
  }
};

template <int B> struct PairCodes {  // other codes whose values are bfloat16
  using Dot = PairDot;
  static constexpr int parts = 1;
  Fields f, ahead;
  const Words<B>* words;
  struct Half {
    b64 v[2];
    const Words<B>* words;
  };
  Half open(int, int64_t half) const {
    Half h;
    h.words = words;
    fetch_half<B>(half, ahead);
    read_half<B>(f, half, h.v);
    return h;
  }
  static __m512i vec(const Half& h, int step) {
    return step < 2 ? h.words->even(h.v[step & 1]) : h.words->odd(h.v[step & 1]);
  }
};
#endif

// ---------------------------------------------------------------- the tile

// What a stretch of segments of P panels needs besides the codes.
struct Stretch {
  int64_t first, last;      // segments
  int64_t length;           // columns a segment
  int64_t halves;           // half blocks of the whole width
  const float* scales;      // [panel][segment - first][16]
  const float* offsets;     // the same, or null
  int64_t stride;           // floats from panel to panel
  int zero[2];              // added for each unit of input: what bytes stand for is less by a zero point
  float weight[2];          // of the parts
};

// T tokens of a prepared input.
struct TileInput {
  const uint8_t* data;       // [step][T][4 bytes]
  const int32_t* sums;       // [segment][T], of bytes; null when nothing is subtracted
  const float* float_sums;   // [segment][T], of inputs in units of the token's scale; only for offsets
  const float* scales;       // [segment][T] when the input has a scale a group, else null
};

// One half block of P panels times T tokens, added to the sums.
template <class Source, int P, int T, bool Twice, class Sum>
inline void add_half(const Source* source, int part, int64_t half, const uint8_t* data, Sum (&sum)[P][T], Sum (&more)[P][T]) {
  using Dot = typename Source::Dot;
  typename Source::Half open[P];
GSM_UNROLL
  for (int p = 0; p < P; ++p) open[p] = source[p].open(part, half);
GSM_UNROLL
  for (int step = 0; step < Dot::steps; ++step) {
    typename Dot::Vec w[P];
GSM_UNROLL
    for (int p = 0; p < P; ++p) w[p] = Source::vec(open[p], step);
GSM_UNROLL
    for (int t = 0; t < T; ++t) {
      const Bits b = broadcast(data + (step * T + t) * 4);
GSM_UNROLL
      for (int p = 0; p < P; ++p) {
        auto& to = Twice && step % 2 ? more[p][t] : sum[p][t];
        to = Dot::dot(to, w[p], b);
      }
    }
  }
}

template <class Source, int P, int T>
__attribute__((noinline)) void tile(const Source* sources, const Stretch& s, const TileInput& x, float* totals, bool fresh) {
  using Dot = typename Source::Dot;
  // Copies of their own: what is stored through `totals` cannot change them, so they stay in registers.
  Source source[P];
GSM_UNROLL
  for (int p = 0; p < P; ++p) source[p] = sources[p];
  f32x16 total[P][T];
GSM_UNROLL
  for (int p = 0; p < P; ++p)
GSM_UNROLL
    for (int t = 0; t < T; ++t) total[p][t] = fresh ? gsm::GSM_LEVEL::zero() : load(totals + (t * P + p) * 16);
  constexpr int kBytes = Dot::steps * T * 4;  // of inputs, a half block
  const int64_t length = s.length / 8, stride = s.stride;
  int64_t half = s.first * length;
  const uint8_t* data = x.data + half * kBytes;
  const int32_t* sums = x.sums ? x.sums + s.first * T : nullptr;
  const float* input_scales = x.scales ? x.scales + s.first * T : nullptr;
  const float* float_sums = s.offsets ? x.float_sums + s.first * T : nullptr;
  const float *scales = s.scales, *offsets = s.offsets;
  for (int64_t g = s.last - s.first; g > 0; --g, scales += 16) {
    const int64_t from = half, to = std::min(s.halves, from + length);
    const uint8_t* const begin = data;
    for (int part = 0; part < Source::parts; ++part) {
      typename Dot::Sum sum[P][T];
      // Integers add exactly in any order: a single output gets a second chain, which hides the latency of the first.
      constexpr bool twice = Dot::integer && P * T <= 2;
      typename Dot::Sum more[P][T];
GSM_UNROLL
      for (int t = 0; t < T; ++t) {
        const auto start = Dot::init(Dot::integer && sums ? s.zero[part] * sums[t] : 0);
GSM_UNROLL
        for (int p = 0; p < P; ++p) {
          sum[p][t] = start;
          if constexpr (twice) more[p][t] = Dot::init(0);
        }
      }
      half = from;
      data = begin;
      // Most groups are a multiple of 32 columns.
      for (; half + 4 <= to; half += 4, data += 4 * kBytes) {
GSM_UNROLL
        for (int i = 0; i < 4; ++i) add_half<Source, P, T, twice>(source, part, half + i, data + i * kBytes, sum, more);
      }
      for (; half < to; ++half, data += kBytes) add_half<Source, P, T, twice>(source, part, half, data, sum, more);
      if constexpr (twice) {
GSM_UNROLL
        for (int p = 0; p < P; ++p)
GSM_UNROLL
          for (int t = 0; t < T; ++t) sum[p][t] = sum[p][t] + more[p][t];
      }
GSM_UNROLL
      for (int p = 0; p < P; ++p) {
        f32x16 scale = load(scales + p * stride);
        if constexpr (Source::parts > 1) scale = scale * set1(s.weight[part]);
        if (input_scales) {
GSM_UNROLL
          for (int t = 0; t < T; ++t)
            total[p][t] = fma(Dot::value(sum[p][t]), scale * set1(input_scales[t]), total[p][t]);
        } else {
GSM_UNROLL
          for (int t = 0; t < T; ++t) total[p][t] = fma(Dot::value(sum[p][t]), scale, total[p][t]);
        }
      }
    }
    if (offsets) {
GSM_UNROLL
      for (int p = 0; p < P; ++p) {
        const f32x16 offset = load(offsets + p * stride);
GSM_UNROLL
        for (int t = 0; t < T; ++t) total[p][t] = fma(-offset, set1(float_sums[t]), total[p][t]);
      }
      offsets += 16;
      float_sums += T;
    }
    if (sums) sums += T;
    if (input_scales) input_scales += T;
  }
GSM_UNROLL
  for (int p = 0; p < P; ++p)
GSM_UNROLL
    for (int t = 0; t < T; ++t) store(totals + (t * P + p) * 16, total[p][t]);
}

// The commonest case of few tokens, with as few instructions as it takes, for every one of them shortens the reach of the
// loads: one panel, integers with a scale a segment on both sides, the weight's as stored, whole segments of a multiple of
// 32 columns. Adds in the order of `tile`, so the bits are the same.
template <class Source, int T>
__attribute__((noinline)) void lean_tile(const Source& from, const Stretch& s, const f16* scales, int64_t scales_ahead,
                                         const TileInput& x, float* totals) {
  using Dot = typename Source::Dot;
  const Source source[1] = {from};
  constexpr bool twice = T <= 2;
  constexpr int kBytes = Dot::steps * T * 4;
  const int64_t length = s.length / 8;
  const int32_t zero_point = s.zero[0], *sums = x.sums + s.first * T;
  const float* input_scales = x.scales + s.first * T;
  const uint8_t* data = x.data + s.first * length * kBytes;
  f32x16 total[T];
GSM_UNROLL
  for (int t = 0; t < T; ++t) total[t] = zero();
  int64_t half = s.first * length;
  for (int64_t g = s.first; g < s.last; ++g) {
    typename Dot::Sum sum[1][T], more[1][T];
GSM_UNROLL
    for (int t = 0; t < T; ++t) {
      sum[0][t] = Dot::init(zero_point * sums[t]);
      if constexpr (twice) more[0][t] = Dot::init(0);
    }
    const int64_t to = half + length;
    do {
GSM_UNROLL
      for (int i = 0; i < 4; ++i) add_half<Source, 1, T, twice>(source, 0, half + i, data + i * kBytes, sum, more);
      half += 4;
      data += 4 * kBytes;
    } while (half < to);
    __builtin_prefetch(scales + scales_ahead);
    const f32x16 scale = load(scales);
    scales += 16;
GSM_UNROLL
    for (int t = 0; t < T; ++t) {
      if constexpr (twice) sum[0][t] = sum[0][t] + more[0][t];
      total[t] = fma(Dot::value(sum[0][t]), scale * set1(input_scales[t]), total[t]);
    }
    sums += T;
    input_scales += T;
  }
GSM_UNROLL
  for (int t = 0; t < T; ++t) store(totals + t * 16, total[t]);
}

}  // namespace gsm::GSM_LEVEL
