// The inner loops over bit planes: see planes.h. Compiled once per level.
//
// Integers are exact within a group, in whatever order; groups are added in ascending order in float32. So every path,
// batch size and number of threads gives the same bits.
// Bound: 1/8 byte of memory a bit of a weight; at few bits and one token the instructions of each path, counted below
// for 256 one-bit weights of one token at 512 bits, come first: mask 16 (for each 64: a mask, a selection, a broadcast,
// a dot product; a tile of tokens shares the first two), lookup 8 (two tables) or 6 (one), popcount
// 1.5 for each plane of x and 2 more.
#include "planes.h"

#include "planes_bytes.h"
#include "planes_popcount.h"
#include "team.h"

// Inner loops stay functions of their own: inlined into one another, they run out of registers.
#if defined(__GNUC__)
#define GSM_APART __attribute__((noinline))
#else
#define GSM_APART
#endif

namespace gsm::GSM_LEVEL {
namespace {

struct Finish {
  const Planes& w;
  const PlanesInput& in;
  const PlanesOutput& out;

  // Group g of a panel is summed up. `total` [16] is the caller's from the first group to the last: the rows of y lie
  // far apart, and often at the same place of the cache.
  void operator()(int64_t token, int64_t panel, int64_t g, i32x16 acc, float* total) const {
    const int64_t groups = w.groups();
    if (out.sums) return store_ints(out.sums + ((token * w.panels() + panel) * groups + g) * 16, acc);
    const i32x16 value = acc * set1(w.step) - set1(w.zero * in.sums[token * groups + g]);
    const f32x16 scale = load(w.scales + (panel * groups + g) * 16);
    const f32x16 sum = fma(scale, to_float(value), g ? load(total) : zero());
    if (g < groups - 1) return store(total, sum);
    const int n = static_cast<int>(std::min<int64_t>(16, w.rows - panel * 16));
    store_first(out.y + token * w.rows + panel * 16, sum * set1(in.scale[token]), n);
  }
};

// ---------------------------------------------------------------- mask

// acc[t][16] = the dot products of T tokens with B planes over `blocks` blocks, times 2^shift and added for shift > 0.
template <int B, int T>
GSM_APART void mask_run(const uint8_t* const* planes, int64_t blocks, const int8_t* x, int shift, int32_t* acc) {
  constexpr int kChains = T == 1 ? 4 : 1;  // independent sums hide the latency of the dot product
  i32x16 sums[T][kChains];
  for (int t = 0; t < T; ++t)
    for (int c = 0; c < kChains; ++c) sums[t][c] = set1(0);
  for (int64_t k = 0; k < blocks; ++k) {
#pragma GCC unroll 4
    for (int h = 0; h < 4; ++h) {
      bytes codes = no_bytes();
#pragma GCC unroll 8
      for (int b = 0; b < B; ++b) codes = add_where(codes, planes[b] + 32 * k + 8 * h, 1 << b);
#pragma GCC unroll 16
      for (int t = 0; t < T; ++t)
        sums[t][h % kChains] = dot4(sums[t][h % kChains], codes, x + ((4 * k + h) * T + t) * 4);
    }
  }
  for (int t = 0; t < T; ++t) {
    i32x16 total = sums[t][0];
    for (int c = 1; c < kChains; ++c) total = total + sums[t][c];
    store_ints(acc + 16 * t, shift ? load_ints(acc + 16 * t) + shift_left(total, shift) : total);
  }
}

template <int T>
void mask_bits(int bits, const uint8_t* const* planes, int64_t blocks, const int8_t* x, int32_t* acc) {
  for (int shift = 0; shift < bits;) {
    const int b = bits <= kMaxMaskBits ? bits : std::min(4, bits - shift);
    const uint8_t* const* p = planes + shift;
    switch (b) {
      case 1: mask_run<1, T>(p, blocks, x, shift, acc); break;
      case 2: mask_run<2, T>(p, blocks, x, shift, acc); break;
      case 3: mask_run<3, T>(p, blocks, x, shift, acc); break;
      case 4: mask_run<4, T>(p, blocks, x, shift, acc); break;
      case 5: mask_run<5, T>(p, blocks, x, shift, acc); break;
      case 6: mask_run<6, T>(p, blocks, x, shift, acc); break;
      case 7: mask_run<7, T>(p, blocks, x, shift, acc); break;
      default: mask_run<kMaxMaskBits, T>(p, blocks, x, shift, acc); break;
    }
    shift += b;
  }
}

void mask_panels(const Planes& w, const PlanesInput& in, int64_t first, int64_t last, const Finish& finish) {
  const int64_t stride = w.blocks() * 16;
  auto* const totals = static_cast<float*>(thread_scratch(0, static_cast<size_t>(in.tokens) * 64));
  for (int64_t p = first; p < last; ++p)
    for (int64_t g = 0; g < w.groups(); ++g) {
      const int64_t begin = g * w.group_blocks(), blocks = w.last_block(g) - begin;
      const uint8_t* planes[8];
      for (int b = 0; b < w.bits; ++b) planes[b] = w.plane[b] + (p * w.blocks() + begin) * 32;
      for (int64_t t = 0; t < in.tokens;) {
        alignas(64) int32_t acc[kPlanesTile * 16];
        const int tile = planes_tile(in.tokens - t, in.most);
        const int8_t* x = in.x + t * stride + begin * 16 * tile;
        if (tile == 1) mask_bits<1>(w.bits, planes, blocks, x, acc);
        else if (tile == 4) mask_bits<4>(w.bits, planes, blocks, x, acc);
        else mask_bits<kPlanesTile>(w.bits, planes, blocks, x, acc);
        for (int i = 0; i < tile; ++i) finish(t + i, p, g, load_ints(acc + 16 * i), totals + 16 * (t + i));
        t += tile;
      }
    }
}

// ---------------------------------------------------------------- lookup

// A table holds sum + 32 in 6 bits, or sum + 512 as two tables of the low and the high 5 bits: bytes can then take 4 or
// 8 blocks before they are widened.
template <bool Narrow> struct Table {
  static constexpr int64_t kSize = Narrow ? 64 : 128;
  static constexpr int kBlocks = Narrow ? 4 : 8;
  static constexpr int32_t kBias = 4 * (Narrow ? 32 : 512);  // a block
};

// acc[s][t] = the sums over `blocks` blocks of S streams (planes of one panel, or of several) for T tokens.
template <int S, int T, bool Narrow>
GSM_APART void lookup_run(const uint8_t* const* streams, int64_t blocks, const uint8_t* tables, int64_t stride,
                          i32x16 (*acc)[T]) {
  using Entry = Table<Narrow>;
  for (int s = 0; s < S; ++s)
    for (int t = 0; t < T; ++t) acc[s][t] = set1(static_cast<int32_t>(-Entry::kBias * blocks));
  for (int64_t k = 0; k < blocks;) {
    const int64_t end = std::min<int64_t>(blocks, k + Entry::kBlocks);
    bytes low[S][T], high[S][T];
    for (int s = 0; s < S; ++s)
      for (int t = 0; t < T; ++t) low[s][t] = high[s][t] = no_bytes();
    for (; k < end; ++k) {
      bytes index[S];
#pragma GCC unroll 4
      for (int s = 0; s < S; ++s) index[s] = nibbles(streams[s] + 32 * k);
#pragma GCC unroll 4
      for (int t = 0; t < T; ++t) {
        const uint8_t* table = tables + t * stride + k * Entry::kSize;
        const bytes first = load_bytes(table);
#pragma GCC unroll 4
        for (int s = 0; s < S; ++s) low[s][t] = add_bytes(low[s][t], look_up(first, index[s]));
        if constexpr (!Narrow) {
          const bytes second = load_bytes(table + 64);
#pragma GCC unroll 4
          for (int s = 0; s < S; ++s) high[s][t] = add_bytes(high[s][t], look_up(second, index[s]));
        }
      }
    }
    for (int s = 0; s < S; ++s)
      for (int t = 0; t < T; ++t) {
        acc[s][t] = add_words<1>(acc[s][t], low[s][t]);
        if constexpr (!Narrow) acc[s][t] = add_words<32>(acc[s][t], high[s][t]);
      }
  }
}

// carry[panel][t][16] += the sums of `panels` panels (of `bits` planes each, S = panels * bits streams).
template <int S, int T, bool Narrow>
void lookup_streams(const uint8_t* const* streams, int bits, int shift, int64_t blocks, const uint8_t* tables,
                    int64_t stride, int32_t* carry) {
  i32x16 acc[S][T];
  lookup_run<S, T, Narrow>(streams, blocks, tables, stride, acc);
  for (int s = 0; s < S; ++s)
    for (int t = 0; t < T; ++t) {
      int32_t* const to = carry + (s / bits * T + t) * 16;
      store_ints(to, load_ints(to) + shift_left(acc[s][t], s % bits + shift));
    }
}

template <int T, bool Narrow>
void lookup_some(int count, const uint8_t* const* streams, int bits, int shift, int64_t blocks, const uint8_t* tables,
                 int64_t stride, int32_t* carry) {
  if constexpr (T == 1) {
    switch (count) {
      case 2: return lookup_streams<2, T, Narrow>(streams, bits, shift, blocks, tables, stride, carry);
      case 3: return lookup_streams<3, T, Narrow>(streams, bits, shift, blocks, tables, stride, carry);
      case 4: return lookup_streams<4, T, Narrow>(streams, bits, shift, blocks, tables, stride, carry);
      default: break;
    }
  }
  lookup_streams<1, T, Narrow>(streams, bits, shift, blocks, tables, stride, carry);
}

// T tokens from `token` on. Columns are cut so that the tables of a cut stay in the first-level cache while the panels
// pass by; the integers of an unfinished group wait in `carry` [panels][T][16], the sums over groups in `totals`.
template <int T, bool Narrow>
void lookup_tokens(const Planes& w, const PlanesInput& in, int64_t token, int64_t first, int64_t last, int32_t* carry,
                   float* totals, const Finish& finish) {
  constexpr int64_t kSize = Table<Narrow>::kSize, kCut = 16384 / (kSize * T);
  const int64_t all = w.blocks(), stride = all * kSize;
  const uint8_t* const tables = in.tables + token * stride;
  std::fill(carry, carry + (last - first) * T * 16, 0);
  for (int64_t cut = 0; cut < all; cut += kCut) {
    const int64_t cut_end = std::min(all, cut + kCut);
    for (int64_t p = first; p < last;) {
      const int64_t panels = T == 1 && w.bits <= 2 ? std::min<int64_t>(4 / w.bits, last - p) : 1;
      for (int64_t k = cut; k < cut_end;) {
        const int64_t g = k / w.group_blocks(), end = std::min(cut_end, w.last_block(g));
        int32_t* const sums = carry + (p - first) * T * 16;
        const int most = T == 1 ? 4 : 1;  // streams at once
        for (int b = 0; b < w.bits; b += most) {
          const int planes = std::min(w.bits - b, most);
          const uint8_t* streams[4];
          int count = 0;
          for (int64_t i = 0; i < panels; ++i)
            for (int j = 0; j < planes; ++j) streams[count++] = w.plane[b + j] + ((p + i) * all + k) * 32;
          lookup_some<T, Narrow>(count, streams, planes, b, end - k, tables + k * kSize, stride, sums);
        }
        if (end == w.last_block(g)) {
          for (int64_t i = 0; i < panels; ++i)
            for (int t = 0; t < T; ++t)
              finish(token + t, p + i, g, load_ints(sums + (i * T + t) * 16), totals + ((p - first + i) * T + t) * 16);
          std::fill(sums, sums + panels * T * 16, 0);
        }
        k = end;
      }
      p += panels;
    }
  }
}

template <bool Narrow>
void lookup_panels(const Planes& w, const PlanesInput& in, int64_t first, int64_t last, const Finish& finish) {
  const int64_t n = (last - first) * 4 * 16;
  auto* const carry = static_cast<int32_t*>(thread_scratch(0, static_cast<size_t>(n) * 4));
  auto* const totals = static_cast<float*>(thread_scratch(1, static_cast<size_t>(n) * 4));
  int64_t t = 0;
  for (; t + 4 <= in.tokens; t += 4) lookup_tokens<4, Narrow>(w, in, t, first, last, carry, totals, finish);
  for (; t < in.tokens; ++t) lookup_tokens<1, Narrow>(w, in, t, first, last, carry, totals, finish);
}

// Entry e: the bias and those of four activations whose bit is set in e.
inline void sums_of_four(const int8_t* x, int bias, uint16_t* sums) {
#if defined(__AVX2__)
  const auto where = [](int bit, int16_t value) {
    const __m256i entry = _mm256_setr_epi16(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m256i mask = _mm256_set1_epi16(static_cast<int16_t>(bit));
    return _mm256_and_si256(_mm256_cmpeq_epi16(_mm256_and_si256(entry, mask), mask), _mm256_set1_epi16(value));
  };
  const __m256i low = _mm256_add_epi16(where(1, x[0]), where(2, x[1]));
  const __m256i high = _mm256_add_epi16(where(4, x[2]), where(8, x[3]));
  const __m256i biased = _mm256_add_epi16(_mm256_add_epi16(low, high), _mm256_set1_epi16(static_cast<int16_t>(bias)));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(sums), biased);
#else
  for (int e = 0; e < 16; ++e)
    sums[e] = static_cast<uint16_t>(bias + (e & 1) * x[0] + (e >> 1 & 1) * x[1] + (e >> 2 & 1) * x[2] + (e >> 3) * x[3]);
#endif
}

// ---------------------------------------------------------------- popcount

template <bool Instruction>
void popcount_panels(const Planes& w, const PlanesInput& in, int64_t first, int64_t last, const Finish& finish) {
  constexpr int64_t kCut = 64;  // words of 64 columns: the turned plane stays in the first-level cache
  alignas(64) uint64_t rows[kCut * 16];
  const Count count = count_of<Instruction>(in.x_bits);
  auto* const totals = static_cast<int64_t*>(thread_scratch(0, static_cast<size_t>(in.tokens) * 128));
  auto* const floats = static_cast<float*>(thread_scratch(1, static_cast<size_t>(in.tokens) * 64));
  for (int64_t p = first; p < last; ++p)
    for (int64_t g = 0; g < w.groups(); ++g) {
      std::fill(totals, totals + in.tokens * 16, 0);
      const int64_t begin = g * w.group_blocks(), blocks = w.last_block(g) - begin, words = (blocks + 3) / 4;
      for (int64_t cut = 0; cut < words; cut += kCut) {
        const int64_t n = std::min(kCut, words - cut);
        for (int b = 0; b < w.bits; ++b) {
          const uint8_t* plane = w.plane[b] + (p * w.blocks() + begin) * 32;
          for (int64_t i = 0; i < n; ++i) turn(plane + (cut + i) * 128, blocks - 4 * (cut + i), rows + 16 * i);
          for (int64_t t = 0; t < in.tokens; ++t)
            count(rows, n, in.words + ((t * w.groups() + g) * in.group_words + cut) * 8, b, totals + 16 * t);
        }
      }
      for (int64_t t = 0; t < in.tokens; ++t) {
        alignas(64) int32_t acc[16];
        for (int r = 0; r < 16; ++r) acc[r] = static_cast<int32_t>(totals[16 * t + r / 2 + r % 2 * 8]);
        finish(t, p, g, load_ints(acc), floats + 16 * t);
      }
    }
}

}  // namespace

void planes_tables(const int8_t* x, int64_t blocks, bool narrow, uint8_t* tables) {
  for (int64_t k = 0; k < blocks; ++k, x += 16, tables += narrow ? 64 : 128) {
    uint16_t sums[4][16];  // never negative: the bias is larger than any sum
    const int bias = narrow ? 32 : 512;
    for (int h = 0; h < 4; ++h) sums_of_four(x + 4 * h, bias, sums[h]);
    const uint16_t* const all = sums[0];
    for (int e = 0; e < 64; ++e) tables[e] = static_cast<uint8_t>(narrow ? all[e] : all[e] & 31);
    if (!narrow)
      for (int e = 0; e < 64; ++e) tables[64 + e] = static_cast<uint8_t>(all[e] >> 5);
  }
}

void planes_words(const int8_t* x, int64_t blocks, uint64_t* words) {
  for (int64_t k = 0; k < blocks; k += 4, words += 8) {
    int8_t columns[64] = {};
    std::memcpy(columns, x + 16 * k, static_cast<size_t>(std::min<int64_t>(4, blocks - k)) * 16);
    for (int a = 0; a < 8; ++a) {
      const uint64_t bits = bit_of_each(columns, a);
      words[a] = spread_nibbles(bits & 0xFFFFFFFFu) | spread_nibbles(bits >> 32) << 4;
    }
  }
}

void planes_panels(const Planes& w, PlanesPath path, const PlanesInput& in, int64_t first, int64_t last,
                   const PlanesOutput& out) {
  const Finish finish{w, in, out};
  switch (path) {
    case PlanesPath::mask: return mask_panels(w, in, first, last, finish);
    case PlanesPath::lookup:
      return in.narrow ? lookup_panels<true>(w, in, first, last, finish)
                       : lookup_panels<false>(w, in, first, last, finish);
    case PlanesPath::popcount: return popcount_panels<false>(w, in, first, last, finish);
    case PlanesPath::vpopcnt: return popcount_panels<true>(w, in, first, last, finish);
  }
}

}  // namespace gsm::GSM_LEVEL
