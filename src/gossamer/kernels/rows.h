// Row-wise and element-wise float32 operations: normalise, rotate, gate, add. All are bound by memory.
// Arrays are C-contiguous; every result is independent of the number of threads.
#pragma once
#include <cstdint>
#include <memory>

#include "isa.h"
#include "op.h"

namespace gsm {

enum class Gate { silu, gelu_tanh, gelu };

// One thread's part of each op below, with the same arguments.
GSM_DECLARE(void rmsnorm(const float* x, const float* gain, float eps, float* out, int64_t rows, int64_t width))
GSM_DECLARE(void rope(float* x, const float* cos, const float* sin, int64_t rows, int64_t heads, int64_t dim,
                      int64_t half))
GSM_DECLARE(void gated(Gate kind, const float* gate, const float* up, float* out, int64_t n))
GSM_DECLARE(void add(float* x, const float* y, int64_t n))
GSM_DECLARE(void scale(float* x, float s, int64_t n))
GSM_DECLARE(void softcap(float* x, float cap, int64_t n))

// out = x / sqrt(mean(x^2) + eps) * gain for each row of `width`; out may be x.
std::unique_ptr<Op> rmsnorm_op(const float* x, const float* gain, float eps, float* out, int64_t width);

// Rotates dimensions i and i + half of q [rows, heads, dim] and k [rows, kv_heads, dim] by the angle whose cosine and
// sine lie in cos, sin [rows, half]; the other dimensions stay.
struct Rope {
  float *q, *k;
  const float *cos, *sin;
  int64_t heads, kv_heads, dim, half;
};
std::unique_ptr<Op> rope_op(const Rope& r);

// cos, sin [rows, half] of the angles positions[row] * frequencies[i], each a float32 product. Both are computed in
// double and rounded once.
std::unique_ptr<Op> angles_op(const int32_t* positions, const float* frequencies, float* cos, float* sin, int64_t half);

// The rest work on rows of `width` elements. out = act(gate) * up; out may be gate or up.
std::unique_ptr<Op> gated_op(Gate kind, const float* gate, const float* up, float* out, int64_t width);
std::unique_ptr<Op> add_op(float* x, const float* y, int64_t width);
std::unique_ptr<Op> scale_op(float* x, float s, int64_t width);
std::unique_ptr<Op> softcap_op(float* x, float cap, int64_t width);

}  // namespace gsm
