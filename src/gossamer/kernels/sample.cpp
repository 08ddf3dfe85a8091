#include "sample.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>

#include "logits.h"
#include "team.h"

namespace gsm {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();

// The total order behind every filter: larger values first, the lower index first among equals.
bool better(const Candidate& a, const Candidate& b) {
  return a.value > b.value || (a.value == b.value && a.index < b.index);
}

uint64_t mix(uint64_t x) {  // the finaliser of SplitMix64 (Steele, Lea & Flood 2014)
  x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9u;
  x = (x ^ x >> 27) * 0x94D049BB133111EBu;
  return x ^ x >> 31;
}

// Uniform in [0, 1): element `step` of the SplitMix64 sequence whose state is the hashed seed.
double uniform(uint64_t seed, uint64_t step) {
  constexpr uint64_t golden = 0x9E3779B97F4A7C15u;
  return static_cast<double>(mix(mix(seed + golden) + (step + 1) * golden) >> 11) * 0x1p-53;
}

class Draw {
 public:
  Draw(const float* x, int64_t vocab, float top, double factor)
      : x_(x), vocab_(vocab), top_(top), factor_(factor),
        pool_(static_cast<Candidate*>(thread_scratch(0, static_cast<size_t>(vocab) * sizeof(Candidate)))) {
    for (int64_t at = 0; at < vocab_; at += kChunk) total_ += chunk_mass(at);
  }

  // Natural log of the candidate's share of the whole vocabulary.
  double logprob(const Candidate& token) const { return log_weight(token.value) - std::log(total_); }

  Candidate token(const Sampling& how) {
    const bool by_rank = how.top_k > 0 && how.top_k < vocab_;
    Candidate cut{-kInf, std::numeric_limits<int32_t>::max()};  // the last candidate that stays
    if (by_rank) cut = keep_largest(how.top_k);
    if (how.top_p < 1.0) {
      if (by_rank) {
        cut = keep_mass(how.top_k, how.top_p * mass(0, how.top_k));
      } else {
        const double need = how.top_p * total_;
        cut = keep_mass(gather_mass(need), need);
      }
    }
    return cut.value == -kInf && how.min_p == 0.0 ? pick_any(how) : pick(cut, how);
  }

 private:
  static constexpr int64_t kChunk = 4096;

  double chunk_mass(int64_t at) const { return sum_exp(x_ + at, std::min(kChunk, vocab_ - at), top_, factor_); }

  double log_weight(float value) const { return (static_cast<double>(value) - top_) * factor_; }

  double mass(int64_t begin, int64_t end) const {
    double sum = 0.0;
    for (int64_t i = begin; i < end; ++i) sum += std::exp(log_weight(pool_[i].value));
    return sum;
  }

  // Leaves the k best candidates in the pool and returns the worst of them. The vocabulary passes in chunks, each
  // filtered by the k-th best so far, so few elements are ever moved.
  Candidate keep_largest(int64_t k) {
    float threshold = -kInf;
    int64_t held = 0;
    for (int64_t at = 0; at < vocab_; at += kChunk) {
      const int64_t length = std::min(kChunk, vocab_ - at);
      held += gather_at_least(x_ + at, length, threshold, static_cast<int32_t>(at), pool_ + held);
      if (held > k && (held > k + k / 2 + 64 || at + kChunk >= vocab_)) {
        std::nth_element(pool_, pool_ + k - 1, pool_ + held, better);
        held = k;
        threshold = pool_[k - 1].value;
      }
    }
    return *std::max_element(pool_, pool_ + held, better);  // the "largest" in this order is the worst
  }

  // Fills the pool with enough of the best candidates to hold the mass `need`; returns how many.
  int64_t gather_mass(double need) {
    for (const double depth : {6.0, 8.0, 10.0, 12.0, 16.0, 24.0}) {
      const float threshold = static_cast<float>(top_ - depth / factor_);
      const int64_t held = gather_at_least(x_, vocab_, threshold, 0, pool_);
      if (mass(0, held) >= need) return held;
    }
    return gather_at_least(x_, vocab_, -kInf, 0, pool_);
  }

  // Among the first n of the pool, the last member of the smallest best set whose mass reaches `need`:
  // selection by halves, each half weighed once.
  Candidate keep_mass(int64_t n, double need) {
    int64_t low = 0, high = n;
    while (high - low > 1) {
      const int64_t middle = low + (high - low) / 2;
      std::nth_element(pool_ + low, pool_ + middle, pool_ + high, better);
      const double upper = mass(low, middle);
      if (upper >= need) {
        high = middle;
      } else {
        need -= upper;
        low = middle;
      }
    }
    return pool_[low];
  }

