// The sampler against its definition: a full sort in double precision. A draw must come from the tokens that the
// filters keep, at the same token on every level, and at the right rate over many steps.
#include "sample.h"

#include <algorithm>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <vector>

#include "check.h"
#include "isa.h"
#include "logits.h"

namespace {

using check::Block;

constexpr float kInf = std::numeric_limits<float>::infinity();

struct Outcome {
  gsm::Sampled drawn{};
  bool refused = false;
};

Outcome draw(const Block<float>& logits, const Block<int32_t>& recent, const gsm::Sampling& how) {
  Outcome outcome;
  check::fresh([&] {
    try {
      outcome.drawn = gsm::sample(logits.data(), logits.size(), recent.data(), recent.size(), how);
    } catch (const std::runtime_error&) {
      outcome.refused = true;
    }
  });
  return outcome;
}

struct Definition {
  std::vector<double> share;    // of each token after the filters; 0 for those dropped
  std::vector<double> logprob;  // as Sampled states it
};

Definition define(const Block<float>& logits, const Block<int32_t>& recent, const gsm::Sampling& how) {
  const auto n = static_cast<size_t>(logits.size());
  std::vector<float> x(logits.data(), logits.data() + n);
  for (int64_t i = 0; i < recent.size(); ++i) {
    const float v = logits[recent[i]];
    x[static_cast<size_t>(recent[i])] = v > 0 ? v / how.repeat_penalty : v * how.repeat_penalty;
  }
  const bool greedy = how.temperature == 0.0f;
  const float* const scored = greedy ? logits.data() : x.data();
  const double factor = greedy ? 1.0 : 1.0 / static_cast<double>(how.temperature);
  const double top = *std::max_element(scored, scored + n);
  double z = 0;
  for (size_t i = 0; i < n; ++i) z += std::exp((scored[i] - top) * factor);
  Definition d;
  for (size_t i = 0; i < n; ++i) d.logprob.push_back((scored[i] - top) * factor - std::log(z));
  d.share.assign(n, 0.0);

  std::vector<size_t> order(n);
  std::iota(order.begin(), order.end(), size_t{0});
  std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return x[a] > x[b]; });
  size_t keep = greedy ? 1 : how.top_k > 0 ? std::min(n, static_cast<size_t>(how.top_k)) : n;
  if (!greedy) {
    double mass = 0, reached = 0;
    for (size_t i = 0; i < keep; ++i) mass += std::exp(d.logprob[order[i]]);
    size_t nucleus = 0;
    while (nucleus < keep && (nucleus == 0 || reached < how.top_p * mass)) reached += std::exp(d.logprob[order[nucleus++]]);
    if (how.top_p < 1.0) keep = nucleus;
    while (keep > 1 && d.logprob[order[keep - 1]] < d.logprob[order[0]] + std::log(how.min_p)) --keep;
  }
  double kept = 0;
  for (size_t i = 0; i < keep; ++i) kept += std::exp(greedy ? 0.0 : d.logprob[order[i]]);
  for (size_t i = 0; i < keep; ++i) d.share[order[i]] = std::exp(greedy ? 0.0 : d.logprob[order[i]]) / kept;
  return d;
}

std::string name(int64_t vocab, const gsm::Sampling& how) {
  return "sample of " + std::to_string(vocab) + ", temperature " + std::to_string(how.temperature) + " top_k " +
         std::to_string(how.top_k) + " top_p " + std::to_string(how.top_p) + " min_p " + std::to_string(how.min_p);
}

std::vector<gsm::Sampling> settings() {
  std::vector<gsm::Sampling> all;
  for (float temperature : {0.0f, 0.3f, 1.0f, 2.5f})
    for (int64_t top_k : {0, 1, 3, 40})
      for (double top_p : {1.0, 0.9, 1e-9})
        for (double min_p : {0.0, 0.05}) {
          gsm::Sampling how;
          how.temperature = temperature;
          how.top_k = top_k;
          how.top_p = top_p;
          how.min_p = min_p;
          how.repeat_penalty = top_k == 3 ? 1.3f : 1.0f;
          how.seed = 17;
          all.push_back(how);
        }
  return all;
}

