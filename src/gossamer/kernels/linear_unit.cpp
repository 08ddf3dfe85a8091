// Panels of one weight times all tokens of a call: chooses the source, expands what is not read in place, runs the tiles.
#include <algorithm>

#include "activations.h"
#include "dot.h"

namespace gsm::GSM_LEVEL {
namespace {

struct Job {
  const PanelPart& part;
  int64_t panel, strips, tokens;
  float* result;
  float* scales;    // scratch for one chunk
  float* offsets;   // null when there are none
  uint8_t* codes;   // scratch for expanded codes
};

// Expanding costs a store and a load; unpacking in registers costs as much again for every tile.
constexpr int64_t kUnpackTokens = 16;
// 8-bit codes and plain numbers are copied, so that the two panels of a tile do not collide in the cache.
constexpr int64_t kCopyTokens = 32;

// Whether codes are read where they are.
bool in_place(const Weight& w, Path path, int64_t tokens) {
  const bool few = tokens <= kUnpackTokens;
  switch (path) {
    case Path::bytes:
      if (w.bits == 8) return w.byte_table.empty() && tokens <= kCopyTokens;
      return w.bits == 4 ? few || w.byte_table.empty() : few && w.byte_table.empty() && w.bits >= 2 && w.bits <= 6;
    case Path::pairs: return !w.coded() || w.bits == 4 || (few && (w.bits >= 5 && w.bits != 7));
    default:
      if (!w.coded()) return w.number != Number::bf16 && w.cols == w.width() && tokens <= (w.number == Number::f32 ? kCopyTokens : kUnpackTokens);
      return few && !w.table_per_row && (w.bits == 4 || (w.bits == 8 && !w.table));
  }
}

// Segments at once. Expanded codes of a chunk stay in the first cache for few tokens and in the second for many; what
// is read in place needs room for its scales only, but the inputs of a tile should stay in the first cache.
int64_t chunk_segments(int64_t tokens, const PanelPart& part) {
  const bool many = tokens > kUnpackTokens;
  int64_t columns;
  if (in_place(*part.weight, part.form->path, tokens)) columns = 2048;
  else if (part.form->path == Path::bytes) columns = many ? 2048 : 256;
  else if (part.form->path == Path::pairs) columns = many ? 1024 : 128;
  else columns = many ? 512 : 128;
  return std::max<int64_t>(1, std::min(part.sums->segments, columns / part.sums->length));
}

#if defined(__AVX512F__)
constexpr int kMaxTile = 6, kMaxPanels = 4;
#elif defined(__AVX2__)
constexpr int kMaxTile = 2, kMaxPanels = 2;
#else
constexpr int kMaxTile = 2, kMaxPanels = 1;
#endif

template <class Source> using Run = void (*)(const Source*, const Stretch&, const TileInput&, float*, bool);

// Four panels are taken for few tokens only, so that totals and sums fit in the registers.
template <class Source, int P> Run<Source> pick(int64_t T) {
  if (T == 1) return tile<Source, P, 1>;
  if constexpr (kMaxTile > 2 || P == 1) {
    if (T == 2) return tile<Source, P, 2>;
  }
  if constexpr (kMaxTile > 2) {
    if (T == 3) return tile<Source, P, 3>;
    if constexpr (P < 4) {
      if (T == 4) return tile<Source, P, 4>;
      if (T == 5) return tile<Source, P, 5>;
      if (T == 6) return tile<Source, P, 6>;
    }
  }
  return nullptr;
}

// Whether `lean_tile` serves: see there.
template <class Source, int P> bool lean(const Job& j, Values of) {
  if constexpr (P != 1 || !Source::Dot::integer || Source::parts != 1) return false;
  const Weight& w = *j.part.weight;
  const Sums& sums = *j.part.sums;
  return of == Values::bytes && j.tokens <= std::min<int64_t>(few_tokens(), kMaxTile) && !j.offsets && sums.scales && sums.bytes &&
         w.scales.kind == ScaleKind::f16 && w.byte_scale == 1 && w.tile_rows == 1 && w.group == sums.length &&
         sums.length % 32 == 0 && w.width() == sums.segments * sums.length;
}

// All segments of one panel of few tokens.
template <class Source> void run_lean(const Job& j, const Source& source, int64_t strip) {
  const Weight& w = *j.part.weight;
  const Sums& sums = *j.part.sums;
  const Form& form = *j.part.form;
  const Stretch s{0, sums.segments, sums.length, w.width() / 8, nullptr, nullptr, 0, {-byte_zero(w, 0), 0}, {1, 0}};
  const int64_t row = w.groups() * 16;
  const f16* scales = reinterpret_cast<const f16*>(w.scales.values) + (j.panel + strip) * row;
  const TileInput x{form.data, sums.bytes, nullptr, sums.scales};
  float* result = j.result + strip * j.tokens * 16;
  switch (j.tokens) {
    case 1: return lean_tile<Source, 1>(source, s, scales, row, x, result);
    case 2: return lean_tile<Source, 2>(source, s, scales, row, x, result);
    default: return lean_tile<Source, 3>(source, s, scales, row, x, result);
  }
}

// One strip and chunk after another: `open` gives the source of one panel for halves [from, to).
template <class Source, int P, class Open> void run_chunks(const Job& j, Values of, const Open& open) {
  if constexpr (P == 1 && Source::Dot::integer && Source::parts == 1) {
    if (lean<Source, P>(j, of)) {
      for (int64_t strip = 0; strip < j.strips; ++strip)
        run_lean<Source>(j, open(0, j.panel + strip, 0, j.part.weight->width() / 8), strip);
      return;
    }
  }
  const Weight& w = *j.part.weight;
  const Form& form = *j.part.form;
  const Sums& sums = *j.part.sums;
  const int64_t per_chunk = chunk_segments(j.tokens, j.part), tiles = tile_count(j.tokens);
  Stretch s{};
  s.length = sums.length;
  s.halves = w.width() / 8;
  s.stride = per_chunk * 16;
  s.scales = j.scales;
  s.offsets = j.offsets;
  if (of == Values::bytes) {
    s.zero[0] = -byte_zero(w, 0);
    s.zero[1] = -byte_zero(w, 1);
    s.weight[0] = w.byte_parts == 2 ? 256.0f : 1.0f;
    s.weight[1] = 1.0f;
  }
  for (int64_t strip = 0; strip < j.strips; ++strip) {
    const int64_t panel = j.panel + strip * P;
    float* result = j.result + strip * j.tokens * P * 16;
    for (s.first = 0; s.first < sums.segments; s.first = s.last) {
      s.last = std::min(sums.segments, s.first + per_chunk);
      for (int p = 0; p < P; ++p)
        expand_scales(w, of, panel + p, s.length, s.first, s.last, P, j.scales + p * s.stride,
                      j.offsets ? j.offsets + p * s.stride : nullptr);
      Source source[P];
      const int64_t from = s.first * s.length / 8, to = std::min(s.halves, s.last * s.length / 8);
      for (int p = 0; p < P; ++p) source[p] = open(p, panel + p, from, to);
      for (int64_t i = 0; i < tiles; ++i) {
        const Tile t = tile_at(j.tokens, i);
        TileInput x;
        x.data = form.data + t.begin * form.stride();
        x.sums = sums.bytes ? sums.bytes + t.begin * sums.segments : nullptr;
        x.float_sums = sums.floats ? sums.floats + t.begin * sums.segments : nullptr;
        x.scales = sums.scales ? sums.scales + t.begin * sums.segments : nullptr;
        pick<Source, P>(t.end - t.begin)(source, s, x, result + t.begin * P * 16, s.first == 0);
      }
    }
  }
}

// Bytes of the panels at hand, which is how far ahead the next ones begin; one panel alone is read close behind.
int64_t ahead_of(const Job& j, int P, int64_t panel_bytes) {
  return P == 1 && j.tokens <= few_tokens() ? 4096 : P * panel_bytes;
}

Fields fields_ahead(const Job& j, int P, int64_t panel) {
  Fields f = panel_fields(*j.part.weight, panel);
  const int64_t ahead = ahead_of(j, P, j.part.weight->width() * 8);
  if (f.q8) f.q8 += 2 * ahead;
  if (f.q4) f.q4 += ahead;
  if (f.q2) f.q2 += ahead / 2;
  if (f.q1) f.q1 += ahead / 4;
  return f;
}

template <int P> void bytes(const Job& j) {
  const Weight& w = *j.part.weight;
  const int64_t stretch = chunk_segments(j.tokens, j.part) * j.part.sums->length;
  const int64_t room = (std::min(stretch, w.width()) + 8) * 16;
  const bool place = in_place(w, Path::bytes, j.tokens);
  if (place && w.bits == 8) {
    const int64_t ahead = ahead_of(j, P, w.width() * 16);
    return run_chunks<Bytes, P>(j, Values::bytes, [&](int, int64_t panel, int64_t, int64_t) {
      return Bytes{panel_fields(w, panel).q8, 0, ahead};
    });
  }
  const auto stored = [&](int64_t panel) { return panel_fields(w, panel); };
  const auto later = [&](int64_t panel) { return fields_ahead(j, P, panel); };
  if (place) {
    if (w.byte_table.empty()) {
      switch (w.bits) {
#define GSM_STORED(B) \
  case B: return run_chunks<Stored<B>, P>(j, Values::bytes, [&](int, int64_t panel, int64_t, int64_t) { return Stored<B>{stored(panel), later(panel)}; });
        GSM_STORED(2)
        GSM_STORED(3)
        GSM_STORED(4)
        GSM_STORED(5)
        GSM_STORED(6)
#undef GSM_STORED
        default: break;
      }
    } else if (w.byte_parts == 1) {
      return run_chunks<Looked<1>, P>(j, Values::bytes, [&](int, int64_t panel, int64_t, int64_t) { return Looked<1>{stored(panel), later(panel), w.byte_table.data()}; });
    } else {
      return run_chunks<Looked<2>, P>(j, Values::bytes, [&](int, int64_t panel, int64_t, int64_t) { return Looked<2>{stored(panel), later(panel), w.byte_table.data()}; });
    }
  }
  if (w.byte_parts == 2) {
    run_chunks<TwoBytes, P>(j, Values::bytes, [&](int p, int64_t panel, int64_t from, int64_t to) {
      uint8_t* out = j.codes + 2 * p * room;
      expand_bytes(w, 0, panel, from, to, out);
      expand_bytes(w, 1, panel, from, to, out + room);
      return TwoBytes{{out, out + room}, from};
    });
    return;
  }
  run_chunks<Bytes, P>(j, Values::bytes, [&](int p, int64_t panel, int64_t from, int64_t to) {
    uint8_t* out = j.codes + p * room;
    expand_bytes(w, 0, panel, from, to, out);
    return Bytes{out, from, 0};
  });
}

template <int P> void floats(const Job& j) {
  const Weight& w = *j.part.weight;
  const bool place = in_place(w, Path::floats, j.tokens);
  if (place && w.number == Number::f32)
    return run_chunks<Floats, P>(j, Values::floats, [&](int, int64_t panel, int64_t, int64_t) {
      return Floats{reinterpret_cast<const float*>(w.values) + panel * w.cols * 16, 0, ahead_of(j, P, w.cols * 64)};
    });
  if (place && w.number == Number::f16)
    return run_chunks<Halves, P>(j, Values::floats, [&](int, int64_t panel, int64_t, int64_t) {
      return Halves{reinterpret_cast<const f16*>(w.values) + panel * w.cols * 16, ahead_of(j, P, w.cols * 32)};
    });
  if (place && w.bits == 4)
    return run_chunks<FloatNibbles, P>(j, Values::floats, [&](int, int64_t panel, int64_t, int64_t) {
      return FloatNibbles{panel_fields(w, panel).q4, ahead_of(j, P, w.width() * 8), load(w.small_table)};
    });
  if (place)
    return run_chunks<FloatBytes, P>(j, Values::floats, [&](int, int64_t panel, int64_t, int64_t) {
      return FloatBytes{panel_fields(w, panel).q8, ahead_of(j, P, w.width() * 16), w.step, w.zero};
    });
  const int64_t stretch = chunk_segments(j.tokens, j.part) * j.part.sums->length;
  const int64_t room = (std::min(stretch, w.width()) + 8) * 16;
  run_chunks<Floats, P>(j, Values::floats, [&](int p, int64_t panel, int64_t from, int64_t to) {
    float* out = reinterpret_cast<float*>(j.codes) + p * room;
    expand_floats(w, panel, from, to, out);
    return Floats{out, from, 0};
  });
}

#if defined(__AVX512BF16__)
template <int B, int P> void pair_codes(const Job& j) {
  const Words<B> words(j.part.weight->bf16_table.data());
  run_chunks<PairCodes<B>, P>(j, Values::floats, [&](int, int64_t panel, int64_t, int64_t) {
    return PairCodes<B>{panel_fields(*j.part.weight, panel), fields_ahead(j, P, panel), &words};
  });
}

template <int P> void pairs(const Job& j) {
  const Weight& w = *j.part.weight;
  if (w.number == Number::bf16)
    return run_chunks<PairValues, P>(j, Values::floats, [&](int, int64_t panel, int64_t, int64_t) {
      return PairValues{reinterpret_cast<const uint16_t*>(w.values) + panel * w.width() * 16, 0,
                        ahead_of(j, P, w.width() * 32)};
    });
  if (w.bits == 4) {
    const Words<4> words(w.bf16_table.data());
    return run_chunks<PairNibbles, P>(j, Values::floats, [&](int, int64_t panel, int64_t, int64_t) {
      return PairNibbles{panel_fields(w, panel).q4, ahead_of(j, P, w.width() * 8), &words};
    });
  }
  if (in_place(w, Path::pairs, j.tokens)) {
    if (w.bits == 5) return pair_codes<5, P>(j);
    if (w.bits == 6) return pair_codes<6, P>(j);
    return pair_codes<8, P>(j);
  }
  const int64_t stretch = chunk_segments(j.tokens, j.part) * j.part.sums->length;
  const int64_t room = (std::min(stretch, w.width()) + 8) * 16;
  run_chunks<PairValues, P>(j, Values::floats, [&](int p, int64_t panel, int64_t from, int64_t to) {
    uint16_t* out = reinterpret_cast<uint16_t*>(j.codes) + p * room;
    expand_bf16(w, panel, from, to, out);
    return PairValues{out, from, 0};
  });
}
#endif

template <int P> void any_path(const Job& j) {
  switch (j.part.form->path) {
    case Path::bytes:
      if constexpr (P < 4) bytes<P>(j);
      return;
#if defined(__AVX512BF16__)
    case Path::pairs: return pairs<P>(j);
#endif
    default: return floats<P>(j);
  }
}

inline int64_t aligned(int64_t bytes) { return (bytes + 63) / 64 * 64; }

}  // namespace

int max_tile() { return kMaxTile; }

int panels_at_once(Path path, int64_t tokens) {
  // Bytes of one panel are one stream from memory; a float chain needs others beside it to hide its latency.
  if (kMaxPanels < 4) return tokens == 1 && path != Path::bytes ? kMaxPanels : 1;  // `pick` has no larger tiles
  if (tokens <= few_tokens()) return path == Path::bytes ? 1 : kMaxPanels;
  return 2;
}

int64_t panel_scratch(int64_t tokens, const PanelPart& part) {
  int64_t bytes = strips_at_once(tokens) * tokens * 256 + 256;  // of totals, when they are added to others
  if (!part.weight) return bytes;
  const int64_t segments = chunk_segments(tokens, part);
  const int64_t columns = std::min(segments * part.sums->length, part.weight->width()) + 8;
  return bytes + 4 * (2 * segments * 64 + columns * 16 * (part.form->path == Path::floats ? 4 : 2));
}

namespace {

// One slot of a mask: the entry of each row, its column (0 where there is none), and a bit for each row that has one.
struct Slot {
  float value[16];
  int32_t column[16];
  uint32_t filled;
};

inline void read_slot(const Mask& m, int64_t slot, Slot& out) {
  switch (m.kind) {
    case ScaleKind::f32: store(out.value, load(reinterpret_cast<const float*>(m.values) + 16 * slot)); break;
    case ScaleKind::f16: store(out.value, load(reinterpret_cast<const f16*>(m.values) + 16 * slot)); break;
    case ScaleKind::bf16: store(out.value, load(reinterpret_cast<const bf16*>(m.values) + 16 * slot)); break;
    default:
      for (int r = 0; r < 16; ++r) out.value[r] = m.scale * static_cast<float>(m.values[16 * slot + r] - 128);
  }
  const uint8_t* p = m.index + 16 * m.index_bytes * slot;
#if defined(__AVX512F__)
  const __m512i none = _mm512_set1_epi32(m.index_bytes == 2 ? 0xFFFF : -1);
  const __m512i c = m.index_bytes == 2 ? _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))
                                       : _mm512_loadu_si512(p);
  const __mmask16 filled = _mm512_cmpneq_epi32_mask(c, none);
  _mm512_storeu_si512(out.column, _mm512_maskz_mov_epi32(filled, c));
  out.filled = filled;
#else
  out.filled = 0;
  for (int r = 0; r < 16; ++r) {
    uint32_t c = 0;
    std::memcpy(&c, p + m.index_bytes * r, static_cast<size_t>(m.index_bytes));  // little-endian, as the format is
    const bool some = c != (m.index_bytes == 2 ? 0xFFFFu : 0xFFFFFFFFu);
    out.column[r] = some ? static_cast<int32_t>(c) : 0;  // columns are below 2^31
    out.filled |= static_cast<uint32_t>(some) << r;
  }
#endif
}

