// How the sums are cut. Scores of a key are one chain of fused multiply-adds over the dimensions; keys are weighed
// in ascending order; both depend on nothing but the row. A softmax runs over a segment of kSegment absolute positions
// and the segments of a row are merged in ascending order. So a row's bits do not depend on the other rows of the call,
// on the chunking of the prompt, on the number of threads or on the block size. Lanes of invisible keys are computed
// and dropped; invisible values are never multiplied, since a slot that was never written may hold NaN.
#include "attention.h"

#include <cmath>
#include <functional>
#include <limits>
#include <type_traits>

#include "simd.h"
#include "team.h"

namespace gsm::GSM_LEVEL {
namespace {

constexpr int kSegment = 256;
constexpr int kVectors = kSegment / 16;
constexpr int64_t kMostPartFloats = 1 << 24;  // bounds the memory of a call whose segments are shared out
constexpr float kInf = std::numeric_limits<float>::infinity();

// Register tiles: `kRows` query rows (heads of a group and neighbouring tokens) against tile_width(rows) vectors.
#if defined(__AVX512F__)
constexpr int kRows = 8;
constexpr int tile_width(int rows) { return rows <= 4 ? 4 : 2; }
#elif defined(__AVX2__)
constexpr int kRows = 6;
constexpr int tile_width(int rows) { return rows <= 2 ? 2 : 1; }
#else
constexpr int kRows = 4;
constexpr int tile_width(int) { return 1; }
#endif

#define GSM_UNROLL _Pragma("GCC unroll 16")

// Calls fn with the row count as a compile-time constant.
template <int R = kRows, class Fn>
inline void with_rows(int rows, const Fn& fn) {
  if constexpr (R > 1) {
    if (rows < R) return with_rows<R - 1>(rows, fn);
  }
  fn(std::integral_constant<int, R>{});
}

int64_t padded(int64_t dim) { return (dim + 15) / 16 * 16; }

// The queries that one pass handles: `rows` consecutive (token, head of the group) pairs of one key-value head.
struct Rows {
  int n;
  int64_t kv_head;
  int64_t index[kRows];  // row of q and out
  int64_t position[kRows];
};

// Softmax state of the rows over a set of keys. `sum` is negative while no key was visible.
struct State {
  float* top;  // largest score
  float* sum;
  float* out;  // [row][padded dim], not yet divided by the sum
};

Rows rows_of(const Attention& a, int64_t kv_head, int64_t tile) {
  const int64_t group = a.heads / a.pool.heads, count = a.tokens * group;
  Rows r;
  r.n = static_cast<int>(count - tile * kRows < kRows ? count - tile * kRows : kRows);
  r.kv_head = kv_head;
  for (int i = 0; i < r.n; ++i) {
    const int64_t row = tile * kRows + i, token = row / group;
    r.index[i] = token * a.heads + kv_head * group + row % group;
    r.position[i] = a.positions[token];
  }
  return r;
}

// scores[r][v] = q_r . key over 16 keys a vector; q is [dim][kRows] with the softmax scale folded in. With few rows
// memory sets the pace, so the values of the same keys (16 * dim elements a vector) are fetched meanwhile.
template <class T, int R, int W>
void score_tile(const float* q, int64_t dim, const T* const* keys, const T* const* values, int64_t stride,
                float* scores) {
  f32x16 acc[R][W];
  GSM_UNROLL for (int r = 0; r < R; ++r) {
    GSM_UNROLL for (int w = 0; w < W; ++w) acc[r][w] = zero();
  }
  const T* at[W];
  GSM_UNROLL for (int w = 0; w < W; ++w) at[w] = keys[w];
  for (int64_t c = 0; c < dim; ++c, q += kRows) {
    f32x16 k[W];
    GSM_UNROLL for (int w = 0; w < W; ++w) {
      k[w] = load(at[w]);
      at[w] += stride;
      if (R <= 4) __builtin_prefetch(values[w] + c * 16, 0, 2);
    }
    GSM_UNROLL for (int r = 0; r < R; ++r) {
      const f32x16 x = set1(q[r]);
      GSM_UNROLL for (int w = 0; w < W; ++w) acc[r][w] = fma(x, k[w], acc[r][w]);
    }
  }
  GSM_UNROLL for (int r = 0; r < R; ++r) {
    GSM_UNROLL for (int w = 0; w < W; ++w) store(scores + r * kSegment + w * 16, acc[r][w]);
  }
}

// out[r] += sum over keys begin..end-1 of the segment of weight[r][key] * value[key], for W vectors of dimensions.
// Tail: the last, incomplete vector of `lane` dimensions (W is 1 then).
template <class T, int R, int W, bool Tail = false>
void weigh_tile(const float* weights, const T* const* values, int64_t dim, int begin, int end, float* out,
                int64_t out_stride, int lane = 16) {
  f32x16 acc[R][W];
  GSM_UNROLL for (int r = 0; r < R; ++r) {
    GSM_UNROLL for (int w = 0; w < W; ++w) acc[r][w] = load(out + r * out_stride + w * 16);
  }
  for (int j = begin; j < end;) {
    const int stop = (j / 16 + 1) * 16 < end ? (j / 16 + 1) * 16 : end;
    const T* value = values[j / 16] + (j % 16) * dim;
    for (; j < stop; ++j, value += dim) {
      f32x16 v[W];
      GSM_UNROLL for (int w = 0; w < W; ++w) v[w] = Tail ? load_first(value, lane) : load(value + w * 16);
      GSM_UNROLL for (int r = 0; r < R; ++r) {
        const f32x16 x = set1(weights[r * kSegment + j]);
        GSM_UNROLL for (int w = 0; w < W; ++w) acc[r][w] = fma(x, v[w], acc[r][w]);
      }
    }
  }
  GSM_UNROLL for (int r = 0; r < R; ++r) {
    GSM_UNROLL for (int w = 0; w < W; ++w) store(out + r * out_stride + w * 16, acc[r][w]);
  }
}

template <class T, int R>
void weigh(const float* weights, const T* const* values, int64_t dim, int begin, int end, float* out) {
  constexpr int W = tile_width(R);
  const int64_t stride = padded(dim);
  const T* at[kVectors];
  const auto shifted = [&](int64_t c) {
    for (int v = begin / 16; v * 16 < end; ++v) at[v] = values[v] + c;
    return at;
  };
  int64_t c = 0;
  for (; c + W * 16 <= dim; c += W * 16) weigh_tile<T, R, W>(weights, shifted(c), dim, begin, end, out + c, stride);
  for (; c + 16 <= dim; c += 16) weigh_tile<T, R, 1>(weights, shifted(c), dim, begin, end, out + c, stride);
  if (c < dim)
    weigh_tile<T, R, 1, true>(weights, shifted(c), dim, begin, end, out + c, stride, static_cast<int>(dim - c));
}

struct Scales {
  const float *k, *v;  // of a vector of 16 keys; null unless int8
};

// Scores of keys begin..end-1 of the segment become exp(score - top), times the value's scale where there is one.
void softmax_row(float* s, int begin, int end, float softcap, const Scales* scales, float& top, float& sum) {
  const int first = begin / 16, last = (end + 15) / 16;
  if (scales || softcap > 0.0f) {
    for (int v = first; v < last; ++v) {
      f32x16 x = load(s + v * 16);
      if (scales) x = x * load(scales[v].k);
      if (softcap > 0.0f) x = set1(softcap) * tanh(x / set1(softcap));
      store(s + v * 16, x);
    }
  }
  for (int j = first * 16; j < begin; ++j) s[j] = -kInf;
  for (int j = end; j < last * 16; ++j) s[j] = -kInf;
  f32x16 most = set1(-kInf);
  for (int v = first; v < last; ++v) most = max(most, load(s + v * 16));
  top = max(most);
  // A row whose scores are all -infinity keeps a finite reference, so that it weighs nothing instead of NaN.
  const f32x16 reference = set1(top < -std::numeric_limits<float>::max() ? -std::numeric_limits<float>::max() : top);
  f32x16 total = zero();
  for (int v = first; v < last; ++v) {
    const f32x16 e = exp(load(s + v * 16) - reference);
    total = total + e;
    store(s + v * 16, scales ? e * load(scales[v].v) : e);
  }
  sum = gsm::GSM_LEVEL::sum(total);
}

// Attends to the keys of segment `index`; the state is overwritten.
template <class T>
void segment(const Attention& a, const Rows& rows, const float* q, int64_t index, float* scores, State state) {
  const int64_t base = index * kSegment, dim = a.pool.dim, block = a.pool.block, width = padded(dim);
  int begin[kRows], end[kRows], low = kSegment, high = 0, common_low = 0, common_high = kSegment;
  for (int r = 0; r < rows.n; ++r) {
    const int64_t first = first_visible(rows.position[r], a.window) - base, stop = rows.position[r] + 1 - base;
    begin[r] = static_cast<int>(first < 0 ? 0 : first > kSegment ? kSegment : first);
    end[r] = static_cast<int>(stop < 0 ? 0 : stop > kSegment ? kSegment : stop);
    if (common_low < begin[r]) common_low = begin[r];
    if (common_high > end[r]) common_high = end[r];
    state.sum[r] = -1.0f;
    if (begin[r] >= end[r]) continue;
    if (low > begin[r]) low = begin[r];
    if (high < end[r]) high = end[r];
  }
  if (low >= high) return;

  const T *keys[kVectors], *values[kVectors];
  Scales scales[kVectors];
  const int first = low / 16, last = (high + 15) / 16;
  for (int v = first; v < last; ++v) {
    const int64_t position = base + v * 16, slot = position % block;
    const int64_t at = a.table[position / block] * a.pool.heads + rows.kv_head;
    keys[v] = static_cast<const T*>(a.pool.k) + at * dim * block + slot;
    values[v] = static_cast<const T*>(a.pool.v) + (at * block + slot) * dim;
    if constexpr (std::is_same_v<T, int8_t>)
      scales[v] = {a.pool.k_scale + at * block + slot, a.pool.v_scale + at * block + slot};
  }

  with_rows(rows.n, [&](auto count) {
    constexpr int R = decltype(count)::value, W = tile_width(R);
    int v = first;
    for (; v + W <= last; v += W) score_tile<T, R, W>(q, dim, keys + v, values + v, block, scores + v * 16);
    for (; v < last; ++v) score_tile<T, R, 1>(q, dim, keys + v, values + v, block, scores + v * 16);
  });

  for (int r = 0; r < rows.n; ++r) {
    if (begin[r] >= end[r]) continue;
    softmax_row(scores + r * kSegment, begin[r], end[r], a.softcap, std::is_same_v<T, int8_t> ? scales : nullptr,
                state.top[r], state.sum[r]);
    for (int64_t c = 0; c < width; c += 16) store(state.out + r * width + c, zero());
  }

  // Keys that all rows see go through the whole tile; what each row sees before and after them goes alone.
  if (common_low < common_high) {
    for (int r = 0; r < rows.n; ++r)
      if (begin[r] < common_low)
        weigh<T, 1>(scores + r * kSegment, values, dim, begin[r], common_low, state.out + r * width);
    with_rows(rows.n, [&](auto count) {
      weigh<T, decltype(count)::value>(scores, values, dim, common_low, common_high, state.out);
    });
    for (int r = 0; r < rows.n; ++r)
      if (end[r] > common_high)
        weigh<T, 1>(scores + r * kSegment, values, dim, common_high, end[r], state.out + r * width);
  } else {
    for (int r = 0; r < rows.n; ++r)
      if (begin[r] < end[r]) weigh<T, 1>(scores + r * kSegment, values, dim, begin[r], end[r], state.out + r * width);
  }
}

// Adds the state of a later segment, row by row.
void merge(State into, State from, int rows, int64_t width) {
  for (int r = 0; r < rows; ++r) {
    if (from.sum[r] < 0.0f) continue;
    float *a = into.out + r * width, *b = from.out + r * width;
    if (into.sum[r] < 0.0f) {
      into.top[r] = from.top[r];
      into.sum[r] = from.sum[r];
      for (int64_t c = 0; c < width; c += 16) store(a + c, load(b + c));
      continue;
    }
    float top = from.top[r] > into.top[r] ? from.top[r] : into.top[r];
    if (top < -std::numeric_limits<float>::max()) top = -std::numeric_limits<float>::max();
    float factors[16] = {into.top[r] - top, from.top[r] - top};
    store(factors, exp(load(factors)));
    const f32x16 keep = set1(factors[0]), take = set1(factors[1]);
    into.top[r] = top;
    into.sum[r] = into.sum[r] * factors[0] + from.sum[r] * factors[1];
    for (int64_t c = 0; c < width; c += 16) store(a + c, fma(take, load(b + c), keep * load(a + c)));
  }
}

void finish(const Attention& a, const Rows& rows, State state) {
  const int64_t dim = a.pool.dim, width = padded(dim);
  for (int r = 0; r < rows.n; ++r) {
    float* out = a.out + rows.index[r] * dim;
    const bool none = state.sum[r] < 0.0f;
    for (int64_t c = 0; c < dim; c += 16) {
      const f32x16 y = none ? zero() : load(state.out + r * width + c) / set1(state.sum[r]);
      store_first(out + c, y, static_cast<int>(dim - c < 16 ? dim - c : 16));
    }
    if (a.lse) {
      const double log_sum = std::log(static_cast<double>(state.sum[r]));
      a.lse[rows.index[r]] = none ? -kInf : static_cast<float>(state.top[r] + log_sum);
    }
  }
}

int64_t state_floats(int64_t width) { return kRows * (width + 2); }

State state_at(float* memory, int64_t width) { return {memory + kRows * width, memory + kRows * (width + 1), memory}; }

// Working memory of one thread.
struct Scratch {
  float *q, *scores;
  State part, whole;