  // Draws among the candidates no worse than the cut, in ascending order of index.
  Candidate pick(Candidate cut, const Sampling& how) {
    const double floor = std::log(how.min_p);  // min_p 0: minus infinity
    if (how.min_p > 0.0) {
      // Slightly low, since the exact test below decides.
      double least = top_ + floor / factor_;
      least -= (std::abs(top_) + std::abs(least)) * 1e-6;
      if (least > cut.value) cut = {static_cast<float>(least), std::numeric_limits<int32_t>::max()};
    }
    const int64_t held = gather_at_least(x_, vocab_, cut.value, 0, pool_);
    int64_t kept = 0;
    double sum = 0.0;
    for (int64_t i = 0; i < held; ++i) {
      const double weight = log_weight(pool_[i].value);
      if (better(cut, pool_[i]) || weight < floor) continue;
      pool_[kept++] = pool_[i];
      sum += std::exp(weight);
    }
    const double target = uniform(how.seed, how.step) * sum;
    double reached = 0.0;
    int64_t last = 0;
    for (int64_t i = 0; i < kept; ++i) {
      const double weight = std::exp(log_weight(pool_[i].value));
      if (weight <= 0.0) continue;
      reached += weight;
      last = i;
      if (reached > target) break;
    }
    return pool_[last];
  }

  // Draws from the whole vocabulary: finds the chunk by its mass, then the token within it.
  Candidate pick_any(const Sampling& how) const {
    const double target = uniform(how.seed, how.step) * total_;
    double reached = 0.0;
    int64_t at = 0;
    while (at + kChunk < vocab_) {
      const double next = reached + chunk_mass(at);
      if (next > target) break;
      reached = next;
      at += kChunk;
    }
    int64_t last = -1;
    for (int64_t i = at; i < vocab_; ++i) {
      const double weight = std::exp(log_weight(x_[i]));
      if (weight <= 0.0) continue;
      reached += weight;
      last = i;
      if (reached > target) break;
    }
    // Rounding may end the walk in a last chunk without mass: the best token then.
    if (last < 0) last = std::max_element(x_, x_ + vocab_) - x_;
    return {x_[last], static_cast<int32_t>(last)};
  }

  const float* x_;
  const int64_t vocab_;
  const double top_, factor_;
  Candidate* const pool_;
  double total_ = 0.0;  // mass of the whole vocabulary
};

float checked_max(const float* x, int64_t vocab) {
  const float top = row_max(x, vocab);
  if (std::isnan(top) || top == kInf)
    throw std::runtime_error(std::string("the logits hold ") + (top == kInf ? "+infinity" : "NaN") +
                             ", so no token can be drawn; check the weights and the input");
  if (top == -kInf)
    throw std::runtime_error("all logits are -infinity, so no token can be drawn; allow at least one token");
  return top;
}

}  // namespace

Sampled sample(const float* logits, int64_t vocab, const int32_t* recent, int64_t n, const Sampling& how) {
  const float* x = logits;
  float top = checked_max(x, vocab);
  const float raw_top = top;
  if (n > 0 && how.repeat_penalty != 1.0f) {
    auto* penalised = static_cast<float*>(thread_scratch(1, static_cast<size_t>(vocab) * sizeof(float)));
    std::memcpy(penalised, logits, static_cast<size_t>(vocab) * sizeof(float));
    for (int64_t i = 0; i < n; ++i) {  // always from the given value, so a duplicate changes nothing
      const float v = logits[recent[i]];
      penalised[recent[i]] = v > 0.0f ? v / how.repeat_penalty : v * how.repeat_penalty;
    }
    x = penalised;
    top = checked_max(x, vocab);
  }
  if (how.temperature == 0.0f) {
    const auto at = static_cast<int32_t>(std::find(x, x + vocab, top) - x);
    return {at, static_cast<double>(logits[at]) - raw_top - std::log(sum_exp(logits, vocab, raw_top, 1.0))};
  }
  const double factor = 1.0 / static_cast<double>(how.temperature);
  Draw draw(x, vocab, top, factor);
  const Candidate token = draw.token(how);
  return {token.index, draw.logprob(token)};
}

}  // namespace gsm
