// Paged attention against a softmax in double precision over what the pool stores. Slots that were never written
// hold NaN, blocks lie out of order in the pool, and table entries that a call must not read lie far outside of it.
//
// Tolerance: a score of `dim` products errs by d = (dim + 4) * 2^-23 * scale * sum |q k|, or 2^-19 of the cap more
// with a soft cap; an exponential carries that over as a relative error, so a result errs by at most
// (2 d + (keys + 64) * 2^-23 + 2^-23 * the spread of the scores) times the weighted mean of |v|; twice that is allowed.
// Over bf16 pools queries and weights are rounded, each by 2^-9 of itself at most (here: the reference rounds neither).
// Over codes a query errs by 2^-16 of its peak in each element, and a weight (times the value's scale, against the code)
// by 2^-16 of the heaviest of its segment; codes span 255 or 15 steps of the scale.
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
  static const char* const types[] = {"f32", "f16", "bf16", "int8", "uint4"};
  return std::string("attention ") + types[static_cast<int>(c.type)] + " dim " + std::to_string(c.dim) + " heads " +
         std::to_string(c.heads()) + "/" + std::to_string(c.kv_heads) + " block " + std::to_string(c.block) + " context " +
         std::to_string(c.context) + " window " + std::to_string(c.window) + " cap " + std::to_string(c.softcap);
}

bool coded(KvType type) { return type == KvType::int8 || type == KvType::uint4; }

// The scale and the minimum of a row as the layout asks for; value = scale * code + minimum (int8: scale * (code - 128)).
struct Scale {
  float step = 1, low = 0;
};

Scale scale_of(KvType type, const float* x, int64_t n) {
  float low = x[0], high = x[0];
  for (int64_t c = 0; c < n; ++c) {
    low = std::min(low, x[c]);
    high = std::max(high, x[c]);
  }
  if (type == KvType::int8) return {std::max(std::fabs(low), std::fabs(high)) / 127.0f, 0};
  if (type != KvType::uint4) return {};
  // To f16, outwards: the neighbour is tried where rounding to nearest went the other way.
  uint16_t l = gsm::to_f16(low).bits;
  if (gsm::to_f32(gsm::f16{l}) > low) l = static_cast<uint16_t>(l & 0x8000 ? l + 1 : l == 0 ? 0x8001 : l - 1);
  const float minimum = gsm::to_f32(gsm::f16{l}), step = (high - minimum) / 15.0f;
  uint16_t s = gsm::to_f16(step).bits;
  if (gsm::to_f32(gsm::f16{s}) < step) ++s;
  return {gsm::to_f32(gsm::f16{s}), minimum};
}

// Stores an element of a row in the unit that starts at `unit`: it is number `place` of kv_pack(type) there. Returns
// what it decodes to.
float store(KvType type, float x, const Scale& s, uint8_t* unit, int64_t place) {
  if (type == KvType::f32) {
    std::memcpy(unit, &x, 4);
    return x;
  }
  if (!coded(type)) {
    const uint16_t bits = type == KvType::f16 ? gsm::to_f16(x).bits : gsm::to_bf16(x).bits;
    std::memcpy(unit + 2 * place, &bits, 2);
    return type == KvType::f16 ? gsm::to_f32(gsm::f16{bits}) : gsm::to_f32(gsm::bf16{bits});
  }
  if (type == KvType::int8) {
    const float code = s.step > 0 ? std::clamp(std::nearbyint(x / s.step), -127.0f, 127.0f) : 0.0f;
    unit[place] = static_cast<uint8_t>(static_cast<int>(code) + 128);
    return code * s.step;
  }
  const float code = s.step > 0 ? std::clamp(std::nearbyint((x - s.low) / s.step), 0.0f, 15.0f) : 0.0f;
  uint8_t& byte = unit[place % 4];
  const auto bits = static_cast<uint8_t>(code);
  byte = place < 4 ? static_cast<uint8_t>((byte & 0xF0) | bits) : static_cast<uint8_t>((byte & 0x0F) | bits << 4);
  return code * s.step + s.low;
}

