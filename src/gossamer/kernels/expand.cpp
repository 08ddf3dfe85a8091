#include "expand.h"

#include <algorithm>
#include <vector>

#include "codes.h"

namespace gsm {

namespace GSM_LEVEL {
namespace {

inline f32x16 exponent_bytes(const uint8_t* p) {  // e8m0
#if defined(__AVX512F__)
  const __m512i b = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  __m512i bits = _mm512_slli_epi32(b, 23);
  // 2^-127 is subnormal: its bits are not an exponent alone. 255 is NaN.
  bits = _mm512_mask_mov_epi32(bits, _mm512_testn_epi32_mask(b, b), _mm512_set1_epi32(0x00400000));
  bits = _mm512_mask_mov_epi32(bits, _mm512_cmpeq_epi32_mask(b, _mm512_set1_epi32(255)), _mm512_set1_epi32(0x7FC00000));
  return {_mm512_castsi512_ps(bits)};
#else
  float v[16];
  for (int r = 0; r < 16; ++r) {
    const uint32_t bits = p[r] == 255 ? 0x7FC00000u : p[r] ? static_cast<uint32_t>(p[r]) << 23 : 0x00400000u;
    std::memcpy(&v[r], &bits, 4);
  }
  return load(v);
#endif
}

inline float e4m3_value(uint8_t b) {
  // The exponent and mantissa moved to where float32 has them, times 2^120, which also makes subnormals right.
  const uint32_t bits = static_cast<uint32_t>(b & 127) << 20;
  float v;
  std::memcpy(&v, &bits, 4);
  v *= 0x1p120f;
  if ((b & 127) == 127) v = std::numeric_limits<float>::quiet_NaN();
  return b & 128 ? -v : v;
}
inline f32x16 e4m3_bytes(const uint8_t* p) {
  float v[16];
  for (int r = 0; r < 16; ++r) v[r] = e4m3_value(p[r]);
  return load(v);
}

inline f32x16 zero_points(const Weight& w, int64_t at) {
  float z[16];
  for (int r = 0; r < 16; ++r)
    z[r] = w.zero_bits == 8 ? w.zeros[at * 16 + r] : w.zeros[at * 8 + (r & 7)] >> (r < 8 ? 0 : 4) & 15;
  return load(z);
}

// Values of groups [first, last) of a scale matrix: out [group - first][16 rows].
void read_scales(const Scales& s, const Weight& w, int64_t panel, int64_t first, int64_t last, float* out) {
  const int64_t groups = w.groups();
  if (s.kind == ScaleKind::none) {
    for (int64_t g = first; g < last; ++g) store(out + 16 * (g - first), set1(1.0f));
    return;
  }
  if (w.tile_rows > 1) {  // a panel lies in one tile
    for (int64_t g = first; g < last; ++g) store(out + 16 * (g - first), set1(scale_at(s, w, panel * kPanel, g)));
    return;
  }
  if (s.kind == ScaleKind::nested) {
    const int64_t from = first / 8 * 8, to = std::min(s.nested->width(), (last + 7) / 8 * 8);
    if (from == first && to == last) return decode_columns(*s.nested, panel, from, to, out);
    static thread_local std::vector<float> wide;
    if (static_cast<int64_t>(wide.size()) < 16 * (to - from)) wide.resize(static_cast<size_t>(16 * (to - from)));
    std::vector<float> mine;
    mine.swap(wide);  // the call below may come here again
    decode_columns(*s.nested, panel, from, to, mine.data());
    std::memcpy(out, mine.data() + 16 * (first - from), static_cast<size_t>(last - first) * 64);
    wide.swap(mine);
    return;
  }
  const int64_t base = (panel * groups + first) * 16;
  for (int64_t g = 0; g < last - first; ++g) {
    const int64_t at = base + 16 * g;
    f32x16 v;
    switch (s.kind) {
      case ScaleKind::f32: v = load(reinterpret_cast<const float*>(s.values) + at); break;
      case ScaleKind::f16: v = load(reinterpret_cast<const f16*>(s.values) + at); break;
      case ScaleKind::bf16: v = load(reinterpret_cast<const bf16*>(s.values) + at); break;
      case ScaleKind::e4m3: v = e4m3_bytes(s.values + at); break;
      default: v = exponent_bytes(s.values + at);
    }
    store(out + 16 * g, v);
  }
}

}  // namespace

void expand_bytes(const Weight& w, int part, int64_t panel, int64_t first, int64_t last, uint8_t* out) {
  const Fields f = panel_fields(w, panel);
  const uint8_t* table = w.byte_table.empty() ? nullptr : w.byte_table.data() + part * w.table_stride();
  for (int64_t h = first; h < last; ++h, out += 128) {
    b64 v[2];
    read_half(w.bits, f, h, v);
    if (table) {
      v[0] = lookup(v[0], table, w.bits);
      v[1] = lookup(v[1], table, w.bits);
    }
    store64(out, v[0]);
    store64(out + 64, v[1]);
  }
}

namespace {

template <int I> inline f32x16 value_of(const Weight& w, b64 v, int64_t panel) {
  if (w.table_per_row) {
    alignas(64) int32_t at[16];
    float out[16];
    const i32x16 code = byte_to_int<I>(v);
    std::memcpy(at, &code, 64);
    const float* table = w.table + panel * (int64_t{16} << w.bits);
    for (int r = 0; r < 16; ++r) out[r] = table[16 * at[r] + r];
    return load(out);
  }
  if (w.table) return gather(w.table, byte_to_int<I>(v));
  const f32x16 c = byte_to_float<I>(v);
  if (w.zeros) return c;
  return w.step == 1.0f ? c - set1(w.zero) : set1(w.step) * c - set1(w.zero);
}

}  // namespace

void expand_floats(const Weight& w, int64_t panel, int64_t first, int64_t last, float* out) {
  if (!w.coded()) {
    for (int64_t k = 8 * first; k < 8 * last; ++k, out += 16) {
      if (w.number == Number::bf16) {
        const int c = static_cast<int>(k % 8), pair = (c >> 2 & 1) + 2 * (c & 1);
        const bf16* p = reinterpret_cast<const bf16*>(w.values) + ((panel * w.blocks() * 2 + k / 8) * 4 + pair) * 32 + (c >> 1 & 1);
        for (int r = 0; r < 16; ++r) out[r] = to_f32(p[2 * r]);
      } else if (k >= w.cols) {
        store(out, zero());
      } else if (w.number == Number::f32) {
        store(out, load(reinterpret_cast<const float*>(w.values) + (panel * w.cols + k) * 16));
      } else {
        store(out, load(reinterpret_cast<const f16*>(w.values) + (panel * w.cols + k) * 16));
      }
    }
    return;
  }
  const Fields f = panel_fields(w, panel);
  if (w.bits <= 4 && !w.table_per_row) {
    const f32x16 table = load(w.small_table);
    for (int64_t h = first; h < last; ++h, out += 128) {
      b64 v[2];
      read_half(w.bits, f, h, v);
      for (int j = 0; j < 2; ++j) {
        store(out + 64 * j, pick16(table, shift_words<0>(v[j])));
        store(out + 64 * j + 16, pick16(table, shift_words<8>(v[j])));
        store(out + 64 * j + 32, pick16(table, shift_words<16>(v[j])));
        store(out + 64 * j + 48, pick16(table, shift_words<24>(v[j])));
      }
    }
    return;
  }
  for (int64_t h = first; h < last; ++h, out += 128) {
    b64 v[2];
    read_half(w.bits, f, h, v);
    for (int j = 0; j < 2; ++j) {
      store(out + 64 * j, value_of<0>(w, v[j], panel));
      store(out + 64 * j + 16, value_of<1>(w, v[j], panel));
      store(out + 64 * j + 32, value_of<2>(w, v[j], panel));
      store(out + 64 * j + 48, value_of<3>(w, v[j], panel));
    }
  }
}

#if defined(__AVX512BF16__)

namespace {

template <int B> void pairs_of(const Weight& w, int64_t panel, int64_t first, int64_t last, uint16_t* out) {
  const Fields f = panel_fields(w, panel);
  const Words<B> words(w.bf16_table.data());
  for (int64_t h = first; h < last; ++h, out += 128) {
    b64 v[2];
    read_half<B>(f, h, v);
    _mm512_storeu_si512(out, words.even(v[0]));
    _mm512_storeu_si512(out + 32, words.even(v[1]));
    _mm512_storeu_si512(out + 64, words.odd(v[0]));
    _mm512_storeu_si512(out + 96, words.odd(v[1]));
  }
}

}  // namespace

void expand_bf16(const Weight& w, int64_t panel, int64_t first, int64_t last, uint16_t* out) {
  switch (w.bits) {
    case 1: return pairs_of<1>(w, panel, first, last, out);
    case 2: return pairs_of<2>(w, panel, first, last, out);
    case 3: return pairs_of<3>(w, panel, first, last, out);
    case 4: return pairs_of<4>(w, panel, first, last, out);
    case 5: return pairs_of<5>(w, panel, first, last, out);
    case 6: return pairs_of<6>(w, panel, first, last, out);
    case 7: return pairs_of<7>(w, panel, first, last, out);
    default: return pairs_of<8>(w, panel, first, last, out);
  }
}

#endif

namespace {

// A scale a segment and nothing else: the usual case, which few tokens feel.
template <class T, class Read>
void plain_scales(const uint8_t* values, int64_t at, int64_t n, int64_t ahead, float factor, float* to, const Read& read) {
  const T* from = reinterpret_cast<const T*>(values) + at;
  for (int64_t s = 0; s < n; s += 4 / static_cast<int64_t>(sizeof(T))) __builtin_prefetch(from + 16 * s + ahead);
  if (factor == 1.0f)
    for (int64_t s = 0; s < n; ++s) store(to + 16 * s, read(from + 16 * s));
  else
    for (int64_t s = 0; s < n; ++s) store(to + 16 * s, read(from + 16 * s) * set1(factor));
}

}  // namespace

void expand_scales(const Weight& w, Values of, int64_t panel, int64_t length, int64_t first, int64_t last,
                   int64_t ahead, float* scales, float* offsets) {
  if (!offsets && w.group == length && w.tile_rows == 1) {
    const int64_t at = (panel * w.groups() + first) * 16;
    const float factor = of == Values::bytes ? w.byte_scale : 1.0f;
    ahead *= w.groups() * 16;
    const auto go = [&]<class T>(const T*, const auto& read) {
      plain_scales<T>(w.scales.values, at, last - first, ahead, factor, scales, read);
    };
    const auto plain = [](const auto* p) { return load(p); };
    switch (w.scales.kind) {
      case ScaleKind::f32: return go(static_cast<const float*>(nullptr), plain);
      case ScaleKind::f16: return go(static_cast<const f16*>(nullptr), plain);
      case ScaleKind::bf16: return go(static_cast<const bf16*>(nullptr), plain);
      case ScaleKind::e8m0: return go(static_cast<const uint8_t*>(nullptr), exponent_bytes);
      case ScaleKind::e4m3: return go(static_cast<const uint8_t*>(nullptr), e4m3_bytes);
      default: break;
    }
  }
  const bool bytes = of == Values::bytes;
  const f32x16 factor = set1(bytes ? w.byte_scale : 1.0f);
  const int64_t group = w.group ? w.group : w.width() + length;
  // Segments of one group share its scale, so that groups are read once, into the front of the output.
  const int64_t g0 = first * length / group, g1 = std::min(w.groups(), ((last - 1) * length) / group + 1);
  static thread_local std::vector<float> buffer;
  const bool direct = group == length;
  std::vector<float> own;
  own.swap(buffer);
  const auto need = static_cast<size_t>(32 * (g1 - g0));
  if (own.size() < need) own.resize(need);
  float* base = direct ? scales : own.data();
  read_scales(w.scales, w, panel, g0, g1, base);
  float* low = own.data() + 16 * (g1 - g0);
  const bool minimum = w.mins.kind != ScaleKind::none;
  if (offsets && minimum) read_scales(w.mins, w, panel, g0, g1, low);
  for (int64_t s = first; s < last; ++s) {
    const int64_t g = std::min(s * length / group, g1 - 1) - g0;
    const f32x16 scale = load(base + 16 * g);
    if (offsets) {
      f32x16 o = zero();
      if (minimum) o = load(low + 16 * g);
      else if (w.zeros) o = scale * zero_points(w, panel * w.groups() + g0 + g);
      else o = scale * set1(w.zero);
      store(offsets + 16 * (s - first), o);
    }
    store(scales + 16 * (s - first), scale * factor);
  }
  buffer.swap(own);
}

void decode_columns(const Weight& w, int64_t panel, int64_t first, int64_t last, float* out) {
  expand_floats(w, panel, first / 8, last / 8, out);
  if (!w.coded()) return;
  const int64_t group = w.group ? w.group : w.width();
  const int64_t g0 = first / group, g1 = std::min(w.groups(), (last - 1) / group + 1);
  std::vector<float> scales(static_cast<size_t>(32 * (g1 - g0)));
  float* low = scales.data() + 16 * (g1 - g0);
  read_scales(w.scales, w, panel, g0, g1, scales.data());
  const bool minimum = w.mins.kind != ScaleKind::none;
  if (minimum) read_scales(w.mins, w, panel, g0, g1, low);
  for (int64_t g = g0; g < g1; ++g) {
    const f32x16 s = load(scales.data() + 16 * (g - g0));
    const f32x16 z = w.zeros ? zero_points(w, panel * w.groups() + g) : zero();
    const f32x16 m = minimum ? load(low + 16 * (g - g0)) : zero();
    for (int64_t k = std::max(first, g * group); k < std::min(last, (g + 1) * group); ++k) {
      f32x16 v = load(out + 16 * (k - first));
      if (w.zeros) v = v - z;
      v = s * v;
      if (minimum) v = v - m;
      store(out + 16 * (k - first), v);
    }
  }
}

}  // namespace GSM_LEVEL
}  // namespace gsm
