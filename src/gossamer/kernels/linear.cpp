// One call of linear layers: which form of the input each site takes, and who computes which panels. Compiled once.
#include "linear.h"

#include <algorithm>
#include <cstring>

#include "arena.h"
#include "expand.h"
#include "fwht.h"
#include "team.h"

namespace gsm {
namespace {

int largest_tile() { GSM_DISPATCH(max_tile()) }
int panel_step(Path path, int64_t tokens) { GSM_DISPATCH(panels_at_once(path, tokens)) }
void prepare(const float* x, const Form& form, int64_t tokens, int64_t token, float* q) {
  GSM_DISPATCH(prepare_token(x, form, tokens, token, q))
}
void normalize(const float* x, const float* gain, float eps, int64_t cols, float* out) {
  GSM_DISPATCH(normalize_token(x, gain, eps, cols, out))
}
int64_t scratch_bytes(int64_t tokens, const PanelPart& part) { GSM_DISPATCH(panel_scratch(tokens, part)) }
void totals(const PanelPart& part, int64_t panel, int P, int64_t strips, int64_t tokens, float* result, bool add,
            uint8_t* scratch) {
  GSM_DISPATCH(panel_totals(part, panel, P, strips, tokens, result, add, scratch))
}
void finish(const Emission& e) { GSM_DISPATCH(emit(e)) }

constexpr int64_t kFloatSegment = 256;     // columns a float chain may grow to
constexpr int64_t kPiecePanels = 64;       // shares smaller than a few panels are not worth taking over
constexpr int64_t kIntegerSegment = 65536;  // 255 * 127 * 65536 < 2^31

bool bf16_dot() { return current_level() == Level::avx512bf16; }

}  // namespace

int64_t tile_count(int64_t tokens) { return (tokens + largest_tile() - 1) / largest_tile(); }
Tile tile_at(int64_t tokens, int64_t index) {
  const int64_t n = tile_count(tokens), base = tokens / n, more = tokens % n;
  return {index * base + std::min(index, more), (index + 1) * base + std::min(index + 1, more)};
}
Tile tile_of(int64_t tokens, int64_t token) {
  const int64_t n = tile_count(tokens), base = tokens / n, more = tokens % n, longer = more * (base + 1);
  return tile_at(tokens, token < longer ? token / (base + 1) : more + (token - longer) / base);
}

Path linear_path(const Weight& w, const InputFormat& in, const char** why) {
  const auto give = [why](const char* reason, Path path) {
    if (why) *why = reason;
    return path;
  };
  if (in.integer()) {
    if (!w.coded()) return give("the weight is plain numbers, which integer inputs do not multiply", Path::floats);
    if (in.rounding == Rounding::e4m3) return give("e4m3 inputs have no integer form", Path::floats);
    if (in.rounding == Rounding::uint8) return give("uint8 inputs less their zero point need nine bits", Path::floats);
    if (w.byte_parts == 0) return give("the weight's values are no integers of 16 bits", Path::floats);
    const int64_t a = w.group ? w.group : w.width(), b = in.group ? in.group : w.width();
    if (std::max(a, b) % std::min(a, b) && std::max(a, b) < w.cols)
      return give("neither of the groups of weight and input divides the other", Path::floats);
    return give(nullptr, Path::bytes);
  }
  if (in.rounding == Rounding::bf16) {
    if (!w.bf16_exact) return give("not every value of the weight is a bfloat16", Path::floats);
    if (!bf16_dot()) return give("this instruction set has no bfloat16 dot product", Path::floats);
    return give(nullptr, Path::pairs);
  }
  return give(nullptr, Path::floats);
}

namespace {

// The longest segment up to `limit` that cuts groups of n columns evenly; the only group of a row may be cut anywhere.
int64_t cut(int64_t n, int64_t width, int64_t limit) {
  if (n <= limit) return n;
  if (n >= width) return limit;
  int64_t length = limit / 8 * 8;
  while (n % length) length -= 8;
  return length;
}

}  // namespace

int64_t segment_length(const Weight& w, const InputFormat& in, Path path) {
  int64_t n = w.group && w.coded() ? std::min(w.group, w.width()) : w.width();
  if (path == Path::bytes) return cut(in.group ? std::min(n, in.group) : n, w.width(), kIntegerSegment);
  // A group that the float segment does not divide stays whole if it can, but for the only one of a row.
  if (n > kFloatSegment && (n % kFloatSegment == 0 || n == w.width())) return kFloatSegment;
  return cut(n, w.width(), kIntegerSegment);
}

namespace {

int64_t after(const Source& s) {
  int64_t cols = s.cols;
  for (const Transform& t : s.steps)
    if (t.kind == Transform::gather) cols = t.n;
  return cols;
}

// Equal transforms may lie in arrays of their own: q, k and v each bring their copy.
bool same(const Transform& a, const Transform& b, int64_t cols) {
  const auto equal = [](const void* p, const void* q, int64_t bytes) {
    return p == q || (p && q && std::memcmp(p, q, static_cast<size_t>(bytes)) == 0);
  };
  return a.kind == b.kind && a.n == b.n && a.order == b.order && equal(a.index, b.index, 4 * a.n) &&
         equal(a.factors, b.factors, 4 * cols);
}
bool same(const Source& a, const Source& b) {
  if (a.x != b.x || a.cols != b.cols || a.steps.size() != b.steps.size()) return false;
  int64_t cols = a.cols;
  for (size_t i = 0; i < a.steps.size(); ++i) {
    if (a.steps[i].kind == Transform::gather) cols = a.steps[i].n;
    if (!same(a.steps[i], b.steps[i], cols)) return false;
  }
  return true;
}

class LinearOp final : public Op {
 public:
  explicit LinearOp(LinearSpec spec) : spec_(std::move(spec)) {
    for (const LinearSite& site : spec_.sites) {
      std::vector<Use> uses;
      for (const LinearPart& part : site.parts) uses.push_back(use_of(part));
      uses_.push_back(std::move(uses));
      panels_ += panels_of(site);
    }
    if (gated()) panels_ = panels_of(spec_.sites[0]);
    for (const Source& s : sources_) {
      widest_ = std::max(widest_, s.cols);
      for (const Transform& t : s.steps) widest_ = std::max(widest_, t.n);
    }
    widest_ = std::max(widest_, spec_.cols) + kPanel;
  }

