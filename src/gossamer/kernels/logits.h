// Reductions over rows of logits, accumulated in double: evaluation and the passes of the sampler that see the
// whole vocabulary. Bound by the double-precision exponential (about three cycles an element with AVX-512).
#pragma once
#include <cstdint>

#include "isa.h"

namespace gsm {

struct Candidate {
  float value;
  int32_t index;
};

GSM_DECLARE(float row_max(const float* x, int64_t n))
GSM_DECLARE(double sum_exp(const float* x, int64_t n, double top, double factor))
GSM_DECLARE(int64_t gather_at_least(const float* x, int64_t n, float threshold, int32_t first, Candidate* out))
GSM_DECLARE(void nll(const float* logits, const int32_t* targets, double* out, int64_t rows, int64_t vocab))
GSM_DECLARE(void divergence(const float* base, const float* other, double* kl, uint8_t* same_top, int64_t rows,
                            int64_t vocab))

// The largest element; NaN if there is any NaN.
inline float row_max(const float* x, int64_t n) { GSM_DISPATCH(row_max(x, n)) }
// Sum of exp((x - top) * factor), for (x - top) * factor <= 0; the same bits at every level.
inline double sum_exp(const float* x, int64_t n, double top, double factor) { GSM_DISPATCH(sum_exp(x, n, top, factor)) }
// Writes the elements >= threshold in ascending order, with index first + i; returns how many. `out` holds up to n.
inline int64_t gather_at_least(const float* x, int64_t n, float threshold, int32_t first, Candidate* out) {
  GSM_DISPATCH(gather_at_least(x, n, threshold, first, out))
}
// Negative log-likelihood in nats of targets[m] under the softmax of each row; targets lie in [0, vocab).
inline void nll(const float* logits, const int32_t* targets, double* out, int64_t rows, int64_t vocab) {
  GSM_DISPATCH(nll(logits, targets, out, rows, vocab))
}
// KL(base || other) in nats for each row, and whether both rows have their largest element at the same index
// (the lowest on ties; false when a row holds NaN).
inline void divergence(const float* base, const float* other, double* kl, uint8_t* same_top, int64_t rows,
                       int64_t vocab) {
  GSM_DISPATCH(divergence(base, other, kl, same_top, rows, vocab))
}

}  // namespace gsm
