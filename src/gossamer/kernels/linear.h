// y = x W^T + b for packed weights, several sites that share their input in one call.
//
// An input is prepared once for each input format among the sites (normalised, quantized, laid out in tiles of tokens);
// then the panels of all sites are shared out among the threads. What bounds it: the bytes of the codes for a few
// tokens, the rate of the dot product for many.
#pragma once
#include <cstdint>
#include <memory>
#include <vector>

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
struct Form {
  Path path = Path::floats;
  uint8_t* data = nullptr;
  int64_t stride = 0;              // bytes a token
  float* token_scale = nullptr;    // [tokens]; null: 1
  std::vector<Sums> sums;
};

// One token x [cols] into the form at its place in the tile. `q` is scratch of width floats.
GSM_DECLARE(void prepare_token(const float* x, int64_t cols, int64_t width, const InputFormat& in, const Form& form,
                               int64_t tokens, int64_t token, float* q))
// out = x / sqrt(mean(x^2) + eps) * gain
GSM_DECLARE(void normalize_token(const float* x, const float* gain, float eps, int64_t cols, float* out))

// ---------------------------------------------------------------- panels

struct PanelPart {
  const Weight* weight;
  const Form* form;
  const Sums* sums;
};
// result [tokens][P * 16] (+)= the part's outputs for P panels, P at most panels_at_once.
// Bytes of scratch that panel_totals needs.
GSM_DECLARE(int64_t panel_scratch(int64_t tokens, const Weight& w, const Form& form, const Sums& sums))
GSM_DECLARE(void panel_totals(const PanelPart& part, int64_t panel, int P, int64_t tokens, float* result, bool add,
                              uint8_t* scratch))
// Up to here memory sets the pace; above, arithmetic does.
constexpr int64_t few_tokens() { return 3; }

enum class Epilogue { store, add, silu, gelu, gelu_tanh };
// y [tokens][ld] (+)= result + bias for rows [row, row + n); with a gate, y = act(result) * second.
GSM_DECLARE(void emit(const float* result, const float* second, const float* bias, const float* second_bias,
                      Epilogue epilogue, int64_t tokens, int64_t lanes, int64_t row, int64_t n, float* y, int64_t ld))

// ---------------------------------------------------------------- the call

struct LinearSite {
  std::vector<const Weight*> parts;  // summed
  InputFormat input;
  const float* bias = nullptr;
  float* out = nullptr;              // [tokens][rows]
};

struct LinearSpec {
  const float* x = nullptr;          // [tokens][cols]
  const float* gain = nullptr;       // RMSNorm first, when given
  float eps = 0;
  std::vector<LinearSite> sites;     // with a gate: two sites, act(first) * second into the first's out
  Epilogue epilogue = Epilogue::store;
};

// Work in two phases, 0 prepares tokens and 1 multiplies; all threads of the team call each, with a barrier between.
class Linear {
 public:
  explicit Linear(LinearSpec spec);
  // Before the phases of a run, from one thread.
  void reserve(int64_t tokens);
  void run(int64_t tokens, int phase, int thread, int threads) const;
  bool small(int64_t tokens) const;  // not worth waking a team

 private:
  struct Use { int form, sums; };
  LinearSpec spec_;
  int64_t cols_ = 0, width_ = 0, panels_ = 0;
  std::vector<InputFormat> formats_;
  std::vector<Form> forms_;
  std::vector<std::vector<Use>> uses_;  // [site][part]
  uint8_t* arena_ = nullptr;
};

// Runs at once on the team.
void linear(LinearSpec spec, int64_t tokens);

}  // namespace gsm