  int phases(int64_t) const override { return 2; }
  bool alone(int64_t tokens, int phase) const override {
    return tokens * panels_ * kPanel * spec_.cols < kTeamWork || (phase == 0 && tokens < 4);
  }
  int pieces(int64_t, int phase) const override {
    return phase == 0 ? 1 : static_cast<int>(std::clamp<int64_t>(panels_ / kPiecePanels, 1, 4));
  }
  void check(int64_t tokens) const override { reserve(tokens); }
  void run(int64_t tokens, int phase, int thread, int threads) override {
    if (phase == 0) prepare_tokens(share(tokens, thread, threads), tokens);
    else multiply(share(panels_, thread, threads), tokens);
  }

 private:
  struct Use {
    size_t form, sums;
  };

  bool gated() const { return spec_.epilogue > Epilogue::add; }
  static int64_t panels_of(const LinearSite& site) { return (site.parts[0].rows() + kPanel - 1) / kPanel; }

  Use use_of(const LinearPart& part) {
    size_t source = 0;
    while (source < sources_.size() && !same(sources_[source], part.source)) ++source;
    if (source == sources_.size()) sources_.push_back(part.source);
    const Path path = part.weight ? linear_path(*part.weight, part.input) : Path::floats;
    size_t f = 0;
    while (f < forms_.size() && !(source_of_[f] == source && forms_[f].input == part.input && forms_[f].path == path)) ++f;
    if (f == forms_.size()) {
      forms_.emplace_back();
      source_of_.push_back(source);
      forms_[f].path = path;
      forms_[f].input = part.input;
      forms_[f].cols = after(part.source);
      forms_[f].width = (forms_[f].cols + kBlock - 1) / kBlock * kBlock;
    }
    Form& form = forms_[f];
    if (!part.weight) return {f, 0};
    const int64_t length = segment_length(*part.weight, part.input, path);
    size_t s = 0;
    while (s < form.sums.size() && form.sums[s].length != length) ++s;
    if (s == form.sums.size()) {
      form.sums.emplace_back();
      form.sums[s].length = length;
      form.sums[s].segments = (form.cols + length - 1) / length;
    }
    // Which sums are needed is marked by a pointer that is not null; reserve() gives each its place.
    Sums& sums = form.sums[s];
    const bool integers = path == Path::bytes;
    const bool offset = need_offset(*part.weight, integers ? Values::bytes : Values::floats);
    static int32_t some_int;
    static float some_float;
    if (integers && (offset || byte_zero(*part.weight, 0) || byte_zero(*part.weight, 1))) sums.bytes = &some_int;
    if (offset) sums.floats = &some_float;
    if (integers && part.input.group) sums.scales = &some_float;
    return {f, s};
  }

