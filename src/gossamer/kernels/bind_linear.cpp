#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cmath>
#include <cstring>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "bind.h"
#include "fwht.h"
#include "linear.h"

namespace nb = nanobind;
using namespace nb::literals;
using gsm::refuse;

namespace {

using Bytes = nb::ndarray<const uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Words = nb::ndarray<const uint32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Floats = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Ids = nb::ndarray<const int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using RowsOut = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

template <class E> E pick(const std::map<std::string, E>& table, const std::string& what, const std::string& name) {
  const auto it = table.find(name);
  if (it == table.end()) refuse(what + " '" + name + "' is unknown to the kernels");
  return it->second;
}

const std::map<std::string, gsm::ScaleKind> kKinds{
    {"none", gsm::ScaleKind::none}, {"f32", gsm::ScaleKind::f32},   {"f16", gsm::ScaleKind::f16},      {"bf16", gsm::ScaleKind::bf16},
    {"e8m0", gsm::ScaleKind::e8m0}, {"e4m3", gsm::ScaleKind::e4m3}, {"nested", gsm::ScaleKind::nested}};
const std::map<std::string, gsm::Rounding> kRoundings{
    {"f32", gsm::Rounding::f32},     {"bf16", gsm::Rounding::bf16},   {"int8", gsm::Rounding::int8}, {"int4", gsm::Rounding::int4},
    {"uint4", gsm::Rounding::uint4}, {"uint8", gsm::Rounding::uint8}, {"e4m3", gsm::Rounding::e4m3}};
const std::map<std::string, gsm::Epilogue> kEpilogues{{"store", gsm::Epilogue::store},
                                                      {"add", gsm::Epilogue::add},
                                                      {"silu", gsm::Epilogue::silu},
                                                      {"gelu", gsm::Epilogue::gelu},
                                                      {"gelu_tanh", gsm::Epilogue::gelu_tanh}};

// An argument inside a dictionary, list or tuple; nothing is converted.
template <class T> T want(nb::handle value, const std::string& what) {
  T found;
  if (!nb::try_cast(value, found, false)) refuse(what + " has the wrong type");
  return found;
}
template <class A> A want_array(nb::handle value, const std::string& what) {
  A array = want<A>(value, what + ", a flat, contiguous array,");
  if (reinterpret_cast<uintptr_t>(array.data()) % sizeof(typename A::Scalar))
    refuse(what + " is not aligned to its element size; copy it first");
  return array;
}

// The upper limits keep every byte count far from overflow, so that the checks below hold.
void check_shape(int64_t rows, int64_t cols) {
  if (rows < 1 || cols < 1 || cols > (int64_t{1} << 31) || rows > (int64_t{1} << 46) / cols)
    refuse("a weight needs at least one row and one column, and at most 2^46 elements");
}

// What a matrix reads: arrays as they were given, and aligned copies of those that begin in the middle of an element (as
// parts of a mapped file may).
struct Kept {
  std::vector<Bytes> arrays;
  std::vector<std::shared_ptr<uint8_t[]>> copies;  // shared, since matrices can be copied
};

const uint8_t* take(Kept& keep, const char* name, const std::optional<Bytes>& array, int64_t need, int64_t size = 1) {
  if (need == 0) return nullptr;
  if (!array || static_cast<int64_t>(array->size()) < need)
    refuse(std::string("array '") + name + "' needs " + std::to_string(need) + " bytes" +
           (array ? " but has " + std::to_string(array->size()) : ""));
  if (reinterpret_cast<uintptr_t>(array->data()) % static_cast<uintptr_t>(size)) {
    keep.copies.emplace_back(new uint8_t[static_cast<size_t>(need)]);
    std::memcpy(keep.copies.back().get(), array->data(), static_cast<size_t>(need));
    return keep.copies.back().get();
  }
  keep.arrays.push_back(*array);
  return keep.arrays.back().data();
}

int64_t bytes_of(gsm::ScaleKind kind) {
  return kind == gsm::ScaleKind::f32 ? 4 : kind == gsm::ScaleKind::f16 || kind == gsm::ScaleKind::bf16 ? 2 : 1;
}

// A packed matrix and the arrays it reads from, which it keeps alive.
struct PackedWeight {
  gsm::Weight w;
  Kept keep;
  std::optional<Floats> table;
  std::vector<nb::object> nested;

