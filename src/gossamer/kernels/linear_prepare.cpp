// One token of input into the form that the inner loops read.
#include <algorithm>
#include <cmath>

#include <vector>

#include "activations.h"
#include "linear.h"

namespace gsm::GSM_LEVEL {
namespace {

inline int lanes(int64_t left) { return static_cast<int>(std::min<int64_t>(16, left)); }

// The largest magnitude of x [n]; infinite or NaN when x holds an infinity or a NaN. The bits of magnitudes are ordered
// like integers, with NaN above all, so that one maximum serves both.
float peak_of(const float* x, int64_t n) {
#if defined(__AVX512F__)
  const __m512i magnitude = _mm512_set1_epi32(0x7FFFFFFF);
  __m512i top = _mm512_setzero_si512();
  for (int64_t k = 0; k < n; k += 16)
    top = _mm512_max_epu32(top, _mm512_and_si512(_mm512_castps_si512(load_first(x + k, lanes(n - k)).v), magnitude));
  const uint32_t bits = _mm512_reduce_max_epu32(top);
#else
  uint32_t bits = 0;
  for (int64_t k = 0; k < n; ++k) {
    uint32_t u;
    std::memcpy(&u, x + k, 4);
    bits = std::max(bits, u & 0x7FFFFFFFu);
  }
#endif
  float peak;
  std::memcpy(&peak, &bits, 4);
  return peak;
}

// q = clamp(rint(x / s), low, top) as bytes.
void round_bytes(const float* x, int64_t n, float s, float low, float top, int8_t* q) {
  const f32x16 divisor = set1(s), lo = set1(low), hi = set1(top);
  for (int64_t k = 0; k < n; k += 16) {
    const int m = lanes(n - k);
    // A subnormal s is rounded coarsely, so the quotient can pass the last number.
    const i32x16 r = to_int(max(lo, min(hi, rint(load_first(x + k, m) / divisor))));
#if defined(__AVX512F__)
    _mm_mask_storeu_epi8(q + k, first(m), _mm512_cvtepi32_epi8(r.v));
#else
    int32_t v[16];
    std::memcpy(v, &r, 64);
    for (int i = 0; i < m; ++i) q[k + i] = static_cast<int8_t>(v[i]);
#endif
  }
}

int32_t sum_bytes(const int8_t* q, int64_t n) {
  int32_t total = 0;
  for (int64_t k = 0; k < n; ++k) total += q[k];
  return total;
}

float round_e4m3(float v) {
  v = std::max(-448.0f, std::min(448.0f, v));
  const float a = std::fabs(v);
  int e;
  std::frexp(a, &e);  // a = f * 2^e, f in [0.5, 1)
  const float step = std::ldexp(1.0f, std::max(e - 1, -6) - 3);
  return a == 0 ? v : std::copysign(std::min(448.0f, step * std::nearbyint(a / step)), v);
}

// Quantizes x [n] with one scale, which is returned: whole numbers in q, or e4m3 values in `values`.
float quantize(const float* x, int64_t n, const InputFormat& in, int8_t* q, float* values) {
  const float peak = peak_of(x, n);
  const bool finite = std::isfinite(peak);
  float s = 0, low = 0, top = 0;
  switch (in.rounding) {
    case Rounding::int8: top = 127, low = -127, s = peak / 127.0f; break;
    case Rounding::int4: top = 7, low = -7, s = peak / 7.0f; break;
    case Rounding::uint4:
    case Rounding::uint8: {
      const float levels = in.rounding == Rounding::uint4 ? 15.0f : 255.0f;
      float l = 0, h = 0;
      for (int64_t k = 0; k < n; ++k) l = std::min(l, x[k]), h = std::max(h, x[k]);
      s = in.fixed > 0 ? in.fixed : (h - l) / levels;
      const float z = finite && s > 0 ? std::max(0.0f, std::min(levels, std::nearbyint(-l / s))) : 0.0f;
      low = -z, top = levels - z;
      break;
    }
    default: s = peak / 448.0f;
  }
  if (in.fixed > 0) s = in.fixed;
  if (!finite || !(s > 0) || !std::isfinite(s)) {
    for (int64_t k = 0; k < n; ++k) {
      if (values) values[k] = 0.0f;
      else q[k] = 0;
    }
    return finite && std::isfinite(s) ? 0.0f : std::numeric_limits<float>::quiet_NaN();
  }
  if (in.rounding == Rounding::e4m3) {
    for (int64_t k = 0; k < n; ++k) values[k] = round_e4m3(x[k] / s);
  } else if (values) {  // the whole numbers as floats: for uint8 they have nine bits
    for (int64_t k = 0; k < n; ++k) values[k] = std::max(low, std::min(top, std::nearbyint(x[k] / s)));
  } else {
    round_bytes(x, n, s, low, top, q);
  }
  return s;
}

}  // namespace

void normalize_token(const float* x, const float* gain, float eps, int64_t cols, float* out) {
  rmsnorm_row(x, gain, eps, out, cols);
}

namespace {

// The scales of a token's groups, and what it looks like without its outliers.
struct Memory {
  std::vector<float> scales, kept;
  std::vector<int8_t> bytes;
};

// Elements that are at least the threshold leave a zero; for bytes they are listed.
const float* keep_apart(const float* x, const Form& form, int64_t token, Memory& memory) {
  const InputFormat& in = form.input;
  if (!(in.outlier > 0)) return x;
  memory.kept.assign(x, x + form.cols);
  int32_t count = 0;
  for (int64_t k = 0; k < form.cols; ++k)
    if (std::fabs(x[k]) >= in.outlier) {
      memory.kept[static_cast<size_t>(k)] = 0.0f;
      if (form.path == Path::bytes) form.outlier[token * form.cols + count++] = {static_cast<int32_t>(k), x[k]};
    }
  if (form.path == Path::bytes) form.outliers[token] = count;
  return memory.kept.data();
}

void prepare_bytes_of(const float* x, const Form& form, const Tile& tile, int64_t token, Memory& memory) {
  const InputFormat& in = form.input;
  const int64_t cols = form.cols, T = tile.end - tile.begin, t = token - tile.begin, group = in.group ? in.group : cols;
  x = keep_apart(x, form, token, memory);
  memory.bytes.resize(static_cast<size_t>(form.width));
  int8_t* q = memory.bytes.data();
  memory.scales.resize(static_cast<size_t>((cols + group - 1) / group));
  for (int64_t g = 0, k = 0; k < cols; ++g, k += group)
    memory.scales[static_cast<size_t>(g)] = quantize(x + k, std::min(group, cols - k), in, q + k, nullptr);
  std::fill(q + cols, q + form.width, int8_t{0});
  if (form.token_scale) form.token_scale[token] = in.group ? 1.0f : memory.scales[0];
  uint8_t* data = form.data + tile.begin * form.stride() + t * 4;
  for (int64_t k = 0; k < form.width; k += 4, data += 4 * T) std::memcpy(data, q + k, 4);
  for (const Sums& s : form.sums) {
    const int64_t base = tile.begin * s.segments + t;
    for (int64_t g = 0; g < s.segments; ++g) {
      const int64_t begin = g * s.length, at = base + g * T;
      const float scale = in.group ? memory.scales[static_cast<size_t>(begin / group)] : 1.0f;
      if (s.scales) s.scales[at] = scale;
      if (!s.bytes) continue;
      s.bytes[at] = sum_bytes(q + begin, std::min(s.length, cols - begin));
      if (s.floats) s.floats[at] = static_cast<float>(s.bytes[at]) * scale;
    }
  }
}

}  // namespace

void prepare_token(const float* x, const Form& form, int64_t tokens, int64_t token, float* v) {
  static thread_local Memory memory;
  const InputFormat& in = form.input;
  const int64_t cols = form.cols, width = form.width;
  const Tile tile = tile_of(tokens, token);
  if (form.path == Path::bytes) return prepare_bytes_of(x, form, tile, token, memory);
  // v: the elements as they are multiplied, rounded, zeros behind them.
  if (in.integer()) {
    const float* from = keep_apart(x, form, token, memory);
    const int64_t group = in.group ? in.group : cols;
    for (int64_t k = 0; k < cols; k += group) {
      const int64_t n = std::min(group, cols - k);
      const float s = quantize(from + k, n, in, nullptr, v + k);
      for (int64_t i = k; i < k + n; ++i) v[i] = in.outlier > 0 && std::fabs(x[i]) >= in.outlier ? x[i] : s == s ? s * v[i] : s;
    }
  } else if (in.rounding == Rounding::bf16) {
    for (int64_t k = 0; k < cols; ++k) v[k] = round_to_bf16(x[k]);
  } else {
    std::copy(x, x + cols, v);
  }
  std::fill(v + cols, v + width, 0.0f);
  const int64_t T = tile.end - tile.begin, t = token - tile.begin;
  uint8_t* data = form.data + tile.begin * form.stride() + t * 4;
  if (form.path == Path::pairs) {
    constexpr int order[8] = {0, 2, 4, 6, 1, 3, 5, 7};
    for (int64_t k = 0; k < width; k += 8) {
      uint32_t u[8];
      std::memcpy(u, v + k, 32);
      for (int p = 0; p < 4; ++p, data += 4 * T) {  // already rounded: the low halves are zero, but for a NaN's
        const uint32_t pair = u[order[2 * p]] >> 16 | (u[order[2 * p + 1]] & 0xFFFF0000u);
        std::memcpy(data, &pair, 4);
      }
    }
  } else {
    for (int64_t k = 0; k < width; ++k, data += 4 * T) std::memcpy(data, v + k, 4);
  }
  for (const Sums& s : form.sums) {
    if (!s.floats) continue;
    for (int64_t g = 0; g < s.segments; ++g) {
      const int64_t begin = g * s.length, end = std::min(cols, begin + s.length);
      f32x16 total = zero();
      for (int64_t k = begin; k < end; k += 16) total = total + load_first(v + k, lanes(end - k));
      s.floats[tile.begin * s.segments + g * T + t] = sum(total);
    }
  }
}

}  // namespace gsm::GSM_LEVEL
