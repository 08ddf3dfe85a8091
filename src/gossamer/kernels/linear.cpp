// One call of linear layers: which form of the input each site takes, and who computes which panels. Compiled once.
#include "linear.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <mutex>
#include <new>
#include <stdexcept>

#include "expand.h"
#include "team.h"

namespace gsm {
namespace {

int largest_tile() { GSM_DISPATCH(max_tile()) }
int panel_step(Path path, int64_t tokens) { GSM_DISPATCH(panels_at_once(path, tokens)) }
void prepare(const float* x, int64_t cols, int64_t width, const InputFormat& in, const Form& form, int64_t tokens,
             int64_t token, float* q) {
  GSM_DISPATCH(prepare_token(x, cols, width, in, form, tokens, token, q))
}
void normalize(const float* x, const float* gain, float eps, int64_t cols, float* out) {
  GSM_DISPATCH(normalize_token(x, gain, eps, cols, out))
}
int64_t scratch_bytes(int64_t tokens, const Weight& w, const Form& form, const Sums& sums) {
  GSM_DISPATCH(panel_scratch(tokens, w, form, sums))
}
void totals(const PanelPart& part, int64_t panel, int P, int64_t tokens, float* result, bool add, uint8_t* scratch) {
  GSM_DISPATCH(panel_totals(part, panel, P, tokens, result, add, scratch))
}
void finish(const float* result, const float* second, const float* bias, const float* second_bias, Epilogue epilogue,
            int64_t tokens, int64_t lanes, int64_t row, int64_t n, float* y, int64_t ld) {
  GSM_DISPATCH(emit(result, second, bias, second_bias, epilogue, tokens, lanes, row, n, y, ld))
}

constexpr int64_t kFloatSegment = 256;     // columns a float chain may grow to
constexpr int64_t kIntegerSegment = 65536;  // 255 * 127 * 65536 < 2^31

bool bf16_dot() { return current_level() == Level::avx512bf16; }

// Memory for prepared inputs, shared by all calls: they run one after another (team.h). It grows by half at least; the
// smaller blocks stay, since the other calls of the same run may have been given them.
uint8_t* arena(int64_t bytes) {
  static std::vector<std::unique_ptr<uint8_t, decltype(&std::free)>> blocks;
  static int64_t size = 0;
  if (size < bytes) {
    const int64_t grown = (std::max(bytes, size + size / 2) + 4095) / 4096 * 4096;
    auto* memory = static_cast<uint8_t*>(std::aligned_alloc(64, static_cast<size_t>(grown)));
    if (!memory) throw std::bad_alloc();
    blocks.emplace_back(memory, &std::free);
    size = grown;
  }
  return blocks.empty() ? nullptr : blocks.back().get();
}

int64_t aligned(int64_t bytes) { return (bytes + 63) / 64 * 64; }

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

int64_t segment_length(const Weight& w, const InputFormat& in, Path path) {
  int64_t n = w.group && w.coded() ? std::min(w.group, w.width()) : w.width();
  if (path == Path::bytes) {
    if (in.group) n = std::min(n, in.group);
    return std::min(n, kIntegerSegment);
  }
  return n > kFloatSegment && n % kFloatSegment == 0 ? kFloatSegment : n > kFloatSegment && (!w.group || n == w.width()) ? kFloatSegment : n;
}

Linear::Linear(LinearSpec spec) : spec_(std::move(spec)) {
  cols_ = spec_.sites.at(0).parts.at(0)->cols;
  width_ = spec_.sites[0].parts[0]->width();
  for (const LinearSite& site : spec_.sites) {
    std::vector<Use> uses;
    for (const Weight* w : site.parts) {
      const Path path = linear_path(*w, site.input);
      size_t f = 0;
      while (f < forms_.size() && !(formats_[f] == site.input && forms_[f].path == path)) ++f;
      if (f == forms_.size()) {
        formats_.push_back(site.input);
        forms_.emplace_back();
        forms_[f].path = path;
        forms_[f].stride = width_ * (path == Path::bytes ? 1 : path == Path::pairs ? 2 : 4);
      }
      Form& form = forms_[f];
      const int64_t length = segment_length(*w, site.input, path);
      size_t s = 0;
      while (s < form.sums.size() && form.sums[s].length != length) ++s;
      if (s == form.sums.size()) {
        form.sums.emplace_back();
        form.sums[s].length = length;
        form.sums[s].segments = (cols_ + length - 1) / length;
      }
      uses.push_back({static_cast<int>(f), static_cast<int>(s)});
    }
    uses_.push_back(std::move(uses));
    panels_ += site.parts[0]->panels();
  }
  if (spec_.epilogue > Epilogue::add) panels_ = spec_.sites[0].parts[0]->panels();
}

void Linear::reserve(int64_t tokens) {
  int64_t bytes = 0;
  const auto place = [&](auto*& pointer, int64_t count, bool wanted) {
    using T = std::remove_reference_t<decltype(*pointer)>;
    pointer = nullptr;
    if (!wanted) return;
    pointer = reinterpret_cast<T*>(static_cast<uintptr_t>(bytes) + 1);  // an offset, made an address below
    bytes += aligned(count * static_cast<int64_t>(sizeof(T)));
  };
  for (size_t f = 0; f < forms_.size(); ++f) {
    Form& form = forms_[f];
    const InputFormat& in = formats_[f];
    const bool integers = form.path == Path::bytes;
    place(form.data, tokens * form.stride, true);
    place(form.token_scale, tokens, integers && !in.group);
    for (size_t s = 0; s < form.sums.size(); ++s) {
      Sums& sums = form.sums[s];
      bool offset = false, subtracted = false;
      for (size_t i = 0; i < spec_.sites.size(); ++i)
        for (size_t p = 0; p < uses_[i].size(); ++p)
          if (uses_[i][p].form == static_cast<int>(f) && uses_[i][p].sums == static_cast<int>(s)) {
            const Weight& w = *spec_.sites[i].parts[p];
            offset = offset || need_offset(w, integers ? Values::bytes : Values::floats);
            subtracted = subtracted || (integers && (byte_zero(w, 0) || byte_zero(w, 1)));
          }
      place(sums.bytes, tokens * sums.segments, integers && (subtracted || offset));
      place(sums.floats, tokens * sums.segments, offset);
      place(sums.scales, tokens * sums.segments, integers && in.group != 0);
    }
  }
  uint8_t* base = arena(bytes);
  const auto settle = [base](auto*& pointer) {
    using T = std::remove_reference_t<decltype(*pointer)>;
    if (pointer) pointer = reinterpret_cast<T*>(base + (reinterpret_cast<uintptr_t>(pointer) - 1));
  };
  for (Form& form : forms_) {
    settle(form.data);
    settle(form.token_scale);
    for (Sums& s : form.sums) {
      settle(s.bytes);
      settle(s.floats);
      settle(s.scales);
    }
  }
}

bool Linear::small(int64_t tokens) const { return tokens * panels_ * kPanel * cols_ < kTeamWork; }

void Linear::run(int64_t tokens, int phase, int thread, int threads) const {
  if (phase == 0) {
    const Range mine = share(tokens, thread, threads);
    if (mine.begin == mine.end) return;
    float* q = static_cast<float*>(thread_scratch(0, static_cast<size_t>(2 * width_) * sizeof(float)));
    for (int64_t m = mine.begin; m < mine.end; ++m) {
      const float* x = spec_.x + m * cols_;
      if (spec_.gain) {
        normalize(x, spec_.gain, spec_.eps, cols_, q + width_);
        x = q + width_;
      }
      for (size_t f = 0; f < forms_.size(); ++f) prepare(x, cols_, width_, formats_[f], forms_[f], tokens, m, q);
    }
    return;
  }
  const bool gated = spec_.epilogue > Epilogue::add;
  const Range mine = share(panels_, thread, threads);
  int64_t bytes = 0;
  for (size_t i = 0; i < spec_.sites.size(); ++i)
    for (size_t p = 0; p < uses_[i].size(); ++p) {
      const Form& form = forms_[static_cast<size_t>(uses_[i][p].form)];
      bytes = std::max(bytes, scratch_bytes(tokens, *spec_.sites[i].parts[p], form, form.sums[static_cast<size_t>(uses_[i][p].sums)]));
    }
  const int64_t result_bytes = tokens * 4 * kPanel * 4;
  auto* memory = static_cast<uint8_t*>(thread_scratch(0, static_cast<size_t>(2 * result_bytes + bytes)));
  float* result = reinterpret_cast<float*>(memory);
  float* second = reinterpret_cast<float*>(memory + result_bytes);
  uint8_t* scratch = memory + 2 * result_bytes;
  const auto site_totals = [&](size_t i, int64_t panel, int P, float* to) {
    for (size_t p = 0; p < uses_[i].size(); ++p) {
      const Form& form = forms_[static_cast<size_t>(uses_[i][p].form)];
      const PanelPart part{spec_.sites[i].parts[p], &form, &form.sums[static_cast<size_t>(uses_[i][p].sums)]};
      totals(part, panel, P, tokens, to, p > 0, scratch);
    }
  };
  int64_t base = 0;
  for (size_t i = 0; i < spec_.sites.size() && base < mine.end; ++i) {
    const LinearSite& site = spec_.sites[i];
    const int64_t rows = site.parts[0]->rows, panels = site.parts[0]->panels();
    int64_t panel = std::max<int64_t>(0, mine.begin - base);
    const int64_t end = std::min(panels, mine.end - base);
    int64_t step = 4;
    for (const Use& use : uses_[i]) step = std::min<int64_t>(step, panel_step(forms_[static_cast<size_t>(use.form)].path, tokens));
    while (panel < end) {
      int64_t P = step;
      while (P > end - panel) P /= 2;
      site_totals(i, panel, static_cast<int>(P), result);
      const float* second_bias = nullptr;
      if (gated) {
        site_totals(1, panel, static_cast<int>(P), second);
        second_bias = spec_.sites[1].bias;
      }
      const int64_t row = panel * kPanel;
      finish(result, second, site.bias, second_bias, spec_.epilogue, tokens, P * kPanel, row,
             std::min(P * kPanel, rows - row), site.out, rows);
      panel += P;
    }
    if (gated) break;
    base += panels;
  }
}

void linear(LinearSpec spec, int64_t tokens) {
  if (tokens == 0 || spec.sites.empty()) return;
  Linear call(std::move(spec));
  static std::mutex one;  // the memory of prepared inputs is shared
  std::lock_guard lock(one);
  call.reserve(tokens);
  if (call.small(tokens) || team_threads() == 1) {
    call.run(tokens, 0, 0, 1);
    call.run(tokens, 1, 0, 1);
    return;
  }
  if (tokens < 4) call.run(tokens, 0, 0, 1);
  else team_run([&](int t, int threads) { call.run(tokens, 0, t, threads); });
  team_run([&](int t, int threads) { call.run(tokens, 1, t, threads); });
}

}  // namespace gsm
