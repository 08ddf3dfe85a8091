#include "weight.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "expand.h"
#include "team.h"

namespace gsm {
namespace {

int64_t scale_bytes(const Scales& s) {
  switch (s.kind) {
    case ScaleKind::f32: return 4;
    case ScaleKind::f16:
    case ScaleKind::bf16: return 2;
    case ScaleKind::e8m0:
    case ScaleKind::e4m3: return 1;
    default: return 0;
  }
}

int64_t scale_count(const Weight& w) {
  return w.tile_rows == 1 ? w.panels() * w.groups() * kPanel : w.row_tiles() * w.groups();
}

template <class T> T read(const uint8_t* p, int64_t i) {
  T v;
  std::memcpy(&v, p + i * static_cast<int64_t>(sizeof(T)), sizeof(T));
  return v;
}

float e4m3(uint8_t b) {
  const int e = b >> 3 & 15, m = b & 7;
  float v;
  if (e == 15 && m == 7) v = std::nanf("");
  else v = e ? std::ldexp(static_cast<float>(8 + m), e - 10) : std::ldexp(static_cast<float>(m), -9);
  return b & 128 ? -v : v;
}

int code_at(const Weight& w, int64_t panel, int lane, int64_t col) {
  const int64_t block = panel * w.blocks() + col / kBlock;
  const int h = static_cast<int>(col / 4 % 4), i = static_cast<int>(col % 4), at = 4 * lane + i;
  if (w.bits == 8) return w.q8[block * 256 + 64 * h + at];
  int code = 0, shift = 0;
  if (w.bits & 4) {
    const int byte = w.q4[block * 128 + 64 * (h / 2) + at];
    code = h & 1 ? byte >> 4 : byte & 15;
    shift = 4;
  }
  if (w.bits & 2) {
    code |= (w.q2[block * 64 + at] >> (2 * h) & 3) << shift;
    shift += 2;
  }
  if (w.bits & 1) code |= (w.q1[block * 32 + 8 * h + at / 8] >> (at % 8) & 1) << shift;
  return code;
}

}  // namespace

ArrayBytes array_bytes(const Weight& w) {
  ArrayBytes n;
  const int64_t cells = w.panels() * w.blocks();
  switch (w.number) {
    case Number::f32: n.values = w.panels() * w.cols * 64; return n;
    case Number::f16: n.values = w.panels() * w.cols * 32; return n;
    case Number::bf16: n.values = cells * 512; return n;
    case Number::coded: break;
  }
  n.q8 = w.bits == 8 ? cells * 256 : 0;
  n.q4 = w.bits != 8 && w.bits & 4 ? cells * 128 : 0;
  n.q2 = w.bits != 8 && w.bits & 2 ? cells * 64 : 0;
  n.q1 = w.bits != 8 && w.bits & 1 ? cells * 32 : 0;
  n.zeros = w.zero_bits ? w.panels() * w.groups() * 2 * w.zero_bits : 0;
  n.scales = scale_count(w) * scale_bytes(w.scales);
  n.mins = scale_count(w) * scale_bytes(w.mins);
  n.table = w.table ? (int64_t{4} << w.bits) * (w.table_per_row ? w.panels() * kPanel : 1) : 0;
  return n;
}

float scale_at(const Scales& s, const Weight& w, int64_t row, int64_t group) {
  const int64_t tile = row / w.tile_rows;
  if (s.kind == ScaleKind::nested) return decode_element(*s.nested, tile, group);
  const int64_t at =
      w.tile_rows == 1 ? (row / kPanel * w.groups() + group) * kPanel + row % kPanel : tile * w.groups() + group;
  switch (s.kind) {
    case ScaleKind::none: return 1.0f;
    case ScaleKind::f32: return read<float>(s.values, at);
    case ScaleKind::f16: return to_f32(read<f16>(s.values, at));
    case ScaleKind::bf16: return to_f32(read<bf16>(s.values, at));
    case ScaleKind::e4m3: return e4m3(s.values[at]);
    default: {  // e8m0: 2^(b - 127), 255 is NaN
      const uint8_t b = s.values[at];
      return b == 255 ? std::nanf("") : std::ldexp(1.0f, b - 127);
    }
  }
}

float decode_element(const Weight& w, int64_t row, int64_t col) {
  const int64_t panel = row / kPanel;
  const int lane = static_cast<int>(row % kPanel);
  switch (w.number) {
    case Number::f32: return read<float>(w.values, (panel * w.cols + col) * kPanel + lane);
    case Number::f16: return to_f32(read<f16>(w.values, (panel * w.cols + col) * kPanel + lane));
    case Number::bf16: {
      const int64_t half = panel * w.blocks() * 2 + col / 8;
      const int c = static_cast<int>(col % 8), pair = (c >> 2 & 1) + 2 * (c & 1), which = c >> 1 & 1;
      return to_f32(read<bf16>(w.values, ((half * 4 + pair) * kPanel + lane) * 2 + which));
    }
    case Number::coded: break;
  }
  const int code = code_at(w, panel, lane, col);
  const int64_t group = w.group ? col / w.group : 0;
  float q;
  if (w.table_per_row) q = w.table[(panel * (int64_t{1} << w.bits) + code) * kPanel + lane];
  else q = w.value(code);
  if (w.zeros) {
    const int64_t at = panel * w.groups() + group;
    const int z = w.zero_bits == 8 ? w.zeros[at * kPanel + lane] : w.zeros[at * 8 + (lane & 7)] >> (lane < 8 ? 0 : 4) & 15;
    q = static_cast<float>(code - z);
  }
  const float s = w.scales.kind == ScaleKind::none ? 1.0f : scale_at(w.scales, w, row, group);
  const float v = s * q;
  return w.mins.kind == ScaleKind::none ? v : v - scale_at(w.mins, w, row, group);
}

void prepare_bytes(Weight& w) {
  w.byte_parts = 0;
  w.byte_scale = 1;
  w.bf16_exact = w.number == Number::bf16;
  if (!w.coded() || w.table_per_row) return;
  const int n = 1 << w.bits;
  w.bf16_exact = true;
  for (int c = 0; c < n; ++c) {
    const float v = w.value(c);
    if (v == v && round_to_bf16(v) != v) w.bf16_exact = false;
  }
  for (int c = 0; w.bf16_exact && c < std::max(n, 32); ++c) w.bf16_table.push_back(to_bf16(w.value(c & (n - 1))).bits);
  for (int c = 0; w.bits <= 4 && c < 16; ++c) w.small_table[c] = w.value(c & (n - 1));
  if (!w.table) {
    w.byte_parts = 1;
    w.byte_scale = w.step;
    return;
  }
  // A power of two that makes every value an integer; else the largest value is put on 32767, which rounds the others
  // to 2^-16 of it.
  float top = 0;
  for (int c = 0; c < n; ++c) {
    if (!std::isfinite(w.table[c])) return;  // a NaN has no integer
    top = std::fmax(top, std::fabs(w.table[c]));
  }
  if (top == 0) return;
  float factor = 0;
  for (float f = 1.0f / 1024; f <= 65536.0f && f * top <= 32767.0f; f *= 2) {
    bool whole = true;
    for (int c = 0; c < n && whole; ++c) whole = std::rint(w.table[c] * f) == w.table[c] * f;
    if (whole) {
      factor = f;
      break;
    }
  }
  if (factor == 0) {
    if (w.bits > 4) return;  // wide minifloats span more than 16 bits: float paths are exact for them
    factor = 32767.0f / top;
    if (!(factor < 0x1p100f)) return;  // its inverse would be subnormal
  }
  w.byte_parts = top * factor <= 127.0f ? 1 : 2;
  w.byte_scale = 1.0f / factor;
  const int stride = w.table_stride();
  w.byte_table.assign(static_cast<size_t>(w.byte_parts * stride), 0);
  for (int c = 0; c < n; ++c) {
    const int v = static_cast<int>(std::rint(w.table[c] * factor));
    if (w.byte_parts == 1) {
      w.byte_table[static_cast<size_t>(c)] = static_cast<uint8_t>(v + 128);
    } else {  // 256 (hi - 128) + lo
      w.byte_table[static_cast<size_t>(c)] = static_cast<uint8_t>((v + 32768) >> 8);
      w.byte_table[static_cast<size_t>(stride + c)] = static_cast<uint8_t>((v + 32768) & 255);
    }
  }
}

bool need_offset(const Weight& w, Values of) {
  if (w.has_offset()) return true;
  return of == Values::bytes && !w.table && w.zero != w.step * static_cast<float>(byte_zero(w, 0));
}

void decode_row(const Weight& w, int64_t row, float* out) {
  // A scale is looked up once a group: nested ones cost a decode each.
  if (!w.coded()) {
    for (int64_t k = 0; k < w.cols; ++k) out[k] = decode_element(w, row, k);
    return;
  }
  const int64_t panel = row / kPanel;
  const int lane = static_cast<int>(row % kPanel);
  for (int64_t g = 0, k = 0; k < w.cols; ++g) {
    const int64_t end = w.group ? std::min(w.cols, (g + 1) * w.group) : w.cols;
    const float s = w.scales.kind == ScaleKind::none ? 1.0f : scale_at(w.scales, w, row, g);
    const bool minimum = w.mins.kind != ScaleKind::none;
    const float m = minimum ? scale_at(w.mins, w, row, g) : 0.0f;
    int z = 0;
    if (w.zeros) {
      const int64_t at = panel * w.groups() + g;
      z = w.zero_bits == 8 ? w.zeros[at * kPanel + lane] : w.zeros[at * 8 + (lane & 7)] >> (lane < 8 ? 0 : 4) & 15;
    }
    for (; k < end; ++k) {
      const int code = code_at(w, panel, lane, k);
      float q;
      if (w.zeros) q = static_cast<float>(code - z);
      else if (w.table_per_row) q = w.table[(panel * (int64_t{1} << w.bits) + code) * kPanel + lane];
      else q = w.value(code);
      out[k] = minimum ? s * q - m : s * q;
    }
  }
}

void decode_rows(const Weight& w, const int64_t* ids, int64_t n, float* out) {
  team_share(n, n * w.cols, [&](int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end; ++j) decode_row(w, ids[j], out + j * w.cols);
  });
}

}  // namespace gsm
