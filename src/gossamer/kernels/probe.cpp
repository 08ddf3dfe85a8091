#include "probe.h"

#include "simd.h"

namespace gsm::GSM_LEVEL {
namespace {

template <int Lines>
float read_lines(const float* memory, int64_t floats, int prefetch) {
  f32x16 acc[Lines];
  for (int i = 0; i < Lines; ++i) acc[i] = zero();
  for (int64_t at = 0; at < floats; at += Lines * 16) {
    const float* p = memory + at;
    if (prefetch) {
#pragma GCC unroll 16
      for (int i = 0; i < Lines; ++i) __builtin_prefetch(reinterpret_cast<const char*>(p + i * 16) + prefetch);
    }
#pragma GCC unroll 16
    for (int i = 0; i < Lines; ++i) acc[i] = acc[i] + load(p + i * 16);
  }
  for (int i = 1; i < Lines; ++i) acc[0] = acc[0] + acc[i];
  return sum(acc[0]);
}

}  // namespace

float read_all(const float* memory, int64_t floats, ReadPattern pattern) {
  switch (pattern.lines) {
    case 4: return read_lines<4>(memory, floats, pattern.prefetch);
    case 8: return read_lines<8>(memory, floats, pattern.prefetch);
    default: return read_lines<16>(memory, floats, pattern.prefetch);
  }
}

}  // namespace gsm::GSM_LEVEL