  explicit Scratch(int64_t dim) {
    const int64_t width = padded(dim), floats = dim * kRows + kRows * kSegment + 2 * state_floats(width);
    float* at = static_cast<float*>(thread_scratch(0, static_cast<size_t>(floats) * sizeof(float)));
    scores = at;
    part = state_at(at += kRows * kSegment, width);
    whole = state_at(at += state_floats(width), width);
    q = at + state_floats(width);
  }

  void load_queries(const Attention& a, const Rows& rows) {
    for (int r = 0; r < rows.n; ++r) {
      const float* from = a.q + rows.index[r] * a.pool.dim;
      for (int64_t c = 0; c < a.pool.dim; ++c) q[c * kRows + r] = from[c] * a.scale;
    }
  }
};

struct Span {
  int64_t begin, end;
};

// Segments in which some row of the tile sees a key (there may be gaps between them, which segment() skips).
Span segments_of(const Attention& a, const Rows& rows) {
  int64_t low = std::numeric_limits<int64_t>::max(), high = -1;
  for (int r = 0; r < rows.n; ++r) {
    const int64_t p = rows.position[r], first = first_visible(p, a.window);
    if (p < 0) continue;
    if (first < low) low = first;
    if (p > high) high = p;
  }
  if (high < 0) return {0, 0};
  return {low / kSegment, high / kSegment + 1};
}

template <class T>
void attend(const Attention& a) {
  const int64_t width = padded(a.pool.dim), group = a.heads / a.pool.heads;
  const int64_t tiles = (a.tokens * group + kRows - 1) / kRows, units = tiles * a.pool.heads;
  int64_t low = std::numeric_limits<int64_t>::max(), high = -1, visible = 0;
  for (int64_t m = 0; m < a.tokens; ++m) {
    const int64_t p = a.positions[m], first = first_visible(p, a.window);
    if (p < 0) continue;
    visible += p + 1 - first;
    if (first < low) low = first;
    if (p > high) high = p;
  }
  const int64_t first_segment = high < 0 ? 0 : low / kSegment;
  const int64_t segments = high < 0 ? 0 : high / kSegment + 1 - first_segment;
  const bool alone = team_threads() == 1 || visible * a.heads * a.pool.dim / 4 < kTeamWork;

  const auto whole_rows = [&](int64_t unit) {
    Scratch s(a.pool.dim);
    const Rows rows = rows_of(a, unit / tiles, unit % tiles);
    s.load_queries(a, rows);
    for (int r = 0; r < rows.n; ++r) s.whole.sum[r] = -1.0f;
    const Span span = segments_of(a, rows);
    for (int64_t i = span.begin; i < span.end; ++i) {
      segment<T>(a, rows, s.q, i, s.scores, s.part);
      merge(s.whole, s.part, rows.n, width);
    }
    finish(a, rows, s.whole);
  };
  if (alone) {
    for (int64_t u = 0; u < units; ++u) whole_rows(u);
    return;
  }
  const int64_t part_floats = units * segments * state_floats(width);
  // Units are dealt like cards, since with a causal mask later tiles cost more; the tiles of a head follow each
  // other, so that its keys and values stay in the cache.
  if (units >= 4 * team_threads() || segments < 2 || part_floats > kMostPartFloats) {
    const auto deal = [&](int t, int threads) {
      for (int64_t u = t; u < units; u += threads) whole_rows(u);
    };
    team_run(std::ref(deal));
    return;
  }
  // Few rows over many keys: threads take segments, and the same merge follows in the same order.
  float* parts = static_cast<float*>(thread_scratch(1, static_cast<size_t>(part_floats) * sizeof(float)));
  const auto deal = [&](int t, int threads) {
    Scratch s(a.pool.dim);
    int64_t loaded = -1;
    Rows rows{};
    const Range mine = share(units * segments, t, threads);
    for (int64_t i = mine.begin; i < mine.end; ++i) {
      if (const int64_t unit = i / segments; unit != loaded) {
        rows = rows_of(a, unit / tiles, unit % tiles);
        s.load_queries(a, rows);
        loaded = unit;
      }
      const State part = state_at(parts + i * state_floats(width), width);
      segment<T>(a, rows, s.q, first_segment + i % segments, s.scores, part);
    }
  };
  team_run(std::ref(deal));
  team_share(units, units * segments * kRows * width, [&](int64_t begin, int64_t end) {
    Scratch s(a.pool.dim);
    for (int64_t u = begin; u < end; ++u) {
      const Rows rows = rows_of(a, u / tiles, u % tiles);
      for (int r = 0; r < rows.n; ++r) s.whole.sum[r] = -1.0f;
      for (int64_t i = u * segments; i < (u + 1) * segments; ++i)
        merge(s.whole, state_at(parts + i * state_floats(width), width), rows.n, width);
      finish(a, rows, s.whole);
    }
  });
}

}  // namespace

void attention(const Attention& a) {
  switch (a.pool.type) {
    case KvType::f32: return attend<float>(a);
    case KvType::f16: return attend<f16>(a);
    case KvType::bf16: return attend<bf16>(a);
    case KvType::int8: return attend<int8_t>(a);
  }
}

}  // namespace gsm::GSM_LEVEL
