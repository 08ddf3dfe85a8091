// How the sums are cut. A score is one chain of multiply-adds over the dimensions and a row's keys are weighed in
// ascending order; a softmax runs over a segment of kSegment absolute positions and the segments of a row are merged in
// ascending order. So a row's bits do not depend on the other rows of the call, on the chunking of the prompt, on the
// number of threads or on the block size. Lanes of invisible keys are computed and dropped; invisible float values are
// never multiplied, since a slot that was never written may hold NaN.
#include "attention.h"

#include <cmath>
#include <type_traits>

#include "attention_plan.h"
#include "attention_rows.h"
#include "attention_tiles.h"
#include "simd.h"

namespace gsm::GSM_LEVEL {
namespace {

// Calls fn with the row count as a compile-time constant.
template <int R, class Fn>
inline void with_rows(int rows, const Fn& fn) {
  if constexpr (R > 1) {
    if (rows < R) return with_rows<R - 1>(rows, fn);
  }
  fn(std::integral_constant<int, R>{});
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
