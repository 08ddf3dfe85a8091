// The memory bandwidth that this machine's loads reach: the yardstick for every kernel bound by memory.
#pragma once
#include <cstdint>

#include "isa.h"

namespace gsm {

// Ways to read memory: lines of 64 bytes in flight and prefetch distance in bytes (0: the hardware's alone).
struct ReadPattern {
  int lines;
  int prefetch;
};
constexpr ReadPattern kReadPatterns[] = {{4, 0}, {8, 0}, {16, 0}, {8, 1024}, {16, 1024}, {8, 4096}, {16, 4096}};

GSM_DECLARE(float read_all(const float* memory, int64_t floats, ReadPattern pattern))

// Reads every float (a multiple of 256 of them) with the widest loads and returns their sum, so nothing is dropped.
inline float read_all(const float* memory, int64_t floats, ReadPattern pattern) {
  GSM_DISPATCH(read_all(memory, floats, pattern))
}

// Gigabytes (1e9) a second that the team reads from `bytes` of anonymous memory: the best pass of all patterns, each
// pass over the whole memory, each pattern at least once, then more rounds until `seconds` have gone by. The memory
// is kept for the next probe of the same size. Throws std::invalid_argument for sizes this machine cannot hold.
double read_bandwidth(int64_t bytes, double seconds);
void probe_release();

}  // namespace gsm
