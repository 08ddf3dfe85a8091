// Linear layers and row look-up against a plain reference in double precision, which reads the codes before they
// are packed. Tolerance: a float32 sum of n terms in any order errs by at most n * 2^-24 times the sum of the
// terms' magnitudes; twice that is allowed. A bf16 dot also takes a subnormal input, product or sum for zero, so
// bf16 inputs may lose 2^-126 times (|weight| + scale) a term.
#include "linear.h"

#include <algorithm>
#include <vector>

#include "check.h"
#include "team.h"

namespace {

using check::Block;
using gsm::Code;
using gsm::Input;
using gsm::Offset;
using gsm::Scale;

enum class Fill { random, zero, top };

struct Shape {
  Code code;
  Scale scale;
  Offset offset;
  int64_t group, rows, cols;
};

std::string name(const Shape& s) {
  static const char* const codes[] = {"f32", "f16", "bf16", "u8", "u5", "u4"};
  static const char* const scales[] = {"none", "f32", "f16", "bf16"};
  static const char* const offsets[] = {"symmetric", "zero_u4", "zero_u8", "min_f16", "min_f32", "min_bf16"};
  return std::string(codes[static_cast<int>(s.code)]) + "/" + std::to_string(s.group) + " scale " +
         scales[static_cast<int>(s.scale)] + " " + offsets[static_cast<int>(s.offset)] + " [" + std::to_string(s.rows) +
         ", " + std::to_string(s.cols) + "]";
}
std::string name(Input input) { return input == Input::f32 ? "f32" : input == Input::bf16 ? "bf16" : "int8/token"; }

// Stores v as the named type at element i and returns what that type holds.
float put(uint8_t* at, int64_t i, Scale type, float v) {
  if (type == Scale::f32) {
    std::copy_n(reinterpret_cast<const uint8_t*>(&v), 4, at + 4 * i);
    return v;
  }
  const uint16_t bits = type == Scale::f16 ? gsm::to_f16(v).bits : gsm::to_bf16(v).bits;
  std::copy_n(reinterpret_cast<const uint8_t*>(&bits), 2, at + 2 * i);
  return type == Scale::f16 ? gsm::to_f32(gsm::f16{bits}) : gsm::to_f32(gsm::bf16{bits});
}

// One matrix twice: as plain numbers for the reference, and packed in blocks of exactly the layout's size.
struct Matrix {
  Shape shape;
  gsm::Weight w;
  Block<uint8_t> codes, high, scales, offsets;
  Block<float> bias;
  std::vector<int> code;                     // [rows][cols], less the zero code or zero point
  std::vector<int> raw;                      // [rows][cols], as stored
  std::vector<float> value;                  // [rows][cols], plain weights
  std::vector<float> scale, minimum, point;  // [rows][groups]

  Matrix(const Shape& s, check::Random& random, Fill fill = Fill::random) : shape(s) {
    w.code = s.code;
    w.scale = s.scale;
    w.offset = s.offset;
    w.rows = s.rows;
    w.cols = s.cols;
    w.group = s.group;
    codes = Block<uint8_t>(w.panels() * gsm::panel_bytes_codes(w));
    high = Block<uint8_t>(w.panels() * gsm::panel_bytes_high(w));
    scales = Block<uint8_t>(w.panels() * gsm::panel_bytes_scales(w));
    offsets = Block<uint8_t>(w.panels() * gsm::panel_bytes_offsets(w));
    w.coded() ? pack_codes(random, fill) : pack_values(random, fill);
    if (random.below(2)) {
      bias = Block<float>(s.rows);
      for (int64_t r = 0; r < s.rows; ++r) bias[r] = random.uniform(-1, 1);
    }
    w.codes = codes.data();
    w.high = high.size() ? high.data() : nullptr;
    w.scales = scales.size() ? scales.data() : nullptr;
    w.offsets = offsets.size() ? offsets.data() : nullptr;
    w.bias = bias.size() ? bias.data() : nullptr;
  }

