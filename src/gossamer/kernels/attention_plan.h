// How the work of a call is cut. A tile is up to kTileRows consecutive (token, query head) pairs of one sequence and
// one key-value head; its keys are handled in segments of kSegment absolute positions. Tiles in order (head, token),
// each with its segments in order, form a line of costs, of which every thread takes an equal length. Nothing here
// depends on timing, and nothing in a row's result depends on where the line is cut.
#pragma once
#include <cstdint>

#include "attention.h"

namespace gsm {
namespace {  // every file its own: a shared inline function could come from one compiled for another level

constexpr int kTileRows = 8;
constexpr int kSegment = 256;

struct Tile {
  int64_t token;     // the run of tokens of one sequence that it belongs to
  int64_t row;       // first row in the run: rows count (token of the run) * group + head of the group
  int rows;
  int64_t low, high;  // keys that some row sees: low..high-1; none when low >= high

  int64_t first_segment() const { return low / kSegment; }
  int64_t end_segment() const { return low < high ? (high + kSegment - 1) / kSegment : first_segment(); }
  int64_t vectors(int64_t segment) const {
    const int64_t from = low > segment * kSegment ? low : segment * kSegment;
    const int64_t to = high < (segment + 1) * kSegment ? high : (segment + 1) * kSegment;
    return (to + 15) / 16 - from / 16;
  }
  // In vectors of 16 keys, times the rows and what loading the keys costs.
  int64_t cost(int64_t segment) const { return (vectors(segment) + (segment == first_segment())) * (rows + 3); }
  int64_t cost() const { return (low < high ? (high + 15) / 16 - low / 16 + 1 : 1) * (rows + 3); }
};

// Calls fn(tile) for the tiles of one key-value head.
template <class Fn>
inline void each_tile(const Attention& a, const Fn& fn) {
  const int64_t group = a.heads / a.pool.heads;
  for (int64_t m = 0; m < a.tokens;) {
    int64_t end = m + 1;
    while (end < a.tokens && a.sequence[end] == a.sequence[m]) ++end;
    const int64_t rows = (end - m) * group;
    for (int64_t row = 0; row < rows; row += kTileRows) {
      Tile t{m, row, static_cast<int>(rows - row < kTileRows ? rows - row : kTileRows), INT64_MAX, 0};
      for (int64_t i = m + row / group; i <= m + (row + t.rows - 1) / group; ++i) {
        const int64_t p = a.positions[i];
        if (p < 0) continue;
        const int64_t first = first_visible(p, a.window);
        if (first < t.low) t.low = first;
        if (p >= t.high) t.high = p + 1;
      }
      fn(t);
    }
    m = end;
  }
}

struct Plan {
  int64_t cost = 0;      // of one key-value head
  int64_t segments = 0;  // most of a tile
  // Whether threads may share the segments of a tile, which takes a second phase for the merge. Many tiles share the
  // threads evenly enough as they are.
  bool split = false;
};

inline Plan plan_of(const Attention& a) {
  Plan plan;
  int64_t tiles = 0;
  each_tile(a, [&](const Tile& t) {
    ++tiles;
    plan.cost += t.cost();
    const int64_t n = t.end_segment() - t.first_segment();
    if (n > plan.segments) plan.segments = n;
  });
  plan.split = plan.segments > 1 && tiles * a.pool.heads < 256;
  return plan;
}

// The thread that takes the piece begin..begin+cost-1 of a line of `total`: the one that its middle falls to.
inline int64_t owner(int64_t begin, int64_t cost, int64_t total, int threads) {
  return (2 * begin + cost) * threads / (2 * total);
}

}  // namespace
}  // namespace gsm
