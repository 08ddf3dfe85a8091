#include "rows.h"

#include <cmath>

#include "simd.h"

namespace gsm::GSM_LEVEL {
namespace {

// Elements are independent of each other, so a range may begin anywhere and a short tail uses the same lanes.
template <class Fn>
void lanes(int64_t n, const Fn& fn) {
  for (int64_t i = 0; i < n; i += 16) fn(i, static_cast<int>(n - i < 16 ? n - i : 16));
}

// 1 / (1 + e^-x) without overflow on either side: e^-|x| is at most 1.
f32x16 sigmoid(f32x16 x) {
  const f32x16 e = exp(-abs(x));
  return select_less(x, zero(), e, set1(1.0f)) / (set1(1.0f) + e);
}

f32x16 silu(f32x16 x) { return x * sigmoid(x); }

// 0.5 x (1 + tanh u) = x sigmoid(2u), u = sqrt(2/pi) (x + 0.044715 x^3); no cancellation for negative x.
f32x16 gelu_tanh(f32x16 x) {
  const f32x16 u = x * fma(x * x, set1(0.044715f), set1(1.0f));
  return x * sigmoid(u * set1(1.5957691216057308f));
}

// x Phi(x). With z = |x| / sqrt 2 and t = 1 / (1 + 0.3 z), Phi(-|x|) = exp(-z^2) t P(t - 1/2) / 2, where P is a
// least-maximum fit of erfc(z) exp(z^2) / t of degree 8 (relative error 2e-8 for z < 9.6, beyond which exp is zero);
// small results for negative x keep their relative accuracy.
f32x16 gelu(f32x16 x) {
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

template <class Act>
void gate_with(const Act& act, const float* gate, const float* up, float* out, int64_t n) {
  lanes(n, [=](int64_t i, int lane) {
    store_first(out + i, act(load_first(gate + i, lane)) * load_first(up + i, lane), lane);
  });
}

float mean_square(const float* x, int64_t width) {
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

}  // namespace

void rmsnorm(const float* x, const float* gain, float eps, float* out, int64_t rows, int64_t width) {
  for (int64_t m = 0; m < rows; ++m) {
    const float* in = x + m * width;
    float* to = out + m * width;
    const f32x16 inverse = set1(1.0f / std::sqrt(mean_square(in, width) + eps));
    lanes(width, [=](int64_t i, int lane) {
      store_first(to + i, load_first(in + i, lane) * inverse * load_first(gain + i, lane), lane);
    });
  }
}

void rope(float* x, const float* cos, const float* sin, int64_t rows, int64_t heads, int64_t dim, int64_t half) {
  for (int64_t m = 0; m < rows; ++m) {
    const float *c = cos + m * half, *s = sin + m * half;
    for (int64_t h = 0; h < heads; ++h) {
      float* lo = x + (m * heads + h) * dim;
      float* hi = lo + half;
      lanes(half, [=](int64_t i, int lane) {
        const f32x16 a = load_first(lo + i, lane), b = load_first(hi + i, lane);
        const f32x16 co = load_first(c + i, lane), si = load_first(s + i, lane);
        store_first(lo + i, a * co - b * si, lane);
        store_first(hi + i, b * co + a * si, lane);
      });
    }
  }
}

void gated(Gate kind, const float* gate, const float* up, float* out, int64_t n) {
  switch (kind) {
    case Gate::silu: return gate_with(silu, gate, up, out, n);
    case Gate::gelu_tanh: return gate_with(gelu_tanh, gate, up, out, n);
    case Gate::gelu: return gate_with(gelu, gate, up, out, n);
  }
}

void add(float* x, const float* y, int64_t n) {
  lanes(n, [=](int64_t i, int lane) {
    store_first(x + i, load_first(x + i, lane) + load_first(y + i, lane), lane);
  });
}

void scale(float* x, float s, int64_t n) {
  lanes(n, [=](int64_t i, int lane) { store_first(x + i, load_first(x + i, lane) * set1(s), lane); });
}

void softcap(float* x, float cap, int64_t n) {
  lanes(n, [=](int64_t i, int lane) {
    store_first(x + i, set1(cap) * tanh(load_first(x + i, lane) / set1(cap)), lane);
  });
}

}  // namespace gsm::GSM_LEVEL
