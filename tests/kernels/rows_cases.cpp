// Row-wise and element-wise operations and the reductions over logits, against double precision. `kUnit` is the
// rounding error of one float32 operation; each tolerance counts the operations on the way to a result.
#include "rows.h"

#include <algorithm>
#include <functional>
#include <limits>
#include <memory>
#include <vector>

#include "check.h"
#include "logits.h"
#include "op.h"

namespace {

using check::Block;

constexpr double kUnit = 0x1p-24, kUnit64 = 0x1p-53;

Block<float> values(int64_t n, float low, float high, check::Random& random) {
  Block<float> x(n);
  for (int64_t i = 0; i < n; ++i) x[i] = random.uniform(low, high);
  return x;
}

// `call` fills a fresh block of n elements, starting from `start` when it works in place. At every level: element i
// lies within error(i) of want(i), NaN where want is NaN, and the bits do not depend on the number of threads.
void at_every_level(const std::string& what, int64_t n, const Block<float>* start, const std::function<void(float*)>& call,
                    const std::function<double(int64_t)>& want, const std::function<double(int64_t)>& error) {
  for (gsm::Level level : gsm::supported_levels()) {
    gsm::set_level(gsm::level_name(level));
    const auto run = [&](int threads) {
      gsm::set_team_threads(threads);
      Block<float> out(n);
      if (start) out = start->copy(0, n);
      check::fresh([&] { call(out.data()); });
      return out;
    };
    const Block<float> out = run(1);
    bool near = true;
    for (int64_t i = 0; i < n; ++i) {
      const double w = want(i);
      near = near && (std::isnan(w) ? std::isnan(out[i]) : std::fabs(out[i] - w) <= error(i));
    }
    check::expect(near, [&] { return what + " differs from the reference at " + gsm::level_name(level); });
    for (int threads : {2, 3})
      check::expect(check::same(run(threads), out),
                    [&] { return what + " depends on the number of threads at " + gsm::level_name(level); });
  }
}

// A single row of the elements, so that the share of a thread may begin anywhere.
void now(std::unique_ptr<gsm::Op> op, int64_t rows = 1) { gsm::run_now(*op, rows); }

std::string shape(const char* what, int64_t rows, int64_t width) {
  return std::string(what) + " [" + std::to_string(rows) + ", " + std::to_string(width) + "]";
}

void normalise(int64_t rows, int64_t width, check::Random& random) {
  Block<float> x = values(rows * width, -3, 3, random);
  const Block<float> gain = values(width, -2, 2, random);
  if (rows > 2) {
    std::fill_n(x.data(), width, 0.0f);
    x[width + random.below(width)] = std::nanf("");
  }
  const float eps = 1e-5f;
  std::vector<double> inverse;
  for (int64_t m = 0; m < rows; ++m) {
    double sum = 0;
    for (int64_t i = 0; i < width; ++i) sum += static_cast<double>(x[m * width + i]) * x[m * width + i];
    inverse.push_back(1 / std::sqrt(sum / static_cast<double>(width) + eps));
  }
  const auto want = [&](int64_t i) { return x[i] * inverse[static_cast<size_t>(i / width)] * gain[i % width]; };
  // The square root halves the error of a sum of `width` squares.
  const auto error = [&](int64_t i) { return (static_cast<double>(width) + 8) * kUnit * std::fabs(want(i)); };
  at_every_level(shape("rmsnorm", rows, width), x.size(), nullptr,
                 [&](float* out) { now(gsm::rmsnorm_op(x.data(), gain.data(), eps, out, width), rows); }, want, error);
  at_every_level(shape("rmsnorm in place", rows, width), x.size(), &x,
                 [&](float* out) { now(gsm::rmsnorm_op(out, gain.data(), eps, out, width), rows); }, want, error);
}

void rotate(int64_t rows, int64_t heads, int64_t dim, int64_t half, check::Random& random) {
  const Block<float> x = values(rows * heads * dim, -3, 3, random);
  Block<float> cos(rows * half), sin(rows * half);
  for (int64_t i = 0; i < cos.size(); ++i) {
    const float angle = random.uniform(-10, 10);
    cos[i] = std::cos(angle);
    sin[i] = std::sin(angle);
  }
  const auto parts = [&](int64_t i, double& a, double& b) {  // the element is a + b
    const int64_t c = i % dim, row = i / (heads * dim);
    a = x[i];
    b = 0;
    if (c >= 2 * half) return;
    const int64_t angle = row * half + c % half;
    a *= cos[angle];
    b = c < half ? -static_cast<double>(x[i + half]) * sin[angle] : static_cast<double>(x[i - half]) * sin[angle];
  };
  at_every_level(
      shape("rope", rows * heads, dim), x.size(), &x,
      [&](float* out) {
        Block<float> k = x.copy(0, rows * dim);  // one head: what it becomes, the first of q must be when there is one
        now(gsm::rope_op({out, k.data(), cos.data(), sin.data(), heads, 1, dim, half}), rows);
        Block<float> same = x.copy(0, rows * dim), none(0);
        now(gsm::rope_op({same.data(), none.data(), cos.data(), sin.data(), 1, 0, dim, half}), rows);
        check::expect(check::same(k, same), [] { return std::string("rope treats q and k differently"); });
      },
      [&](int64_t i) { double a, b; parts(i, a, b); return a + b; },
      [&](int64_t i) { double a, b; parts(i, a, b); return 3 * kUnit * (std::fabs(a) + std::fabs(b)); });
}

void gates(int64_t n, check::Random& random) {
  Block<float> gate = values(n, -12, 12, random);
  const Block<float> up = values(n, -2, 2, random);
  for (int64_t i = 0; i < n; i += 5) gate[i] = random.uniform(-120, 120);
  if (n > 8) {
    gate[3] = std::nanf("");
    gate[4] = 0.0f;
  }
  for (gsm::Gate kind : {gsm::Gate::silu, gsm::Gate::gelu_tanh, gsm::Gate::gelu}) {
    const auto inner = [](double x) { return 1.5957691216057308 * (x + 0.044715 * x * x * x); };
    const auto want = [&](int64_t i) {
      const double x = gate[i], act = kind == gsm::Gate::silu        ? x / (1 + std::exp(-x))
                                      : kind == gsm::Gate::gelu_tanh ? x / (1 + std::exp(-inner(x)))
                                                                     : 0.5 * x * std::erfc(-x * std::sqrt(0.5));
      return act * up[i];
    };
    // An error in the exponent's argument u is multiplied by |u|. Below e^-87 the exponential is zero.
    const auto error = [&](int64_t i) {
      const double x = gate[i], u = kind == gsm::Gate::silu ? 0 : kind == gsm::Gate::gelu_tanh ? inner(x) : x * x;
      return (16 + 8 * std::fabs(u)) * kUnit * std::fabs(want(i)) + 1e-35;
    };
    const std::string what = shape("gated", static_cast<int>(kind), n);
    at_every_level(what, n, nullptr, [&](float* out) { now(gsm::gated_op(kind, gate.data(), up.data(), out, n)); }, want, error);
    at_every_level(what + " in place", n, &gate, [&](float* out) { now(gsm::gated_op(kind, out, up.data(), out, n)); }, want, error);
  }
}

void elements(int64_t n, check::Random& random) {
  Block<float> x = values(n, -100, 100, random);
  const Block<float> y = values(n, -1, 1, random);
  x[random.below(n)] = std::nanf("");
  const auto zero = [](int64_t) { return 0.0; };
  at_every_level(shape("add", 1, n), n, &x, [&](float* out) { now(gsm::add_op(out, y.data(), n)); },
                 [&](int64_t i) { return x[i] + y[i]; }, zero);
  at_every_level(shape("scale", 1, n), n, &x, [&](float* out) { now(gsm::scale_op(out, 0.3f, n)); },
                 [&](int64_t i) { return x[i] * 0.3f; }, zero);
  const auto cap = [&](int64_t i) { return 30.0 * std::tanh(x[i] / 30.0); };
  at_every_level(shape("softcap", 1, n), n, &x, [&](float* out) { now(gsm::softcap_op(out, 30.0f, n)); }, cap,
                 [&](int64_t i) { return 16 * kUnit * std::fabs(cap(i)); });
}

void angles(int64_t rows, int64_t half, check::Random& random) {
  Block<int32_t> positions(rows);
  for (int64_t m = 0; m < rows; ++m) positions[m] = static_cast<int32_t>(random.below(1 << 20));
  const Block<float> frequencies = values(half, 0, 1, random);
  Block<float> other(rows * half);
  const auto angle = [&](int64_t i) { return static_cast<float>(positions[i / half]) * frequencies[i % half]; };
  const auto error = [](int64_t) { return kUnit; };  // half a unit in the last place of what is at most 1
  const auto cos = [&](int64_t i) { return std::cos(static_cast<double>(angle(i))); };
  const auto sin = [&](int64_t i) { return std::sin(static_cast<double>(angle(i))); };
  const auto call = [&](float* c, float* s) { now(gsm::angles_op(positions.data(), frequencies.data(), c, s, half), rows); };
  at_every_level(shape("cosines", rows, half), rows * half, nullptr, [&](float* out) { call(out, other.data()); }, cos, error);
  at_every_level(shape("sines", rows, half), rows * half, nullptr, [&](float* out) { call(other.data(), out); }, sin, error);
}

// ---------------------------------------------------------------- logits

double log_sum(const float* x, int64_t n, double& top) {
  top = *std::max_element(x, x + n);
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += std::exp(x[i] - top);
  return std::log(sum);
}

void reductions(int64_t rows, int64_t vocab, check::Random& random) {
  const Block<float> base = values(rows * vocab, -20, 20, random);
  Block<float> other = values(rows * vocab, -1, 1, random);
  Block<int32_t> targets(rows);
  for (int64_t i = 0; i < other.size(); ++i) other[i] += base[i];
  for (int64_t m = 0; m < rows; ++m) targets[m] = static_cast<int32_t>(random.below(vocab));
  if (rows > 1 && vocab > 1) {  // a tie for the first place, and a token without mass
    const int64_t top = std::max_element(base.data(), base.data() + vocab) - base.data();
    std::copy_n(base.data(), vocab, other.data());
    other[vocab - 1 - (top == vocab - 1)] = other[top];
    other[vocab + (targets[1] + 1) % vocab] = -std::numeric_limits<float>::infinity();
  }
  Block<double> first_nll, first_kl;
  for (gsm::Level level : gsm::supported_levels())
    for (int threads : {1, 2}) {
      gsm::set_level(gsm::level_name(level));
      gsm::set_team_threads(threads);
      Block<double> nll(rows), kl(rows);
      Block<uint8_t> same_top(rows);
      check::fresh([&] {
        gsm::nll(other.data(), targets.data(), nll.data(), rows, vocab);
        gsm::divergence(base.data(), other.data(), kl.data(), same_top.data(), rows, vocab);
      });
      bool near = true, tops = true, bits = true;
      for (int64_t m = 0; m < rows; ++m) {
        const float *b = base.data() + m * vocab, *o = other.data() + m * vocab;
        double top_base, top_other;
        const double z_base = log_sum(b, vocab, top_base), z_other = log_sum(o, vocab, top_other);
        double want = z_other + top_other - o[targets[m]], kl_want = 0, size = 1 + std::fabs(z_base) + std::fabs(z_other);
        near = near && std::fabs(nll[m] - want) <= (static_cast<double>(vocab) + 16) * 2 * kUnit64 * (1 + std::fabs(want) + z_other);
        for (int64_t i = 0; i < vocab; ++i) {
          const double p = std::exp(b[i] - top_base - z_base), term = (b[i] - top_base) - (o[i] - top_other);
          kl_want += p * (term - z_base + z_other);
          size += p * std::fabs(term);
        }
        near = near && (std::isinf(kl_want) ? kl[m] == kl_want
                                            : std::fabs(kl[m] - kl_want) <= (static_cast<double>(vocab) + 16) * 8 * kUnit64 * size);
        tops = tops && same_top[m] == (std::max_element(b, b + vocab) - b == std::max_element(o, o + vocab) - o);
        bits = bits && (first_nll.size() == 0 || (first_nll[m] == nll[m] && first_kl[m] == kl[m]));
      }
      const auto what = [&] { return shape("nll and divergence", rows, vocab) + " at " + gsm::level_name(level); };
      check::expect(near, [&] { return what() + " differ from the reference"; });
      check::expect(tops, [&] { return what() + ": same_top is wrong"; });
      check::expect(bits, [&] { return what() + " depend on the level or the threads"; });
      if (first_nll.size() == 0) {
        first_nll = std::move(nll);
        first_kl = std::move(kl);
      }
    }
}

void scans(int64_t n, check::Random& random) {
  Block<float> x = values(n, -5, 5, random);
  x[random.below(n)] = -std::numeric_limits<float>::infinity();
  for (gsm::Level level : gsm::supported_levels()) {
    gsm::set_level(gsm::level_name(level));
    const auto what = [&] { return shape("scan", 1, n) + " at " + gsm::level_name(level); };
    check::expect(gsm::row_max(x.data(), n) == *std::max_element(x.data(), x.data() + n), [&] { return what() + ": row_max"; });
    Block<float> nan = x.copy(0, n);
    nan[random.below(n)] = std::nanf("");
    check::expect(std::isnan(gsm::row_max(nan.data(), n)), [&] { return what() + ": row_max hides a NaN"; });
    for (float threshold : {-std::numeric_limits<float>::infinity(), 0.0f, 6.0f}) {
      int64_t want = 0;
      for (int64_t i = 0; i < n; ++i) want += x[i] >= threshold;
      Block<gsm::Candidate> out(n);
      const int64_t held = gsm::gather_at_least(x.data(), n, threshold, 7, out.data());
      bool ok = held == want;
      for (int64_t i = 0; i < held; ++i) {
        const int64_t at = out[i].index - 7;
        ok = ok && at >= 0 && at < n && check::same(out[i].value, x[at]) && out[i].value >= threshold &&
             (i == 0 || out[i].index > out[i - 1].index);
      }
      check::expect(ok, [&] { return what() + ": gather_at_least"; });
    }
  }
}

}  // namespace

void rows_cases(bool team_only) {
  check::Random random(5);
  // Large enough for the team to be woken.
  normalise(70, 500, random);
  rotate(40, 9, 64, 32, random);
  gates(20000, random);
  elements(70001, random);
  angles(60, 32, random);
  reductions(9, 1001, random);
  if (team_only) return;
  for (int64_t width : {1, 7, 15, 16, 17, 63, 64, 65, 100})
    for (int64_t rows : {1, 3, 5}) {
      normalise(rows, width, random);
      reductions(rows, width, random);
    }
  for (int64_t dim : {2, 6, 16, 30, 34, 64})
    for (int64_t half : {dim / 2, (dim + 3) / 4}) rotate(3, 2, dim, half, random);
  angles(1, 1, random);
  angles(5, 17, random);
  for (int64_t n : {1, 7, 15, 16, 17, 31, 100}) {
    gates(n, random);
    elements(n, random);
    scans(n, random);
  }
}
