// Paged attention against a softmax in double precision over what the pool stores. Slots that were never written
// hold NaN, blocks lie out of order in the pool, and table entries that a call must not read lie far outside of it.
//
// Tolerance: a score of `dim` products errs by d = (dim + 4) * 2^-23 * scale * sum |q k|, or 2^-19 of the cap more
// with a soft cap; an exponential carries that over as a relative error, so a result errs by at most
// (2 d + (keys + 64) * 2^-23 + 2^-23 * the spread of the scores) times the weighted mean of |v|; twice that is allowed.
#include "attention.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <vector>

#include "check.h"
#include "halves.h"
#include "team.h"

namespace {

using check::Block;
using gsm::KvType;

constexpr double kUnit = 0x1p-23;

struct Case {
  KvType type;
  int64_t dim, kv_heads, group, block, context, window;
  float softcap;
  int64_t heads() const { return kv_heads * group; }
};

std::string name(const Case& c) {
  static const char* const types[] = {"f32", "f16", "bf16", "int8"};
  return std::string("attention ") + types[static_cast<int>(c.type)] + " dim " + std::to_string(c.dim) + " heads " +
         std::to_string(c.heads()) + "/" + std::to_string(c.kv_heads) + " block " + std::to_string(c.block) + " context " +
         std::to_string(c.context) + " window " + std::to_string(c.window) + " cap " + std::to_string(c.softcap);
}

int64_t bytes_of(KvType type) { return type == KvType::f32 ? 4 : type == KvType::int8 ? 1 : 2; }

// Stores n floats as the pool's type, `step` elements apart, and puts back what they decode to; returns the scale.
float store(KvType type, const float* x, int64_t n, uint8_t* base, int64_t at, int64_t step, float* decoded) {
  float peak = 0;
  for (int64_t c = 0; c < n; ++c) peak = std::max(peak, std::fabs(x[c]));
  const float s = peak / 127.0f;
  for (int64_t c = 0; c < n; ++c) {
    uint8_t* const to = base + (at + c * step) * bytes_of(type);
    if (type == KvType::f32) {
      std::memcpy(to, x + c, 4);
      decoded[c] = x[c];
    } else if (type == KvType::int8) {
      const auto code = static_cast<int8_t>(s > 0 ? std::clamp(std::nearbyint(x[c] / s), -127.0f, 127.0f) : 0.0f);
      std::memcpy(to, &code, 1);
      decoded[c] = static_cast<float>(code) * s;
    } else {
      const uint16_t bits = type == KvType::f16 ? gsm::to_f16(x[c]).bits : gsm::to_bf16(x[c]).bits;
      std::memcpy(to, &bits, 2);
      decoded[c] = type == KvType::f16 ? gsm::to_f32(gsm::f16{bits}) : gsm::to_f32(gsm::bf16{bits});
    }
  }
  return s;
}

// A sequence in a pool. `expected` holds the bytes that the layout asks for; the kernel fills `written`.
struct Cache {
  struct Image {
    Block<uint8_t> k, v;
    Block<float> k_scale, v_scale;
  };
  Case c;
  int64_t blocks;
  Block<int32_t> table;
  Block<float> k, v;        // [context, kv_heads, dim], as given
  std::vector<float> dk, dv;  // as the pool stores them
  Image written, expected;

