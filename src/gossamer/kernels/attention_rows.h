// The rows of a tile on their way through a segment: their queries as the tiles take them, their softmax, and the
// memory of a thread. Include only from files compiled once per level.
#pragma once
#include <limits>

#include "attention_plan.h"
#include "attention_tiles.h"

namespace gsm::GSM_LEVEL {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kLargest = std::numeric_limits<float>::max();

inline int64_t padded(int64_t dim) { return (dim + 15) / 16 * 16; }

// The rows of a tile.
struct Rows {
  int n;
  int64_t kv_head;
  const int32_t* table;
  int64_t index[kTileRows];  // row of q and out
  int64_t position[kTileRows];

  Rows(const Attention& a, int64_t head, const Tile& tile)
      : n(tile.rows), kv_head(head), table(a.tables + a.sequence[tile.token] * a.max_blocks) {
    const int64_t group = a.heads / a.pool.heads;
    for (int r = 0; r < n; ++r) {
      const int64_t row = tile.row + r, token = tile.token + row / group;
      index[r] = token * a.heads + head * group + row % group;
      position[r] = a.positions[token];
    }
  }
};

// Softmax state of the rows over a set of keys. `sum` is negative while no key was visible.
struct State {
  float* top;  // largest score
  float* sum;
  float* out;  // [row][padded dim], not yet divided by the sum
};

inline int64_t state_floats(int64_t width) { return kTileRows * (width + 2); }

inline State state_at(float* memory, int64_t width) {
  return {memory + kTileRows * width, memory + kTileRows * (width + 1), memory};
}

// The working memory of one thread: see attention_scratch.
struct Scratch {
  Queries queries;
  float* scores;
  Weights weights;
  State part, whole;
  float* parts;
  int64_t width;

  Scratch(float* at, int64_t dim) : width(padded(dim)) {
    scores = at;
    weights.floats = scores;
    at += kTileRows * kSegment;
    weights.halves = reinterpret_cast<uint16_t*>(at);
    weights.high = reinterpret_cast<int8_t*>(at);
    weights.low = weights.high + kTileRows * kSegment;
    at += kTileRows * kSegment / 2;
    queries.data = at;
    at += kTileRows * width * 2;
    part = state_at(at, width);
    whole = state_at(at + state_floats(width), width);
    parts = at + 2 * state_floats(width);
  }

