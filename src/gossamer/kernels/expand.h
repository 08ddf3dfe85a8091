// Turns stretches of a panel into what the inner loops read: bytes, bfloat16 pairs or floats, and scales as floats.
// A half is half a block: 8 columns.
#pragma once
#include <cstdint>

#include "weight.h"

namespace gsm {

// out [half][2][16 rows][4]: the byte of each code (part 0 or 1 of two).
GSM_DECLARE(void expand_bytes(const Weight& w, int part, int64_t panel, int64_t first, int64_t last, uint8_t* out))
// out [half][4 pairs][16 rows][2]: the value of each code, exact; needs w.bf16_exact.
// Only the level with a bfloat16 dot product has it.
GSM_DECLARE(void expand_bf16(const Weight& w, int64_t panel, int64_t first, int64_t last, uint16_t* out))
// out [half][8 columns][16 rows]: the value of each code or plain number, before scaling.
GSM_DECLARE(void expand_floats(const Weight& w, int64_t panel, int64_t first, int64_t last, float* out))

// scales and offsets [segment][16 rows] for segments of `length` columns (each inside one group): a result is
// sum over segments of  scale * (sum of values * x)  -  offset * (sum of x). `offsets` may be null when !need_offset. The
// scales that lie `ahead` panels further are fetched meanwhile.
enum class Values { bytes, floats };  // what the sums are of: bytes of codes or their values
bool need_offset(const Weight& w, Values of);
GSM_DECLARE(void expand_scales(const Weight& w, Values of, int64_t panel, int64_t length, int64_t first, int64_t last,
                               int64_t ahead, float* scales, float* offsets))
// out [column - first][16 rows]: weights, scales applied; first and last are multiples of 8.
GSM_DECLARE(void decode_columns(const Weight& w, int64_t panel, int64_t first, int64_t last, float* out))

// Bytes stand for  byte - zero  when this is exact in integers, and for  byte  with an offset otherwise.
inline int byte_zero(const Weight& w, int part) {
  if (w.byte_parts == 2) return part == 0 ? 128 : 0;
  if (w.table) return 128;
  if (w.zeros) return 0;
  const float z = w.zero / w.step;
  return z == static_cast<float>(static_cast<int>(z)) ? static_cast<int>(z) : 0;
}

}  // namespace gsm