  void set_scales(gsm::Scales& s, const char* name, const std::string& kind, nb::handle inner) {
    s.kind = pick(kKinds, "scale", kind);
    if (s.kind != gsm::ScaleKind::nested) return;
    if (!nb::isinstance<PackedWeight>(inner)) refuse(std::string("nested ") + name + " need a weight");
    const gsm::Weight& m = nb::cast<const PackedWeight&>(inner).w;
    if (m.rows != w.row_tiles() || m.cols != w.groups())
      refuse(std::string("the matrix of ") + name + " must be " + std::to_string(w.row_tiles()) + " x " +
             std::to_string(w.groups()) + ", not " + std::to_string(m.rows) + " x " + std::to_string(m.cols));
    s.nested = &m;
    nested.push_back(nb::borrow(inner));
  }

  PackedWeight(const std::string& number, int64_t rows, int64_t cols, const nb::dict& a) {
    check_shape(rows, cols);
    w.rows = rows;
    w.cols = cols;
    const auto bytes = [&a](const char* key) -> std::optional<Bytes> {
      return a.contains(key) && !a[key].is_none() ? std::optional(want_array<Bytes>(a[key], std::string("array '") + key + "'"))
                                                  : std::nullopt;
    };
    const auto integer = [&a](const char* key, int64_t fallback) {
      return a.contains(key) ? want<int64_t>(a[key], key) : fallback;
    };
    const auto real = [&a](const char* key, double fallback) {
      // nanobind takes no integer for a float without a conversion.
      return a.contains(key) ? static_cast<float>(PyFloat_AsDouble(a[key].ptr())) : static_cast<float>(fallback);
    };
    const auto text = [&a](const char* key) {
      return a.contains(key) ? want<std::string>(a[key], key) : std::string("none");
    };
    if (number == "f32") w.number = gsm::Number::f32;
    else if (number == "f16") w.number = gsm::Number::f16;
    else if (number == "bf16") w.number = gsm::Number::bf16;
    else if (number.size() == 2 && number[0] == 'u' && number[1] >= '1' && number[1] <= '8') {
      w.number = gsm::Number::coded;
      w.bits = number[1] - '0';
    } else {
      refuse("number '" + number + "' is unknown to the kernels");
    }
    if (w.coded()) {
      w.step = real("step", 1.0);
      w.zero = real("zero", 0.0);
      if (PyErr_Occurred()) throw nb::python_error();
      // The zero of a code is a code, so that integer sums cannot overflow.
      if (!(w.step >= 0x1p-60f && w.step <= 0x1p60f) || !(w.zero / w.step >= 0 && w.zero / w.step <= 255))
        refuse("a step must be a positive number and a zero from 0 to 255 steps");
      w.group = integer("group", 0);
      w.tile_rows = integer("tile_rows", 1);
      if (w.group < 8 || w.group % 8 || w.group > (int64_t{1} << 31) + 16) refuse("a coded weight needs a group that is a multiple of 8");
      if (w.tile_rows < 1 || (w.tile_rows > 1 && w.tile_rows % gsm::kPanel) || w.tile_rows > int64_t{1} << 47)
        refuse("rows that share a scale must be 1 or a multiple of 16");
      w.zero_bits = static_cast<int>(integer("zero_bits", 0));
      if (w.zero_bits != 0 && w.zero_bits != 4 && w.zero_bits != 8) refuse("zero points have 4 or 8 bits");
      w.table_per_row = integer("table_per_row", 0) != 0;
      if (a.contains("table") && !a["table"].is_none()) {
        table = want_array<Floats>(a["table"], "array 'table'");
        w.table = table->data();
        if (static_cast<int64_t>(table->size()) * 4 < gsm::array_bytes(w).table) refuse("the table has too few values");
        if (w.zero_bits) refuse("a weight with a table has no zero points");
      } else if (w.table_per_row) {
        refuse("a table for each row was announced but not given");
      }
      const auto inner = [&a](const char* key) { return a.contains(key) ? nb::object(a[key]) : nb::none(); };
      set_scales(w.scales, "scales", text("scale"), inner("scales_nested"));
      set_scales(w.mins, "mins", text("min"), inner("mins_nested"));
      if (w.zero_bits && w.mins.kind != gsm::ScaleKind::none) refuse("a weight has zero points or minima, not both");
      if ((w.zero_bits || w.mins.kind != gsm::ScaleKind::none) && (w.step != 1.0f || w.zero != 0.0f || w.table)) refuse("zero points and minima go with plain codes alone");
    }
    const gsm::ArrayBytes need = gsm::array_bytes(w);
    w.values = take(keep, "values", bytes("values"), need.values, w.number == gsm::Number::f32 ? 4 : 2);
    w.q8 = take(keep, "q8", bytes("q8"), need.q8);
    w.q4 = take(keep, "q4", bytes("q4"), need.q4);
    w.q2 = take(keep, "q2", bytes("q2"), need.q2);
    w.q1 = take(keep, "q1", bytes("q1"), need.q1);
    w.zeros = take(keep, "zeros", bytes("zeros"), need.zeros);
    w.scales.values = take(keep, "scales", bytes("scales"), need.scales, bytes_of(w.scales.kind));
    w.mins.values = take(keep, "mins", bytes("mins"), need.mins, bytes_of(w.mins.kind));
    gsm::prepare_bytes(w);
  }
};

struct PackedMask {
  gsm::Mask m;
  Kept keep;
  std::optional<Words> starts;