  Cache(const Case& shape, const Block<float>& k_, const Block<float>& v_, check::Random& random) : c(shape) {
    k = k_.copy(0, k_.size());
    v = v_.copy(0, v_.size());
    const int64_t used = (c.context + c.block - 1) / c.block;
    blocks = used + 2;
    std::vector<int32_t> order(static_cast<size_t>(blocks));
    for (int32_t i = 0; i < blocks; ++i) order[static_cast<size_t>(i)] = i;
    for (int64_t i = blocks - 1; i > 0; --i) std::swap(order[static_cast<size_t>(i)], order[static_cast<size_t>(random.below(i + 1))]);
    table = Block<int32_t>(used);
    std::copy_n(order.begin(), used, table.data());
    empty(written);
    empty(expected);
    dk.resize(static_cast<size_t>(k.size()));
    dv.resize(static_cast<size_t>(v.size()));
    for (int64_t p = 0; p < c.context; ++p)
      for (int64_t h = 0; h < c.kv_heads; ++h) {
        const int64_t at = table[p / c.block] * c.kv_heads + h, slot = p % c.block, row = (p * c.kv_heads + h) * c.dim;
        const float ks = store(c.type, k.data() + row, c.dim, expected.k.data(), at * c.dim * c.block + slot, c.block, dk.data() + row);
        const float vs = store(c.type, v.data() + row, c.dim, expected.v.data(), (at * c.block + slot) * c.dim, 1, dv.data() + row);
        if (c.type == KvType::int8) {
          expected.k_scale[at * c.block + slot] = ks;
          expected.v_scale[at * c.block + slot] = vs;
        }
      }
  }

  void empty(Image& image) const {
    const int64_t slots = blocks * c.kv_heads * c.block;
    image.k = Block<uint8_t>(slots * c.dim * bytes_of(c.type));
    image.v = Block<uint8_t>(slots * c.dim * bytes_of(c.type));
    image.k.fill(0xFF);  // NaN in every float type
    image.v.fill(0xFF);
    if (c.type != KvType::int8) return;
    image.k_scale = Block<float>(slots);
    image.v_scale = Block<float>(slots);
    image.k_scale.fill(std::nanf(""));
    image.v_scale.fill(std::nanf(""));
  }

  gsm::KvPool pool(Image& image) const {
    const bool scaled = c.type == KvType::int8;
    return {c.type, image.k.data(), image.v.data(), scaled ? image.k_scale.data() : nullptr,
            scaled ? image.v_scale.data() : nullptr, c.kv_heads, c.dim, c.block};
  }

  void write(int64_t first, int64_t tokens) {
    const Block<float> kk = k.copy(first * c.kv_heads * c.dim, tokens * c.kv_heads * c.dim);
    const Block<float> vv = v.copy(first * c.kv_heads * c.dim, tokens * c.kv_heads * c.dim);
    Block<int32_t> positions(tokens);
    for (int64_t m = 0; m < tokens; ++m) positions[m] = static_cast<int32_t>(first + m);
    check::fresh([&] { gsm::kv_write({kk.data(), vv.data(), positions.data(), table.data(), tokens, pool(written)}); });
  }