  State stored(int64_t i) const { return state_at(parts + i * state_floats(width), width); }
  int64_t plane() const { return kTileRows * width; }
};

template <KvType K>
void load_queries(const Attention& a, const Rows& rows, Scratch& s) {
  const int64_t dim = a.pool.dim;
  const f32x16 scale = set1(a.scale);
  Queries& to = s.queries;
  // Words word, word + 1, ... of row r.
  const auto place = [&](int64_t word, int r, const void* from, int words) {
    float* at = to.data + word * kTileRows + r;
    for (int i = 0; i < words; ++i, at += kTileRows) std::memcpy(at, static_cast<const uint8_t*>(from) + 4 * i, 4);
  };
  for (int r = 0; r < rows.n; ++r) {
    const float* const from = a.q + rows.index[r] * dim;
    const auto part = [&](int64_t c) {
      return load_first(from + c, static_cast<int>(dim - c < 16 ? dim - c : 16)) * scale;
    };
    if constexpr (K == KvType::f32 || K == KvType::f16) {
      for (int64_t c = 0; c < dim; c += 16) {
        float x[16];
        store(x, part(c));
        place(c, r, x, 16);
      }
    } else if constexpr (K == KvType::bf16) {
      for (int64_t c = 0; c < dim; c += 16) {
        uint16_t x[16];
        store_bf16(x, part(c));
        place(c / 2, r, x, 8);
      }
    } else {
      f32x16 most = zero(), poison = zero();
      for (int64_t c = 0; c < dim; c += 16) {
        const f32x16 x = part(c);
        most = max(most, abs(x));
        poison = poison + (x - x);  // 0, or NaN for infinity and NaN
      }
      const bool sound = mask_at_least(poison, zero()) == 0xFFFF;
      const float peak = sound ? max(most) : std::numeric_limits<float>::quiet_NaN(), inverse = kPlanes / peak;
      const bool none = !(inverse <= kLargest);  // zeros (or smaller than any float), or NaN
      i32x16 high = set1(int32_t{0}), low = high;
      for (int64_t c = 0; c < s.width; c += 16) {
        const Planes p = planes(to_int(none ? zero() : part(c) * set1(inverse)));
        high = high + p.high;
        low = low + p.low;
        int8_t bytes[2][16];
        store_bytes(bytes[0], p.high);
        store_bytes(bytes[1], p.low);
        place(c / 4, r, bytes[0], 4);
        place(c / 4 + s.plane() / kTileRows, r, bytes[1], 4);
      }
      const int32_t high_sum = sum(high), low_sum = sum(low);
      to.scale[r] = none && sound ? 0.0f : peak / kPlanes;
      to.start_high[r] = -kZero<K> * high_sum;
      to.start_low[r] = -kZero<K> * low_sum;
      to.total[r] = (256.0f * static_cast<float>(high_sum) + static_cast<float>(low_sum)) * to.scale[r];
    }
  }
}

// The keys and values of a segment: of each vector of 16 keys.
struct Keys {
  const uint8_t *k[kVectors], *v[kVectors];
  const uint8_t* next[kVectors];            // what to fetch while weighing: the keys of the next segment
  const uint8_t *k_scale[kVectors], *v_scale[kVectors];
};

// One vector's scales and minima, where there are any.
template <KvType K>
struct Scaling {
  f32x16 scale, min;
  Scaling(const uint8_t* at, int64_t block) {
    if constexpr (K == KvType::int8) {
      scale = load_as<float>(at);
      min = zero();
    } else {
      scale = load_as<f16>(at);
      min = load_as<f16>(at + block * 2);
    }
  }
};

// Scores of keys begin..end-1 of the segment become exp(score - top), and what the weigh tiles take. Vectors
// low..high-1 of codes are filled.
template <KvType K>
void softmax_row(const Attention& a, Scratch& scratch, int r, int begin, int end, int low, int high, const Keys& keys,
                 int rows, float& top, float& sum_of) {
  float* const s = scratch.scores + r * kSegment;
  const int first = begin / 16, last = (end + 15) / 16;
  const f32x16 none = set1(-kInf);
  f32x16 most = none;
  for (int v = first; v < last; ++v) {
    f32x16 x = load(s + v * 16);
    if constexpr (kCodes<K>) {
      const Scaling<K> k(keys.k_scale[v], a.pool.block);
      x = x * k.scale;
      if constexpr (K == KvType::uint4) x = fma(set1(scratch.queries.total[r]), k.min, x);
    }
    if (a.softcap > 0.0f) x = set1(a.softcap) * tanh(x / set1(a.softcap));
    if (v == first || v == last - 1) x = keep_between(x, begin - v * 16, end - v * 16, none);
    most = max(most, x);
    if (kCodes<K> || a.softcap > 0.0f || v == first || v == last - 1) store(s + v * 16, x);
  }
  top = max(most);
  // A row whose scores are all -infinity keeps a finite reference, so that it weighs nothing instead of NaN.
  const f32x16 reference = set1(top < -kLargest ? -kLargest : top);
  // This row's share of the keys of the next segment: where a softmax takes long, memory would idle.
  const int64_t slice = kCodes<K> || K == KvType::bf16 ? 16 / kPack<K> * a.pool.dim * kUnit<K> : 0;
  const int64_t ahead_begin = slice * r / rows & ~63, ahead_end = slice * (r + 1) / rows & ~63;
  f32x16 total = zero(), heaviest = zero(), offset = zero();
  f32x16 poison = zero();  // NaN where a value's scale is
  for (int v = first; v < last; ++v) {
    for (int64_t i = ahead_begin; i < ahead_end; i += 64) fetch(keys.next[v] + i);
    f32x16 e = exp_weight(load(s + v * 16) - reference);
    total = total + e;
    if constexpr (kCodes<K>) {
      const Scaling<K> value(keys.v_scale[v], a.pool.block);
      f32x16 weight = e * value.scale, min = e * value.min;
      if (v == first || v == last - 1) {
        weight = keep_between(weight, begin - v * 16, end - v * 16, zero());
        min = keep_between(min, begin - v * 16, end - v * 16, zero());
      }
      heaviest = max(heaviest, weight);
      poison = poison + weight;
      if constexpr (K == KvType::uint4) offset = offset + min;
      e = weight;
    }
    if constexpr (K == KvType::bf16) {
      store_bf16(scratch.weights.halves + r * kSegment + v * 16, e);
    } else {
      store(s + v * 16, e);
    }
  }
  sum_of = sum(total);
  if constexpr (kCodes<K>) {
    Weights& w = scratch.weights;
    const bool sound = mask_at_least(poison, poison) == 0xFFFF;
    const float peak = sound ? max(heaviest) : std::numeric_limits<float>::quiet_NaN(), inverse = kPlanes / peak;
    const bool nothing = !(inverse <= kLargest);
    i32x16 high_sum = set1(int32_t{0}), low_sum = high_sum;
    for (int v = low; v < high; ++v) {
      const bool seen = v >= first && v < last && !nothing;
      const Planes p = planes(seen ? to_int(load(s + v * 16) * set1(inverse)) : set1(int32_t{0}));
      if constexpr (kZero<K> != 0) {
        high_sum = high_sum + p.high;
        low_sum = low_sum + p.low;
      }
      store_bytes(w.high + r * kSegment + v * 16, p.high);
      store_bytes(w.low + r * kSegment + v * 16, p.low);
    }
    w.start_high[r] = kZero<K> ? -kZero<K> * sum(high_sum) : 0;
    w.start_low[r] = kZero<K> ? -kZero<K> * sum(low_sum) : 0;
    w.scale[r] = nothing && sound ? 0.0f : peak / kPlanes;
    w.offset[r] = K == KvType::uint4 ? sum(offset) : 0.0f;
  }
}

}  // namespace
}  // namespace gsm::GSM_LEVEL