  PackedMask(int64_t rows, int64_t cols, nb::handle starts_, Bytes index, const std::string& kind, Bytes values, double scale) {
    check_shape(rows, cols);
    if (cols > (int64_t{1} << 27)) refuse("a mask has at most 2^27 columns");  // times the tokens of a tile: 32 bits
    m.rows = rows;
    m.cols = cols;
    m.kind = kind == "int8" ? gsm::ScaleKind::none : pick(kKinds, "number", kind);
    const int64_t size = bytes_of(m.kind);
    if (kind == "none") refuse("the entries of a mask are f32, f16, bf16 or int8");
    if (m.kind != gsm::ScaleKind::none && m.kind != gsm::ScaleKind::f32 && m.kind != gsm::ScaleKind::f16 && m.kind != gsm::ScaleKind::bf16)
      refuse("the entries of a mask are f32, f16, bf16 or int8");
    m.scale = static_cast<float>(scale);
    m.index_bytes = cols <= 65535 ? 2 : 4;
    const int64_t panels = (rows + gsm::kPanel - 1) / gsm::kPanel;
    starts = want_array<Words>(starts_, "starts");
    if (static_cast<int64_t>(starts->size()) < panels + 1) refuse("a mask needs a start for each panel and an end");
    m.starts = starts->data();
    for (int64_t p = 0; p < panels; ++p)
      if (m.starts[p] > m.starts[p + 1]) refuse("the starts of a mask never fall");
    const int64_t slots = m.starts[panels];
    m.index = take(keep, "index", index, slots * gsm::kPanel * m.index_bytes);
    m.values = take(keep, "values", values, slots * gsm::kPanel * size, size);
    for (int64_t i = 0; i < slots * gsm::kPanel; ++i) {
      uint32_t c = 0;
      std::memcpy(&c, m.index + i * m.index_bytes, static_cast<size_t>(m.index_bytes));
      if (c >= cols && c != (m.index_bytes == 2 ? 0xFFFFu : 0xFFFFFFFFu)) refuse("a mask names a column that does not exist");
    }
  }
};

struct Input {
  gsm::InputFormat f;
  Input(const std::string& rounding, int64_t group, double fixed, double outlier) {
    f.rounding = pick(kRoundings, "input", rounding);
    f.group = group;
    f.fixed = static_cast<float>(fixed);
    f.outlier = static_cast<float>(outlier);
    if (group < 0 || group % 16 || group > (int64_t{1} << 31)) refuse("an input group must be a multiple of 16, at most 2^31");
    if (!(f.fixed >= 0) || !(f.outlier >= 0) || !std::isfinite(f.fixed) || !std::isfinite(f.outlier))
      refuse("a static scale and an outlier threshold must be positive and finite");
    if (!f.integer() && (group || fixed != 0 || outlier != 0)) refuse("float inputs have no group, scale or outliers");
  }
};

// The rows of one linear site: blocks of rows, each a sum of parts.
struct Site {
  int64_t rows, cols;  // cols: of the site's own input
  std::optional<Floats> bias;
  struct Part {
    gsm::LinearPart part;
    int64_t extra;  // which array beside the call's input it reads, or -1
  };
  struct Block {
    const uint32_t* index;
    std::vector<Part> parts;
  };
  std::vector<Block> blocks;
  std::vector<nb::object> keep;
  std::vector<bool> taken;  // rows that a block has