  bool intact() const {
    return std::equal(written.k.data(), written.k.data() + written.k.size(), expected.k.data()) &&
           std::equal(written.v.data(), written.v.data() + written.v.size(), expected.v.data()) &&
           check::same(written.k_scale, expected.k_scale) && check::same(written.v_scale, expected.v_scale);
  }
};

struct Result {
  Block<float> out, lse;
};

Result attend(Cache& cache, const Block<float>& q, const Block<int32_t>& positions, int64_t first, int64_t tokens, bool lse = true) {
  const Case& c = cache.c;
  const int64_t width = c.heads() * c.dim;
  const Block<float> part = q.copy(first * width, tokens * width);
  const Block<int32_t> at = positions.copy(first, tokens);
  Block<int32_t> table = cache.table.copy(0, cache.table.size());
  // What no query of this call sees may be gone from the pool.
  int64_t low = std::numeric_limits<int64_t>::max(), high = -1;
  for (int64_t m = 0; m < tokens; ++m)
    if (at[m] >= 0) {
      low = std::min(low, gsm::first_visible(at[m], c.window));
      high = std::max<int64_t>(high, at[m]);
    }
  for (int64_t i = 0; i < table.size(); ++i)
    if ((i + 1) * c.block <= low || i * c.block > high) table[i] = 1 << 20;
  Result r{Block<float>(tokens * width), Block<float>(lse ? tokens * c.heads() : 0)};
  r.out.fill(-77.0f);
  r.lse.fill(-77.0f);
  check::fresh([&] {
    gsm::attention({part.data(), at.data(), table.data(), tokens, c.heads(), cache.pool(cache.written),
                    1.0f / std::sqrt(static_cast<float>(c.dim)), c.window, c.softcap, r.out.data(), lse ? r.lse.data() : nullptr});
  });
  return r;
}

bool near(const Cache& cache, const Block<float>& q, const Block<int32_t>& positions, const Result& r) {
  const Case& c = cache.c;
  const double scale = 1.0f / std::sqrt(static_cast<float>(c.dim));
  bool ok = true;
  std::vector<double> score, y(static_cast<size_t>(c.dim)), size(static_cast<size_t>(c.dim));
  for (int64_t row = 0; row < positions.size() * c.heads(); ++row) {
    const int64_t p = positions[row / c.heads()], kv_head = row % c.heads() / c.group;
    const int64_t first = gsm::first_visible(p, c.window);
    score.clear();
    double worst = 0, top = -HUGE_VAL, bottom = HUGE_VAL;
    for (int64_t j = first; j <= p; ++j) {
      double s = 0, terms = 0;
      for (int64_t i = 0; i < c.dim; ++i) {
        const double t = static_cast<double>(q[row * c.dim + i]) * cache.dk[static_cast<size_t>((j * c.kv_heads + kv_head) * c.dim + i)];
        s += t * scale;
        terms += std::fabs(t * scale);
      }
      if (c.softcap > 0) s = c.softcap * std::tanh(s / c.softcap);
      worst = std::max(worst, static_cast<double>(c.dim + 4) * kUnit * terms + c.softcap * 0x1p-19);
      top = std::max(top, s);
      bottom = std::min(bottom, s);
      score.push_back(s);
    }
    double sum = 0;
    std::fill(y.begin(), y.end(), 0.0);
    std::fill(size.begin(), size.end(), 0.0);
    for (size_t j = 0; j < score.size(); ++j) {
      const double e = std::exp(score[j] - top);
      sum += e;
      for (int64_t i = 0; i < c.dim; ++i) {
        const double v = cache.dv[static_cast<size_t>(((first + static_cast<int64_t>(j)) * c.kv_heads + kv_head) * c.dim + i)];
        y[static_cast<size_t>(i)] += e * v;
        size[static_cast<size_t>(i)] += e * std::fabs(v);
      }
    }
    const double keys = static_cast<double>(score.size());
    const double error = score.empty() ? 0 : 2 * (2 * worst + (keys + 64) * kUnit + kUnit * (top - bottom));
    for (int64_t i = 0; i < c.dim; ++i) {
      const auto at = static_cast<size_t>(i);
      const double want = score.empty() ? 0 : y[at] / sum;
      ok = ok && std::fabs(r.out[row * c.dim + i] - want) <= (score.empty() ? 0 : error * size[at] / sum);
    }
    const double want = score.empty() ? -HUGE_VAL : top + std::log(sum);
    ok = ok && (score.empty() ? r.lse[row] == want : std::fabs(r.lse[row] - want) <= error + kUnit * std::fabs(want));
  }
  return ok;
}

void one(const Case& c, const std::vector<int>& threads, check::Random& random) {
  const int64_t row = c.kv_heads * c.dim;
  Block<float> k(c.context * row), v(c.context * row);
  for (int64_t i = 0; i < k.size(); ++i) {
    k[i] = random.uniform(-2, 2);
    v[i] = random.uniform(-1, 1);
  }
  std::fill_n(k.data(), c.dim, 0.0f);  // a row of zeros has the scale zero
  std::fill_n(v.data(), c.dim, 0.0f);
  // A prompt's last tokens, some of its first, and queries that see nothing.
  std::vector<int32_t> chosen{-1, 0};
  for (int64_t p = std::max<int64_t>(0, c.context - 7); p < c.context; ++p) chosen.push_back(static_cast<int32_t>(p));
  chosen.push_back(static_cast<int32_t>(c.context / 2));
  chosen.push_back(-1);
  const auto tokens = static_cast<int64_t>(chosen.size());
  Block<int32_t> positions(tokens);
  std::copy(chosen.begin(), chosen.end(), positions.data());
  Block<float> q(tokens * c.heads() * c.dim);
  for (int64_t i = 0; i < q.size(); ++i) q[i] = random.uniform(-2, 2);

  for (gsm::Level level : gsm::supported_levels()) {
    gsm::set_level(gsm::level_name(level));
    gsm::set_team_threads(1);
    const auto what = [&] { return name(c) + " at " + gsm::level_name(level); };
    Cache cache(c, k, v, random);
    const int64_t cut = c.context / 3;
    cache.write(0, cut);
    cache.write(cut, c.context - cut);
    check::expect(cache.intact(), [&] { return what() + ": kv_write leaves other bytes than the layout's"; });
    const Result whole = attend(cache, q, positions, 0, tokens);
    check::expect(near(cache, q, positions, whole), [&] { return what() + " differs from the reference"; });

    bool chunked = true;
    for (int64_t m = 0; m < tokens; ++m) {
      const Result alone = attend(cache, q, positions, m, 1);
      chunked = chunked && check::same(alone.out, whole.out.copy(m * c.heads() * c.dim, c.heads() * c.dim)) &&
                check::same(alone.lse, whole.lse.copy(m * c.heads(), c.heads()));
    }
    check::expect(chunked, [&] { return what() + " depends on the other tokens of the call"; });

    Case coarse = c;
    coarse.block = 3 * c.block;
    Cache other(coarse, k, v, random);
    other.write(0, c.context);
    check::expect(check::same(attend(other, q, positions, 0, tokens).out, whole.out), [&] { return what() + " depends on the block size"; });
    check::expect(check::same(attend(cache, q, positions, 0, tokens, false).out, whole.out), [&] { return what() + " depends on lse"; });
    for (int n : threads) {
      gsm::set_team_threads(n);
      Cache again(c, k, v, random);
      again.write(0, c.context);
      check::expect(again.intact(), [&] { return what() + ": kv_write depends on the number of threads"; });
      const Result r = attend(again, q, positions, 0, tokens), last = attend(again, q, positions, tokens - 2, 1);
      check::expect(check::same(r.out, whole.out) && check::same(r.lse, whole.lse) &&
                        check::same(last.out, whole.out.copy((tokens - 2) * c.heads() * c.dim, c.heads() * c.dim)),
                    [&] { return what() + " depends on the number of threads: " + std::to_string(n); });
    }
  }
}

}  // namespace

