// Stores keys and values in a layer's pool, in the pool's element type. Bound by memory.
#include <cstring>
#include <limits>
#include <type_traits>

#include "attention.h"
#include "simd.h"
#include "team.h"

namespace gsm::GSM_LEVEL {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();

// Largest magnitude, or NaN if the row holds anything that is not finite.
float finite_peak(const float* x, int64_t n) {
  f32x16 most = zero(), poison = zero();
  for (int64_t c = 0; c < n; c += 16) {
    const f32x16 v = load_first(x + c, static_cast<int>(n - c < 16 ? n - c : 16));
    most = max(most, abs(v));
    poison = poison + (v - v);  // 0, or NaN for infinity and NaN
  }
  return max(most) + sum(poison);
}

// Converts one row of n floats to storage; the return value is the row's scale (1 unless int8).
float narrow(const float* x, int64_t n, float* to) {
  for (int64_t c = 0; c < n; ++c) to[c] = x[c];
  return 1.0f;
}
float narrow(const float* x, int64_t n, bf16* to) {
  for (int64_t c = 0; c < n; ++c) to[c] = to_bf16(x[c]);
  return 1.0f;
}
float narrow(const float* x, int64_t n, f16* to) {
  const f32x16 limit = set1(65504.0f);
  for (int64_t c = 0; c < n; c += 16) {
    const int lane = static_cast<int>(n - c < 16 ? n - c : 16);
    const f32x16 v = load_first(x + c, lane);
    f16 half[16];
    store(half, select_less(abs(v), set1(kInf), min(limit, max(-limit, v)), v));  // infinity and NaN stay
    std::memcpy(to + c, half, static_cast<size_t>(lane) * sizeof(f16));
  }
  return 1.0f;
}
float narrow(const float* x, int64_t n, int8_t* to) {
  const float s = finite_peak(x, n) / 127.0f;
  for (int64_t c = 0; c < n; c += 16) {
    const int lane = static_cast<int>(n - c < 16 ? n - c : 16);
    float code[16];
    store(code, rint(min(set1(127.0f), max(set1(-127.0f), load_first(x + c, lane) / set1(s)))));
    for (int i = 0; i < lane; ++i) to[c + i] = s > 0.0f ? static_cast<int8_t>(code[i]) : int8_t{0};  // NaN scale: 0
  }
  return s;
}

// A unit is the keys or the values of one head, so that no two threads write to one slot whatever the positions are.
template <class T>
void write_all(const KvWrite& w) {
  const KvPool& pool = w.pool;
  const int64_t units = 2 * pool.heads, dim = pool.dim, block = pool.block;
  team_share(units, units * w.tokens * dim * 4, [&](int64_t begin, int64_t end) {
    T* row = static_cast<T*>(thread_scratch(0, static_cast<size_t>(dim) * sizeof(T)));
    for (int64_t u = begin; u < end; ++u) {
      const int64_t head = u / 2;
      const bool keys = u % 2 == 0;
      for (int64_t m = 0; m < w.tokens; ++m) {
        const int64_t p = w.positions[m], at = w.table[p / block] * pool.heads + head, slot = p % block;
        const float s = narrow((keys ? w.k : w.v) + (m * pool.heads + head) * dim, dim, row);
        if constexpr (std::is_same_v<T, int8_t>) (keys ? pool.k_scale : pool.v_scale)[at * block + slot] = s;
        if (keys) {
          T* to = static_cast<T*>(pool.k) + at * dim * block + slot;
          for (int64_t c = 0; c < dim; ++c) to[c * block] = row[c];
        } else {
          std::memcpy(static_cast<T*>(pool.v) + (at * block + slot) * dim, row, static_cast<size_t>(dim) * sizeof(T));
        }
      }
    }
  });
}

}  // namespace

void kv_write(const KvWrite& w) {
  switch (w.pool.type) {
    case KvType::f32: return write_all<float>(w);
    case KvType::f16: return write_all<f16>(w);
    case KvType::bf16: return write_all<bf16>(w);
    case KvType::int8: return write_all<int8_t>(w);
  }
}

}  // namespace gsm::GSM_LEVEL