  Site(int64_t rows_, int64_t cols_, nb::handle bias_) : rows(rows_), cols(cols_) {
    check_shape(rows, cols);
    if (bias_.is_none()) return;
    bias = want_array<Floats>(bias_, "the bias");
    if (static_cast<int64_t>(bias->size()) != rows) refuse("the bias needs one value per row");
  }

  void block(nb::object index) {
    const uint32_t* p = nullptr;
    if (index.is_none() ? !blocks.empty() : !blocks.empty() && taken.empty()) refuse("a block of all rows stands alone");
    if (!index.is_none()) {
      const Words words = want_array<Words>(index, "the index of a block");
      if (words.size() == 0) refuse("a block needs rows");
      if (taken.empty()) taken.resize(static_cast<size_t>(rows));
      std::vector<bool> now = taken;  // two threads must not write one row
      for (size_t i = 0; i < words.size(); ++i) {
        if (words.data()[i] >= rows) refuse("a block names a row that does not exist");
        if (now[words.data()[i]]) refuse("row " + std::to_string(words.data()[i]) + " of a site is named twice");
        now[words.data()[i]] = true;
      }
      taken = std::move(now);
      p = words.data();
      keep.push_back(index);
      sizes.push_back(static_cast<int64_t>(words.size()));
    } else {
      sizes.push_back(rows);
    }
    blocks.push_back({p, {}});
  }

  // steps: ("gather", uint32 [n]), ("multiply", float32 [n]) or ("hadamard", order, signs float32 [n] or None)
  void part(nb::object matrix, const Input& input, int64_t extra, int64_t extra_cols, const nb::list& steps) {
    if (blocks.empty()) refuse("a part needs a block of rows first");
    Part p;
    p.extra = extra;
    p.part.input = input.f;
    if (nb::isinstance<PackedWeight>(matrix)) p.part.weight = &nb::cast<const PackedWeight&>(matrix).w;
    else if (nb::isinstance<PackedMask>(matrix)) p.part.mask = &nb::cast<const PackedMask&>(matrix).m;
    else refuse("a part is a Weight or a Mask");
    int64_t n = p.part.source.cols = extra >= 0 ? extra_cols : cols;
    if (n < 1 || n > int64_t{1} << 31) refuse("a part reads from 1 to 2^31 columns");
    std::vector<nb::object> used;
    for (nb::handle step : steps) {
      const auto t = want<nb::tuple>(step, "a step of a part");
      if (nb::len(t) < 2) refuse("a step of a part is a name and its arguments");
      const auto kind = want<std::string>(t[0], "the name of a step");
      gsm::Transform f;
      if (kind == "gather") {
        const Words index = want_array<Words>(t[1], "the index of a gather");
        for (size_t i = 0; i < index.size(); ++i)
          if (index.data()[i] >= static_cast<uint64_t>(n)) refuse("a gather names a column that does not exist");
        f.kind = gsm::Transform::gather;
        f.index = index.data();
        n = f.n = static_cast<int64_t>(index.size());
        if (n == 0) refuse("a gather needs columns");
        used.push_back(nb::borrow(t[1]));
      } else if (kind == "multiply" || kind == "hadamard") {
        f.kind = kind == "multiply" ? gsm::Transform::multiply : gsm::Transform::hadamard;
        const size_t at = kind == "multiply" ? 1 : 2;
        if (nb::len(t) <= at) refuse("a hadamard step needs its order and signs");
        if (!t[at].is_none()) {
          const Floats factors = want_array<Floats>(t[at], "the factors of a step");
          if (static_cast<int64_t>(factors.size()) < n) refuse("a transform needs a factor for each column");
          f.factors = factors.data();
          used.push_back(nb::borrow(t[at]));
        } else if (at == 1) {
          refuse("a multiply needs factors");
        }
        if (f.kind == gsm::Transform::hadamard) {
          f.order = want<int64_t>(t[1], "the order of a hadamard step");
          if (!gsm::hadamard(f.order) || n % f.order) refuse("there is no Hadamard matrix of order " + std::to_string(f.order) + " for " + std::to_string(n) + " columns");
        }
      } else {
        refuse("transform '" + kind + "' is unknown to the kernels");
      }
      p.part.source.steps.push_back(f);
    }
    if (p.part.cols() != n)
      refuse("a part of " + std::to_string(p.part.cols()) + " columns is given " + std::to_string(n));
    if (p.part.rows() != sizes.back())
      refuse("a part has " + std::to_string(p.part.rows()) + " rows, its block " + std::to_string(sizes.back()));
    for (nb::object& array : used) keep.push_back(std::move(array));
    keep.push_back(std::move(matrix));
    blocks.back().parts.push_back(std::move(p));
  }

