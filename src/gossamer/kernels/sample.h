// Draws the next token from one row of logits. Every draw is a function of its arguments alone, so a request gets
// the same tokens whatever else runs. Bound by one exponential per vocabulary entry; nothing is fully sorted.
#pragma once
#include <cstdint>

namespace gsm {

struct Sampling {
  float temperature = 1.0f;     // 0: the largest logit, the lowest index on ties
  int64_t top_k = 0;            // keep the k largest; 0 keeps all
  double top_p = 1.0;           // then the smallest set with at least this share of the remaining mass
  double min_p = 0.0;           // then those with at least this share of the largest probability
  float repeat_penalty = 1.0f;  // divides positive and multiplies negative logits of recent tokens
  uint64_t seed = 0, step = 0;  // the counter of the generator
};

struct Sampled {
  int32_t token;
  // Natural log of the token's probability under the softmax after penalties and temperature, before any filter;
  // at temperature 0 under the softmax of the logits as they were given.
  double logprob;
};

// `recent` holds n ids within [0, vocab), in any order; duplicates count once.
// Throws std::runtime_error when the logits hold NaN or +infinity, or are all -infinity.
Sampled sample(const float* logits, int64_t vocab, const int32_t* recent, int64_t n, const Sampling& how);

}  // namespace gsm
