// The two 16-bit float types as storage, with exact scalar conversions (round to nearest even). Static, because files
// are compiled for different instruction sets: a shared inline function could be taken from the wrong one.
#pragma once
#include <bit>
#include <cstdint>

namespace gsm {

struct f16 { uint16_t bits; };
struct bf16 { uint16_t bits; };

static inline float to_f32(bf16 h) { return std::bit_cast<float>(static_cast<uint32_t>(h.bits) << 16); }

static inline float to_f32(f16 h) {
  const uint32_t sign = static_cast<uint32_t>(h.bits & 0x8000) << 16;
  const uint32_t rest = h.bits & 0x7FFF;
  if (rest >= 0x7C00) return std::bit_cast<float>(sign | 0x7F800000 | (rest & 0x3FF) << 13);  // inf, NaN
  if (rest < 0x400) {  // zero and subnormals: rest * 2^-24
    const float magnitude = static_cast<float>(rest) * 0x1p-24f;
    return sign ? -magnitude : magnitude;
  }
  return std::bit_cast<float>(sign | ((rest << 13) + 0x38000000));
}

static inline bf16 to_bf16(float x) {
  const uint32_t u = std::bit_cast<uint32_t>(x);
  if ((u & 0x7FFFFFFF) > 0x7F800000) return {static_cast<uint16_t>(u >> 16 | 0x40)};  // quiet NaN
  return {static_cast<uint16_t>((u + 0x7FFF + (u >> 16 & 1)) >> 16)};
}

static inline f16 to_f16(float x) {
  const uint32_t u = std::bit_cast<uint32_t>(x);
  const uint16_t sign = static_cast<uint16_t>(u >> 16 & 0x8000);
  const uint32_t a = u & 0x7FFFFFFF;
  if (a > 0x7F800000) return {static_cast<uint16_t>(sign | 0x7E00)};
  if (a >= 0x477FF000) return {static_cast<uint16_t>(sign | 0x7C00)};  // rounds to infinity
  if (a < 0x38800000) {  // subnormal in f16: adding 0.5 aligns the bits, the hardware rounds to even
    const uint32_t r = std::bit_cast<uint32_t>(std::bit_cast<float>(a) + 0.5f) - 0x3F000000;
    return {static_cast<uint16_t>(sign | r)};
  }
  return {static_cast<uint16_t>(sign | ((a - 0x38000000 + 0xFFF + (a >> 13 & 1)) >> 13))};
}

static inline float round_to_bf16(float x) { return to_f32(to_bf16(x)); }

}  // namespace gsm