  std::vector<int64_t> sizes;
};

void linear(nb::handle x_, const std::vector<const Site*>& sites, const nb::list& outs, const nb::list& extras,
            nb::handle gain_, double eps, const std::string& epilogue) {
  const gsm::Array<const float> x(x_, "x");
  x.need_dims(2);
  gsm::LinearSpec spec;
  spec.x = x.data();
  spec.cols = x.size(1);
  spec.epilogue = pick(kEpilogues, "epilogue", epilogue);
  const bool gated = spec.epilogue > gsm::Epilogue::add;
  if (sites.empty() || nb::len(outs) != (gated ? 1 : sites.size()) || (gated && sites.size() != 2))
    refuse("a call needs sites and an output for each; with a gate two sites and one output");
  if (!gain_.is_none()) {
    const gsm::Array<const float> gain(gain_, "gain");
    gain.need_shape({x.size(1)});
    spec.gain = gain.data();
    spec.eps = static_cast<float>(eps);
    if (!(eps >= 0.0) || std::isinf(eps)) refuse("eps must be finite and at least 0");
  }
  if (nb::len(extras) != 0 && nb::len(extras) != sites.size()) refuse("extra inputs are listed for each site");
  for (size_t i = 0; i < sites.size(); ++i) {
    if (!sites[i]) throw nb::type_error("a site is None");
    const Site& site = *sites[i];
    gsm::keep_if_recording(nb::find(&site));
    if (site.cols != x.size(1))
      refuse("the input has " + std::to_string(x.size(1)) + " columns, the site " + std::to_string(site.cols));
    std::vector<const float*> extra;
    std::vector<int64_t> extra_cols;
    if (nb::len(extras))
      for (nb::handle e : want<nb::list>(extras[i], "the extra inputs of a site")) {
        const gsm::Array<const float> array(e, "extra");
        array.need_dims(2);
        if (array.size(0) != x.size(0)) refuse("an extra input has another number of tokens");
        extra.push_back(array.data());
        extra_cols.push_back(array.size(1));
      }
    float* out = nullptr;
    if (!gated || i == 0) {
      const gsm::Array<float> array(outs[i], "out");
      array.need_shape({x.size(0), site.rows});
      out = array.data();
    }
    if (gated && (site.blocks.size() != 1 || site.blocks[0].index || site.rows != sites[0]->rows))
      refuse("a gate needs two sites of the same rows, each in one block");
    int64_t computed = 0;
    for (const int64_t n : site.sizes) computed += n;
    if (computed != site.rows)
      refuse("the blocks of a site of " + std::to_string(site.rows) + " rows hold " + std::to_string(computed));
    for (const Site::Block& block : site.blocks) {
      gsm::LinearSite s;
      s.index = block.index;
      s.bias = site.bias ? site.bias->data() : nullptr;
      s.out = out;
      s.ld = site.rows;
      if (block.parts.empty()) refuse("a block of rows has no parts");
      for (const Site::Part& part : block.parts) {
        gsm::LinearPart p = part.part;
        if (part.extra >= 0) {
          if (part.extra >= static_cast<int64_t>(extra.size()) || extra_cols[static_cast<size_t>(part.extra)] != p.source.cols)
            refuse("a part reads an extra input that was not given, or of another width");
          p.source.x = extra[static_cast<size_t>(part.extra)];
        }
        s.parts.push_back(std::move(p));
      }
      spec.sites.push_back(std::move(s));
    }
  }
  const int64_t tokens = x.size(0);
  nb::gil_scoped_release release;
  gsm::submit(gsm::linear_op(std::move(spec)), tokens);
}

struct EmbedOp final : gsm::Op {
  const gsm::Weight* weight;
  const int32_t* ids;
  float* out;
  void check(int64_t rows) const override {
    for (int64_t m = 0; m < rows; ++m)
      if (ids[m] < 0 || ids[m] >= weight->rows)
        refuse("ids[" + std::to_string(m) + "] is " + std::to_string(ids[m]) + ", outside of a matrix of " +
               std::to_string(weight->rows) + " rows");
  }
  bool alone(int64_t rows, int) const override { return rows * weight->cols * 8 < gsm::kTeamWork; }
  void run(int64_t rows, int, int thread, int threads) override {
    const gsm::Range r = gsm::share(rows, thread, threads);
    for (int64_t m = r.begin; m < r.end; ++m) gsm::decode_row(*weight, ids[m], out + m * weight->cols);
  }
};

void embed(const PackedWeight& weight, nb::handle ids_, nb::handle out_) {
  const gsm::Array<const int32_t> ids(ids_, "ids");
  const gsm::Array<float> out(out_, "out");
  ids.need_dims(1);
  out.need_shape({ids.size(0), weight.w.cols});
  gsm::keep_if_recording(nb::find(&weight));
  auto op = std::make_unique<EmbedOp>();
  op->weight = &weight.w;
  op->ids = ids.data();
  op->out = out.data();
  nb::gil_scoped_release release;
  gsm::submit(std::move(op), ids.size(0));
}

void decode_rows(const PackedWeight& weight, Ids ids, RowsOut out) {
  gsm::refuse_if_recording("decode_rows");
  const auto n = static_cast<int64_t>(ids.shape(0));
  if (static_cast<int64_t>(out.shape(0)) != n || static_cast<int64_t>(out.shape(1)) != weight.w.cols)
    refuse("the output does not have the shape [ids, columns]");
  const int64_t* p = ids.data();
  for (int64_t i = 0; i < n; ++i)
    if (p[i] < 0 || p[i] >= weight.w.rows)
      refuse("row " + std::to_string(p[i]) + " is outside a matrix of " + std::to_string(weight.w.rows) + " rows");
  float* y = out.data();
  nb::gil_scoped_release release;
  gsm::decode_rows(weight.w, p, n, y);
}

}  // namespace

