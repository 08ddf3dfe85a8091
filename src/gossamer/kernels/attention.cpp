// How the sums are cut. A score is one chain of multiply-adds over the dimensions and a row's keys are weighed in
// ascending order; a softmax runs over a segment of kSegment absolute positions and the segments of a row are merged in
// ascending order. So a row's bits do not depend on the other rows of the call, on the chunking of the prompt, on the
// number of threads or on the block size. Lanes of invisible keys are computed and dropped; invisible float values are
// never multiplied, since a slot that was never written may hold NaN.
#include "attention.h"

#include <cmath>
#include <limits>
#include <type_traits>

#include "attention_plan.h"
#include "attention_tiles.h"
#include "simd.h"

namespace gsm::GSM_LEVEL {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kLargest = std::numeric_limits<float>::max();

// Calls fn with the row count as a compile-time constant.
template <int R, class Fn>
inline void with_rows(int rows, const Fn& fn) {
  if constexpr (R > 1) {
    if (rows < R) return with_rows<R - 1>(rows, fn);
  }
  fn(std::integral_constant<int, R>{});
}

int64_t padded(int64_t dim) { return (dim + 15) / 16 * 16; }

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

int64_t state_floats(int64_t width) { return kTileRows * (width + 2); }

State state_at(float* memory, int64_t width) {
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
  Queries& to = s.queries;
  for (int r = 0; r < rows.n; ++r) {
    const float* const from = a.q + rows.index[r] * dim;
    if constexpr (K == KvType::f32 || K == KvType::f16) {
      for (int64_t c = 0; c < dim; ++c) to.data[c * kTileRows + r] = from[c] * a.scale;
    } else if constexpr (K == KvType::bf16) {
      for (int64_t c = 0; c < dim; c += 2) {
        const uint32_t even = to_bf16(from[c] * a.scale).bits;
        const uint32_t pair = c + 1 < dim ? even | static_cast<uint32_t>(to_bf16(from[c + 1] * a.scale).bits) << 16 : even;
        std::memcpy(to.data + c / 2 * kTileRows + r, &pair, 4);
      }
    } else {
      f32x16 most = zero(), poison = zero();
      const f32x16 scale = set1(a.scale);
      for (int64_t c = 0; c < dim; c += 16) {
        const f32x16 x = load_first(from + c, static_cast<int>(dim - c < 16 ? dim - c : 16)) * scale;
        most = max(most, abs(x));
        poison = poison + (x - x);  // 0, or NaN for infinity and NaN
      }
      const float peak = max(most) + sum(poison);
      const float inverse = kPlanes / peak;
      const bool none = !(inverse <= kLargest);  // zeros (or smaller than any float), or NaN
      i32x16 high = set1(int32_t{0}), low = high;
      for (int64_t c = 0; c < s.width; c += 16) {
        const int lanes = static_cast<int>(dim - c < 16 ? dim - c : 16);
        const f32x16 x = none ? zero() : load_first(from + c, lanes) * scale * set1(inverse);
        const Planes p = planes(to_int(x));
        high = high + p.high;
        low = low + p.low;
        int8_t bytes[2][16];
        store_bytes(bytes[0], p.high);
        store_bytes(bytes[1], p.low);
        for (int i = 0; i < 4; ++i) {
          std::memcpy(to.data + (c / 4 + i) * kTileRows + r, bytes[0] + 4 * i, 4);
          std::memcpy(to.data + s.plane() + (c / 4 + i) * kTileRows + r, bytes[1] + 4 * i, 4);
        }
      }
      const int32_t high_sum = sum(high), low_sum = sum(low);
      to.scale[r] = none && peak == peak ? 0.0f : peak / kPlanes;
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
  f32x16 total = zero(), heaviest = zero(), poison = zero(), offset = zero();
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
      poison = poison + (weight - weight);
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
    const bool sound = mask_at_least(poison, zero()) == 0xFFFF;
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
    w.scale[r] = nothing && peak == peak ? 0.0f : peak / kPlanes;
    w.offset[r] = K == KvType::uint4 ? sum(offset) : 0.0f;
  }
}

// Rows row..row+R-1 over keys begin..end-1, all dimensions.
template <KvType K, int R, bool Edge>
void weigh(const Scratch& s, int row, const Keys& keys, int64_t dim, int begin, int end, float* out) {
  constexpr int W = tile_width<K>(R);
  const auto tile = [&](auto width, auto tail, int64_t c) {
    constexpr int V = decltype(width)::value;
    constexpr bool T = decltype(tail)::value;
    const int lanes = T ? static_cast<int>(dim - c) : 16;
    if constexpr (kCodes<K>) {
      weigh_codes<K, R, V, T>(s.weights, row, keys.v, c * 4, dim, begin, end, out + c, s.width, lanes);
    } else {
      weigh_tile<K, R, V, Edge, T>(s.weights, row, keys.v, keys.next, c * kUnit<K>, dim, begin, end, out + c, s.width,
                                   lanes);
    }
  };
  int64_t c = 0;
  for (; c + W * 16 <= dim; c += W * 16) tile(std::integral_constant<int, W>{}, std::false_type{}, c);
  for (; c + 16 <= dim; c += 16) tile(std::integral_constant<int, 1>{}, std::false_type{}, c);
  if (c < dim) tile(std::integral_constant<int, 1>{}, std::true_type{}, c);
}

// Attends to the keys of segment `index`; the state is overwritten. No row sees a key from `tile_end` on.
template <KvType K>
void segment(const Attention& a, const Rows& rows, Scratch& s, int64_t index, int64_t tile_end, State state) {
  const int64_t base = index * kSegment, dim = a.pool.dim, block = a.pool.block, width = s.width;
  int begin[kTileRows], end[kTileRows], low = kSegment, high = 0;
  for (int r = 0; r < rows.n; ++r) {
    const int64_t first = first_visible(rows.position[r], a.window) - base, stop = rows.position[r] + 1 - base;
    begin[r] = static_cast<int>(first < 0 ? 0 : first > kSegment ? kSegment : first);
    end[r] = static_cast<int>(stop < 0 ? 0 : stop > kSegment ? kSegment : stop);
    state.sum[r] = -1.0f;
    if (begin[r] >= end[r]) continue;
    if (low > begin[r]) low = begin[r];
    if (high < end[r]) high = end[r];
  }
  if (low >= high) return;

  Keys keys;
  const int first = low / 16, stop = (high + 15) / 16;
  const int64_t key_bytes = kv_key_bytes(a.pool), value_bytes = kv_value_bytes(a.pool);
  const int64_t row_bytes = dim * kUnit<K>;  // of the values of kPack positions
  for (int v = first; v < stop; ++v) {
    const int64_t position = base + v * 16, slot = position % block;
    const int64_t at = rows.table[position / block] * a.pool.heads + rows.kv_head;
    keys.k[v] = static_cast<const uint8_t*>(a.pool.k) + at * key_bytes + slot * kUnit<K>;
    keys.v[v] = static_cast<const uint8_t*>(a.pool.v) + at * value_bytes + slot / kPack<K> * row_bytes;
    keys.next[v] = keys.v[v];
    if (position + kSegment < tile_end) {
      const int64_t ahead = rows.table[(position + kSegment) / block] * a.pool.heads + rows.kv_head;
      keys.next[v] = static_cast<const uint8_t*>(a.pool.k) + ahead * key_bytes + slot / kPack<K> * row_bytes;
    }
    if constexpr (kCodes<K>) {
      const int64_t one = K == KvType::int8 ? 4 : 2, many = K == KvType::int8 ? 1 : 2;
      const int64_t scale = (at * many * block + slot) * one;
      keys.k_scale[v] = static_cast<const uint8_t*>(a.pool.k_scale) + scale;
      keys.v_scale[v] = static_cast<const uint8_t*>(a.pool.v_scale) + scale;
    }
  }

  const int64_t steps = (dim + kPack<K> - 1) / kPack<K>;
  for (int row = 0; row < rows.n; row += kRows<K>) {
    with_rows<kRows<K>>(rows.n - row, [&](auto count) {
      constexpr int R = decltype(count)::value, W = tile_width<K>(R);
      const auto tile = [&](auto vectors, int v) {
        constexpr int V = decltype(vectors)::value;
        float* const to = s.scores + row * kSegment + v * 16;
        if constexpr (kCodes<K>) {
          score_codes<K, R, V>(s.queries, row, s.plane(), steps, keys.k + v, keys.v + v, block * 4, to);
        } else {
          score_tile<K, R, V>(s.queries.data + row, steps, keys.k + v, keys.v + v, block * kUnit<K>, to);
        }
      };
      int v = first;
      for (; v + W <= stop; v += W) tile(std::integral_constant<int, W>{}, v);
      for (; v < stop; ++v) tile(std::integral_constant<int, 1>{}, v);
    });
  }

  for (int r = 0; r < rows.n; ++r) {
    if (begin[r] >= end[r]) {
      // Its weights are multiplied all the same when they are codes, and its state is not used.
      if constexpr (kCodes<K>) {
        std::memset(s.weights.high + r * kSegment, 0, kSegment);
        std::memset(s.weights.low + r * kSegment, 0, kSegment);
        s.weights.start_high[r] = s.weights.start_low[r] = 0;
        s.weights.scale[r] = s.weights.offset[r] = 0.0f;
      }
      continue;
    }
    softmax_row<K>(a, s, r, begin[r], end[r], first, stop, keys, rows.n, state.top[r], state.sum[r]);
    if constexpr (!kCodes<K>)
      for (int64_t c = 0; c < width; c += 16) store(state.out + r * width + c, zero());
  }

  // Keys that all rows see go through the whole tile; what each row sees before and after them goes alone.
  for (int row = 0; row < rows.n; row += kRows<K>) {
    const int n = rows.n - row < kRows<K> ? rows.n - row : kRows<K>;
    float* const out = state.out + row * width;
    if constexpr (kCodes<K>) {
      with_rows<kRows<K>>(n, [&](auto count) {
        weigh<K, decltype(count)::value, false>(s, row, keys, dim, first * 16, stop * 16, out);
      });
    } else {
      int common_low = 0, common_high = kSegment;
      for (int r = row; r < row + n; ++r) {
        if (common_low < begin[r]) common_low = begin[r];
        if (common_high > end[r]) common_high = end[r];
      }
      common_low = (common_low + kPack<K> - 1) / kPack<K> * kPack<K>;
      common_high = common_high / kPack<K> * kPack<K>;
      const bool common = common_low < common_high;
      const auto alone = [&](int r, int from, int to) {
        if (from < to) weigh<K, 1, true>(s, r, keys, dim, from, to, state.out + r * width);
      };
      for (int r = row; r < row + n; ++r) alone(r, begin[r], common ? common_low : end[r]);
      if (!common) continue;
      with_rows<kRows<K>>(n, [&](auto count) {
        weigh<K, decltype(count)::value, false>(s, row, keys, dim, common_low, common_high, out);
      });
      for (int r = row; r < row + n; ++r) alone(r, common_high, end[r]);
    }
  }
}

// Adds the state of a later segment, row by row. The exponentials of all rows are taken at once.
void merge(State into, State from, int rows, int64_t width) {
  static_assert(2 * kTileRows <= 16);
  float factors[16] = {}, tops[kTileRows];
  for (int r = 0; r < rows; ++r) {
    const bool old = !(into.sum[r] < 0.0f), fresh = !(from.sum[r] < 0.0f);
    float top = old ? into.top[r] : -kLargest;
    if (fresh && (!old || from.top[r] > top)) top = from.top[r];
    if (top < -kLargest) top = -kLargest;
    factors[r] = old ? into.top[r] - top : 0.0f;
    factors[kTileRows + r] = fresh ? from.top[r] - top : 0.0f;
    tops[r] = top;
  }
  store(factors, exp(load(factors)));
  for (int r = 0; r < rows; ++r) {
    if (from.sum[r] < 0.0f) continue;
    float *a = into.out + r * width, *b = from.out + r * width;
    if (into.sum[r] < 0.0f) {
      into.top[r] = from.top[r];
      into.sum[r] = from.sum[r];
      for (int64_t c = 0; c < width; c += 16) store(a + c, load(b + c));
      continue;
    }
    const float keep = factors[r], take = factors[kTileRows + r];
    into.top[r] = tops[r];
    into.sum[r] = into.sum[r] * keep + from.sum[r] * take;
    for (int64_t c = 0; c < width; c += 16) store(a + c, fma(set1(take), load(b + c), set1(keep) * load(a + c)));
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

// The pieces of one tile: its segments, or the tile as a whole when tiles are not split.
struct Pieces {
  const Tile& tile;
  bool split;
  int64_t begin, total;  // where it lies on the line of costs
  int threads;

  template <class Fn>  // fn(segment, thread); the whole tile has one thread unless it is split
  void each(const Fn& fn) const {
    int64_t at = begin;
    const int whole = static_cast<int>(owner(begin, tile.cost(), total, threads));
    for (int64_t i = tile.first_segment(); i < tile.end_segment(); ++i) {
      const int64_t cost = tile.cost(i);
      fn(i, split ? static_cast<int>(owner(at, cost, total, threads)) : whole);
      at += cost;
    }
  }
  // The thread that finishes the tile: the one with its first piece.
  int first() const {
    const bool pieces = split && tile.first_segment() < tile.end_segment();
    return static_cast<int>(owner(begin, pieces ? tile.cost(tile.first_segment()) : tile.cost(), total, threads));
  }
  // The last piece falls to this thread or an earlier one.
  int last() const { return static_cast<int>(owner(begin + tile.cost(), 0, total, threads)); }
};

// Phase 0: each thread works on its pieces. A tile that it began and another one continues stays in `whole` (there is
// at most one, its last); the segments of a tile that another thread began are stored one by one (again at most one,
// its first). Phase 1: whoever began a tile adds the stored segments in order.
template <KvType K>
void attend(const Attention& a, int phase, int thread, int threads) {
  const Plan plan = plan_of(a);
  if (phase == 1 && !plan.split) return;
  const int64_t total = plan.cost * a.pool.heads, stride = attention_scratch(a);
  Scratch s(a.scratch + thread * stride, a.pool.dim);
  for (int64_t head = 0; head < a.pool.heads; ++head) {
    int64_t at = head * plan.cost;
    if (owner(at, 0, total, threads) > thread || owner(at + plan.cost, 0, total, threads) < thread) continue;
    each_tile(a, [&](const Tile& tile) {
      const Pieces pieces{tile, plan.split, at, total, threads};
      at += tile.cost();
      const int first = pieces.first();
      if (first > thread || pieces.last() < thread) return;
      const Rows rows(a, head, tile);
      if (phase == 1) {
        if (first != thread) return;
        int holder = thread;
        int64_t from = 0;  // the first segment that `holder` stored
        pieces.each([&](int64_t i, int t) {
          if (t == thread) return;
          if (t != holder) {
            holder = t;
            from = i;
          }
          merge(s.whole, Scratch(a.scratch + t * stride, a.pool.dim).stored(i - from), rows.n, s.width);
        });
        if (holder != thread) finish(a, rows, s.whole);
        return;
      }
      bool loaded = false, continued = false;
      int64_t stored = 0;
      const auto load_rows = [&] {
        if (!loaded) load_queries<K>(a, rows, s);
        loaded = true;
      };
      if (first == thread)
        for (int r = 0; r < rows.n; ++r) s.whole.sum[r] = -1.0f;
      pieces.each([&](int64_t i, int t) {
        if (t != thread) {
          continued = continued || t > thread;
          return;
        }
        load_rows();
        const State to = first == thread ? s.part : s.stored(stored++);
        segment<K>(a, rows, s, i, tile.high, to);
        if (first == thread) merge(s.whole, to, rows.n, s.width);
      });
      if (first == thread && !continued) finish(a, rows, s.whole);
    });
  }
}

}  // namespace

void attention_part(const Attention& a, int phase, int thread, int threads) {
  if (a.tokens == 0) return;
  switch (a.pool.type) {
    case KvType::f32: return attend<KvType::f32>(a, phase, thread, threads);
    case KvType::f16: return attend<KvType::f16>(a, phase, thread, threads);
    case KvType::bf16: return attend<KvType::bf16>(a, phase, thread, threads);
    case KvType::int8: return attend<KvType::int8>(a, phase, thread, threads);
    case KvType::uint4: return attend<KvType::uint4>(a, phase, thread, threads);
  }
}

}  // namespace gsm::GSM_LEVEL