void members(int64_t vocab, int steps, check::Random& random) {
  Block<float> logits(vocab);
  for (int64_t i = 0; i < vocab; ++i) logits[i] = random.uniform(-6, 6);
  if (vocab > 3) {
    logits[random.below(vocab)] = -kInf;
    logits[random.below(vocab)] = 7.0f;
  }
  Block<int32_t> recent(std::min<int64_t>(vocab, 9));
  for (int64_t i = 0; i < recent.size(); ++i) recent[i] = static_cast<int32_t>(random.below(vocab));
  for (gsm::Sampling how : settings()) {
    const Definition want = define(logits, recent, how);
    for (int step = 0; step < steps; ++step) {
      how.step = static_cast<uint64_t>(step);
      Outcome first;
      for (gsm::Level level : gsm::supported_levels()) {
        gsm::set_level(gsm::level_name(level));
        const Outcome got = draw(logits, recent, how);
        const auto token = static_cast<size_t>(got.drawn.token);
        check::expect(!got.refused && token < want.share.size() && want.share[token] > 0 &&
                          std::fabs(got.drawn.logprob - want.logprob[token]) < 1e-9,
                      [&] { return name(vocab, how) + " is not a token that the filters keep, at " + gsm::level_name(level); });
        if (level == gsm::Level::scalar) first = got;
        check::expect(got.drawn.token == first.drawn.token,
                      [&] { return name(vocab, how) + " draws another token at " + gsm::level_name(level); });
      }
    }
  }
}

// Over many steps each token comes up at its rate, to within five standard deviations and five draws.
void rates(check::Random& random) {
  constexpr int kSteps = 2000;
  gsm::set_level(gsm::level_name(gsm::supported_levels().back()));
  for (int trial = 0; trial < 80; ++trial) {
    Block<float> logits(2 + random.below(30));
    const Block<int32_t> recent;
    for (int64_t i = 0; i < logits.size(); ++i) logits[i] = random.uniform(-1, 2);
    gsm::Sampling how;
    how.temperature = random.uniform(0.5f, 1.5f);
    how.top_k = trial % 2 ? random.below(logits.size()) : 0;
    how.top_p = trial % 4 == 3 ? 1.0 : random.uniform(0.05f, 1.0f);
    how.min_p = trial % 3 ? 0.0 : random.uniform(0.0f, 0.5f);
    how.seed = random.bits();
    const Definition want = define(logits, recent, how);
    std::vector<int> count(want.share.size());
    for (int step = 0; step < kSteps; ++step) {
      how.step = static_cast<uint64_t>(step);
      ++count[static_cast<size_t>(gsm::sample(logits.data(), logits.size(), recent.data(), 0, how).token)];
    }
    bool ok = true;
    for (size_t i = 0; i < count.size(); ++i) {
      const double p = want.share[i], deviation = std::sqrt(kSteps * p * (1 - p));
      ok = ok && (p > 0 || count[i] == 0) && std::fabs(count[i] - kSteps * p) <= 5 * deviation + 5;
    }
    check::expect(ok, [&] { return name(logits.size(), how) + " draws at a wrong rate"; });
  }
}

void refusals() {
  const Block<int32_t> recent;
  for (gsm::Level level : gsm::supported_levels()) {
    gsm::set_level(gsm::level_name(level));
    for (float bad : {std::nanf(""), kInf}) {
      Block<float> logits(33);
      logits[32] = bad;
      check::expect(draw(logits, recent, {}).refused, [&] { return "sample accepts logits with " + std::to_string(bad); });
    }
    Block<float> logits(33);
    logits.fill(-kInf);
    check::expect(draw(logits, recent, {}).refused, [] { return "sample accepts logits that are all -infinity"; });
  }
}

}  // namespace

void sample_cases(bool team_only) {
  if (team_only) return;  // one thread draws
  check::Random random(6);
  for (int64_t vocab : {1, 2, 15, 16, 17, 100}) members(vocab, 8, random);
  for (int64_t vocab : {4097, 9000}) members(vocab, 2, random);
  rates(random);
  refusals();
}