// Arrays are never converted: an output of the wrong type would be filled in a copy that nobody sees.
void bind_linear(nb::module_& m) {
  nb::class_<PackedWeight>(m, "Weight")
      .def(nb::init<const std::string&, int64_t, int64_t, const nb::dict&>(), "number"_a, "rows"_a, "cols"_a, "arrays"_a)
      .def_prop_ro("rows", [](const PackedWeight& p) { return p.w.rows; })
      .def_prop_ro("cols", [](const PackedWeight& p) { return p.w.cols; })
      .def("path", [](const PackedWeight& p, const Input& input) {
        const char* why = nullptr;
        const gsm::Path path = gsm::linear_path(p.w, input.f, &why);
        const char* name = path == gsm::Path::bytes ? "int8" : path == gsm::Path::pairs ? "bf16" : "f32";
        return std::make_pair(std::string(name), why ? std::optional<std::string>(why) : std::nullopt);
      }, "input"_a);
  nb::class_<PackedMask>(m, "Mask")
      .def(nb::init<int64_t, int64_t, nb::handle, Bytes, const std::string&, Bytes, double>(), "rows"_a, "cols"_a,
           "starts"_a, "index"_a.noconvert(), "kind"_a, "values"_a.noconvert(), "scale"_a)
      .def_prop_ro("rows", [](const PackedMask& p) { return p.m.rows; })
      .def_prop_ro("cols", [](const PackedMask& p) { return p.m.cols; });
  nb::class_<Input>(m, "Input")
      .def(nb::init<const std::string&, int64_t, double, double>(), "rounding"_a, "group"_a, "fixed"_a, "outlier"_a);
  nb::class_<Site>(m, "Site")
      .def(nb::init<int64_t, int64_t, nb::handle>(), "rows"_a, "cols"_a, "bias"_a.none())
      .def("block", &Site::block, "index"_a.none())
      .def("part", &Site::part, "matrix"_a, "input"_a, "extra"_a, "extra_cols"_a, "steps"_a)
      .def_prop_ro("rows", [](const Site& s) { return s.rows; })
      .def_prop_ro("cols", [](const Site& s) { return s.cols; })
      .def_prop_ro("blocks", [](const Site& s) { return s.blocks.size(); });
  m.def("linear", &linear, "x"_a, "sites"_a, "outs"_a, "extras"_a, "gain"_a.none(), "eps"_a, "epilogue"_a);
  m.def("embed", &embed, "weight"_a, "ids"_a, "out"_a);
  m.def("decode_rows", &decode_rows, "weight"_a, "ids"_a.noconvert(), "out"_a.noconvert());
}
