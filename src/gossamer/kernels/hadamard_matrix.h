// Hadamard matrices as the fast transform uses them: H_K (x) H_{2^m}, with H_{2^m} in Sylvester order and H_K of one of
// Paley's constructions over a prime field (Paley 1933).
#pragma once
#include <cstdint>
#include <vector>

namespace gsm {

constexpr int kMaxPaley = 172;               // the largest K
constexpr int64_t kMaxHadamard = 1 << 20;    // the largest order

struct Hadamard {
  int64_t order;  // n = k * power
  int k;          // 1 when n is a power of two
  int64_t power;  // 2^m
  float scale;    // 1 / sqrt(n)
  // Four entries of a row of H_K (or of its transpose) in a byte, [k][k / 4]: bit i of byte g is set where entry
  // 4g + i is -1.
  std::vector<uint8_t> rows, columns;
};

// The matrix of this order, made at first use and kept for good; null where there is none: the order must be a power
// of two, or K 2^m with K at most 172 and of the form q + 1 (prime q = 3 mod 4) or 2(q + 1) (prime q = 1 mod 4); the
// smallest such K is taken. Thread-safe.
const Hadamard* hadamard(int64_t order);

}  // namespace gsm
