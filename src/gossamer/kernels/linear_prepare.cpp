// One token of input into the form that the inner loops read.
#include <algorithm>
#include <cmath>

#include <vector>

#include "activations.h"
#include "linear.h"

namespace gsm::GSM_LEVEL {
namespace {

inline int lanes(int64_t left) { return static_cast<int>(std::min<int64_t>(16, left)); }

struct Range16 {
  float low, high, peak;
  bool finite;
};
Range16 range_of(const float* x, int64_t n) {
  f32x16 low = zero(), high = zero(), poison = zero();
  for (int64_t k = 0; k < n; k += 16) {
    const f32x16 v = load_first(x + k, lanes(n - k));
    low = min(v, low);
    high = max(v, high);
    poison = fma(v, zero(), poison);  // 0 * inf and 0 * NaN are NaN
  }
  const float l = -max(-low), h = max(high);
  return {l, h, std::max(-l, h), sum(poison) == 0.0f};
}

float round_e4m3(float v) {
  v = std::max(-448.0f, std::min(448.0f, v));
  const float a = std::fabs(v);
  int e;
  std::frexp(a, &e);  // a = f * 2^e, f in [0.5, 1)
  const float step = std::ldexp(1.0f, std::max(e - 1, -6) - 3);
  return a == 0 ? v : std::copysign(std::min(448.0f, step * std::nearbyint(a / step)), v);
}

// Quantizes x [n] with one scale: whole numbers in q, of which x is about s times.
float quantize(const float* x, int64_t n, const InputFormat& in, float* q) {
  const Range16 r = range_of(x, n);
  float s = 0, low = 0, top = 0, zero_point = 0;
  switch (in.rounding) {
    case Rounding::int8: top = 127, low = -127, s = r.peak / 127.0f; break;
    case Rounding::int4: top = 7, low = -7, s = r.peak / 7.0f; break;
    case Rounding::uint4:
    case Rounding::uint8: {
      const float levels = in.rounding == Rounding::uint4 ? 15.0f : 255.0f;
      s = in.fixed > 0 ? in.fixed : (r.high - r.low) / levels;
      zero_point = s > 0 ? std::max(0.0f, std::min(levels, std::nearbyint(-r.low / s))) : 0.0f;
      low = -zero_point, top = levels - zero_point;
      break;
    }
    default: s = r.peak / 448.0f;
  }
  if (in.fixed > 0) s = in.fixed;
  if (!r.finite || !(s > 0)) {
    std::fill(q, q + n, 0.0f);
    return r.finite ? 0.0f : std::numeric_limits<float>::quiet_NaN();
  }
  if (in.rounding == Rounding::e4m3) {
    for (int64_t k = 0; k < n; ++k) q[k] = round_e4m3(x[k] / s);
    return s;
  }
  const f32x16 divisor = set1(s), lo = set1(low), hi = set1(top);
  for (int64_t k = 0; k < n; k += 16) {
    const int m = lanes(n - k);
    // A subnormal s is rounded coarsely, so the quotient can pass the last number.
    store_first(q + k, max(lo, min(hi, rint(load_first(x + k, m) / divisor))), m);
  }
  return s;
}

}  // namespace

void normalize_token(const float* x, const float* gain, float eps, int64_t cols, float* out) {
  rmsnorm_row(x, gain, eps, out, cols);
}

void prepare_token(const float* x, const Form& form, int64_t tokens, int64_t token, float* q) {
  const InputFormat& in = form.input;
  const int64_t cols = form.cols, width = form.width;
  const Tile tile = tile_of(tokens, token);
  const int64_t T = tile.end - tile.begin, t = token - tile.begin;
  const bool bytes = form.path == Path::bytes;
  const float* v = x;  // what is multiplied: rounded elements, or whole numbers
  float token_scale = 1.0f;
  const int64_t group = in.group ? in.group : cols;
  static thread_local std::vector<float> group_scales, kept;
  if (in.integer()) {
    if (in.outlier > 0) {
      kept.assign(x, x + cols);
      int32_t count = 0;
      for (int64_t k = 0; k < cols; ++k)
        if (std::fabs(x[k]) >= in.outlier) {
          kept[static_cast<size_t>(k)] = 0.0f;
          if (bytes) form.outlier[token * cols + count++] = {static_cast<int32_t>(k), x[k]};
        }
      if (bytes) form.outliers[token] = count;
    }
    const float* from = in.outlier > 0 ? kept.data() : x;
    const int64_t groups = (cols + group - 1) / group;
    if (static_cast<int64_t>(group_scales.size()) < groups) group_scales.resize(static_cast<size_t>(groups));
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t begin = g * group, n = std::min(cols, begin + group) - begin;
      const float s = group_scales[static_cast<size_t>(g)] = quantize(from + begin, n, in, q + begin);
      if (!bytes)
        for (int64_t k = begin; k < begin + n; ++k)
          q[k] = in.outlier > 0 && std::fabs(x[k]) >= in.outlier ? x[k] : s == s ? s * q[k] : s;
    }
    v = q;
    if (bytes && !in.group) token_scale = group_scales[0];
  } else if (in.rounding == Rounding::bf16) {
    for (int64_t k = 0; k < cols; ++k) q[k] = round_to_bf16(x[k]);
    v = q;
  }
  if (form.token_scale) form.token_scale[token] = token_scale;

  uint8_t* data = form.data + tile.begin * form.stride() + t * 4;
  switch (form.path) {
    case Path::bytes:
      for (int64_t k = 0; k < width; k += 4, data += 4 * T) {
        int8_t b[4];
        for (int i = 0; i < 4; ++i) b[i] = k + i < cols ? static_cast<int8_t>(v[k + i]) : int8_t{0};
        std::memcpy(data, b, 4);
      }
      break;
    case Path::pairs: {
      constexpr int order[8] = {0, 2, 4, 6, 1, 3, 5, 7};
      for (int64_t k = 0; k < width; k += 8)
        for (int p = 0; p < 4; ++p, data += 4 * T) {
          const int64_t a = k + order[2 * p], b = k + order[2 * p + 1];
          const bf16 pair[2] = {to_bf16(a < cols ? v[a] : 0.0f), to_bf16(b < cols ? v[b] : 0.0f)};
          std::memcpy(data, pair, 4);
        }
      break;
    }
    case Path::floats:
      for (int64_t k = 0; k < width; ++k, data += 4 * T) {
        const float f = k < cols ? v[k] : 0.0f;
        std::memcpy(data, &f, 4);
      }
  }
  for (const Sums& s : form.sums) {
    const int64_t base = tile.begin * s.segments + t;
    for (int64_t g = 0; g < s.segments; ++g) {
      const int64_t begin = g * s.length, end = std::min(cols, begin + s.length), at = base + g * T;
      const float scale = in.group && bytes ? group_scales[static_cast<size_t>(begin / group)] : 1.0f;
      if (s.scales) s.scales[at] = scale;
      if (!s.bytes && !s.floats) continue;
      f32x16 total = zero();
      for (int64_t k = begin; k < end; k += 16) total = total + load_first(v + k, lanes(end - k));
      const float f = sum(total);  // of whole numbers, exact below 2^24
      if (s.bytes) {
        int32_t whole = 0;
        if (end - begin <= 65536) whole = static_cast<int32_t>(f);
        else
          for (int64_t k = begin; k < end; ++k) whole += static_cast<int32_t>(v[k]);
        s.bytes[at] = whole;
        if (s.floats) s.floats[at] = static_cast<float>(whole) * scale;
      } else {
        s.floats[at] = f;
      }
    }
  }
}

}  // namespace gsm::GSM_LEVEL
