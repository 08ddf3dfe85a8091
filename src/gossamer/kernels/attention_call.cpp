// What a call of attention or kv_write needs apart from arithmetic: checks, phases, scratch, and running it at once.
#include <functional>
#include <stdexcept>
#include <string>

#include "attention.h"
#include "attention_plan.h"
#include "team.h"

namespace gsm {
namespace {

[[noreturn]] void refuse(const std::string& sentence) { throw std::invalid_argument(sentence); }

void need_token(int64_t s, int64_t p, int64_t least, int64_t sequences, int64_t slots) {
  if (s < 0 || s >= sequences)
    refuse("sequence holds " + std::to_string(s) + ", outside of the " + std::to_string(sequences) +
           " rows of tables");
  if (p < least || p >= slots)
    refuse("positions holds " + std::to_string(p) + ", outside of the " + std::to_string(slots) +
           " slots of a row of tables");
}

void need_block(const int32_t* tables, int64_t max_blocks, int64_t s, int64_t i, int64_t blocks) {
  if (const int64_t b = tables[s * max_blocks + i]; b < 0 || b >= blocks)
    refuse("tables[" + std::to_string(s) + ", " + std::to_string(i) + "] is " + std::to_string(b) +
           ", outside of the " + std::to_string(blocks) + " blocks of the pool");
}

}  // namespace

void check_kv_write(const KvWrite& w, int64_t sequences, int64_t blocks) {
  for (int64_t m = 0; m < w.tokens; ++m) {
    need_token(w.sequence[m], w.positions[m], 0, sequences, w.max_blocks * w.pool.block);
    need_block(w.tables, w.max_blocks, w.sequence[m], w.positions[m] / w.pool.block, blocks);
  }
}

void check_attention(const Attention& a, int64_t sequences, int64_t blocks) {
  for (int64_t m = 0; m < a.tokens; ++m)
    need_token(a.sequence[m], a.positions[m], -1, sequences, a.max_blocks * a.pool.block);
  for (int64_t m = 0; m < a.tokens;) {
    const int64_t s = a.sequence[m];
    int64_t low = INT64_MAX, high = -1;
    for (; m < a.tokens && a.sequence[m] == s; ++m) {
      const int64_t p = a.positions[m];
      if (p < 0) continue;
      low = first_visible(p, a.window) < low ? first_visible(p, a.window) : low;
      high = p > high ? p : high;
    }
    if (high < 0) continue;
    for (int64_t i = low / a.pool.block; i <= high / a.pool.block; ++i)
      need_block(a.tables, a.max_blocks, s, i, blocks);
  }
}

int attention_phases(const Attention& a) { return plan_of(a).split ? 2 : 1; }

int64_t attention_scratch(const Attention& a) {
  const int64_t width = (a.pool.dim + 15) / 16 * 16, state = kTileRows * (width + 2);
  const int64_t segments = (a.max_blocks * a.pool.block + kSegment - 1) / kSegment;
  // Queries (two planes), scores, weights (two planes of bytes), the state of a segment and of the whole, and the
  // states of the segments of one tile that another thread merges.
  const int64_t floats = kTileRows * (2 * width + kSegment + kSegment / 2) + (segments + 2) * state;
  return (floats + 15) / 16 * 16;
}

void attention_part(const Attention& a, int phase, int thread, int threads) {
  GSM_DISPATCH(attention_part(a, phase, thread, threads))
}

void kv_write_part(const KvWrite& w, int, int thread, int threads) {
  GSM_DISPATCH(kv_write_part(w, thread, threads))
}

void attention(const Attention& call) {
  Attention a = call;
  int64_t visible = 0;
  for (int64_t m = 0; m < a.tokens; ++m)
    if (const int64_t p = a.positions[m]; p >= 0) visible += p + 1 - first_visible(p, a.window);
  const bool alone = team_threads() == 1 || visible * a.heads * a.pool.dim / 4 < kTeamWork;
  const int threads = alone ? 1 : team_threads();
  const auto floats = static_cast<size_t>(threads * attention_scratch(a));
  a.scratch = static_cast<float*>(thread_scratch(0, floats * sizeof(float)));
  for (int phase = 0; phase < attention_phases(a); ++phase) {
    // The shares stay those of `threads` even if the team's size changes meanwhile.
    const auto part = [&](int t, int n) {
      for (; t < threads; t += n) attention_part(a, phase, t, threads);
    };
    if (alone) {
      part(0, 1);
    } else {
      team_run(std::ref(part));
    }
  }
}

void kv_write(const KvWrite& w) {
  const auto part = [&](int t, int n) { kv_write_part(w, 0, t, n); };
  if (team_threads() == 1 || w.tokens * w.pool.heads * w.pool.dim * 8 < kTeamWork) {
    part(0, 1);
  } else {
    team_run(std::ref(part));
  }
}

}  // namespace gsm