// What the code 0 (int8: 128) means in a row that decodes to x.
float offset(KvType type, const float* x, int64_t n) { return type == KvType::uint4 ? *std::min_element(x, x + n) : 0.0f; }

// A sequence in a pool. `expected` holds the bytes that the layout asks for; the kernel fills `written`.
struct Cache {
  struct Image {
    Block<uint8_t> k, v, k_scale, v_scale;
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
        const int64_t at = table[p / c.block] * c.kv_heads + h, row = (p * c.kv_heads + h) * c.dim;
        keep(expected, true, k.data() + row, at, p % c.block, dk.data() + row);
        keep(expected, false, v.data() + row, at, p % c.block, dv.data() + row);
      }
  }

  // One row of a head and block `at`, in the layout of attention.h.
  void keep(Image& image, bool keys, const float* x, int64_t at, int64_t slot, float* decoded) const {
    const gsm::KvPool p = pool(image);
    const int64_t pack = gsm::kv_pack(c.type), unit = gsm::kv_unit(c.type);
    const Scale s = scale_of(c.type, x, c.dim);
    uint8_t* const base = static_cast<uint8_t*>(keys ? p.k : p.v) + at * (keys ? gsm::kv_key_bytes(p) : gsm::kv_value_bytes(p));
    if (keys && c.dim % pack) std::memset(base + (c.dim / pack * c.block + slot) * unit, 0, static_cast<size_t>(unit));  // past the end: zero
    for (int64_t d = 0; d < c.dim; ++d) {
      const int64_t cell = keys ? d / pack * c.block + slot : slot / pack * c.dim + d;
      decoded[d] = store(c.type, x[d], s, base + cell * unit, keys ? d % pack : slot % pack);
    }
    uint8_t* const scales = static_cast<uint8_t*>(keys ? p.k_scale : p.v_scale);
    if (c.type == KvType::int8) std::memcpy(scales + (at * c.block + slot) * 4, &s.step, 4);
    if (c.type != KvType::uint4) return;
    const uint16_t halves[] = {gsm::to_f16(s.step).bits, gsm::to_f16(s.low).bits};
    std::memcpy(scales + (at * 2 * c.block + slot) * 2, &halves[0], 2);
    std::memcpy(scales + ((at * 2 + 1) * c.block + slot) * 2, &halves[1], 2);
  }

  void empty(Image& image) const {
    const gsm::KvPool p{c.type, nullptr, nullptr, nullptr, nullptr, c.kv_heads, c.dim, c.block};
    image.k = Block<uint8_t>(blocks * c.kv_heads * gsm::kv_key_bytes(p));
    image.v = Block<uint8_t>(blocks * c.kv_heads * gsm::kv_value_bytes(p));
    image.k.fill(0xFF);  // NaN in every float type
    image.v.fill(0xFF);
    if (!coded(c.type)) return;
    image.k_scale = Block<uint8_t>(blocks * c.kv_heads * c.block * 4);
    image.v_scale = Block<uint8_t>(blocks * c.kv_heads * c.block * 4);
    image.k_scale.fill(0xFF);
    image.v_scale.fill(0xFF);
  }

  gsm::KvPool pool(Image& image) const {
    const bool scaled = coded(c.type);
    return {c.type, image.k.data(), image.v.data(), scaled ? image.k_scale.data() : nullptr,
            scaled ? image.v_scale.data() : nullptr, c.kv_heads, c.dim, c.block};
  }

  void write(int64_t first, int64_t tokens) {
    const Block<float> kk = k.copy(first * c.kv_heads * c.dim, tokens * c.kv_heads * c.dim);
    const Block<float> vv = v.copy(first * c.kv_heads * c.dim, tokens * c.kv_heads * c.dim);
    Block<int32_t> positions(tokens), sequence(tokens);
    for (int64_t m = 0; m < tokens; ++m) positions[m] = static_cast<int32_t>(first + m);
    const gsm::KvWrite w{kk.data(), vv.data(), positions.data(), sequence.data(), table.data(), table.size(), tokens, pool(written)};
    gsm::check_kv_write(w, 1, blocks);
    check::fresh([&] { gsm::kv_write(w); });
  }

  bool intact() const {
    const auto same = [](const Block<uint8_t>& a, const Block<uint8_t>& b) { return std::equal(a.data(), a.data() + a.size(), b.data()); };
    return same(written.k, expected.k) && same(written.v, expected.v) && same(written.k_scale, expected.k_scale) &&
           same(written.v_scale, expected.v_scale);
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
  const Block<int32_t> sequence(tokens);
  const gsm::Attention a{part.data(), at.data(), sequence.data(), table.data(), table.size(), tokens, c.heads(), cache.pool(cache.written),
                         1.0f / std::sqrt(static_cast<float>(c.dim)), c.window, c.softcap, r.out.data(), lse ? r.lse.data() : nullptr};
  gsm::check_attention(a, 1, cache.blocks);
  check::fresh([&] { gsm::attention(a); });
  return r;
}

