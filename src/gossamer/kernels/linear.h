// y = x W^T + b for packed weights.
//
// Layout (one for every level). Output rows come in panels of 16, one row per lane; rows past the end are
// padding. Input columns come in blocks of 8, zero-padded at the end.
//   u8    codes  [panel][block][2][16 rows][4]        column 8*block + 4*half + i
//   u4    codes  [panel][block][16 rows][4]           low nibble: column 8*block + i, high nibble: 8*block + 4 + i
//   u5    codes  as u4 (the low four bits), high [panel][block][2] 64-bit masks, bit 4*row + i: the fifth bit
//   f32, f16     [panel][column][16 rows]
//   bf16         [panel][column pair][16 rows][2]
//   scales, offsets [panel][group][16 rows]; 4-bit zero points [panel][group][8]: row r low, row r+8 high nibble
// A code c stands for  s*(c - 2^(bits-1)) (symmetric),  s*(c - z) (zero point)  or  s*c - m (minimum).
#pragma once
#include <cstdint>

#include "halves.h"
#include "isa.h"

namespace gsm {

enum class Code { f32, f16, bf16, u8, u5, u4 };
enum class Scale { none, f32, f16, bf16 };
enum class Offset { symmetric, zero_u4, zero_u8, min_f16, min_f32, min_bf16 };
enum class Input { f32, bf16, int8_token };

struct Weight {
  Code code = Code::f32;
  int64_t rows = 0, cols = 0;
  int64_t group = 0;  // columns that share a scale; a multiple of 8 for coded weights
  Scale scale = Scale::none;
  Offset offset = Offset::symmetric;
  const uint8_t* codes = nullptr;
  const uint8_t* high = nullptr;
  const uint8_t* scales = nullptr;
  const uint8_t* offsets = nullptr;
  const float* bias = nullptr;  // [rows] or null

  int64_t panels() const { return (rows + 15) / 16; }
  int64_t blocks() const { return (cols + 7) / 8; }
  int64_t groups() const { return scale == Scale::none ? 1 : (cols + group - 1) / group; }
  bool coded() const { return code == Code::u8 || code == Code::u5 || code == Code::u4; }
};

// Bytes one panel takes in each array; 0 when the weight has no such array.
int64_t panel_bytes_codes(const Weight& w);
int64_t panel_bytes_high(const Weight& w);
int64_t panel_bytes_scales(const Weight& w);
int64_t panel_bytes_offsets(const Weight& w);
int scale_bytes(Scale scale);
int zero_code(const Weight& w);  // 2^(bits-1) for symmetric codes, else 0

// Codes may be summed in int32 without overflow up to this group length: 255 * 127 * 65536 < 2^31.
constexpr int64_t kMaxIntegerGroup = 65536;
// Why this weight cannot take this input format, or null.
const char* refuse(const Weight& w, Input input);

// The input in the forms the inner loops read. A form is computed once per call and shared by all weights.
struct Prepared {
  const float* f32 = nullptr;         // [M][8*blocks], zero-padded; rounded to bf16 when the input format says so
  const bf16* pairs = nullptr;        // [M][8*blocks] in the order in which codes unpack to pairs
  const bf16* plain = nullptr;        // [M][8*blocks] in column order
  const int8_t* int8 = nullptr;       // [M][8*blocks]
  const float* int8_scale = nullptr;  // [M]
  const float* sums_f32 = nullptr;    // [M][groups]
  const int32_t* sums_int = nullptr;  // [M][groups]
  int64_t stride = 0;                 // 8*blocks
};

// Which inner loop a weight takes for an input format at the current level: int8 dot, bf16 dot or float32.
enum class Path { f32, bf16_dot, int8_dot };

GSM_DECLARE(Path linear_path(const Weight& w, Input input))
GSM_DECLARE(void linear_panels(const Weight& w, Path path, const Prepared& x, int64_t tokens, int64_t first_panel,
                               int64_t last_panel, float* y))
GSM_DECLARE(void quantize_token(const float* x, int64_t cols, int64_t stride, int8_t* q, float* scale))

// x [tokens][cols] times each weight, into outs[i] [tokens][weights[i]->rows]. All weights have the same cols.
void linear(const float* x, int64_t tokens, const Weight* const* weights, float* const* outs, int count, Input input);

// Rows `ids` of the matrix in float32: out [n][cols].
void decode_rows(const Weight& w, const int64_t* ids, int64_t n, float* out);

}  // namespace gsm
