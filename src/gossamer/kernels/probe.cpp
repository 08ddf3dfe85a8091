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

// Independent chains: enough to hide an instruction's latency, few enough to stay in registers.
#if defined(__AVX512F__)
constexpr int kChains = 12;
#elif defined(__AVX2__)
constexpr int kChains = 6;
#else
constexpr int kChains = 2;
#endif

int64_t f32_steps(int64_t steps, float* keep) {
  float lanes[16];  // all different, or the halves of a chain would be computed once
  for (int i = 0; i < 16; ++i) lanes[i] = *keep * static_cast<float>(i);
  f32x16 acc[kChains];
  for (int i = 0; i < kChains; ++i) acc[i] = load(lanes) + set1(static_cast<float>(i));
  const f32x16 a = set1(*keep), b = set1(0.5f);
  for (int64_t s = 0; s < steps; ++s) {
#pragma GCC unroll 16
    for (int i = 0; i < kChains; ++i) acc[i] = fma(a, b, acc[i]);
  }
  for (int i = 1; i < kChains; ++i) acc[0] = acc[0] + acc[i];
  *keep += sum(acc[0]);
  return steps * kChains * 16 * 2;
}

#if defined(__AVX512F__)

int64_t int8_steps(int64_t steps, float* keep) {
  __m512i acc[kChains];
  for (int i = 0; i < kChains; ++i) acc[i] = _mm512_set1_epi32(i);
  const __m512i w = _mm512_set1_epi32(static_cast<int32_t>(*keep)), x = _mm512_set1_epi8(1);
  for (int64_t s = 0; s < steps; ++s) {
#pragma GCC unroll 16
    for (int i = 0; i < kChains; ++i) acc[i] = _mm512_dpbusd_epi32(acc[i], w, x);
  }
  for (int i = 1; i < kChains; ++i) acc[0] = _mm512_add_epi32(acc[0], acc[i]);
  *keep += sum(f32x16{_mm512_cvtepi32_ps(acc[0])});
  return steps * kChains * 64 * 2;
}

#elif defined(__AVX2__)

int64_t int8_steps(int64_t steps, float* keep) {
  __m256i acc[kChains];
  for (int i = 0; i < kChains; ++i) acc[i] = _mm256_set1_epi32(i);
  __m256i w = _mm256_set1_epi32(static_cast<int32_t>(*keep));
  const __m256i x = _mm256_set1_epi8(1), ones = _mm256_set1_epi16(1);
  for (int64_t s = 0; s < steps; ++s) {
#pragma GCC unroll 16
    for (int i = 0; i < kChains; ++i) {
      asm volatile("" : "+x"(w));  // or all chains would share one product
      acc[i] = _mm256_add_epi32(acc[i], _mm256_madd_epi16(_mm256_maddubs_epi16(w, x), ones));
    }
  }
  for (int i = 1; i < kChains; ++i) acc[0] = _mm256_add_epi32(acc[0], acc[i]);
  *keep += sum(to_float(i32x16{acc[0], acc[0]}));
  return steps * kChains * 32 * 2;
}

#else

int64_t int8_steps(int64_t steps, float* keep) {
  uint32_t acc[16] = {};  // wraps around
  int8_t w[64], x[64];
  for (int i = 0; i < 64; ++i) w[i] = static_cast<int8_t>(i + static_cast<int>(*keep)), x[i] = 1;
  for (int64_t s = 0; s < steps; ++s) {
    asm volatile("" : : "r"(w), "r"(x) : "memory");  // or the products would be computed once
    for (int r = 0; r < 16; ++r)
      for (int i = 0; i < 4; ++i) acc[r] += static_cast<uint32_t>(w[4 * r + i] * x[4 * r + i]);
  }
  for (int r = 0; r < 16; ++r) *keep += static_cast<float>(acc[r]);
  return steps * 64 * 2;
}

#endif

#if defined(__AVX512BF16__)
int64_t bf16_steps(int64_t steps, float* keep) {
  __m512 acc[kChains];
  for (int i = 0; i < kChains; ++i) acc[i] = _mm512_set1_ps(static_cast<float>(i));
  const __m512bh a = _mm512_cvtne2ps_pbh(_mm512_set1_ps(*keep), _mm512_set1_ps(*keep));
  const __m512bh b = _mm512_cvtne2ps_pbh(_mm512_set1_ps(0.5f), _mm512_set1_ps(0.5f));
  for (int64_t s = 0; s < steps; ++s) {
#pragma GCC unroll 16
    for (int i = 0; i < kChains; ++i) acc[i] = _mm512_dpbf16_ps(acc[i], a, b);
  }
  for (int i = 1; i < kChains; ++i) acc[0] = _mm512_add_ps(acc[0], acc[i]);
  *keep += sum(f32x16{acc[0]});
  return steps * kChains * 32 * 2;
}
#else
int64_t bf16_steps(int64_t steps, float* keep) { return f32_steps(steps, keep); }
#endif

}  // namespace

int64_t dot_steps(Dot kind, int64_t steps, float* keep) {
  switch (kind) {
    case Dot::int8: return int8_steps(steps, keep);
    case Dot::bf16: return bf16_steps(steps, keep);
    default: return f32_steps(steps, keep);
  }
}

float read_all(const float* memory, int64_t floats, ReadPattern pattern) {
  switch (pattern.lines) {
    case 4: return read_lines<4>(memory, floats, pattern.prefetch);
    case 8: return read_lines<8>(memory, floats, pattern.prefetch);
    default: return read_lines<16>(memory, floats, pattern.prefetch);
  }
}

}  // namespace gsm::GSM_LEVEL
