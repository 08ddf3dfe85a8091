// One call of linear layers: prepare the input once, then share out the panels. Compiled once.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <vector>

#include "linear.h"
#include "team.h"

namespace gsm {

int scale_bytes(Scale scale) {
  switch (scale) {
    case Scale::none: return 0;
    case Scale::f32: return 4;
    default: return 2;
  }
}

int zero_code(const Weight& w) {
  if (w.offset != Offset::symmetric) return 0;
  return w.code == Code::u8 ? 128 : w.code == Code::u5 ? 16 : w.code == Code::u4 ? 8 : 0;
}

int64_t panel_bytes_codes(const Weight& w) {
  switch (w.code) {
    case Code::f32: return w.cols * 64;
    case Code::f16: return w.cols * 32;
    case Code::bf16: return (w.cols + 1) / 2 * 64;
    case Code::u8: return w.blocks() * 128;
    default: return w.blocks() * 64;
  }
}
int64_t panel_bytes_high(const Weight& w) { return w.code == Code::u5 ? w.blocks() * 16 : 0; }
int64_t panel_bytes_scales(const Weight& w) { return w.coded() ? w.groups() * 16 * scale_bytes(w.scale) : 0; }
int64_t panel_bytes_offsets(const Weight& w) {
  switch (w.offset) {
    case Offset::symmetric: return 0;
    case Offset::zero_u4: return w.groups() * 8;
    case Offset::zero_u8: return w.groups() * 16;
    case Offset::min_f32: return w.groups() * 64;
    default: return w.groups() * 32;
  }
}

const char* refuse(const Weight& w, Input input) {
  if (input != Input::int8_token) return nullptr;
  if (!w.coded()) return "int8 inputs need integer codes";
  if (std::min(w.group, 8 * w.blocks()) > kMaxIntegerGroup)
    return "a group longer than 65536 columns could overflow the 32-bit sum";
  return nullptr;
}

namespace {

Path path_of(const Weight& w, Input input) { GSM_DISPATCH(linear_path(w, input)) }
void quantize(const float* x, int64_t cols, int64_t stride, int8_t* q, float* scale) {
  GSM_DISPATCH(quantize_token(x, cols, stride, q, scale))
}
void panels(const Weight& w, Path path, const Prepared& x, int64_t tokens, int64_t first, int64_t last, float* y) {
  GSM_DISPATCH(linear_panels(w, path, x, tokens, first, last, y))
}

// Grow-only scratch of the calling thread; a decode step allocates nothing after its first run.
template <class T, int Slot> T* scratch(int64_t n) {
  static thread_local std::vector<T> buffer;
  if (static_cast<int64_t>(buffer.size()) < n) buffer.resize(static_cast<size_t>(n));
  return buffer.data();
}

struct GroupSums {
  int64_t group = 0, groups = 0;
  std::vector<int32_t> ints;
  std::vector<float> floats;
};

// Columns of a block in the order in which codes unpack to bf16 pairs (see Pairs in linear.cpp).
constexpr int kPairOrder[8] = {0, 2, 4, 6, 1, 3, 5, 7};

// Below this many multiply-adds a call is not worth waking the team for.
constexpr int64_t kSmallWork = 1 << 16;

}  // namespace

void linear(const float* x, int64_t tokens, const Weight* const* weights, float* const* outs, int count, Input input) {
  if (tokens == 0 || count == 0) return;
  const int64_t cols = weights[0]->cols, stride = weights[0]->blocks() * 8;

  bool need[3] = {false, false, false}, need_pairs = false, need_plain = false;
  std::vector<Path> paths(static_cast<size_t>(count));
  int64_t total_panels = 0;
  static thread_local std::vector<GroupSums> sums;
  std::vector<int> sums_of(static_cast<size_t>(count), -1);
  int used_sums = 0;
  for (int i = 0; i < count; ++i) {
    const Weight& w = *weights[i];
    const Path path = paths[static_cast<size_t>(i)] = path_of(w, input);
    need[static_cast<int>(path)] = true;
    if (path == Path::bf16_dot) (w.coded() ? need_pairs : need_plain) = true;
    total_panels += w.panels();
    if (w.coded() && (path == Path::int8_dot || w.offset != Offset::symmetric)) {
      int s = 0;
      while (s < used_sums && sums[static_cast<size_t>(s)].group != w.group) ++s;
      if (s == used_sums) {
        if (static_cast<int>(sums.size()) == used_sums) sums.emplace_back();
        GroupSums& fresh = sums[static_cast<size_t>(used_sums++)];
        fresh.group = w.group;
        fresh.groups = w.groups();
        const auto n = static_cast<size_t>(tokens * fresh.groups);
        if (fresh.ints.size() < n) fresh.ints.resize(n);
        if (fresh.floats.size() < n) fresh.floats.resize(n);
      }
      sums_of[static_cast<size_t>(i)] = s;
    }
  }
  GroupSums* const sum_list = sums.data();

  const bool use_int = need[static_cast<int>(Path::int8_dot)];
  // The float form also feeds the group sums of the bf16 path, so both see the same rounded values.
  const bool use_f32 = need[static_cast<int>(Path::f32)] || need_pairs;
  float* const f32 = use_f32 ? scratch<float, 0>(tokens * stride) : nullptr;
  bf16* const pairs = need_pairs ? scratch<bf16, 1>(tokens * stride) : nullptr;
  bf16* const plain = need_plain ? scratch<bf16, 2>(tokens * stride) : nullptr;
  int8_t* const int8 = use_int ? scratch<int8_t, 3>(tokens * stride) : nullptr;
  float* const int8_scale = use_int ? scratch<float, 4>(tokens) : nullptr;
  const bool rounded = input == Input::bf16;

  auto prepare = [&](int64_t m) {
    const float* xm = x + m * cols;
    if (use_int) {
      quantize(xm, cols, stride, int8 + m * stride, int8_scale + m);
      for (int s = 0; s < used_sums; ++s)
        for (int64_t g = 0; g < sum_list[s].groups; ++g) {
          const int64_t end = std::min(cols, (g + 1) * sum_list[s].group);
          int32_t total = 0;
          for (int64_t k = g * sum_list[s].group; k < end; ++k) total += int8[m * stride + k];
          sum_list[s].ints[static_cast<size_t>(m * sum_list[s].groups + g)] = total;
        }
    }
    if (use_f32) {
      float* row = f32 + m * stride;
      for (int64_t k = 0; k < cols; ++k) row[k] = rounded ? round_to_bf16(xm[k]) : xm[k];
      for (int64_t k = cols; k < stride; ++k) row[k] = 0.0f;
      for (int s = 0; s < used_sums && !use_int; ++s)
        for (int64_t g = 0; g < sum_list[s].groups; ++g) {
          const int64_t end = std::min(cols, (g + 1) * sum_list[s].group);
          float chain[8] = {};
          for (int64_t k = g * sum_list[s].group; k < end; ++k) chain[k & 7] += row[k];
          sum_list[s].floats[static_cast<size_t>(m * sum_list[s].groups + g)] =
              ((chain[0] + chain[4]) + (chain[2] + chain[6])) + ((chain[1] + chain[5]) + (chain[3] + chain[7]));
        }
    }
    if (need_pairs)
      for (int64_t b = 0; b < stride; b += 8)
        for (int i = 0; i < 8; ++i) pairs[m * stride + b + i] = to_bf16(f32[m * stride + b + kPairOrder[i]]);
    if (need_plain)
      for (int64_t k = 0; k < stride; ++k) plain[m * stride + k] = to_bf16(k < cols ? xm[k] : 0.0f);
  };

  auto compute = [&](int64_t first, int64_t last) {
    for (int i = 0; i < count; ++i) {
      const Weight& w = *weights[i];
      const int64_t n = w.panels(), begin = std::clamp<int64_t>(first, 0, n), end = std::clamp<int64_t>(last, 0, n);
      if (begin < end) {
        Prepared p;
        p.f32 = f32;
        p.pairs = pairs;
        p.plain = plain;
        p.int8 = int8;
        p.int8_scale = int8_scale;
        p.stride = stride;
        if (const int s = sums_of[static_cast<size_t>(i)]; s >= 0) {
          p.sums_int = sum_list[s].ints.data();
          p.sums_f32 = sum_list[s].floats.data();
        }
        panels(w, paths[static_cast<size_t>(i)], p, tokens, begin, end, outs[i]);
      }
      first -= n;
      last -= n;
    }
  };

  if (tokens * total_panels * 16 * cols < kSmallWork || team_threads() == 1) {
    for (int64_t m = 0; m < tokens; ++m) prepare(m);
    compute(0, total_panels);
    return;
  }
  if (tokens < 4) {
    for (int64_t m = 0; m < tokens; ++m) prepare(m);
  } else {
    team_run([&](int t, int threads) {
      const Range r = share(tokens, t, threads);
      for (int64_t m = r.begin; m < r.end; ++m) prepare(m);
    });
  }
  team_run([&](int t, int threads) {
    const Range r = share(total_panels, t, threads);
    compute(r.begin, r.end);
  });
}

// ---------------------------------------------------------------- decode

namespace {

float half_at(const uint8_t* p, int64_t i, Scale kind) {
  if (kind == Scale::f32) {
    float v;
    std::memcpy(&v, p + 4 * i, 4);
    return v;
  }
  uint16_t bits;
  std::memcpy(&bits, p + 2 * i, 2);
  return kind == Scale::f16 ? to_f32(f16{bits}) : to_f32(bf16{bits});
}

float plain_at(const Weight& w, int64_t panel, int64_t lane, int64_t k) {
  const uint8_t* values = w.codes + panel * panel_bytes_codes(w);
  if (w.code == Code::bf16) return half_at(values, 32 * (k / 2) + 2 * lane + (k & 1), Scale::bf16);
  return half_at(values, 16 * k + lane, w.code == Code::f32 ? Scale::f32 : Scale::f16);
}

int code_at(const Weight& w, int64_t panel, int64_t lane, int64_t k) {
  const int64_t block = k / 8, half = k / 4 & 1, i = k & 3;
  const int bit = static_cast<int>(4 * lane + i);
  if (w.code == Code::u8) return w.codes[((panel * w.blocks() + block) * 2 + half) * 64 + bit];
  const int byte = w.codes[(panel * w.blocks() + block) * 64 + bit];
  int code = half ? byte >> 4 : byte & 15;
  if (w.code == Code::u5) {
    const uint8_t* mask = w.high + ((panel * w.blocks() + block) * 2 + half) * 8;
    code += 16 * (mask[bit / 8] >> (bit % 8) & 1);
  }
  return code;
}

}  // namespace

void decode_rows(const Weight& w, const int64_t* ids, int64_t n, float* out) {
  auto one = [&](int64_t j) {
    const int64_t panel = ids[j] / 16, lane = ids[j] % 16, groups = w.groups();
    float* row = out + j * w.cols;
    if (!w.coded()) {
      for (int64_t k = 0; k < w.cols; ++k) row[k] = plain_at(w, panel, lane, k);
      return;
    }
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t index = (panel * groups + g) * 16 + lane, end = std::min(w.cols, (g + 1) * w.group);
      const float s = half_at(w.scales, index, w.scale);
      int z = zero_code(w);
      float m = 0.0f;
      bool minimum = false;
      switch (w.offset) {
        case Offset::symmetric: break;
        case Offset::zero_u8: z = w.offsets[index]; break;
        case Offset::zero_u4: {
          const uint8_t byte = w.offsets[(panel * groups + g) * 8 + (lane & 7)];
          z = lane < 8 ? byte & 15 : byte >> 4;
          break;
        }
        default:
          minimum = true;
          m = half_at(w.offsets, index,
                      w.offset == Offset::min_f32   ? Scale::f32
                      : w.offset == Offset::min_f16 ? Scale::f16
                                                    : Scale::bf16);
      }
      for (int64_t k = g * w.group; k < end; ++k) {
        const float q = static_cast<float>(code_at(w, panel, lane, k) - z);
        row[k] = minimum ? s * q - m : s * q;
      }
    }
  };
  if (n * w.cols < kSmallWork) {
    for (int64_t j = 0; j < n; ++j) one(j);
    return;
  }
  team_run([&](int t, int threads) {
    const Range r = share(n, t, threads);
    for (int64_t j = r.begin; j < r.end; ++j) one(j);
  });
}

}  // namespace gsm
