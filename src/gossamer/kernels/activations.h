// Activation functions and the normalisation of one row, sixteen lanes at a time. Include only from files compiled once
// per level.
#pragma once
#include <cmath>

#include "simd.h"

namespace gsm::GSM_LEVEL {

// 1 / (1 + e^-x) without overflow on either side: e^-|x| is at most 1.
inline f32x16 sigmoid(f32x16 x) {
  const f32x16 e = exp(-abs(x));
  return select_less(x, zero(), e, set1(1.0f)) / (set1(1.0f) + e);
}

inline f32x16 silu(f32x16 x) { return x * sigmoid(x); }

// 0.5 x (1 + tanh u) = x sigmoid(2u), u = sqrt(2/pi) (x + 0.044715 x^3); no cancellation for negative x.
inline f32x16 gelu_tanh(f32x16 x) {
  const f32x16 u = x * fma(x * x, set1(0.044715f), set1(1.0f));
  return x * sigmoid(u * set1(1.5957691216057308f));
}

// x Phi(x). With z = |x| / sqrt 2 and t = 1 / (1 + 0.3 z), Phi(-|x|) = exp(-z^2) t P(t - 1/2) / 2, where P is a
// least-maximum fit of erfc(z) exp(z^2) / t of degree 8 (relative error 2e-8 for z < 9.6, beyond which exp is zero);
// small results for negative x keep their relative accuracy.
inline f32x16 gelu(f32x16 x) {
  const f32x16 t = set1(1.0f) / fma(abs(x), set1(0.3f * 0.70710678118654752f), set1(1.0f));
  const f32x16 s = t - set1(0.5f);
  f32x16 p = set1(-0.12945787608623505f);
  p = fma(p, s, set1(-0.03260991349816322f));
  p = fma(p, s, set1(0.28056180477142334f));
  p = fma(p, s, set1(0.6534332633018494f));
  p = fma(p, s, set1(0.9112808108329773f));
  p = fma(p, s, set1(0.949734091758728f));
  p = fma(p, s, set1(0.7951261401176453f));
  p = fma(p, s, set1(0.553047239780426f));
  p = fma(p, s, set1(0.3249799311161041f));
  const f32x16 tail = set1(0.5f) * exp(x * x * set1(-0.5f)) * t * p;
  return x * select_less(x, zero(), tail, set1(1.0f) - tail);
}

inline float mean_square(const float* x, int64_t width) {
  // Four accumulators hide the latency of the add; the order depends on the width alone.
  f32x16 a = zero(), b = zero(), c = zero(), d = zero();
  int64_t i = 0;
  for (; i + 64 <= width; i += 64) {
    const f32x16 p = load(x + i), q = load(x + i + 16), r = load(x + i + 32), s = load(x + i + 48);
    a = fma(p, p, a);
    b = fma(q, q, b);
    c = fma(r, r, c);
    d = fma(s, s, d);
  }
  for (; i < width; i += 16) {
    const f32x16 p = load_first(x + i, static_cast<int>(width - i < 16 ? width - i : 16));
    a = fma(p, p, a);
  }
  return sum((a + b) + (c + d)) / static_cast<float>(width);
}

// out = x / sqrt(mean(x^2) + eps) * gain; out may be x.
inline void rmsnorm_row(const float* x, const float* gain, float eps, float* out, int64_t width) {
  const f32x16 inverse = set1(1.0f / std::sqrt(mean_square(x, width) + eps));
  for (int64_t i = 0; i < width; i += 16) {
    const int n = static_cast<int>(width - i < 16 ? width - i : 16);
    store_first(out + i, load_first(x + i, n) * inverse * load_first(gain + i, n), n);
  }
}

}  // namespace gsm::GSM_LEVEL
