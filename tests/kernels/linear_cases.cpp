// Linear sites and row look-up over arrays of exactly the bytes that the layout asks for, so that a sanitizer sees an
// access beyond them. What a result means is held against float64 in the Python tests; here it must be near a double
// reference that decodes the same bytes, and the same bits in every batch and on any number of threads.
#include "linear.h"

#include <algorithm>
#include <deque>
#include <vector>

#include "check.h"
#include "fwht.h"
#include "team.h"

namespace {

using check::Block;
using gsm::InputFormat;
using gsm::Rounding;
using gsm::ScaleKind;

enum class Table { none, small, wide, real, per_row, nan };

struct Kind {
  gsm::Number number = gsm::Number::coded;
  int bits = 0;
  float step = 1, zero = 0;
  Table table = Table::none;
  int64_t group = 0, tile_rows = 1;  // group 0: the width
  ScaleKind scale = ScaleKind::f16;
  int zero_bits = 0;
  ScaleKind min = ScaleKind::none;
};

// Every loop that reads or expands codes, every kind of scale and offset.
std::vector<Kind> kinds() {
  using N = gsm::Number;
  using S = ScaleKind;
  std::vector<Kind> all{{N::f32}, {N::f16}, {N::bf16}};
  for (int bits = 1; bits <= 8; ++bits) all.push_back({N::coded, bits, 1, static_cast<float>(1 << bits) / 2, Table::none, 32});
  all.push_back({N::coded, 4, 1, 0, Table::none, 16, 1, S::f32, 4});
  all.push_back({N::coded, 8, 1, 0, Table::none, 0, 1, S::bf16, 8});
  all.push_back({N::coded, 3, 1, 0, Table::none, 48, 1, S::f16, 4});
  all.push_back({N::coded, 5, 1, 0, Table::none, 48, 1, S::nested, 0, S::f16});
  all.push_back({N::coded, 2, 1, 0, Table::none, 16, 1, S::nested, 0, S::nested});
  all.push_back({N::coded, 7, 1, 0, Table::none, 64, 16, S::f32, 0, S::bf16});
  all.push_back({N::coded, 1, 2, 1, Table::none, 0, 1, S::f32});
  all.push_back({N::coded, 4, 2, 15, Table::none, 32, 1, S::e4m3});
  all.push_back({N::coded, 4, 1, 8, Table::none, 32, 1, S::e8m0});
  all.push_back({N::coded, 8, 1, 128, Table::none, 32, 32, S::nested});
  all.push_back({N::coded, 3, 1, 4, Table::none, 8, 1, S::f16});
  for (int bits : {3, 4, 5, 6, 8})
    for (Table table : {Table::small, Table::wide}) all.push_back({N::coded, bits, 1, 0, table, 32, 1, S::f16});
  for (int bits : {2, 3, 4}) {
    all.push_back({N::coded, bits, 1, 0, Table::real, 64, 1, S::f32});
    all.push_back({N::coded, bits, 1, 0, Table::per_row, 0, 1, S::none});
  }
  all.push_back({N::coded, 8, 1, 0, Table::nan, 16, 1, S::e8m0});
  return all;
}

// A matrix of random bytes. Its blocks never move: the weight points into them.
struct Matrix {
  gsm::Weight w;
  std::deque<Block<uint8_t>> bytes;
  Block<float> table;
  std::deque<Matrix> nested;
  std::string name;