  void pack_values(check::Random& random, Fill fill) {
    const Scale type = w.code == Code::f32 ? Scale::f32 : w.code == Code::f16 ? Scale::f16 : Scale::bf16;
    for (int64_t r = 0; r < w.rows; ++r)
      for (int64_t k = 0; k < w.cols; ++k) {
        const float v = fill == Fill::zero ? 0.0f : fill == Fill::top ? 60000.0f : random.uniform(-1, 1);
        uint8_t* const panel = codes.data() + r / 16 * gsm::panel_bytes_codes(w);
        const int64_t i = w.code == Code::bf16 ? (k / 2 * 16 + r % 16) * 2 + k % 2 : 16 * k + r % 16;
        value.push_back(put(panel, i, type, v));
      }
  }

  void pack_codes(check::Random& random, Fill fill) {
    const int top = w.code == Code::u8 ? 255 : w.code == Code::u5 ? 31 : 15;
    const int top_zero = w.offset == Offset::zero_u4 ? 15 : 255;
    for (int64_t r = 0; r < w.rows; ++r)
      for (int64_t g = 0; g < w.groups(); ++g) {
        const int64_t index = (r / 16 * w.groups() + g) * 16 + r % 16;
        const float s = fill == Fill::zero ? 0.0f : random.uniform(0.01f, 0.1f) * (random.below(4) ? 1.0f : -1.0f);
        scale.push_back(put(scales.data(), index, w.scale, s));
        int zero = gsm::zero_code(w);
        float low = 0.0f;
        if (w.offset == Offset::zero_u4 || w.offset == Offset::zero_u8) {
          zero = fill == Fill::random ? static_cast<int>(random.below(std::min(top, top_zero) + 1))
                 : fill == Fill::top  ? top_zero
                                      : 0;
          if (w.offset == Offset::zero_u8) offsets[index] = static_cast<uint8_t>(zero);
          else offsets[index / 16 * 8 + r % 8] |= static_cast<uint8_t>(r % 16 < 8 ? zero : zero << 4);
        } else if (w.offset != Offset::symmetric) {
          const Scale type = w.offset == Offset::min_f32   ? Scale::f32
                             : w.offset == Offset::min_f16 ? Scale::f16
                                                           : Scale::bf16;
          low = put(offsets.data(), index, type, fill == Fill::zero ? 0.0f : random.uniform(-0.5f, 0.5f));
        }
        minimum.push_back(low);
        point.push_back(static_cast<float>(zero - gsm::zero_code(w)));
        for (int64_t k = g * w.group; k < std::min(w.cols, (g + 1) * w.group); ++k) {
          const int c = fill == Fill::random ? static_cast<int>(random.below(top + 1)) : fill == Fill::top ? top : 0;
          raw.push_back(c - gsm::zero_code(w));
          code.push_back(c - zero);
          put_code(r, k, c);
        }
      }
    // Rows past the end belong to nobody: a NaN scale there must not reach a real row.
    for (int64_t r = w.rows; r < 16 * w.panels(); ++r)
      for (int64_t g = 0; g < w.groups(); ++g)
        put(scales.data(), (r / 16 * w.groups() + g) * 16 + r % 16, w.scale, std::nanf(""));
  }

