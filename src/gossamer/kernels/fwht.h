// The orthonormal fast Walsh-Hadamard transform of consecutive blocks of a row, in place. n (log2 2^m + K/4 + 3)
// additions a block of n = K 2^m. Bound by the first-level cache, and by memory for rows that lie there.
#pragma once
#include <cstdint>

#include "hadamard_matrix.h"
#include "isa.h"

namespace gsm {

GSM_DECLARE(void fwht_row(float* x, int64_t width, const Hadamard& h, const float* signs, bool transpose))
GSM_DECLARE(void fwht(float* x, int64_t rows, int64_t width, const Hadamard& h, const float* signs, bool transpose))

// Each block of h.order columns of x [width] becomes H (d * x) / sqrt(n), or with `transpose` d * (H^T x) / sqrt(n),
// its inverse. `signs` d [width] holds +-1; null stands for all +1. width must be a multiple of h.order. Every level
// adds in the same order and rounds alike, so all give the same bits. Runs on the calling thread.
inline void fwht_row(float* x, int64_t width, const Hadamard& h, const float* signs, bool transpose = false) {
  GSM_DISPATCH(fwht_row(x, width, h, signs, transpose))
}

// The same for each row of x [rows, width], shared out to the team.
inline void fwht(float* x, int64_t rows, int64_t width, const Hadamard& h, const float* signs, bool transpose = false) {
  GSM_DISPATCH(fwht(x, rows, width, h, signs, transpose))
}

}  // namespace gsm
