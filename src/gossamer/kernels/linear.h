// y = x W^T + b for packed weights, several sites that share their input in one call.
//
// An input is prepared once for each input format among the sites (normalised, quantized, laid out in tiles of tokens);
// then the panels of all sites are shared out among the threads. What bounds it: the bytes of the codes for a few
// tokens, the rate of the dot product for many.
#pragma once
#include <cstdint>
#include <memory>
#include <vector>

#include "op.h"
#include "weight.h"

namespace gsm {

// What the input is rounded to before it is multiplied.
enum class Rounding { f32, bf16, int8, int4, uint4, uint8, e4m3 };
struct InputFormat {
  Rounding rounding = Rounding::bf16;
  int64_t group = 0;     // columns that share a scale; 0: the whole token
  float fixed = 0;       // a static scale; 0: from the data
  float outlier = 0;     // elements at least this large are kept apart in float32; 0: none are
  bool operator==(const InputFormat&) const = default;
  bool integer() const { return rounding != Rounding::f32 && rounding != Rounding::bf16; }
};

// How a weight and an input format are multiplied: bytes by bytes, bfloat16 pairs, or float32 (of the rounded input).
enum class Path { bytes, pairs, floats };
// The path, and in `why` (may be null) the reason why a faster one does not fit.
Path linear_path(const Weight& w, const InputFormat& in, const char** why = nullptr);
// Columns that are summed before a scale is applied.
int64_t segment_length(const Weight& w, const InputFormat& in, Path path);

// ---------------------------------------------------------------- prepared inputs

// T tokens lie side by side: [tile][step][T][4 bytes]; a step is 4 int8, 2 bf16 or 1 float.
GSM_DECLARE(int max_tile())                            // tokens of the largest tile
GSM_DECLARE(int panels_at_once(Path path, int64_t tokens))  // 1, 2 or 4
int64_t tile_count(int64_t tokens);
struct Tile { int64_t begin, end; };
Tile tile_at(int64_t tokens, int64_t index);           // tiles of nearly equal size
Tile tile_of(int64_t tokens, int64_t token);

struct Sums {  // per segment of one length
  int64_t length = 0, segments = 0;
  int32_t* bytes = nullptr;   // [tile][segment][T]
  float* floats = nullptr;    // [tile][segment][T], in units of the token's scale
  float* scales = nullptr;    // [tile][segment][T], for inputs with a scale a group
};
struct Outlier {
  int32_t column;
  float value;
};
struct Form {
  Path path = Path::floats;
  InputFormat input;
  int64_t cols = 0, width = 0;     // width: a multiple of 16
  uint8_t* data = nullptr;
  float* token_scale = nullptr;    // [tokens]; null: 1
  int32_t* outliers = nullptr;     // how many each token has; null: none are kept apart
  Outlier* outlier = nullptr;      // [tokens][cols]
  std::vector<Sums> sums;
  int64_t stride() const { return width * (path == Path::bytes ? 1 : path == Path::pairs ? 2 : 4); }  // bytes a token
};

// One token x [cols] into the form at its place in the tile. `memory` is room for width floats, and is not x.
GSM_DECLARE(void prepare_token(const float* x, const Form& form, int64_t tokens, int64_t token, float* memory))
// out = x / sqrt(mean(x^2) + eps) * gain
GSM_DECLARE(void normalize_token(const float* x, const float* gain, float eps, int64_t cols, float* out))

// ---------------------------------------------------------------- panels

// Unstructured entries, sliced by panel: slot s of a panel has one entry for each of its 16 rows, ascending in column.
struct Mask {
  int64_t rows = 0, cols = 0;
  const uint32_t* starts = nullptr;                     // [panels + 1] first slots
  const uint8_t* index = nullptr;                       // [slot][16] columns, all ones: empty
  int index_bytes = 2;
  ScaleKind kind = ScaleKind::f16;                      // of the values; none: int8 + 128 with `scale`
  const uint8_t* values = nullptr;                      // [slot][16]
  float scale = 1;
};

struct PanelPart {
  const Weight* weight;  // or
  const Mask* mask;
  const Form* form;
  const Sums* sums;      // of the weight
};
// Bytes of scratch that panel_totals needs.
GSM_DECLARE(int64_t panel_scratch(int64_t tokens, const PanelPart& part))
// result [strip][tokens][P * 16] (+)= the part's outputs for strips of P panels each, P at most panels_at_once.
GSM_DECLARE(void panel_totals(const PanelPart& part, int64_t panel, int P, int64_t strips, int64_t tokens, float* result,
                              bool add, uint8_t* scratch))
// Strips in one go: few tokens leave so little to do for a panel that the way there would count.
constexpr int64_t strips_at_once(int64_t tokens) { return tokens <= 3 ? 8 : 1; }
// Up to here memory sets the pace; above, arithmetic does.
constexpr int64_t few_tokens() { return 3; }

enum class Epilogue { store, add, silu, gelu, gelu_tanh };
// y [tokens][ld] (+)= result + bias for rows [row, row + n), or for the rows that `index` lists from there on; with a
// gate, y = act(result) * second.
struct Emission {
  const float *result, *second, *bias, *second_bias;
  const uint32_t* index;
  Epilogue epilogue;
  int64_t tokens, lanes, row, n;
  float* y;
  int64_t ld;
};
GSM_DECLARE(void emit(const Emission& e))

// ---------------------------------------------------------------- the call

// What happens to a token before it is quantized for a part: in this order, each step optional.
struct Transform {
  enum Kind { gather, multiply, hadamard } kind = gather;
  const uint32_t* index = nullptr;  // gather: [n] columns
  int64_t n = 0;
  const float* factors = nullptr;   // multiply: [n]; hadamard: signs [n] or null
  int64_t order = 0;                // hadamard
};
struct Source {
  const float* x = nullptr;  // [tokens][cols] of an array beside the call's own input; null: that input
  int64_t cols = 0;          // of that array, before the steps
  std::vector<Transform> steps;
};

struct LinearPart {
  const Weight* weight = nullptr;  // or
  const Mask* mask = nullptr;
  Source source;
  InputFormat input;
  int64_t rows() const { return weight ? weight->rows : mask->rows; }
  int64_t cols() const { return weight ? weight->cols : mask->cols; }
};

struct LinearSite {  // rows that are computed together
  std::vector<LinearPart> parts;     // summed, in this order
  const uint32_t* index = nullptr;   // where its rows lie in the output; null: as they come
  const float* bias = nullptr;       // [ld]
  float* out = nullptr;              // [tokens][ld]
  int64_t ld = 0;
};

struct LinearSpec {
  const float* x = nullptr;          // [tokens][cols]
  int64_t cols = 0;
  const float* gain = nullptr;       // RMSNorm first, when given
  float eps = 0;
  std::vector<LinearSite> sites;     // with a gate: two sites, act(first) * second into the first's out
  Epilogue epilogue = Epilogue::store;
};

// An op of two phases: 0 prepares tokens, 1 multiplies.
std::unique_ptr<Op> linear_op(LinearSpec spec);

}  // namespace gsm