  void put_code(int64_t r, int64_t k, int c) {
    const int64_t block = r / 16 * w.blocks() + k / 8, half = k % 8 / 4, at = 4 * (r % 16) + k % 4;
    if (w.code == Code::u8) {
      codes[(2 * block + half) * 64 + at] = static_cast<uint8_t>(c);
      return;
    }
    codes[block * 64 + at] |= static_cast<uint8_t>(half ? (c & 15) << 4 : c & 15);
    if (w.code == Code::u5 && c >= 16) high[(2 * block + half) * 8 + at / 8] |= static_cast<uint8_t>(1 << at % 8);
  }
};

// ---------------------------------------------------------------- reference

struct Reference {
  std::vector<double> y, error;  // [tokens][rows]: the value, and how far a kernel may be from it
};

// One token of int8/token: the scale and the codes, by the formula that linear.h's quantization states.
float quantize(const float* x, int64_t cols, std::vector<int>& q) {
  float peak = 0.0f;
  for (int64_t k = 0; k < cols; ++k) peak = std::max(peak, std::fabs(x[k]));
  const float s = peak / 127.0f;
  for (int64_t k = 0; k < cols; ++k) {
    const float r = s == 0.0f ? 0.0f : std::nearbyint(x[k] / s);
    q[static_cast<size_t>(k)] = static_cast<int>(std::clamp(r, -127.0f, 127.0f));
  }
  return s;
}

bool finite(const float* x, int64_t cols) {
  return std::all_of(x, x + cols, [](float v) { return std::isfinite(v); });
}

Reference reference(const Matrix& a, const Block<float>& x, int64_t tokens, Input input) {
  const gsm::Weight& w = a.w;
  Reference out;
  std::vector<int> q(static_cast<size_t>(w.cols));
  for (int64_t m = 0; m < tokens; ++m) {
    const float* const xm = x.data() + m * w.cols;
    const bool usable = finite(xm, w.cols);
    const float input_scale = usable && input == Input::int8_token ? quantize(xm, w.cols, q) : 0.0f;
    for (int64_t r = 0; r < w.rows; ++r) {
      double y = w.bias ? w.bias[r] : 0.0, size = std::fabs(y), terms = 16, flushed = 0;
      for (int64_t g = 0; usable && g < w.groups(); ++g) {
        const auto rg = static_cast<size_t>(r * w.groups() + g);
        double exact = 0, inputs = 0;  // int8/token: sums of integers, exact
        for (int64_t k = w.coded() ? g * w.group : 0; k < (w.coded() ? std::min(w.cols, (g + 1) * w.group) : w.cols); ++k) {
          const auto rk = static_cast<size_t>(r * w.cols + k);
          if (input == Input::int8_token) {
            exact += static_cast<double>(a.code[rk]) * q[static_cast<size_t>(k)];
            inputs += q[static_cast<size_t>(k)];
            continue;
          }
          const double v = input == Input::bf16 ? gsm::round_to_bf16(xm[k]) : xm[k];
          if (!w.coded()) {
            y += a.value[rk] * v;
            size += std::fabs(a.value[rk] * v);
            flushed += std::fabs(a.value[rk]) + 1;
          } else {
            const double s = a.scale[rg], low = a.minimum[rg];
            y += (s * a.code[rk] - low) * v;
            const double weight = std::fabs(s) * (std::fabs(static_cast<double>(a.raw[rk])) + std::fabs(a.point[rg])) + std::fabs(low);
            size += weight * std::fabs(v);
            flushed += weight + std::fabs(s);
          }
          ++terms;
        }
        if (input == Input::int8_token) {
          const double s = a.scale[rg] * static_cast<double>(input_scale), low = a.minimum[rg] * static_cast<double>(input_scale);
          y += s * exact - low * inputs;
          size += std::fabs(s * exact) + std::fabs(low * inputs);
          terms += 2;
        }
      }
      out.y.push_back(usable ? y : std::nan(""));
      // The last summand: a float32 result that is itself subnormal has 2^-149 as its unit.
      out.error.push_back(terms * 0x1p-23 * size + (input == Input::bf16 ? flushed * 0x1p-126 : 0) + terms * 0x1p-149);
    }
  }
  return out;
}

// ---------------------------------------------------------------- cases

constexpr int64_t kTokens = 17;

// Tokens of ordinary size with one large value each, and the extremes among them.
Block<float> inputs(int64_t tokens, int64_t cols, check::Random& random) {
  Block<float> x(tokens * cols);
  for (int64_t i = 0; i < x.size(); ++i) x[i] = random.uniform(-2, 2);
  for (int64_t m = 0; m < tokens; ++m) {
    float* const row = x.data() + m * cols;
    row[random.below(cols)] *= 20.0f;
    if (m % 17 == 5) std::fill_n(row, cols, 0.0f);
    if (m % 17 == 6) row[random.below(cols)] = HUGE_VALF;
    if (m % 17 == 7) row[random.below(cols)] = std::nanf("");
    if (m % 17 == 10) for (int64_t k = 0; k < cols; ++k) row[k] *= 1e-40f;
    if (m % 17 == 11) for (int64_t k = 0; k < cols; ++k) row[k] *= 1e28f;
  }
  return x;
}

Block<float> run(const Matrix& a, const Block<float>& x, int64_t tokens, Input input) {
  const Block<float> head = x.copy(0, tokens * a.w.cols);
  Block<float> y(tokens * a.w.rows);
  y.fill(-77.0f);  // a value that was never written shows
  const gsm::Weight* const weight = &a.w;
  float* const out = y.data();
  check::fresh([&] { gsm::linear(head.data(), tokens, &weight, &out, 1, input); });
  return y;
}

bool within(const Block<float>& y, const Reference& want) {
  for (int64_t i = 0; i < y.size(); ++i) {
    const double expected = want.y[static_cast<size_t>(i)], error = want.error[static_cast<size_t>(i)];
    if (std::isnan(expected) ? std::isfinite(y[i]) : !(std::fabs(y[i] - expected) <= error)) return false;
  }
  return true;
}

// At every level: near the reference; a token's bits are the same in a smaller call and with more threads.
void multiply(const Matrix& a, Input input, int64_t tokens, const std::vector<int>& threads, check::Random& random) {
  if (gsm::refuse(a.w, input)) return;
  const Block<float> x = inputs(tokens, a.w.cols, random);
  const Reference want = reference(a, x, tokens, input);
  for (gsm::Level level : gsm::supported_levels()) {
    gsm::set_level(gsm::level_name(level));
    gsm::set_team_threads(1);
    const auto what = [&] { return "linear " + name(a.shape) + " @ " + name(input) + " " + gsm::level_name(level); };
    const Block<float> y = run(a, x, tokens, input);
    check::expect(within(y, want), [&] { return what() + " differs from the reference"; });
    for (int64_t fewer : {int64_t{1}, int64_t{3}, int64_t{9}})
      if (fewer < tokens)
        check::expect(check::same(run(a, x, fewer, input), y),
                      [&] { return what() + " depends on the number of tokens: " + std::to_string(fewer); });
    for (int n : threads) {
      gsm::set_team_threads(n);
      check::expect(check::same(run(a, x, tokens, input), y),
                    [&] { return what() + " depends on the number of threads: " + std::to_string(n); });
    }
  }
}

// The definition: s * (c - z), or s * c - m, in float32; exact at every level because it is compiled once.
void look_up(const Matrix& a, int64_t n, check::Random& random) {
  const gsm::Weight& w = a.w;
  Block<int64_t> ids(n);
  for (int64_t j = 0; j < n; ++j) ids[j] = j < w.rows ? w.rows - 1 - j : random.below(w.rows);
  Block<float> out(n * w.cols);
  check::fresh([&] { gsm::decode_rows(w, ids.data(), n, out.data()); });
  bool ok = true;
  for (int64_t j = 0; j < n; ++j)
    for (int64_t k = 0; k < w.cols; ++k) {
      const auto rk = static_cast<size_t>(ids[j] * w.cols + k);
      float want;
      if (w.coded()) {
        const auto rg = static_cast<size_t>(ids[j] * w.groups() + k / w.group);
        const float product = a.scale[rg] * static_cast<float>(a.code[rk]);
        const bool minimum = w.offset == Offset::min_f16 || w.offset == Offset::min_f32 || w.offset == Offset::min_bf16;
        want = minimum ? product - a.minimum[rg] : product;
      } else {
        want = a.value[rk];
      }
      ok = ok && check::same(out[j * w.cols + k], want);
    }
  check::expect(ok, [&] { return "decode_rows " + name(a.shape); });
}

constexpr Input kInputs[] = {Input::f32, Input::bf16, Input::int8_token};

std::vector<Shape> kinds(int64_t rows, int64_t cols, const std::vector<int64_t>& groups) {
  std::vector<Shape> all;
  for (Code code : {Code::f32, Code::f16, Code::bf16}) all.push_back({code, Scale::none, Offset::symmetric, 0, rows, cols});
  int turn = 0;  // the three scale types take turns
  for (Code code : {Code::u8, Code::u5, Code::u4})
    for (Offset offset : {Offset::symmetric, Offset::zero_u4, Offset::zero_u8, Offset::min_f16, Offset::min_f32, Offset::min_bf16})
      for (int64_t group : groups) {
        const Scale scale = turn % 3 == 0 ? Scale::f16 : turn % 3 == 1 ? Scale::f32 : Scale::bf16;
        all.push_back({code, scale, offset, group, rows, cols});
        ++turn;
      }
  return all;
}

int64_t row_group(int64_t cols) { return (cols + 7) / 8 * 8; }

void odd_shapes() {
  check::Random random(1);
  for (int64_t rows : {1, 15, 16, 17, 40})
    for (int64_t cols : {1, 7, 8, 9, 31, 33, 100})
      for (const Shape& shape : kinds(rows, cols, {8, 32, row_group(cols)})) {
        const Matrix a(shape, random);
        for (Input input : kInputs) multiply(a, input, kTokens, {2}, random);
        look_up(a, rows + 3, random);
      }
  for (Fill fill : {Fill::zero, Fill::top})
    for (const Shape& shape : kinds(17, 33, {8, 64})) {
      const Matrix a(shape, random, fill);
      for (Input input : kInputs) multiply(a, input, kTokens, {2}, random);
      look_up(a, 20, random);
    }
}

// Large enough for the team to be woken, with more threads than panels at the end.
void teams() {
  check::Random random(2);
  for (const Shape& shape : kinds(70, 257, {32, row_group(257)})) {
    const Matrix a(shape, random);
    for (Input input : kInputs)
      for (int64_t tokens : {4, 20}) multiply(a, input, tokens, {2, 3, 7}, random);
    gsm::set_team_threads(2);
    look_up(a, 300, random);
  }
}

// Weights of different kinds that share one input give the bits they give alone.
void shared_input() {
  check::Random random(3);
  for (int64_t cols : {33, 257})
    for (Input input : kInputs) {
      std::vector<Matrix> parts;
      for (const Shape& shape : kinds(40, cols, {8, 32, row_group(cols)})) {
        Matrix a({shape.code, shape.scale, shape.offset, shape.group, 1 + random.below(40), cols}, random);
        if (!gsm::refuse(a.w, input)) parts.push_back(std::move(a));
      }
      const Block<float> x = inputs(kTokens, cols, random);
      std::vector<const gsm::Weight*> weights;
      std::vector<Block<float>> outs;
      std::vector<float*> pointers;
      for (const Matrix& a : parts) {
        weights.push_back(&a.w);
        outs.emplace_back(kTokens * a.w.rows);
        pointers.push_back(outs.back().data());
      }
      for (gsm::Level level : gsm::supported_levels())
        for (int threads : {1, 2}) {
          gsm::set_level(gsm::level_name(level));
          gsm::set_team_threads(threads);
          check::fresh([&] {
            gsm::linear(x.data(), kTokens, weights.data(), pointers.data(), static_cast<int>(parts.size()), input);
          });
          for (size_t i = 0; i < parts.size(); ++i)
            check::expect(check::same(run(parts[i], x, kTokens, input), outs[i]), [&] {
              return "linear of several weights: " + name(parts[i].shape) + " @ " + name(input) + " " + gsm::level_name(level);
            });
        }
    }
}

// The longest group an int8 input takes, at the largest codes: the 32-bit sums must not overflow.
void longest_group() {
  check::Random random(4);
  const int64_t cols = gsm::kMaxIntegerGroup;
  for (Offset offset : {Offset::symmetric, Offset::zero_u8, Offset::min_f32})
    for (Fill fill : {Fill::zero, Fill::top, Fill::random}) {
      const Matrix a({Code::u8, Scale::f32, offset, cols, 2, cols}, random, fill);
      Block<float> x(cols);
      for (float value : {1.0f, -1.0f}) {
        x.fill(value);
        const Reference want = reference(a, x, 1, Input::int8_token);
        for (gsm::Level level : gsm::supported_levels()) {
          gsm::set_level(gsm::level_name(level));
          check::expect(within(run(a, x, 1, Input::int8_token), want),
                        [&] { return "longest group " + name(a.shape) + " " + gsm::level_name(level); });
        }
      }
    }
  gsm::Weight w;
  w.code = Code::u8;
  w.rows = 1;
  w.cols = w.group = cols + 8;
  w.scale = Scale::f32;
  check::expect(gsm::refuse(w, Input::int8_token) && !gsm::refuse(w, Input::f32), [] { return "a longer group is refused"; });
  w.code = Code::f16;
  check::expect(gsm::refuse(w, Input::int8_token) != nullptr, [] { return "int8 inputs need integer codes"; });
}

}  // namespace

void linear_cases(bool team_only) {
  teams();
  if (team_only) return;
  odd_shapes();
  shared_input();
  longest_group();
}
