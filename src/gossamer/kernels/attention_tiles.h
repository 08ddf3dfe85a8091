// The register tiles of attention, one pair for each way of storing keys and values:
//   score: scores[r][key] = q_r . key, W vectors of 16 keys at once
//   weigh: out[r] += sum over keys of weight[r][key] * value[key], W vectors of 16 dimensions at once
// f32 and f16 are multiplied as float32; bf16 as pairs, with queries and weights rounded to bf16; int8 and uint4 as
// integers, with queries and weights as 16-bit integers in two signed bytes. Every accumulator is one chain in
// ascending order of dimensions (positions). Include only from files compiled once per level.
#pragma once
#include <type_traits>

#include "attention.h"
#include "attention_dot.h"
#include "attention_plan.h"

namespace gsm::GSM_LEVEL {
namespace {

#define GSM_UNROLL _Pragma("GCC unroll 16")

constexpr int kVectors = kSegment / 16;

template <KvType K> constexpr int kPack = K == KvType::uint4 ? 8 : K == KvType::int8 ? 4 : K == KvType::bf16 ? 2 : 1;
template <KvType K> constexpr int kUnit = K == KvType::f16 ? 2 : 4;
template <KvType K> constexpr bool kCodes = K == KvType::int8 || K == KvType::uint4;
// Code that means zero. Sums over codes start at minus that times the sum of the other factor.
template <KvType K> constexpr int kZero = K == KvType::int8 ? 128 : 0;

// Rows of a register tile and vectors across for so many rows; codes take two accumulators for each.
#if defined(__AVX512F__)
template <KvType K> constexpr int kRows = K == KvType::f16 ? 4 : 8;
template <KvType K> constexpr int tile_width(int rows) {
  return kCodes<K> ? (rows <= 2 ? 4 : rows <= 4 ? 2 : 1) : rows <= 1 ? 8 : rows <= 4 ? 4 : 2;
}
#elif defined(__AVX2__)
template <KvType K> constexpr int kRows = kCodes<K> ? 2 : 4;
template <KvType K> constexpr int tile_width(int rows) { return !kCodes<K> && rows <= 2 ? 2 : 1; }
#else
template <KvType K> constexpr int kRows = 4;
template <KvType K> constexpr int tile_width(int) { return 1; }
#endif

// Fetches into the second-level cache what will be read next; an address outside of any array does no harm.
inline void fetch(const uint8_t* p) { __builtin_prefetch(p, 0, 2); }

// The queries of a tile. f32, f16: [dim][kTileRows] floats; bf16: [pair][kTileRows]; codes: [4 dims][kTileRows] of four
// signed bytes, the high plane and then the low one. The softmax scale is folded in.
struct Queries {
  float* data;
  int32_t start_high[kTileRows], start_low[kTileRows];  // codes: where the sums start
  float scale[kTileRows];                               // codes: of one unit of the sum
  float total[kTileRows];                               // codes: sum over the dimensions
};

template <class T> inline f32x16 load_as(const uint8_t* p) { return load(reinterpret_cast<const T*>(p)); }

// R rows of `q` against W vectors at keys[0..W-1]; a step (unit of dimensions) lies `stride` bytes after the other.
// With few rows memory sets the pace, so `ahead`, as many bytes, is fetched meanwhile.
template <KvType K, int R, int W>
void score_tile(const float* q, int64_t steps, const uint8_t* const* keys, const uint8_t* const* ahead, int64_t stride,
                float* scores) {
  f32x16 acc[R][W];
  GSM_UNROLL for (int r = 0; r < R; ++r) {
    GSM_UNROLL for (int w = 0; w < W; ++w) acc[r][w] = zero();
  }
  for (int64_t c = 0; c < steps; ++c, q += kTileRows) {
    const int64_t at = c * stride;
    if constexpr (R <= 4) {
      GSM_UNROLL for (int w = 0; w < W; ++w) fetch(ahead[w] + c * 16 * kUnit<K>);
    }
    if constexpr (K == KvType::bf16) {
      bf16x32 k[W];
      GSM_UNROLL for (int w = 0; w < W; ++w) k[w] = load_pairs(keys[w] + at);
      GSM_UNROLL for (int r = 0; r < R; ++r) {
        const bf16x32 x = repeat_pair(std::bit_cast<uint32_t>(q[r]));
        GSM_UNROLL for (int w = 0; w < W; ++w) acc[r][w] = dot2(acc[r][w], k[w], x);
      }
    } else {
      using T = std::conditional_t<K == KvType::f32, float, f16>;
      f32x16 k[W];
      GSM_UNROLL for (int w = 0; w < W; ++w) k[w] = load_as<T>(keys[w] + at);
      GSM_UNROLL for (int r = 0; r < R; ++r) {
        const f32x16 x = set1(q[r]);
        GSM_UNROLL for (int w = 0; w < W; ++w) acc[r][w] = fma(x, k[w], acc[r][w]);
      }
    }
  }
  GSM_UNROLL for (int r = 0; r < R; ++r) {
    GSM_UNROLL for (int w = 0; w < W; ++w) store(scores + r * kSegment + w * 16, acc[r][w]);
  }
}

// The same over codes; `plane` floats lie between the planes of q, `row` is the first row of q here. The scores still
// lack the scale and minimum of the keys.
template <KvType K, int R, int W>
void score_codes(const Queries& queries, int row, int64_t plane, int64_t steps, const uint8_t* const* keys,
                 const uint8_t* const* ahead, int64_t stride, float* scores) {
  i32x16 high[R][W], low[R][W];
  GSM_UNROLL for (int r = 0; r < R; ++r) {
    GSM_UNROLL for (int w = 0; w < W; ++w) {
      high[r][w] = set1(queries.start_high[row + r]);
      low[r][w] = set1(queries.start_low[row + r]);
    }
  }
  const float* q = queries.data + row;
  const auto multiply = [&](const u8x64* k) {
    GSM_UNROLL for (int r = 0; r < R; ++r) {
      const u8x64 x = repeat_codes(reinterpret_cast<const int8_t*>(q + r));
      const u8x64 y = repeat_codes(reinterpret_cast<const int8_t*>(q + plane + r));
      GSM_UNROLL for (int w = 0; w < W; ++w) {
        high[r][w] = dot4(high[r][w], k[w], x);
        low[r][w] = dot4(low[r][w], k[w], y);
      }
    }
    q += kTileRows;
  };
  for (int64_t c = 0; c < steps; ++c) {
    u8x64 k[W];
    GSM_UNROLL for (int w = 0; w < W; ++w) {
      k[w] = load_codes(keys[w] + c * stride);
      if constexpr (R <= 4) fetch(ahead[w] + c * 64);
    }
    if constexpr (K == KvType::int8) {
      multiply(k);
    } else {
      u8x64 half[W];
      GSM_UNROLL for (int w = 0; w < W; ++w) half[w] = low_nibbles(k[w]);
      multiply(half);
      GSM_UNROLL for (int w = 0; w < W; ++w) half[w] = high_nibbles(k[w]);
      multiply(half);
    }
  }
  GSM_UNROLL for (int r = 0; r < R; ++r) {
    const f32x16 s = set1(queries.scale[row + r]);
    GSM_UNROLL for (int w = 0; w < W; ++w)
      store(scores + r * kSegment + w * 16, fma(to_float(high[r][w]), set1(256.0f), to_float(low[r][w])) * s);
  }
}

// Weights of a tile over a segment: f32, f16: floats [row][kSegment]; bf16: [row][kSegment] halves; codes: two planes
// [row][kSegment] of bytes. What a row does not see is zero.
struct Weights {
  float* floats;
  uint16_t* halves;
  int8_t *high, *low;
  int32_t start_high[kTileRows], start_low[kTileRows];  // codes: where the sums start
  float scale[kTileRows];   // codes: of one unit of the sum; weights hold the values' scales
  float offset[kTileRows];  // codes: sum over the keys of weight * minimum
};

// Values of keys begin..end-1 of the segment. Edge: begin or end may cut a pair of bf16, whose other half may be NaN.
// Tail: the last, incomplete vector of `lanes` dimensions (W is 1 then).
template <KvType K, int R, int W, bool Edge, bool Tail>
void weigh_tile(const Weights& weights, int row, const uint8_t* const* values, const uint8_t* const* ahead, int64_t at,
                int64_t dim, int begin, int end, float* out, int64_t out_stride, int lanes = 16) {
  f32x16 acc[R][W];
  GSM_UNROLL for (int r = 0; r < R; ++r) {
    GSM_UNROLL for (int w = 0; w < W; ++w) acc[r][w] = load(out + r * out_stride + w * 16);
  }
  constexpr int P = kPack<K>;
  const int64_t stride = dim * kUnit<K>;
  // One loop: the exits of a loop over 16 keys inside of a loop over vectors would be mispredicted.
  for (int j = begin / P * P; j < end; j += P) {
    const int64_t from = at + j % 16 / P * stride;
    const uint8_t* const value = values[j / 16] + from;
    if constexpr (R <= 4) {
      GSM_UNROLL for (int w = 0; w < W; w += 4 / kUnit<K>) fetch(ahead[j / 16] + from + w * 16 * kUnit<K>);
    }
    if constexpr (K == KvType::bf16) {
      bf16x32 v[W];
      GSM_UNROLL for (int w = 0; w < W; ++w) v[w] = Tail ? load_pairs_first(value, lanes) : load_pairs(value + w * 64);
      if constexpr (Edge) {
        const uint32_t mask = (j >= begin ? 0xFFFFu : 0u) | (j + 1 < end ? 0xFFFF0000u : 0u);
        GSM_UNROLL for (int w = 0; w < W; ++w) v[w] = keep_bits(v[w], mask);
      }
      GSM_UNROLL for (int r = 0; r < R; ++r) {
        uint32_t pair;
        std::memcpy(&pair, weights.halves + (row + r) * kSegment + j, 4);
        const bf16x32 x = repeat_pair(pair);
        GSM_UNROLL for (int w = 0; w < W; ++w) acc[r][w] = dot2(acc[r][w], v[w], x);
      }
    } else {
      using T = std::conditional_t<K == KvType::f32, float, f16>;
      f32x16 v[W];
      GSM_UNROLL for (int w = 0; w < W; ++w)
        v[w] = Tail ? load_first(reinterpret_cast<const T*>(value), lanes) : load_as<T>(value + w * 16 * sizeof(T));
      GSM_UNROLL for (int r = 0; r < R; ++r) {
        const f32x16 x = set1(weights.floats[(row + r) * kSegment + j]);
        GSM_UNROLL for (int w = 0; w < W; ++w) acc[r][w] = fma(x, v[w], acc[r][w]);
      }
    }
  }
  GSM_UNROLL for (int r = 0; r < R; ++r) {
    GSM_UNROLL for (int w = 0; w < W; ++w) store(out + r * out_stride + w * 16, acc[r][w]);
  }
}

// The same over codes, whose integer sums are set, not added to: out is a segment's own. begin and end are multiples
// of 16, since a weight of zero drops whatever a code is.
template <KvType K, int R, int W, bool Tail>
void weigh_codes(const Weights& weights, int row, const uint8_t* const* values, int64_t at, int64_t dim, int begin,
                 int end, float* out, int64_t out_stride, int lanes = 16) {
  i32x16 high[R][W], low[R][W];
  GSM_UNROLL for (int r = 0; r < R; ++r) {
    GSM_UNROLL for (int w = 0; w < W; ++w) {
      high[r][w] = set1(weights.start_high[row + r]);
      low[r][w] = set1(weights.start_low[row + r]);
    }
  }
  const auto multiply = [&](const u8x64* v, int j) {
    GSM_UNROLL for (int r = 0; r < R; ++r) {
      const u8x64 x = repeat_codes(weights.high + (row + r) * kSegment + j);
      const u8x64 y = repeat_codes(weights.low + (row + r) * kSegment + j);
      GSM_UNROLL for (int w = 0; w < W; ++w) {
        high[r][w] = dot4(high[r][w], v[w], x);
        low[r][w] = dot4(low[r][w], v[w], y);
      }
    }
  };
  const int64_t stride = dim * 4;
  for (int j = begin; j < end; j += kPack<K>) {
    const int64_t from = at + j % 16 / kPack<K> * stride;
    const uint8_t* const value = values[j / 16] + from;
    u8x64 v[W];
    GSM_UNROLL for (int w = 0; w < W; ++w)
      v[w] = Tail ? load_codes_first(value, lanes) : load_codes(value + w * 64);
    if constexpr (K == KvType::int8) {
      multiply(v, j);
    } else {
      u8x64 half[W];
      GSM_UNROLL for (int w = 0; w < W; ++w) half[w] = low_nibbles(v[w]);
      multiply(half, j);
      GSM_UNROLL for (int w = 0; w < W; ++w) half[w] = high_nibbles(v[w]);
      multiply(half, j + 4);
    }
  }
  GSM_UNROLL for (int r = 0; r < R; ++r) {
    const f32x16 s = set1(weights.scale[row + r]), add = set1(weights.offset[row + r]);
    GSM_UNROLL for (int w = 0; w < W; ++w) {
      const f32x16 sum = fma(to_float(high[r][w]), set1(256.0f), to_float(low[r][w]));
      store(out + r * out_stride + w * 16, fma(sum, s, add));
    }
  }
}

#undef GSM_UNROLL

}  // namespace
}  // namespace gsm::GSM_LEVEL
