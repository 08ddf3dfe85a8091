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

constexpr int64_t kPiece = 64;  // blocks

void run(const Planes& w, PlanesPath path, const int8_t* x, const float* x_scale, int64_t tokens,
         const PlanesOutput& out) {
  if (tokens == 0 || w.panels() == 0) return;
  const int64_t blocks = w.blocks(), stride = blocks * 16, groups = w.groups();
  PlanesInput in;
  in.tokens = tokens;
  in.scale = x_scale;
  int32_t* const sums = held<int32_t, 0>(tokens * groups);
  in.sums = sums;
  int8_t* tiles = nullptr;
  uint8_t* tables = nullptr;
  uint64_t* words = nullptr;
  if (path == PlanesPath::mask) {
    in.most = current_level() >= Level::avx512 ? kPlanesTile : 4;
    in.x = tiles = held<int8_t, 1>(tokens * stride);
  } else if (path == PlanesPath::lookup) {
    in.narrow = planes_of(x, tokens * w.cols) <= 4;
    in.tables = tables = held<uint8_t, 2>(tokens * blocks * (in.narrow ? 64 : 128));
  } else {
    in.x_bits = planes_of(x, tokens * w.cols);
    in.group_words = (std::min(w.group_blocks(), blocks) + 3) / 4;
    in.words = words = held<uint64_t, 3>(tokens * groups * in.group_words * 8);
  }
  // Prepared in pieces of a token and at most 64 blocks of a group, through a copy padded with zeros.
  const auto piece = [&](int64_t t, int64_t g, int64_t first, int64_t n) {
    alignas(64) int8_t columns[kPiece * 16];
    const int64_t count = std::min(w.cols - first * 16, n * 16);
    std::memcpy(columns, x + t * w.cols + first * 16, static_cast<size_t>(count));
    std::memset(columns + count, 0, static_cast<size_t>(n * 16 - count));
    if (tables) tables_of(columns, n, in.narrow, tables + (t * blocks + first) * (in.narrow ? 64 : 128));
    if (words)
      words_of(columns, n, words + ((t * groups + g) * in.group_words + (first - g * w.group_blocks()) / 4) * 8);
    if (tiles) {
      const int64_t full = tokens / in.most * in.most, fours = full + (tokens - full) / 4 * 4;
      const int64_t tile = t < full ? in.most : t < fours ? 4 : 1;
      const int64_t start = t < full ? t / tile * tile : t < fours ? full + (t - full) / 4 * 4 : t;
      int8_t* const to = tiles + start * stride + first * 16 * tile + (t - start) * 4;
      if (tile == 1) std::memcpy(to, columns, static_cast<size_t>(n) * 16);
      else
        for (int64_t k = 0; k < n * 4; ++k) std::memcpy(to + k * tile * 4, columns + k * 4, 4);
    }
    int32_t sum = 0;
    for (int64_t k = 0; k < count; ++k) sum += columns[k];
    return sum;
  };
  const auto prepare = [&](int64_t begin, int64_t end) {
    for (int64_t at = begin; at < end; ++at) {
      const int64_t t = at / groups, g = at % groups;
      sums[at] = 0;
      for (int64_t first = g * w.group_blocks(); first < w.last_block(g); first += kPiece)
        sums[at] += piece(t, g, first, std::min(kPiece, w.last_block(g) - first));
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

int planes_of(const int8_t* x, int64_t n) {
  int8_t seen = 0;
  for (int64_t i = 0; i < n; ++i) seen = static_cast<int8_t>(seen | (x[i] ^ x[i] >> 7));
  int bits = 1;
  while (seen >> (bits - 1)) ++bits;
  return bits;
}

PlanesPath planes_best_path(int bits, int64_t tokens, int x_bits) {
  // Four tokens share the bytes that the mask path makes; a lookup costs each token the same.
  const bool few = tokens < 4, narrow = x_bits <= 4;
  const Level level = current_level();
  if (level == Level::scalar) return few || narrow ? PlanesPath::popcount : PlanesPath::mask;
  const bool lookup = level == Level::avx2 ? few || bits == 1 || (narrow && bits <= 4)
                                           : (bits == 1 && (few || narrow)) || (bits == 2 && few && narrow);
  return lookup ? PlanesPath::lookup : PlanesPath::mask;
}

void planes_linear(const Planes& w, PlanesPath path, const int8_t* x, const float* x_scale, int64_t tokens, float* y) {
  run(w, path, x, x_scale, tokens, {y, nullptr});
}

void planes_sums(const Planes& w, PlanesPath path, const int8_t* x, int64_t tokens, int32_t* sums) {
  run(w, path, x, nullptr, tokens, {nullptr, sums});
}

}  // namespace gsm
