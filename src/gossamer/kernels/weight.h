// A packed matrix as the kernels see it. docs/formats.md has the bytes; in short:
// rows in panels of 16 (row r is lane r), columns in blocks of 16 (h = column / 4, i = column % 4 inside a block).
// A code of B bits is cut into fields, widest first from the low bits:
//   q8 [panel][block][h][r][i]      q4 [panel][block][h / 2][r][i], h even in the low nibble
//   q2 [panel][block][r][i], bits 2h, 2h + 1      q1 [panel][block][h] 64-bit masks, bit 4r + i
// Plain numbers: f32, f16 [panel][column][r]; bf16 [panel][half block][pair][r][2] with the pairs (0,2) (4,6) (1,3) (5,7).
// With q the number a code stands for, a weight is  s q  |  s (c - z) (stored zero point)  |  s q - m (minimum).
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "halves.h"
#include "isa.h"

namespace gsm {

constexpr int64_t kPanel = 16, kBlock = 16;

enum class Number { f32, f16, bf16, coded };
enum class ScaleKind { none, f32, f16, bf16, e8m0, e4m3, nested };

struct Weight;

// One value for each (row or row tile, group): [panel][group][16 rows], or [row tile][group] when rows share one.
struct Scales {
  ScaleKind kind = ScaleKind::none;
  const uint8_t* values = nullptr;
  const Weight* nested = nullptr;  // the matrix (rows or row tiles) x groups
};

struct Weight {
  Number number = Number::f32;
  int bits = 0;  // of a code
  int64_t rows = 0, cols = 0;
  const uint8_t* values = nullptr;  // plain numbers
  const uint8_t *q8 = nullptr, *q4 = nullptr, *q2 = nullptr, *q1 = nullptr;
  float step = 1, zero = 0;      // a code c stands for step * c - zero ...
  const float* table = nullptr;  // ... or for table[c]: [2^bits], or [panel][2^bits][16 rows] when per row
  bool table_per_row = false;
  int64_t group = 0;      // columns that share a scale
  int64_t tile_rows = 1;  // rows that do; a multiple of 16 unless 1
  Scales scales, mins;
  const uint8_t* zeros = nullptr;  // stored zero points, 4 bits [panel][group][8] or 8 bits [panel][group][16]
  int zero_bits = 0;

  // How integer inputs multiply with the codes: as one byte or as two, value = scale * (256 hi + lo) for two. Set by
  // `prepare_bytes`.
  int byte_parts = 0;  // 0: not at all
  float byte_scale = 1;
  std::vector<uint8_t> byte_table;    // [parts][table_stride()]; empty when the code itself is the byte
  std::vector<uint16_t> bf16_table;   // [2^bits, at least 32, repeating] values, when each is exact in bfloat16
  float small_table[16] = {};         // what codes of up to 4 bits stand for
  bool bf16_exact = false;            // every value is a bfloat16

  bool coded() const { return number == Number::coded; }
  int64_t panels() const { return (rows + kPanel - 1) / kPanel; }
  int64_t blocks() const { return (cols + kBlock - 1) / kBlock; }
  int64_t width() const { return blocks() * kBlock; }
  int64_t groups() const { return group ? (cols + group - 1) / group : 1; }
  int64_t row_tiles() const { return (rows + tile_rows - 1) / tile_rows; }
  bool has_offset() const { return zeros || mins.kind != ScaleKind::none; }
  int table_stride() const { return bits < 4 ? 16 : 1 << bits; }
  float value(int code) const { return table ? table[code] : step * static_cast<float>(code) - zero; }
};

// Bytes of each array of the whole matrix; 0 when the weight has no such array.
struct ArrayBytes {
  int64_t values = 0, q8 = 0, q4 = 0, q2 = 0, q1 = 0, zeros = 0, scales = 0, mins = 0, table = 0;
};
ArrayBytes array_bytes(const Weight& w);

// Finds how codes become bytes and bfloat16 (see above); called once when a weight is made.
void prepare_bytes(Weight& w);

// The element at (row, col): the definition, one at a time.
float decode_element(const Weight& w, int64_t row, int64_t col);

// Rows `ids` in float32: out [n][cols].
void decode_rows(const Weight& w, const int64_t* ids, int64_t n, float* out);
void decode_row(const Weight& w, int64_t row, float* out);

float scale_at(const Scales& s, const Weight& w, int64_t row, int64_t group);

}  // namespace gsm
