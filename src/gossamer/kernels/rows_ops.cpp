// The ops over rows: what they share out and what they check. Compiled once.
#include <cmath>

#include "rows.h"

namespace gsm {
namespace {

void norm(const float* x, const float* gain, float eps, float* out, int64_t rows, int64_t width) {
  GSM_DISPATCH(rmsnorm(x, gain, eps, out, rows, width))
}
void rotate(float* x, const float* cos, const float* sin, int64_t rows, int64_t heads, int64_t dim, int64_t half) {
  GSM_DISPATCH(rope(x, cos, sin, rows, heads, dim, half))
}
void gate_up(Gate kind, const float* gate, const float* up, float* out, int64_t n) {
  GSM_DISPATCH(gated(kind, gate, up, out, n))
}
void add_to(float* x, const float* y, int64_t n) { GSM_DISPATCH(add(x, y, n)) }
void scale_by(float* x, float s, int64_t n) { GSM_DISPATCH(scale(x, s, n)) }
void cap_at(float* x, float cap, int64_t n) { GSM_DISPATCH(softcap(x, cap, n)) }

}  // namespace

std::unique_ptr<Op> rmsnorm_op(const float* x, const float* gain, float eps, float* out, int64_t width) {
  return parts_op(1, 2 * width, [=](int64_t begin, int64_t end) {
    norm(x + begin * width, gain, eps, out + begin * width, end - begin, width);
  });
}

std::unique_ptr<Op> rope_op(const Rope& r) {
  return parts_op(1, (r.heads + r.kv_heads) * r.half * 4, [r](int64_t begin, int64_t end) {
    const float *cos = r.cos + begin * r.half, *sin = r.sin + begin * r.half;
    rotate(r.q + begin * r.heads * r.dim, cos, sin, end - begin, r.heads, r.dim, r.half);
    rotate(r.k + begin * r.kv_heads * r.dim, cos, sin, end - begin, r.kv_heads, r.dim, r.half);
  });
}

std::unique_ptr<Op> angles_op(const int32_t* positions, const float* frequencies, float* cos, float* sin,
                              int64_t half) {
  // A cosine and a sine in double cost as much as a hundred simple operations.
  return parts_op(1, half * 100, [=](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m)
      for (int64_t i = 0; i < half; ++i) {
        const double angle = static_cast<float>(positions[m]) * frequencies[i];
        cos[m * half + i] = static_cast<float>(std::cos(angle));
        sin[m * half + i] = static_cast<float>(std::sin(angle));
      }
  });
}

std::unique_ptr<Op> gated_op(Gate kind, const float* gate, const float* up, float* out, int64_t width) {
  return parts_op(width, 4, [=](int64_t begin, int64_t end) {
    gate_up(kind, gate + begin, up + begin, out + begin, end - begin);
  });
}

std::unique_ptr<Op> add_op(float* x, const float* y, int64_t width) {
  return parts_op(width, 1, [=](int64_t begin, int64_t end) { add_to(x + begin, y + begin, end - begin); });
}

std::unique_ptr<Op> scale_op(float* x, float s, int64_t width) {
  return parts_op(width, 1, [=](int64_t begin, int64_t end) { scale_by(x + begin, s, end - begin); });
}

std::unique_ptr<Op> softcap_op(float* x, float cap, int64_t width) {
  return parts_op(width, 4, [=](int64_t begin, int64_t end) { cap_at(x + begin, cap, end - begin); });
}

}  // namespace gsm