void attention_cases(bool team_only) {
  check::Random random(7);
  constexpr KvType types[] = {KvType::f32, KvType::f16, KvType::bf16, KvType::int8};
  // Long contexts, where threads share out rows or the segments of one row.
  for (KvType type : types) {
    one({type, 64, 1, 1, 16, 1500, 0, 0.0f}, {2, 3}, random);
    if (team_only) continue;
    one({type, 64, 3, 3, 32, 700, 0, 0.0f}, {2, 3}, random);
    one({type, 40, 2, 2, 32, 1100, 600, 20.0f}, {2, 3}, random);
  }
  if (team_only) return;
  for (KvType type : types)
    for (int64_t dim : {1, 8, 15, 16, 33, 64})
      for (int64_t context : {1, 15, 17, 70}) {
        int turn = 0;  // heads, windows and caps take turns with the contexts
        for (int64_t window : {0, 1, 20}) {
          const int64_t kv_heads = 1 + turn % 2, group = turn == 0 ? 1 : turn == 1 ? 3 : 9;
          one({type, dim, kv_heads, group, turn == 2 ? 48 : 16, context, window, turn == 1 ? 5.0f : 0.0f}, {}, random);
          ++turn;
        }
      }
  for (KvType type : types) one({type, 24, 2, 3, 16, 300, 100, 0.0f}, {2}, random);
}
