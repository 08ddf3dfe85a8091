// Products of a matrix of codes whose bits are stored apart, one plane a bit, with int8 activations. Exact integers
// within a group of columns, by three routes that give the same numbers:
//   mask      the bits of all planes are put together into bytes, then multiplied as any int8 code
//   lookup    the four bits of a row are an index into a table of the 16 possible sums of four activations
//             (T-MAC, Wei et al. 2024)
//   popcount  the activations are cut into bit planes too: products are ANDs, sums are population counts
//             (APMM, Ma et al. 2024); vpopcnt is the same with the instruction of that name
//
// A plane is [panel of 16 rows][block of 16 columns][4 words], little-endian words of 64 bits: bit 4r + i of word h is
// column 4h + i of row r. Blocks past the last column and rows past the last row must be there; what columns past the
// last hold does not matter.
#pragma once
#include <algorithm>
#include <cstdint>

#include "isa.h"

namespace gsm {

enum class PlanesPath { mask, lookup, popcount, vpopcnt };

constexpr int64_t kMaxPlanesGroup = 32768;  // columns: the 32-bit sums of 8-bit codes and activations cannot overflow

// y = x_scale * sum over groups of scale * sum (step * code - zero) * x.
struct Planes {
  int64_t rows = 0, cols = 0;
  int64_t group = 0;  // columns, a multiple of 16; the last group may be shorter
  int bits = 0;       // 1..8
  const uint8_t* plane[8] = {};    // the lowest bit first
  const float* scales = nullptr;   // [panel][group][16]
  int32_t zero = 0, step = 1;      // step 1 or 2; |step * code - zero| at most 255

  int64_t panels() const { return (rows + 15) / 16; }
  int64_t blocks() const { return (cols + 15) / 16; }
  int64_t group_blocks() const { return group / 16; }
  int64_t groups() const { return (blocks() + group_blocks() - 1) / group_blocks(); }
  int64_t last_block(int64_t g) const { return std::min(blocks(), (g + 1) * group_blocks()); }
  int64_t plane_bytes() const { return panels() * blocks() * 32; }
};

constexpr int kPlanesTile = 16;
// Tokens multiplied together: the size of the next tile when so many are left. `most` is 16, or 4 with few registers.
inline int planes_tile(int64_t left, int most) { return left >= most ? most : left >= 4 ? 4 : 1; }

// The activations of a call as each route reads them.
struct PlanesInput {
  int64_t tokens = 0;
  const int8_t* x = nullptr;         // mask: [tile][blocks * 4][tokens of the tile][4], zero past the last column
  int most = kPlanesTile;            // mask: tokens in a tile
  const int32_t* sums = nullptr;     // [tokens][groups] of x
  const float* scale = nullptr;      // [tokens]
  const uint8_t* tables = nullptr;   // lookup: [tokens][blocks][1 or 2][4 words][16]
  bool narrow = false;               // lookup: x has 4 bits at most: one table of 6 bits instead of two of 5
  const uint64_t* words = nullptr;   // popcount: [tokens][groups][words of a group][8 planes]
  int x_bits = 8;                    // popcount: planes of x in use, two's complement
  int64_t group_words = 0;           // words of 64 columns in a group
};

// What a call writes: y, or the integer sums where `sums` is given.
struct PlanesOutput {
  float* y = nullptr;        // [tokens][rows]
  int32_t* sums = nullptr;   // [tokens][panels][groups][16]: sum of code * x
};

GSM_DECLARE(void planes_tables(const int8_t* x, int64_t blocks, bool narrow, uint8_t* tables))
GSM_DECLARE(void planes_words(const int8_t* x, int64_t blocks, uint64_t* words))
GSM_DECLARE(void planes_panels(const Planes& w, PlanesPath path, const PlanesInput& in, int64_t first, int64_t last,
                               const PlanesOutput& out))

// Whether this machine and the current level can take the path.
bool planes_path_runs(PlanesPath path);
// The path that was the fastest where it was measured (benchmarks/kernels/planes.py) among those that run.
PlanesPath planes_best_path(int bits, int64_t tokens, int x_bits);
// The bits of two's complement that n values need, 1..8.
int planes_of(const int8_t* x, int64_t n);

// y [tokens][rows] of x [tokens][cols] with one scale a token; every path gives the same bits. Runs on the team.
void planes_linear(const Planes& w, PlanesPath path, const int8_t* x, const float* x_scale, int64_t tokens, float* y);
// The integer sums alone: [tokens][panels][groups][16].
void planes_sums(const Planes& w, PlanesPath path, const int8_t* x, int64_t tokens, int32_t* sums);

}  // namespace gsm