  Matrix(const Kind& k, int64_t rows, int64_t cols, check::Random& random) {
    w.number = k.number;
    w.bits = k.bits;
    w.rows = rows;
    w.cols = cols;
    w.step = k.step;
    w.zero = k.zero;
    name = "linear " + std::to_string(k.bits) + " bits, group " + std::to_string(k.group) + " scale " +
           std::to_string(static_cast<int>(k.scale)) + " table " + std::to_string(static_cast<int>(k.table)) + " [" +
           std::to_string(rows) + ", " + std::to_string(cols) + "]";
    if (w.coded()) {
      w.group = k.group ? k.group : w.width();
      w.tile_rows = k.tile_rows;
      w.zero_bits = k.zero_bits;
      make_table(k.table, random);
      make_scales(w.scales, k.scale, random);
      make_scales(w.mins, k.min, random);
    }
    const gsm::ArrayBytes n = gsm::array_bytes(w);
    for (auto [to, size] : {std::pair{&w.q8, n.q8}, {&w.q4, n.q4}, {&w.q2, n.q2}, {&w.q1, n.q1}, {&w.zeros, n.zeros}})
      *to = random_bytes(size, random);
    // Padding holds any code but one that means NaN, which would spoil its row.
    for (int64_t i = 0; k.table == Table::nan && i < n.q8; ++i)
      if (i / 256 % w.blocks() * 16 + i % 256 / 64 * 4 + i % 4 >= cols) bytes.back()[i] = 0;
    fill(w.scales, n.scales, random);
    fill(w.mins, n.mins, random);
    if (n.values) {
      const ScaleKind as = k.number == gsm::Number::f32   ? ScaleKind::f32
                           : k.number == gsm::Number::f16 ? ScaleKind::f16
                                                          : ScaleKind::bf16;
      w.values = numbers(as, n.values, random);
    }
    gsm::prepare_bytes(w);
  }
  Matrix(const Matrix&) = delete;

  const uint8_t* random_bytes(int64_t n, check::Random& random) {
    if (n == 0) return nullptr;
    bytes.emplace_back(n);
    for (int64_t i = 0; i < n; ++i) bytes.back()[i] = static_cast<uint8_t>(random.bits());
    return bytes.back().data();
  }

  // n bytes of numbers of either sign.
  const uint8_t* numbers(ScaleKind kind, int64_t n, check::Random& random) {
    bytes.emplace_back(n);
    uint8_t* const to = bytes.back().data();
    const int64_t size = kind == ScaleKind::f32 ? 4 : kind == ScaleKind::f16 || kind == ScaleKind::bf16 ? 2 : 1;
    for (int64_t i = 0; i < n / size; ++i) {
      const float v = random.uniform(-0.1f, 0.1f);
      const uint16_t half = kind == ScaleKind::f16 ? gsm::to_f16(v).bits : gsm::to_bf16(v).bits;
      const int64_t byte = kind == ScaleKind::e8m0 ? 118 + random.below(6) : random.below(60) + 128 * random.below(2);
      const auto small = static_cast<uint8_t>(byte);
      const void* const from = size == 4 ? static_cast<const void*>(&v) : size == 2 ? static_cast<const void*>(&half) : &small;
      std::copy_n(static_cast<const uint8_t*>(from), size, to + size * i);
    }
    return to;
  }

  void make_table(Table kind, check::Random& random) {
    if (kind == Table::none) return;
    const int64_t n = int64_t{1} << w.bits;
    w.table_per_row = kind == Table::per_row;
    table = Block<float>(w.table_per_row ? n * 16 * w.panels() : n);
    for (int64_t i = 0; i < table.size(); ++i)
      switch (kind) {
        case Table::small: table[i] = static_cast<float>(i - n / 2) / 2; break;       // integers of a byte
        case Table::wide: table[i] = static_cast<float>((i - n / 2) * 129); break;    // of two
        case Table::nan: table[i] = i % 16 == 15 ? std::nanf("") : static_cast<float>(i); break;
        default: table[i] = random.uniform(-1, 1);
      }
    w.table = table.data();
  }