// y += value * x[column * T] in each lane that has an entry; the others stay as they are.
inline f32x16 add_slot(const Slot& s, const float* x, int64_t T, f32x16 y) {
#if defined(__AVX512F__)  // sixteen loads take less time than a gather instruction
  const auto at = [&](int r) { return x[s.column[r] * T]; };
  const __m512 v = _mm512_set_ps(at(15), at(14), at(13), at(12), at(11), at(10), at(9), at(8), at(7), at(6), at(5), at(4),
                                 at(3), at(2), at(1), at(0));
  const __m512 product = _mm512_mul_ps(_mm512_loadu_ps(s.value), v);
  return {_mm512_mask_add_ps(y.v, static_cast<__mmask16>(s.filled), y.v, product)};
#else
  float lanes[16];
  store(lanes, y);
  for (int r = 0; r < 16; ++r)
    if (s.filled >> r & 1) lanes[r] = lanes[r] + s.value[r] * x[s.column[r] * T];
  return load(lanes);
#endif
}

// Adds the entries of one panel times the inputs: to [t * stride + 16 lanes].
void mask_panel(const Mask& m, const Form& form, int64_t panel, int64_t tokens, float* to, int64_t stride) {
  Slot s;
  const int64_t first = m.starts[panel], last = m.starts[panel + 1], tiles = tile_count(tokens);
  const auto* x = reinterpret_cast<const float*>(form.data);
  if (tokens == 1) {  // the sums stay in a register
    f32x16 y = load(to);
    for (int64_t slot = first; slot < last; ++slot) {
      read_slot(m, slot, s);
      y = add_slot(s, x, 1, y);
    }
    return store(to, y);
  }
  for (int64_t slot = first; slot < last; ++slot) {
    read_slot(m, slot, s);
    for (int64_t i = 0; i < tiles; ++i) {
      const Tile tile = tile_at(tokens, i);
      const float* from = reinterpret_cast<const float*>(form.data + tile.begin * form.stride());
      const int64_t T = tile.end - tile.begin;
      for (int64_t t = 0; t < T; ++t) {
        float* y = to + (tile.begin + t) * stride;
        store(y, add_slot(s, from + t, T, load(y)));
      }
    }
  }
}

