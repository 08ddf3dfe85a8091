#include "rows.h"

#include "activations.h"

namespace gsm::GSM_LEVEL {
namespace {

// Elements are independent of each other, so a range may begin anywhere and a short tail uses the same lanes.
template <class Fn>
void lanes(int64_t n, const Fn& fn) {
  for (int64_t i = 0; i < n; i += 16) fn(i, static_cast<int>(n - i < 16 ? n - i : 16));
}

template <class Act>
void gate_with(const Act& act, const float* gate, const float* up, float* out, int64_t n) {
  lanes(n, [=](int64_t i, int lane) {
    store_first(out + i, act(load_first(gate + i, lane)) * load_first(up + i, lane), lane);
  });
}

}  // namespace

void rmsnorm(const float* x, const float* gain, float eps, float* out, int64_t rows, int64_t width) {
  for (int64_t m = 0; m < rows; ++m) {
    rmsnorm_row(x + m * width, gain, eps, out + m * width, width);
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