  // The kind; plain values follow when their number is known.
  void make_scales(gsm::Scales& s, ScaleKind kind, check::Random& random) {
    s.kind = kind;
    if (kind != ScaleKind::nested) return;
    nested.emplace_back(Kind{gsm::Number::coded, 6, 1, 32, Table::none, 8, 1, ScaleKind::f16}, w.row_tiles(), w.groups(), random);
    s.nested = &nested.back().w;
  }
  void fill(gsm::Scales& s, int64_t n, check::Random& random) {
    if (n) s.values = numbers(s.kind, n, random);
  }
};

// ---------------------------------------------------------------- reference

constexpr int64_t kTokens = 33;

// Ordinary tokens with one large value each, and the extremes among them.
Block<float> inputs(int64_t tokens, int64_t cols, check::Random& random) {
  Block<float> x(tokens * cols);
  for (int64_t i = 0; i < x.size(); ++i) x[i] = random.uniform(-2, 2);
  for (int64_t m = 0; m < tokens; ++m) {
    float* const row = x.data() + m * cols;
    row[random.below(cols)] *= 20.0f;
    if (m % 17 == 5) std::fill_n(row, cols, 0.0f);
    if (m % 17 == 6) row[random.below(cols)] = HUGE_VALF;
    if (m % 17 == 7) row[random.below(cols)] = std::nanf("");
    if (m % 17 == 10)
      for (int64_t k = 0; k < cols; ++k) row[k] *= 1e-40f;
    if (m % 17 == 11)
      for (int64_t k = 0; k < cols; ++k) row[k] *= 1e26f;
  }
  return x;
}

const InputFormat kInputs[] = {{Rounding::f32},       {Rounding::bf16},          {Rounding::int8},
                               {Rounding::int8, 32},  {Rounding::int4, 16},      {Rounding::uint4, 48},
                               {Rounding::uint8, 0},  {Rounding::e4m3, 32},      {Rounding::int8, 0, 0.02f},
                               {Rounding::int8, 0, 0, 5}, {Rounding::uint4, 16, 0, 3}};

// How far rounding moves an element, in units of the token's largest.
double rounding_error(const InputFormat& in) {
  switch (in.rounding) {
    case Rounding::f32: return 0;
    case Rounding::bf16: return 0x1p-8;
    case Rounding::int8: return 0.5 / 127 + 1e-6;
    case Rounding::int4: return 0.5 / 7 + 1e-6;
    case Rounding::uint4: return 2.0 / 15 + 1e-6;  // a range of both signs, and a rounded zero point
    case Rounding::uint8: return 2.0 / 255 + 1e-6;
    default: return 1.0 / 16;
  }
}

// Every output is near the double reference: input rounding, and a float32 sum of cols + 64 terms, doubled; a two-byte
// table is rounded to 2^-16 of its largest. Codes and offsets may cancel, so that terms are as large as both.
bool near(const Matrix& a, const Block<float>& x, const Block<float>& y, int64_t tokens, const InputFormat& in) {
  const gsm::Weight& w = a.w;
  float top = 0;
  for (int c = 0; w.coded() && !w.table_per_row && c < 1 << w.bits; ++c)
    if (w.value(c) == w.value(c)) top = std::max(top, std::fabs(w.value(c)));
  if (w.has_offset()) top = 256;
  std::vector<float> row(static_cast<size_t>(w.cols));
  for (int64_t r = 0; r < w.rows; ++r) {
    for (int64_t k = 0; k < w.cols; ++k) row[static_cast<size_t>(k)] = gsm::decode_element(w, r, k);
    for (int64_t m = 0; m < tokens; ++m) {
      double sum = 0, size = 0, largest = 0, weights = 0;
      bool sound = true;
      for (int64_t k = 0; k < w.cols; ++k) {
        const double v = x[m * w.cols + k], s = row[static_cast<size_t>(k)];
        const int64_t g = w.group ? k / w.group : 0;
        double whole = std::fabs(s);
        if (w.coded()) {
          whole += std::fabs(static_cast<double>(gsm::scale_at(w.scales, w, r, g))) * top;
          if (w.mins.kind != ScaleKind::none) whole += std::fabs(static_cast<double>(gsm::scale_at(w.mins, w, r, g)));
        }
        sound = sound && std::isfinite(v) && std::isfinite(s);
        sum += v * s;
        size += std::fabs(v) * whole;
        weights += whole;
        largest = std::max(largest, std::fabs(v));
      }
      const float got = y[m * w.rows + r];
      if (!sound) {
        if (std::isfinite(got)) return false;
        continue;
      }
      if (in.fixed > 0 && largest > 127 * in.fixed) continue;  // cut off
      double slack = (static_cast<double>(w.cols) + 64) * 0x1p-22 * (size + largest * weights) + weights * 1e-37 + 1e-37;
      slack += weights * (largest * rounding_error(in) + in.fixed);
      if (w.byte_parts == 2) slack += weights * largest * 0x1p-15;
      if (!(std::fabs(got - sum) <= slack)) return false;
    }
  }
  return true;
}

// ---------------------------------------------------------------- calls

struct Call {
  gsm::LinearSpec spec;
  std::vector<int64_t> rows;  // of each output
};

// Runs on arrays of exactly this many tokens, on a thread of its own: outputs one after the other.
std::vector<Block<float>> run(const Call& call, const Block<float>& x, int64_t tokens) {
  const Block<float> head = x.copy(0, tokens * call.spec.cols);
  std::vector<Block<float>> outs;
  for (int64_t rows : call.rows) {
    outs.emplace_back(tokens * rows);
    outs.back().fill(-77.0f);  // what was never written shows
  }
  gsm::LinearSpec spec = call.spec;
  spec.x = head.data();
  for (gsm::LinearSite& site : spec.sites)
    for (size_t i = 0; i < outs.size(); ++i)
      if (site.out == nullptr && site.ld == call.rows[i]) site.out = outs[i].data();
  // Parts that read another array read this one, cut to the tokens at hand.
  std::deque<Block<float>> extras;
  for (gsm::LinearSite& site : spec.sites)
    for (gsm::LinearPart& part : site.parts)
      if (part.source.x) {
        extras.emplace_back(tokens * part.source.cols);
        std::copy_n(part.source.x, extras.back().size(), extras.back().data());
        part.source.x = extras.back().data();
      }
  check::fresh([&] {
    const auto op = gsm::linear_op(std::move(spec));
    gsm::run_now(*op, tokens);
  });
  return outs;
}

Call call_of(const Matrix& a, const InputFormat& in) {
  Call call;
  call.spec.cols = a.w.cols;
  gsm::LinearSite site;
  site.parts.push_back({&a.w, nullptr, {nullptr, a.w.cols, {}}, in});
  site.ld = a.w.rows;
  call.spec.sites.push_back(site);
  call.rows = {a.w.rows};
  return call;
}

bool same(const std::vector<Block<float>>& part, const std::vector<Block<float>>& whole) {
  for (size_t i = 0; i < part.size(); ++i)
    if (!check::same(part[i], whole[i])) return false;
  return true;
}

void in_every_batch(const Call& call, const Block<float>& x, int64_t tokens, const std::vector<Block<float>>& whole,
                    const std::vector<int>& threads, const std::string& name) {
  for (int n : threads) {
    gsm::set_team_threads(n);
    for (int64_t fewer : {int64_t{1}, int64_t{2}, int64_t{3}, int64_t{4}, int64_t{17}, tokens})
      if (fewer <= tokens && (n > 1 || fewer < tokens))
        check::expect(same(run(call, x, fewer), whole), [&] {
          return name + ": " + std::to_string(fewer) + " tokens on " + std::to_string(n) + " threads differ";
        });
  }
  gsm::set_team_threads(1);
}

void multiply(const Matrix& a, const InputFormat& in, int64_t tokens, const std::vector<int>& threads, check::Random& random) {
  const Block<float> x = inputs(tokens, a.w.cols, random);
  const Call call = call_of(a, in);
  for (gsm::Level level : gsm::supported_levels()) {
    gsm::set_level(gsm::level_name(level));
    gsm::set_team_threads(1);
    const std::string name = a.name + " @ " + std::to_string(static_cast<int>(in.rounding)) + "/" + std::to_string(in.group) +
                             " " + gsm::level_name(level);
    const std::vector<Block<float>> y = run(call, x, tokens);
    check::expect(near(a, x, y[0], tokens, in), [&] { return name + " is far from the reference"; });
    in_every_batch(call, x, tokens, y, threads, name);
  }
}

void look_up(const Matrix& a, int64_t n, check::Random& random) {
  Block<int64_t> ids(n);
  for (int64_t j = 0; j < n; ++j) ids[j] = j < a.w.rows ? a.w.rows - 1 - j : random.below(a.w.rows);
  Block<float> out(n * a.w.cols);
  check::fresh([&] { gsm::decode_rows(a.w, ids.data(), n, out.data()); });
  bool ok = true;
  for (int64_t j = 0; j < n; ++j)
    for (int64_t k = 0; k < a.w.cols; ++k)
      ok = ok && check::same(out[j * a.w.cols + k], gsm::decode_element(a.w, ids[j], k));
  check::expect(ok, [&] { return a.name + " decoded"; });
}

// ---------------------------------------------------------------- cases

void odd_shapes() {
  check::Random random(1);
  int turn = 0;
  for (const Kind& kind : kinds())
    for (int64_t rows : {1, 16, 17, 70})
      for (int64_t cols : {1, 8, 24, 33, 100}) {
        const Matrix a(kind, rows, cols, random);
        look_up(a, rows + 3, random);
        // Two input formats a shape, in turn; token counts that take every tile.
        for (int i = 0; i < 2; ++i, ++turn) multiply(a, kInputs[turn % 11], turn % 3 ? 5 : kTokens, {1}, random);
      }
}

// Several panels in one go, and what is left over of them.
void tall() {
  check::Random random(6);
  int turn = 0;
  for (const Kind& kind : kinds()) {
    const Matrix a(kind, 613, 24, random);
    multiply(a, kInputs[turn++ % 11], 3, {1, 2}, random);
  }
}

// Chunks end inside of rows, at segments that are cut and at ones that are not.
void long_rows() {
  check::Random random(2);
  int turn = 0;
  for (const Kind& kind : kinds())
    for (int64_t cols : {1100, 2500}) {
      const Matrix a(kind, 17, cols, random);
      multiply(a, kInputs[turn++ % 11], 5, {1}, random);
    }
  const Matrix odd({gsm::Number::coded, 4, 1, 8, Table::none, 1040, 1, ScaleKind::f32}, 33, 2500, random);
  const Matrix longest({gsm::Number::coded, 8, 1, 128, Table::none, 65552, 1, ScaleKind::f32}, 1, 131120, random);
  for (const InputFormat& in : kInputs) multiply(odd, in, 5, {1}, random);
  multiply(longest, kInputs[2], 2, {1}, random);
}

// Codes and inputs at their largest over a whole segment: 32-bit sums must not overflow.
void longest_sums() {
  for (float zero : {128.0f, 0.0f}) {
    const int64_t cols = 65536;
    check::Random random(3);
    Matrix a({gsm::Number::coded, 8, 1, zero, Table::none, 0, 1, ScaleKind::f32}, 1, cols, random);
    Block<uint8_t> codes(gsm::array_bytes(a.w).q8);
    for (int code : {0, 255}) {
      codes.fill(static_cast<uint8_t>(code));
      a.w.q8 = codes.data();
      Block<float> x(cols);
      for (float value : {1.0f, -1.0f}) {
        x.fill(value);
        for (gsm::Level level : gsm::supported_levels()) {
          gsm::set_level(gsm::level_name(level));
          check::expect(near(a, x, run(call_of(a, kInputs[2]), x, 1)[0], 1, kInputs[2]), [] { return "the longest sum"; });
        }
      }
    }
  }
}

struct Sparse {
  gsm::Mask m;
  Block<uint32_t> starts;
  Block<uint8_t> index, values;
  Sparse(int64_t rows, int64_t cols, ScaleKind kind, int index_bytes, check::Random& random) {
    const int64_t panels = (rows + 15) / 16;
    starts = Block<uint32_t>(panels + 1);
    for (int64_t p = 0; p < panels; ++p) starts[p + 1] = starts[p] + static_cast<uint32_t>(random.below(4));
    const int64_t n = 16 * static_cast<int64_t>(starts[panels]);
    const int64_t size = kind == ScaleKind::f32 ? 4 : kind == ScaleKind::none ? 1 : 2;
    index = Block<uint8_t>(n * index_bytes);
    values = Block<uint8_t>(n * size);
    for (int64_t p = 0, i = 0; p < panels; ++p)
      for (uint32_t s = starts[p]; s < starts[p + 1]; ++s)
        for (int64_t r = 0; r < 16; ++r, ++i) {
          const bool empty = 16 * p + r >= rows || random.below(3) == 0;
          const uint32_t c = empty ? 0xFFFFFFFFu : static_cast<uint32_t>(random.below(cols));
          std::copy_n(reinterpret_cast<const uint8_t*>(&c), index_bytes, index.data() + i * index_bytes);
          const float v = random.uniform(-1, 1);
          const uint16_t half = kind == ScaleKind::f16 ? gsm::to_f16(v).bits : gsm::to_bf16(v).bits;
          const auto byte = static_cast<uint8_t>(random.bits());
          const void* from = size == 4 ? static_cast<const void*>(&v) : size == 2 ? static_cast<const void*>(&half) : &byte;
          std::copy_n(static_cast<const uint8_t*>(from), size, values.data() + i * size);
        }
    m.rows = rows;
    m.cols = cols;
    m.starts = starts.data();
    m.index = index.data();
    m.values = values.data();
    m.index_bytes = index_bytes;
    m.kind = kind;
    m.scale = 0.01f;
  }
};

// Sites of several parts with transforms, further inputs and scattered rows; norm, bias, addition and gate.
void sites(const std::vector<int>& threads) {
  check::Random random(4);
  const int64_t cols = 96, rows = 70, rank = 6;
  using N = gsm::Number;
  const Matrix whole({N::coded, 4, 1, 8, Table::none, 32}, rows, cols, random), thin({N::f16}, rows, rank, random);
  const Matrix some({N::coded, 3, 1, 4, Table::none, 16}, rows, 40, random);
  const Matrix first({N::coded, 8, 1, 128, Table::none, 0, 1, ScaleKind::f32}, 20, cols, random);
  const Matrix rest({N::bf16}, rows - 20, cols, random), other({N::coded, 4, 1, 0, Table::real, 32}, rows + 1, cols, random);
  const Sparse halves(rows, cols, ScaleKind::f16, 2, random), bytes(rows, cols, ScaleKind::none, 4, random);
  Block<uint32_t> wide(500), narrow(40), order(rows);
  for (int64_t i = 0; i < wide.size(); ++i) wide[i] = static_cast<uint32_t>(random.below(cols));
  for (int64_t i = 0; i < narrow.size(); ++i) narrow[i] = static_cast<uint32_t>(random.below(500));
  for (int64_t i = 0; i < rows; ++i) order[i] = static_cast<uint32_t>(i * 13 % rows);
  Block<uint32_t> head = order.copy(0, 20), tail = order.copy(20, rows - 20);
  Block<float> factors(cols), signs(cols), gain(cols), bias(rows), between(kTokens * rank);
  for (int64_t i = 0; i < cols; ++i) factors[i] = random.uniform(0.5f, 2), gain[i] = random.uniform(0, 2);
  for (int64_t i = 0; i < cols; ++i) signs[i] = random.below(2) ? 1.0f : -1.0f;
  for (int64_t i = 0; i < rows; ++i) bias[i] = random.uniform(-1, 1);
  for (int64_t i = 0; i < between.size(); ++i) between[i] = random.uniform(-1, 1);
  const gsm::Transform gather_wide{gsm::Transform::gather, wide.data(), 500};
  const gsm::Transform gather_narrow{gsm::Transform::gather, narrow.data(), 40};
  const gsm::Transform multiply_by{gsm::Transform::multiply, nullptr, 0, factors.data()};
  const gsm::Transform rotate{gsm::Transform::hadamard, nullptr, 0, signs.data(), 32};
  const gsm::Transform rotate_all{gsm::Transform::hadamard, nullptr, 0, nullptr, 48};
  const InputFormat token{Rounding::int8}, plain{Rounding::bf16};

  gsm::LinearSite sum;
  sum.parts.push_back({&whole.w, nullptr, {nullptr, cols, {multiply_by, rotate}}, token});
  sum.parts.push_back({&thin.w, nullptr, {between.data(), rank, {}}, plain});
  sum.parts.push_back({nullptr, &halves.m, {nullptr, cols, {}}, token});
  sum.parts.push_back({&some.w, nullptr, {nullptr, cols, {gather_wide, gather_narrow}}, {Rounding::int4, 16, 0, 1.5f}});
  sum.parts.push_back({nullptr, &bytes.m, {nullptr, cols, {rotate_all}}, {Rounding::f32}});
  sum.bias = bias.data();
  sum.ld = rows;
  gsm::LinearSite upper, lower;
  upper.parts.push_back({&first.w, nullptr, {nullptr, cols, {rotate}}, token});
  upper.index = head.data();
  lower.parts.push_back({&rest.w, nullptr, {nullptr, cols, {}}, plain});
  lower.index = tail.data();
  upper.bias = lower.bias = bias.data();
  upper.ld = lower.ld = rows;
  gsm::LinearSite shared;  // a third output, whose leading dimension tells it apart
  shared.parts.push_back({&other.w, nullptr, {nullptr, cols, {}}, token});
  shared.ld = rows + 1;

  std::vector<std::pair<std::string, Call>> calls(4);
  calls[0].first = "a site of parts";
  calls[0].second = {{nullptr, cols, nullptr, 0, {sum}, gsm::Epilogue::store}, {rows}};
  calls[1].first = "two blocks of rows beside another site, normalised";
  calls[1].second = {{nullptr, cols, gain.data(), 1e-5f, {upper, lower, shared}, gsm::Epilogue::store}, {rows, rows + 1}};
  calls[2].first = "an addition";
  calls[2].second = {{nullptr, cols, nullptr, 0, {upper, lower, shared}, gsm::Epilogue::add}, {rows, rows + 1}};
  calls[3].first = "a gate";
  gsm::LinearSite gate = sum, up;
  up.parts.push_back({&whole.w, nullptr, {nullptr, cols, {}}, plain});
  up.ld = rows;
  calls[3].second = {{nullptr, cols, gain.data(), 1e-5f, {gate, up}, gsm::Epilogue::silu}, {rows}};
  const Block<float> x = inputs(kTokens, cols, random);
  for (gsm::Level level : gsm::supported_levels()) {
    gsm::set_level(gsm::level_name(level));
    for (const auto& [name, call] : calls) {
      gsm::set_team_threads(1);
      const std::vector<Block<float>> whole_batch = run(call, x, kTokens);
      bool written = true;
      for (const Block<float>& y : whole_batch)
        for (int64_t i = 0; i < y.size(); ++i) written = written && (y[i] != -77.0f || call.spec.epilogue == gsm::Epilogue::add);
      check::expect(written, [&] { return name + " leaves outputs out"; });
      in_every_batch(call, x, kTokens, whole_batch, threads, name + " " + gsm::level_name(level));
    }
  }
}

// Large enough for the team to be woken, with more threads than panels at the end.
void teams() {
  check::Random random(5);
  const std::vector<Kind> all = kinds();
  for (size_t i = 0; i < all.size(); i += 3) {
    const Matrix a(all[i], 70, 600, random);
    for (size_t k = 0; k < 2; ++k) multiply(a, kInputs[(i + 5 * k) % 11], kTokens, {2, 3, 7}, random);
    gsm::set_team_threads(2);
    look_up(a, 300, random);
  }
  sites({1, 2, 5});
}

}  // namespace

void linear_cases(bool team_only) {
  teams();
  if (team_only) return;
  odd_shapes();
  tall();
  long_rows();
  longest_sums();
}