// The same with a team of the caller's own: every share of every phase, in an order that no team has.
Block<float> attend_by_parts(Cache& cache, const Block<float>& q, const Block<int32_t>& positions, int threads) {
  const Case& c = cache.c;
  const int64_t tokens = positions.size();
  const Block<int32_t> sequence(tokens);
  Block<float> out(tokens * c.heads() * c.dim);
  gsm::Attention a{q.data(), positions.data(), sequence.data(), cache.table.data(), cache.table.size(), tokens, c.heads(),
                   cache.pool(cache.written), 1.0f / std::sqrt(static_cast<float>(c.dim)), c.window, c.softcap, out.data(), nullptr};
  Block<float> scratch(threads * gsm::attention_scratch(a));
  a.scratch = scratch.data();
  for (int phase = 0; phase < gsm::attention_phases(a); ++phase)
    for (int t = threads - 1; t >= 0; --t) gsm::attention_part(a, phase, t, threads);
  return out;
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
      double rounding = static_cast<double>(c.dim + 4) * kUnit * terms + c.softcap * 0x1p-19;
      if (c.type == KvType::bf16) rounding += 0x1p-9 * terms;
      if (coded(c.type)) {
        double peak = 0, codes = 0;
        for (int64_t i = 0; i < c.dim; ++i) {
          peak = std::max(peak, std::fabs(static_cast<double>(q[row * c.dim + i]) * scale));
          const auto d = static_cast<size_t>((j * c.kv_heads + kv_head) * c.dim + i);
          codes += std::fabs(static_cast<double>(cache.dk[d]) - offset(c.type, &cache.dk[d - static_cast<size_t>(i)], c.dim));
        }
        rounding += 0x1p-16 * peak * codes;
      }
      worst = std::max(worst, rounding);
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
    // Codes: the largest distance of a value from what the code 0 (int8: 128) means; no weight is above one.
    const double keys = static_cast<double>(score.size());
    double span = 0;
    for (size_t j = 0; j < score.size() && coded(c.type); ++j) {
      const float* const v = &cache.dv[static_cast<size_t>(((first + static_cast<int64_t>(j)) * c.kv_heads + kv_head) * c.dim)];
      for (int64_t i = 0; i < c.dim; ++i) span = std::max(span, std::fabs(static_cast<double>(v[i]) - offset(c.type, v, c.dim)));
    }
    const double error = score.empty() ? 0 : 2 * (2 * worst + (keys + 64) * kUnit + kUnit * (top - bottom));
    for (int64_t i = 0; i < c.dim; ++i) {
      const auto at = static_cast<size_t>(i);
      const double want = score.empty() ? 0 : y[at] / sum;
      double allowed = score.empty() ? 0 : (error + (c.type == KvType::bf16 ? 2 * 0x1p-9 : 0)) * size[at] / sum;
      if (coded(c.type) && !score.empty()) allowed += 2 * 0x1p-16 * keys * span / sum;
      ok = ok && std::fabs(r.out[row * c.dim + i] - want) <= allowed;
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
    for (int n : {1, 3, 64})
      check::expect(check::same(attend_by_parts(cache, q, positions, n), whole.out), [&] { return what() + " depends on its shares"; });
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

// Two sequences in one pool and one call: each token gets what it gets alone.
void mixed(KvType type, check::Random& random) {
  const int64_t dim = 40, heads = 2, group = 3, block = 16, context = 600, short_context = 20;
  const int64_t blocks = (context + block - 1) / block + 2, width = heads * group * dim;
  for (gsm::Level level : gsm::supported_levels()) {
    gsm::set_level(gsm::level_name(level));
    const Case c{type, dim, heads, group, block, context, 0, 0.0f};
    Block<float> k(context * heads * dim), v(k.size());
    for (int64_t i = 0; i < k.size(); ++i) {
      k[i] = random.uniform(-2, 2);
      v[i] = random.uniform(-1, 1);
    }
    Cache cache(c, k, v, random);
    cache.write(0, context);
    // The second sequence sees the first one's tokens through the same blocks, as a fork does.
    Block<int32_t> tables(2 * blocks), sequence(9), positions(9);
    tables.fill(1 << 20);
    std::copy_n(cache.table.data(), cache.table.size(), tables.data());
    std::copy_n(cache.table.data(), (short_context + block - 1) / block, tables.data() + blocks);
    const int32_t steps[9][2] = {{1, 3}, {1, 4}, {1, 5}, {0, 599}, {1, 19}, {0, 255}, {0, 256}, {0, -1}, {1, 0}};
    for (int64_t m = 0; m < 9; ++m) {
      sequence[m] = steps[m][0];
      positions[m] = steps[m][1];
    }
    Block<float> q(9 * width), out(9 * width);
    for (int64_t i = 0; i < q.size(); ++i) q[i] = random.uniform(-2, 2);
    for (int threads : {1, 2, 5}) {
      gsm::set_team_threads(threads);
      const gsm::Attention a{q.data(), positions.data(), sequence.data(), tables.data(), blocks, 9, heads * group, cache.pool(cache.written),
                             1.0f / std::sqrt(static_cast<float>(dim)), 0, 0.0f, out.data(), nullptr};
      gsm::check_attention(a, 2, cache.blocks);
      check::fresh([&] { gsm::attention(a); });
      bool same = true;
      for (int64_t m = 0; m < 9; ++m)
        same = same && check::same(attend(cache, q, positions, m, 1, false).out, out.copy(m * width, width));
      check::expect(same, [&] { return name(c) + ": a mixed step differs from its tokens at " + gsm::level_name(level); });
    }
  }
}

}  // namespace

void attention_cases(bool team_only) {
  check::Random random(7);
  constexpr KvType types[] = {KvType::f32, KvType::f16, KvType::bf16, KvType::int8, KvType::uint4};
  // Long contexts, where threads share out rows or the segments of one row.
  for (KvType type : types) {
    one({type, 64, 1, 1, 16, 1500, 0, 0.0f}, {2, 3}, random);
    mixed(type, random);
    if (team_only) continue;
    one({type, 64, 3, 3, 32, 700, 0, 0.0f}, {2, 3}, random);
    one({type, 40, 2, 2, 32, 1100, 600, 20.0f}, {2, 3}, random);
  }
  if (team_only) return;
  for (KvType type : types)
    for (int64_t dim : {1, 7, 8, 15, 33, 64})
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
