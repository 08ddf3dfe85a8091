// What this machine reaches at best, the two yardsticks for every kernel: bytes read from memory, and multiply-adds.
#pragma once
#include <cstdint>
#include <string>

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

enum class Dot { int8, bf16, f32 };

// `steps` rounds of independent multiply-add chains in registers, with the instructions that the level's kernels use;
// adds what they come to into *keep, so that nothing is dropped, and returns the operations: 2 per multiply-add.
GSM_DECLARE(int64_t dot_steps(Dot kind, int64_t steps, float* keep))

inline int64_t dot_steps(Dot kind, int64_t steps, float* keep) { GSM_DISPATCH(dot_steps(kind, steps, keep)) }

// 1e9 operations a second of the whole team for "int8", "bf16" or "f32": the best of repetitions of about 4 ms after
// one more, for `seconds`. In theory clock x multiply-adds of an instruction x 2 x instructions a cycle, for each
// thread: a 64-byte vpdpbusd does 64 multiply-adds, a vdpbf16ps 32, an FMA 16, and cores issue one or two a cycle.
// A level without a bf16 dot product widens to float32, so that its bf16 peak is the float32 one.
double dot_peak(const std::string& kind, double seconds);

}  // namespace gsm