// Adds what was kept apart: each outlier times its decoded column. Tokens mostly share their columns.
void add_outliers(const PanelPart& part, int64_t panel, int64_t tokens, float* to, int64_t stride) {
  constexpr int64_t kSlots = 64;
  alignas(64) float columns[kSlots][16];
  int64_t held[kSlots];
  std::fill(held, held + kSlots, int64_t{-1});
  const Form& form = *part.form;
  for (int64_t t = 0; t < tokens; ++t)
    for (int32_t i = 0; i < form.outliers[t]; ++i) {
      const Outlier& o = form.outlier[t * form.cols + i];
      const int64_t slot = o.column % kSlots;
      if (held[slot] != o.column) {
        alignas(64) float eight[128];
        decode_columns(*part.weight, panel, o.column / 8 * 8, o.column / 8 * 8 + 8, eight);
        store(columns[slot], load(eight + 16 * (o.column % 8)));
        held[slot] = o.column;
      }
      float* y = to + t * stride;
      store(y, fma(load(columns[slot]), set1(o.value), load(y)));
    }
}

}  // namespace

void panel_totals(const PanelPart& part, int64_t panel, int P, int64_t strips, int64_t tokens, float* result, bool add,
                  uint8_t* scratch) {
  const int64_t lanes = P * 16, rows = strips * tokens;
  // fn(panel, its first result) for each panel.
  const auto each_panel = [&](float* to, const auto& fn) {
    for (int64_t i = 0; i < strips * P; ++i) fn(panel + i, to + i / P * tokens * lanes + i % P * 16);
  };
  if (part.mask) {
    if (!add) std::fill(result, result + rows * lanes, 0.0f);
    each_panel(result, [&](int64_t p, float* to) { mask_panel(*part.mask, *part.form, p, tokens, to, lanes); });
    return;
  }
  const int64_t segments = chunk_segments(tokens, part);
  Job j{part, panel, strips, tokens, result, nullptr, nullptr, nullptr};
  j.scales = reinterpret_cast<float*>(scratch);
  scratch += aligned(P * segments * 64);
  if (need_offset(*part.weight, part.form->path == Path::bytes ? Values::bytes : Values::floats)) {
    j.offsets = reinterpret_cast<float*>(scratch);
    scratch += aligned(P * segments * 64);
  }
  if (add) {
    j.result = reinterpret_cast<float*>(scratch);
    scratch += aligned(rows * lanes * 4);
  }
  j.codes = scratch;
  if (P == 1) any_path<1>(j);
  if constexpr (kMaxPanels >= 2) {
    if (P == 2) any_path<2>(j);
  }
  if constexpr (kMaxPanels >= 4) {
    if (P == 4) any_path<4>(j);
  }
  const float* token_scale = part.form->token_scale;
  if (token_scale)
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t r = 0; r < lanes; r += 16) {
        float* y = j.result + i * lanes + r;
        store(y, load(y) * set1(token_scale[i % tokens]));
      }
  if (part.form->outliers)
    each_panel(j.result, [&](int64_t p, float* to) { add_outliers(part, p, tokens, to, lanes); });
  if (add)
    for (int64_t i = 0; i < rows * lanes; i += 16) store(result + i, load(result + i) + load(j.result + i));
}