  void reserve(int64_t tokens) const {
    for (int pass = 0; pass < 2; ++pass) {
      uint8_t* base = pass ? arena(bytes_) : nullptr;
      int64_t at = 0;
      const auto place = [&](auto*& pointer, int64_t count, bool wanted) {
        using T = std::remove_reference_t<decltype(*pointer)>;
        if (!wanted) return;
        if (pass) pointer = reinterpret_cast<T*>(base + at);
        at += (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
      };
      for (Form& form : forms_) {
        const bool integers = form.path == Path::bytes, apart = integers && form.input.outlier > 0;
        place(form.data, tokens * form.stride(), true);
        place(form.token_scale, tokens, integers && !form.input.group);
        place(form.outliers, tokens, apart);
        place(form.outlier, tokens * form.cols, apart);
        for (Sums& s : form.sums) {
          place(s.bytes, tokens * s.segments, s.bytes != nullptr);
          place(s.floats, tokens * s.segments, s.floats != nullptr);
          place(s.scales, tokens * s.segments, s.scales != nullptr);
        }
      }
      bytes_ = at;
    }
  }

  void prepare_tokens(Range mine, int64_t tokens) const {
    if (mine.begin == mine.end) return;
    auto* const memory = static_cast<float*>(thread_scratch(0, static_cast<size_t>(4 * widest_) * sizeof(float)));
    float *const normal = memory, *const q = memory + 3 * widest_;
    for (int64_t m = mine.begin; m < mine.end; ++m) {
      const float* x = spec_.x + m * spec_.cols;
      if (spec_.gain) {
        normalize(x, spec_.gain, spec_.eps, spec_.cols, normal);
        x = normal;
      }
      for (size_t s = 0; s < sources_.size(); ++s) {
        const Source& source = sources_[s];
        const float* v = source.x ? source.x + m * source.cols : x;
        float *to = memory + widest_, *other = memory + 2 * widest_;
        int64_t n = source.cols;
        for (const Transform& t : source.steps) {
          switch (t.kind) {
            case Transform::gather:
              n = t.n;
              for (int64_t k = 0; k < n; ++k) to[k] = v[t.index[k]];
              break;
            case Transform::multiply:
              for (int64_t k = 0; k < n; ++k) to[k] = v[k] * t.factors[k];
              break;
            default:
              std::copy(v, v + n, to);
              fwht_row(to, n, *hadamard(t.order), t.factors, false);
          }
          v = to;
          std::swap(to, other);
        }
        for (size_t f = 0; f < forms_.size(); ++f)
          if (source_of_[f] == s) prepare(v, forms_[f], tokens, m, q);
      }
    }
  }

  PanelPart part_of(size_t site, size_t i) const {
    const LinearPart& part = spec_.sites[site].parts[i];
    const Form& form = forms_[uses_[site][i].form];
    return {part.weight, part.mask, &form, part.weight ? &form.sums[uses_[site][i].sums] : nullptr};
  }

  void site_totals(size_t site, int64_t panel, int64_t P, int64_t strips, int64_t tokens, float* to, uint8_t* scratch) const {
    for (size_t i = 0; i < uses_[site].size(); ++i)
      totals(part_of(site, i), panel, static_cast<int>(P), strips, tokens, to, i > 0, scratch);
  }

  int64_t step_of(size_t site, int64_t tokens) const {
    int64_t step = 4;
    for (const Use& use : uses_[site]) step = std::min<int64_t>(step, panel_step(forms_[use.form].path, tokens));
    return step;
  }

  void multiply(Range mine, int64_t tokens) const {
    int64_t bytes = 0;
    for (size_t i = 0; i < spec_.sites.size(); ++i)
      for (size_t p = 0; p < uses_[i].size(); ++p) bytes = std::max(bytes, scratch_bytes(tokens, part_of(i, p)));
    const int64_t result_bytes = strips_at_once(tokens) * tokens * 4 * kPanel * 4;
    auto* memory = static_cast<uint8_t*>(thread_scratch(0, static_cast<size_t>(2 * result_bytes + bytes)));
    auto *result = reinterpret_cast<float*>(memory), *second = reinterpret_cast<float*>(memory + result_bytes);
    uint8_t* scratch = memory + 2 * result_bytes;
    int64_t base = 0;
    for (size_t i = 0; i < spec_.sites.size() && base < mine.end; ++i) {
      const LinearSite& site = spec_.sites[i];
      const int64_t rows = site.parts[0].rows(), panels = panels_of(site);
      const int64_t end = std::min(panels, mine.end - base);
      const int64_t step = gated() ? std::min(step_of(0, tokens), step_of(1, tokens)) : step_of(i, tokens);
      for (int64_t panel = std::max<int64_t>(0, mine.begin - base); panel < end;) {
        int64_t P = step;
        while (P > end - panel) P /= 2;
        const int64_t strips = std::min(strips_at_once(tokens), (end - panel) / P), lanes = P * kPanel;
        site_totals(i, panel, P, strips, tokens, result, scratch);
        if (gated()) site_totals(1, panel, P, strips, tokens, second, scratch);
        for (int64_t s = 0; s < strips; ++s, panel += P) {
          const int64_t row = panel * kPanel, at = s * tokens * lanes;
          finish({result + at, second + at, site.bias, gated() ? spec_.sites[1].bias : nullptr, site.index, spec_.epilogue,
                  tokens, lanes, row, std::min(lanes, rows - row), site.out, site.ld});
        }
      }
      if (gated()) break;
      base += panels;
    }
  }

  const LinearSpec spec_;
  int64_t panels_ = 0, widest_ = 0;
  std::vector<Source> sources_;
  std::vector<size_t> source_of_;        // of each form
  mutable std::vector<Form> forms_;      // their memory is given anew for each run
  std::vector<std::vector<Use>> uses_;   // [site][part]
  mutable int64_t bytes_ = 0;
};

}  // namespace

std::unique_ptr<Op> linear_op(LinearSpec spec) { return std::make_unique<LinearOp>(std::move(spec)); }

}  // namespace gsm
