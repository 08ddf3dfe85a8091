// Stores keys and values in a layer's pool, in the pool's element type. Bound by memory.
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

#include "attention.h"
#include "attention_dot.h"
#include "simd.h"
#include "team.h"

namespace gsm::GSM_LEVEL {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kHalf = 65504.0f;  // the largest f16

int lanes_at(int64_t c, int64_t n) { return static_cast<int>(n - c < 16 ? n - c : 16); }

struct Extent {
  float low, high;  // NaN if the row holds anything that is not finite
};

Extent extent(const float* x, int64_t n) {
  f32x16 low = set1(x[0]), high = low, poison = zero();
  for (int64_t c = 0; c < n; c += 16) {
    const f32x16 v = load_first(x + c, lanes_at(c, n), x[0]);
    low = min(low, v);
    high = max(high, v);
    poison = poison + (v - v);  // 0, or NaN for infinity and NaN
  }
  const float bad = sum(poison);
  return {-max(zero() - low) + bad, max(high) + bad};
}

// Places unit elements: element c of a row goes to unit c / pack.
void place(const KvPool& pool, bool keys, int64_t at, int64_t slot, const uint8_t* row, int64_t size) {
  const int64_t dim = pool.dim, block = pool.block, unit = kv_unit(pool.type), pack = kv_pack(pool.type);
  if (keys) {
    uint8_t* to = static_cast<uint8_t*>(pool.k) + at * kv_key_bytes(pool) + slot * unit;
    for (int64_t c = 0; c < dim; c += pack, to += block * unit, row += unit)
      std::memcpy(to, row, static_cast<size_t>(unit));
    return;
  }
  uint8_t* const to = static_cast<uint8_t*>(pool.v) + at * kv_value_bytes(pool) + slot / pack * dim * unit;
  if (pack == 1) {
    std::memcpy(to, row, static_cast<size_t>(dim * unit));
  } else if (size > 0) {  // whole bytes, every unit
    uint8_t* byte = to + slot % pack * size;
    for (int64_t c = 0; c < dim; ++c, byte += unit, row += size) std::memcpy(byte, row, static_cast<size_t>(size));
  } else {  // nibbles: the other half of the byte belongs to another position
    const int shift = slot % 8 < 4 ? 0 : 4;
    uint8_t* byte = to + slot % 4;
    for (int64_t c = 0; c < dim; ++c, byte += 4)
      *byte = static_cast<uint8_t>((*byte & (0xF0 >> shift)) | row[c] << shift);
  }
}

void write_f16(const float* x, int64_t n, uint8_t* to) {
  const f32x16 limit = set1(kHalf);
  for (int64_t c = 0; c < n; c += 16) {
    const int lane = lanes_at(c, n);
    const f32x16 v = load_first(x + c, lane);
    f16 half[16];
    store(half, select_less(abs(v), set1(kInf), min(limit, max(-limit, v)), v));  // infinity and NaN stay
    std::memcpy(to + c * 2, half, static_cast<size_t>(lane) * 2);
  }
}

// Codes of (x - from) / s, clamped to low..high, plus `offset`; NaN or a scale of zero gives the code `offset`.
void encode(const float* x, int64_t n, float from, float s, float low, float high, int offset, uint8_t* to) {
  const bool sound = s > 0.0f;
  for (int64_t c = 0; c < n; c += 16) {
    const int lane = lanes_at(c, n);
    float code[16];
    store(code, rint(min(set1(high), max(set1(low), (load_first(x + c, lane) - set1(from)) / set1(s)))));
    for (int i = 0; i < lane; ++i) to[c + i] = static_cast<uint8_t>((sound ? static_cast<int>(code[i]) : 0) + offset);
  }
}

// The nearest f16 that is not above (below) x, within the finite ones; NaN stays.
f16 f16_below(float x) {
  x = x < -kHalf ? -kHalf : x > kHalf ? kHalf : x;
  f16 h = to_f16(x);
  if (to_f32(h) > x) h.bits = static_cast<uint16_t>(h.bits & 0x8000 ? h.bits + 1 : h.bits ? h.bits - 1 : 0x8001);
  return h;
}
f16 f16_above(float x) {
  f16 h = f16_below(-x);
  h.bits ^= 0x8000;
  return h;
}

// The row of one (position, head) at slot `slot` of block and head `at`; `row` holds 4 * dim + 16 bytes.
void write_row(const KvPool& pool, const float* x, bool keys, int64_t at, int64_t slot, uint8_t* row) {
  const int64_t dim = pool.dim, block = pool.block;
  uint8_t* const scales = static_cast<uint8_t*>(keys ? pool.k_scale : pool.v_scale);
  switch (pool.type) {
    case KvType::f32: return place(pool, keys, at, slot, reinterpret_cast<const uint8_t*>(x), 4);
    case KvType::f16: write_f16(x, dim, row); return place(pool, keys, at, slot, row, 2);
    case KvType::bf16:
      for (int64_t c = 0; c < dim + dim % 2; ++c) {
        const bf16 h = c < dim ? to_bf16(x[c]) : bf16{0};
        std::memcpy(row + 2 * c, &h, 2);
      }
      return place(pool, keys, at, slot, row, 2);
    case KvType::int8: {
      const Extent e = extent(x, dim);
      const float s = std::fabs(e.high > -e.low ? e.high : -e.low) / 127.0f;
      std::memcpy(scales + (at * block + slot) * 4, &s, 4);
      std::memset(row + dim, 0, 4);
      encode(x, dim, 0.0f, s, -127.0f, 127.0f, 128, row);
      return place(pool, keys, at, slot, row, 1);
    }
    case KvType::uint4: {
      // Rounded outwards, so that no element is clipped: the error is at most half a step.
      const Extent e = extent(x, dim);
      const f16 low = f16_below(e.low), s = f16_above((e.high - to_f32(low)) / 15.0f);
      uint8_t* const to = scales + (at * 2 * block + slot) * 2;
      std::memcpy(to, &s, 2);
      std::memcpy(to + block * 2, &low, 2);
      std::memset(row + dim, 0, 8);
      encode(x, dim, to_f32(low), to_f32(s), 0.0f, 15.0f, 0, row);
      if (!keys) return place(pool, false, at, slot, row, 0);
      for (int64_t c = 0; c < dim; c += 8)
        for (int i = 0; i < 4; ++i) row[c / 2 + i] = static_cast<uint8_t>(row[c + i] | row[c + 4 + i] << 4);
      return place(pool, true, at, slot, row, 0);
    }
  }
}

}  // namespace

// A unit is the keys or the values of one head, so that no two threads write to one byte whatever the positions are.
void kv_write_part(const KvWrite& w, int thread, int threads) {
  const KvPool& pool = w.pool;
  const int64_t dim = pool.dim, block = pool.block;
  const Range mine = share(2 * pool.heads, thread, threads);
  if (mine.begin >= mine.end) return;
  uint8_t row[4 * kMaxHeadDim + 16];
  for (int64_t u = mine.begin; u < mine.end; ++u) {
    const int64_t head = u / 2;
    const bool keys = u % 2 == 0;
    for (int64_t m = 0; m < w.tokens; ++m) {
      const int64_t p = w.positions[m], at = w.tables[w.sequence[m] * w.max_blocks + p / block] * pool.heads + head;
      write_row(pool, (keys ? w.k : w.v) + (m * pool.heads + head) * dim, keys, at, p % block, row);
    }
  }
}

}  // namespace gsm::GSM_LEVEL