namespace {

template <class Act> void gate(const Emission& e, const Act& act) {
  for (int64_t t = 0; t < e.tokens; ++t)
    for (int64_t r = 0; r < e.n; r += 16) {
      const int m = static_cast<int>(std::min<int64_t>(16, e.n - r));
      f32x16 a = load(e.result + t * e.lanes + r), b = load(e.second + t * e.lanes + r);
      if (e.bias) a = a + load_first(e.bias + e.row + r, m);
      if (e.second_bias) b = b + load_first(e.second_bias + e.row + r, m);
      store_first(e.y + t * e.ld + e.row + r, act(a) * b, m);
    }
}

void scatter(const Emission& e) {
  for (int64_t t = 0; t < e.tokens; ++t)
    for (int64_t r = 0; r < e.n; ++r) {
      const int64_t row = e.index[e.row + r];
      float v = e.result[t * e.lanes + r];
      if (e.bias) v += e.bias[row];
      float& y = e.y[t * e.ld + row];
      y = e.epilogue == Epilogue::add ? y + v : v;
    }
}

}  // namespace

void emit(const Emission& e) {
  switch (e.epilogue) {
    case Epilogue::silu: return gate(e, [](f32x16 a) { return silu(a); });
    case Epilogue::gelu: return gate(e, [](f32x16 a) { return gelu(a); });
    case Epilogue::gelu_tanh: return gate(e, [](f32x16 a) { return gelu_tanh(a); });
    default: break;
  }
  if (e.index) return scatter(e);
  for (int64_t t = 0; t < e.tokens; ++t)
    for (int64_t r = 0; r < e.n; r += 16) {
      const int m = static_cast<int>(std::min<int64_t>(16, e.n - r));
      f32x16 v = load(e.result + t * e.lanes + r);
      if (e.bias) v = v + load_first(e.bias + e.row + r, m);
      float* at = e.y + t * e.ld + e.row + r;
      if (e.epilogue == Epilogue::add) v = load_first(at, m) + v;
      store_first(at, v, m);
    }
}

}  // namespace gsm::GSM_LEVEL
