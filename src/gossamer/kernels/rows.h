// Row-wise and element-wise float32 operations: normalise, rotate, gate, add. All are bound by memory.
// Arrays are C-contiguous; every result is independent of the number of threads.
#pragma once
#include <cstdint>

#include "isa.h"

namespace gsm {

enum class Gate { silu, gelu_tanh, gelu };

GSM_DECLARE(void rmsnorm(const float* x, const float* gain, float eps, float* out, int64_t rows, int64_t width))
GSM_DECLARE(void rope(float* x, const float* cos, const float* sin, int64_t rows, int64_t heads, int64_t dim,
                      int64_t half))
GSM_DECLARE(void gated(Gate kind, const float* gate, const float* up, float* out, int64_t n))
GSM_DECLARE(void add(float* x, const float* y, int64_t n))
GSM_DECLARE(void scale(float* x, float s, int64_t n))
GSM_DECLARE(void softcap(float* x, float cap, int64_t n))

// out = x / sqrt(mean(x^2) + eps) * gain for each row; out may be x.
inline void rmsnorm(const float* x, const float* gain, float eps, float* out, int64_t rows, int64_t width) {
  GSM_DISPATCH(rmsnorm(x, gain, eps, out, rows, width))
}
// Rotates dimensions i and i + half of x [rows, heads, dim] by the angle of cos, sin [rows, half]; the rest stays.
inline void rope(float* x, const float* cos, const float* sin, int64_t rows, int64_t heads, int64_t dim, int64_t half) {
  GSM_DISPATCH(rope(x, cos, sin, rows, heads, dim, half))
}
// out = act(gate) * up over n elements; out may be gate or up.
inline void gated(Gate kind, const float* gate, const float* up, float* out, int64_t n) {
  GSM_DISPATCH(gated(kind, gate, up, out, n))
}
inline void add(float* x, const float* y, int64_t n) { GSM_DISPATCH(add(x, y, n)) }
inline void scale(float* x, float s, int64_t n) { GSM_DISPATCH(scale(x, s, n)) }
inline void softcap(float* x, float cap, int64_t n) { GSM_DISPATCH(softcap(x, cap, n)) }

}  // namespace gsm
