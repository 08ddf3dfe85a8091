// One product with bit planes: the activations are prepared once, then the panels shared out. Compiled once.
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#include "planes.h"
#include "team.h"

namespace gsm {
namespace {

void tables_of(const int8_t* x, int64_t blocks, bool narrow, uint8_t* tables) {
  GSM_DISPATCH(planes_tables(x, blocks, narrow, tables))
}
void words_of(const int8_t* x, int64_t blocks, uint64_t* words) { GSM_DISPATCH(planes_words(x, blocks, words)) }
void panels_of(const Planes& w, PlanesPath path, const PlanesInput& in, int64_t first, int64_t last,
               const PlanesOutput& out) {
  GSM_DISPATCH(planes_panels(w, path, in, first, last, out))
}

// Grow-only memory of the calling thread, at a multiple of 64 bytes.
template <class T, int Slot> T* held(int64_t n) {
  static thread_local std::vector<uint8_t> memory;
  const size_t need = static_cast<size_t>(n) * sizeof(T) + 64;
  if (memory.size() < need) memory.resize(need);
  return reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(memory.data()) + 63) / 64 * 64);
}

// The planes that two's complement needs for every value.
int planes_of(const int8_t* x, int64_t n) {
  int seen = 0;
  for (int64_t i = 0; i < n; ++i) seen |= x[i] < 0 ? ~x[i] : x[i];
  int bits = 1;
  while (seen >> (bits - 1)) ++bits;
  return bits;
}

void run(const Planes& w, PlanesPath path, const int8_t* x, const float* x_scale, int64_t tokens,
         const PlanesOutput& out) {
  if (tokens == 0 || w.panels() == 0) return;
  const int64_t blocks = w.blocks(), stride = blocks * 16, groups = w.groups();
  PlanesInput in;
  in.tokens = tokens;
  in.scale = x_scale;
  int8_t* const padded = held<int8_t, 0>(tokens * stride);
  int32_t* const sums = held<int32_t, 1>(tokens * groups);
  in.x = padded;
  in.sums = sums;
  uint8_t* tables = nullptr;
  uint64_t* words = nullptr;
  if (path == PlanesPath::lookup) {
    in.narrow = planes_narrow(x, tokens, w.cols);
    in.tables = tables = held<uint8_t, 2>(tokens * blocks * (in.narrow ? 64 : 128));
  } else if (path != PlanesPath::mask) {
    in.x_bits = planes_of(x, tokens * w.cols);
    in.group_words = (std::min(w.group_blocks(), blocks) + 3) / 4;
    in.words = words = held<uint64_t, 3>(tokens * groups * in.group_words * 8);
  }
  // Prepared in pieces of a token and a group, so that one token with many columns keeps every thread busy.
  const auto prepare = [&](int64_t begin, int64_t end) {
    for (int64_t at = begin; at < end; ++at) {
      const int64_t t = at / groups, g = at % groups, first = g * w.group_blocks(), n = w.last_block(g) - first;
      const int64_t columns = std::min(w.cols - first * 16, n * 16);
      int8_t* const to = padded + t * stride + first * 16;
      std::memcpy(to, x + t * w.cols + first * 16, static_cast<size_t>(columns));
      std::memset(to + columns, 0, static_cast<size_t>(n * 16 - columns));
      int32_t sum = 0;
      for (int64_t k = 0; k < columns; ++k) sum += to[k];
      sums[at] = sum;
      if (tables) tables_of(to, n, in.narrow, tables + (t * blocks + first) * (in.narrow ? 64 : 128));
      if (words) words_of(to, n, words + at * in.group_words * 8);
    }
  };
  team_share(tokens * groups, tokens * stride * 4, prepare);
  team_share(w.panels(), w.panels() * 16 * tokens * stride * w.bits / 16,
             [&](int64_t begin, int64_t end) { panels_of(w, path, in, begin, end, out); });
}

}  // namespace

bool planes_path_runs(PlanesPath path) {
  if (path != PlanesPath::vpopcnt) return true;
#if defined(__x86_64__)
  __builtin_cpu_init();
  return current_level() >= Level::avx512 && __builtin_cpu_supports("avx512vpopcntdq");
#else
  return false;
#endif
}

PlanesPath planes_best_path(int bits, int64_t tokens, bool narrow) {
  (void)bits, (void)tokens, (void)narrow;
  return PlanesPath::mask;
}

bool planes_narrow(const int8_t* x, int64_t tokens, int64_t cols) {
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t k = 0; k < cols; k += 4) {
      int low = 0, high = 0;
      for (int64_t i = k; i < std::min(cols, k + 4); ++i) {
        const int v = x[t * cols + i];
        (v < 0 ? low : high) += v;
      }
      if (low < -32 || high > 31) return false;
    }
  return true;
}

void planes_linear(const Planes& w, PlanesPath path, const int8_t* x, const float* x_scale, int64_t tokens, float* y) {
  run(w, path, x, x_scale, tokens, {y, nullptr});
}

void planes_sums(const Planes& w, PlanesPath path, const int8_t* x, int64_t tokens, int32_t* sums) {
  run(w, path, x, nullptr, tokens, {nullptr, sums});
}

}  // namespace gsm
