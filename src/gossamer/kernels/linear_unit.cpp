// Panels of one weight times all tokens of a call: chooses the source, expands what is not read in place, runs the tiles.
#include <algorithm>

#include "activations.h"
#include "dot.h"

namespace gsm::GSM_LEVEL {
namespace {

struct Job {
  const PanelPart& part;
  int64_t panel, tokens;
  float* result;
  bool add;
  float* scales;    // scratch for one chunk
  float* offsets;   // null when there are none
  uint8_t* codes;   // scratch for expanded codes
};

// Columns whose expanded codes one chunk holds: they stay in the first cache for few tokens, in the second for many.
int64_t chunk_columns(int64_t tokens, Path path) {
  const bool many = tokens > few_tokens();
  switch (path) {
    case Path::bytes: return many ? 2048 : 1024;
    case Path::pairs: return many ? 1024 : 1024;
    default: return many ? 512 : 512;
  }
}

int64_t chunk_segments(int64_t tokens, Path path, const Sums& s) {
  return std::max<int64_t>(1, std::min(s.segments, chunk_columns(tokens, path) / s.length));
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

// One chunk after another: `open` fills source[0..P) for segments [first, last).
template <class Source, int P, class Open> void run_chunks(const Job& j, Values of, const Open& open) {
  const Weight& w = *j.part.weight;
  const Form& form = *j.part.form;
  const Sums& sums = *j.part.sums;
  const int64_t per_chunk = chunk_segments(j.tokens, form.path, sums), tiles = tile_count(j.tokens);
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
  for (s.first = 0; s.first < sums.segments; s.first = s.last) {
    s.last = std::min(sums.segments, s.first + per_chunk);
    for (int p = 0; p < P; ++p)
      expand_scales(w, of, j.panel + p, s.length, s.first, s.last, j.scales + p * s.stride,
                    j.offsets ? j.offsets + p * s.stride : nullptr);
    Source source[P];
    const int64_t from = s.first * s.length / 8, to = std::min(s.halves, s.last * s.length / 8);
    for (int p = 0; p < P; ++p) source[p] = open(p, from, to);
    for (int64_t i = 0; i < tiles; ++i) {
      const Tile t = tile_at(j.tokens, i);
      TileInput x;
      x.data = form.data + t.begin * form.stride;
      x.sums = sums.bytes ? sums.bytes + t.begin * sums.segments : nullptr;
      x.float_sums = sums.floats ? sums.floats + t.begin * sums.segments : nullptr;
      x.scales = sums.scales ? sums.scales + t.begin * sums.segments : nullptr;
      pick<Source, P>(t.end - t.begin)(source, s, x, j.result + t.begin * P * 16, s.first == 0);
    }
  }
}

// Expanding costs a store and a load; unpacking in registers costs as much again for every tile.
constexpr int64_t kUnpackTokens = 16;
// 8-bit codes and plain numbers are copied, so that the two panels of a tile do not collide in the cache.
constexpr int64_t kCopyTokens = 32;

// Bytes of the panels at hand, which is how far ahead the next ones begin; one panel alone is read close behind.
int64_t ahead_of(const Job& j, int P, int64_t panel_bytes) { return P == 1 && j.tokens <= few_tokens() ? 1024 : P * panel_bytes; }

template <int P> void bytes(const Job& j) {
  const Weight& w = *j.part.weight;
  const int64_t stretch = chunk_segments(j.tokens, Path::bytes, *j.part.sums) * j.part.sums->length;
  const int64_t room = (std::min(stretch, w.width()) + 8) * 16;
  if (w.bits == 8 && w.byte_table.empty() && j.tokens <= kCopyTokens) {
    const int64_t ahead = ahead_of(j, P, w.width() * 16);
    return run_chunks<Bytes, P>(j, Values::bytes, [&](int p, int64_t, int64_t) {
      return Bytes{panel_fields(w, j.panel + p).q8, 0, ahead};
    });
  }
  const auto stored = [&](int p) { return panel_fields(w, j.panel + p); };
  const auto later = [&](int p) {
    Fields f = panel_fields(w, j.panel + p);
    const int64_t ahead = ahead_of(j, P, w.width() * 16 * 4 / 8);
    if (f.q4) f.q4 += ahead;
    if (f.q2) f.q2 += ahead / 2;
    if (f.q1) f.q1 += ahead / 4;
    return f;
  };
  if (j.tokens <= kUnpackTokens || w.bits == 4) {
    if (w.byte_table.empty()) {
      switch (w.bits) {
#define GSM_STORED(B) \
  case B: return run_chunks<Stored<B>, P>(j, Values::bytes, [&](int p, int64_t, int64_t) { return Stored<B>{stored(p), later(p)}; });
        GSM_STORED(2)
        GSM_STORED(3)
        GSM_STORED(4)
        GSM_STORED(5)
        GSM_STORED(6)
#undef GSM_STORED
        default: break;
      }
    } else if (w.bits == 4 && w.byte_parts == 1) {
      return run_chunks<Looked<1>, P>(j, Values::bytes, [&](int p, int64_t, int64_t) { return Looked<1>{stored(p), later(p), w.byte_table.data()}; });
    } else if (w.bits == 4) {
      return run_chunks<Looked<2>, P>(j, Values::bytes, [&](int p, int64_t, int64_t) { return Looked<2>{stored(p), later(p), w.byte_table.data()}; });
    }
  }
  if (w.byte_parts == 2) {
    run_chunks<TwoBytes, P>(j, Values::bytes, [&](int p, int64_t from, int64_t to) {
      uint8_t* out = j.codes + 2 * p * room;
      expand_bytes(w, 0, j.panel + p, from, to, out);
      expand_bytes(w, 1, j.panel + p, from, to, out + room);
      return TwoBytes{{out, out + room}, from};
    });
    return;
  }
  run_chunks<Bytes, P>(j, Values::bytes, [&](int p, int64_t from, int64_t to) {
    uint8_t* out = j.codes + p * room;
    expand_bytes(w, 0, j.panel + p, from, to, out);
    return Bytes{out, from, 0};
  });
}

template <int P> void floats(const Job& j) {
  const Weight& w = *j.part.weight;
  if (w.number == Number::f32 && w.cols % 8 == 0 && j.tokens <= kCopyTokens)
    return run_chunks<Floats, P>(j, Values::floats, [&](int p, int64_t, int64_t) {
      return Floats{reinterpret_cast<const float*>(w.values) + (j.panel + p) * w.cols * 16, 0, ahead_of(j, P, w.cols * 64)};
    });
  if (w.number == Number::f16 && w.cols % 8 == 0 && j.tokens <= kUnpackTokens)
    return run_chunks<Halves, P>(j, Values::floats, [&](int p, int64_t, int64_t) {
      return Halves{reinterpret_cast<const f16*>(w.values) + (j.panel + p) * w.cols * 16, ahead_of(j, P, w.cols * 32)};
    });
  const int64_t stretch = chunk_segments(j.tokens, Path::floats, *j.part.sums) * j.part.sums->length;
  const int64_t room = (std::min(stretch, w.width()) + 8) * 16;
  run_chunks<Floats, P>(j, Values::floats, [&](int p, int64_t from, int64_t to) {
    float* out = reinterpret_cast<float*>(j.codes) + p * room;
    expand_floats(w, j.panel + p, from, to, out);
    return Floats{out, from, 0};
  });
}

#if defined(__AVX512BF16__)
template <int P> void pairs(const Job& j) {
  const Weight& w = *j.part.weight;
  if (w.number == Number::bf16)
    return run_chunks<PairValues, P>(j, Values::floats, [&](int p, int64_t, int64_t) {
      return PairValues{reinterpret_cast<const uint16_t*>(w.values) + (j.panel + p) * w.width() * 16, 0,
                        ahead_of(j, P, w.width() * 32)};
    });
  if (w.bits == 4) {
    alignas(64) uint16_t table[32];
    for (int i = 0; i < 32; ++i) table[i] = w.bf16_table[static_cast<size_t>(i & 15)];
    const __m512i t = _mm512_load_si512(table);
    return run_chunks<PairNibbles, P>(j, Values::floats, [&](int p, int64_t, int64_t) {
      return PairNibbles{panel_fields(w, j.panel + p).q4, ahead_of(j, P, w.width() * 8), t};
    });
  }
  const int64_t stretch = chunk_segments(j.tokens, Path::pairs, *j.part.sums) * j.part.sums->length;
  const int64_t room = (std::min(stretch, w.width()) + 8) * 16;
  run_chunks<PairValues, P>(j, Values::floats, [&](int p, int64_t from, int64_t to) {
    uint16_t* out = reinterpret_cast<uint16_t*>(j.codes) + p * room;
    expand_bf16(w, j.panel + p, from, to, out);
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
  if (tokens <= few_tokens()) return path == Path::bytes ? 1 : kMaxPanels;
  return kMaxPanels == 4 ? 2 : 1;
}

int64_t panel_scratch(int64_t tokens, const Weight& w, const Form& form, const Sums& sums) {
  const int64_t segments = chunk_segments(tokens, form.path, sums);
  const int64_t columns = std::min(segments * sums.length, w.width()) + 8;
  const int64_t element = form.path == Path::bytes ? 2 : form.path == Path::pairs ? 2 : 4;
  return 4 * (2 * segments * 64 + columns * 16 * element) + tokens * 256 + 256;
}

void panel_totals(const PanelPart& part, int64_t panel, int P, int64_t tokens, float* result, bool add, uint8_t* scratch) {
  const int64_t segments = chunk_segments(tokens, part.form->path, *part.sums);
  Job j{part, panel, tokens, result, add, nullptr, nullptr, nullptr};
  j.scales = reinterpret_cast<float*>(scratch);
  scratch += aligned(P * segments * 64);
  if (need_offset(*part.weight, part.form->path == Path::bytes ? Values::bytes : Values::floats)) {
    j.offsets = reinterpret_cast<float*>(scratch);
    scratch += aligned(P * segments * 64);
  }
  float* totals = result;
  if (add) {
    totals = reinterpret_cast<float*>(scratch);
    scratch += aligned(tokens * P * 64);
  }
  j.result = totals;
  j.codes = scratch;
  if (P == 1) any_path<1>(j);
  if constexpr (kMaxPanels >= 2) {
    if (P == 2) any_path<2>(j);
  }
  if constexpr (kMaxPanels >= 4) {
    if (P == 4) any_path<4>(j);
  }
  const float* token_scale = part.form->token_scale;
  if (!token_scale && !add) return;
  for (int64_t t = 0; t < tokens; ++t) {
    const f32x16 s = set1(token_scale ? token_scale[t] : 1.0f);
    for (int p = 0; p < P; ++p) {
      const int64_t at = (t * P + p) * 16;
      const f32x16 v = load(totals + at) * s;
      store(result + at, add ? load(result + at) + v : v);
    }
  }
}

namespace {

template <class Act>
void gate(const Act& act, const float* result, const float* second, const float* bias, const float* second_bias,
          int64_t tokens, int64_t lanes, int64_t row, int64_t n, float* y, int64_t ld) {
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t r = 0; r < n; r += 16) {
      const int m = static_cast<int>(std::min<int64_t>(16, n - r));
      f32x16 a = load(result + t * lanes + r), b = load(second + t * lanes + r);
      if (bias) a = a + load_first(bias + row + r, m);
      if (second_bias) b = b + load_first(second_bias + row + r, m);
      store_first(y + t * ld + row + r, act(a) * b, m);
    }
}

}  // namespace

void emit(const float* result, const float* second, const float* bias, const float* second_bias, Epilogue epilogue,
          int64_t tokens, int64_t lanes, int64_t row, int64_t n, float* y, int64_t ld) {
  const auto gated = [&](const auto& act) { gate(act, result, second, bias, second_bias, tokens, lanes, row, n, y, ld); };
  switch (epilogue) {
    case Epilogue::silu: return gated([](f32x16 a) { return silu(a); });
    case Epilogue::gelu: return gated([](f32x16 a) { return gelu(a); });
    case Epilogue::gelu_tanh: return gated([](f32x16 a) { return gelu_tanh(a); });
    default: break;
  }
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t r = 0; r < n; r += 16) {
      const int m = static_cast<int>(std::min<int64_t>(16, n - r));
      f32x16 v = load(result + t * lanes + r);
      if (bias) v = v + load_first(bias + row + r, m);
      float* at = y + t * ld + row + r;
      if (epilogue == Epilogue::add) v = load_first(at, m) + v;
      store_first(at, v, m);
    }
}

}  // namespace gsm::GSM_LEVEL
