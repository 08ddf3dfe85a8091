#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <map>
#include <optional>
#include <string>
#include <vector>

#include "bind.h"
#include "linear.h"
#include "program_adapters.h"

namespace nb = nanobind;

namespace {

using Bytes = nb::ndarray<const uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Floats = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Rows = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using RowsOut = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Ids = nb::ndarray<const int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

template <class E> E pick(const std::map<std::string, E>& table, const std::string& what, const std::string& name) {
  const auto it = table.find(name);
  if (it == table.end()) throw nb::value_error((what + " '" + name + "' is unknown to the kernels").c_str());
  return it->second;
}

const std::map<std::string, gsm::Code> kCodes{{"f32", gsm::Code::f32}, {"f16", gsm::Code::f16}, {"bf16", gsm::Code::bf16},
                                              {"u8", gsm::Code::u8},   {"u5", gsm::Code::u5},   {"u4", gsm::Code::u4}};
const std::map<std::string, gsm::Scale> kScales{
    {"none", gsm::Scale::none}, {"f32", gsm::Scale::f32}, {"f16", gsm::Scale::f16}, {"bf16", gsm::Scale::bf16}};
const std::map<std::string, gsm::Offset> kOffsets{
    {"symmetric", gsm::Offset::symmetric}, {"zero_u4", gsm::Offset::zero_u4}, {"zero_u8", gsm::Offset::zero_u8},
    {"min_f16", gsm::Offset::min_f16},     {"min_f32", gsm::Offset::min_f32}, {"min_bf16", gsm::Offset::min_bf16}};
const std::map<std::string, gsm::Input> kInputs{
    {"f32", gsm::Input::f32}, {"bf16", gsm::Input::bf16}, {"int8/token", gsm::Input::int8_token}};

// A packed matrix and the arrays it reads from, which it keeps alive.
struct PackedWeight {
  gsm::Weight w;
  std::vector<Bytes> keep;
  std::optional<Floats> bias;

  PackedWeight(const std::string& code, int64_t rows, int64_t cols, Bytes codes, std::optional<Bytes> high,
               const std::string& scale, std::optional<Bytes> scales, const std::string& offset,
               std::optional<Bytes> offsets, int64_t group, std::optional<Floats> bias_) {
    w.code = pick(kCodes, "code", code);
    w.scale = pick(kScales, "scale", scale);
    w.offset = pick(kOffsets, "offset", offset);
    // The upper limits keep every byte count far from overflow, so that the checks of `take` hold.
    if (rows < 1 || cols < 1 || cols > (int64_t{1} << 31) || rows > (int64_t{1} << 46) / cols)
      throw nb::value_error("a weight needs at least one row and one column, and at most 2^46 elements");
    w.rows = rows;
    w.cols = cols;
    w.group = group;
    if (w.coded() && (group < 8 || group % 8 || group > (int64_t{1} << 31) + 8 || w.scale == gsm::Scale::none))
      throw nb::value_error("a coded weight needs a scale and a group that is a multiple of 8");
    if (!w.coded() && (w.scale != gsm::Scale::none || w.offset != gsm::Offset::symmetric))
      throw nb::value_error("a plain weight has no scale and no offset");
    w.codes = take("codes", codes, gsm::panel_bytes_codes(w));
    w.high = take("high", high, gsm::panel_bytes_high(w));
    w.scales = take("scales", scales, gsm::panel_bytes_scales(w));
    w.offsets = take("offsets", offsets, gsm::panel_bytes_offsets(w));
    if (bias_) {
      if (static_cast<int64_t>(bias_->size()) != rows) throw nb::value_error("the bias needs one value per row");
      w.bias = bias_->data();
      bias = std::move(bias_);
    }
  }

  const uint8_t* take(const char* name, const std::optional<Bytes>& array, int64_t panel_bytes) {
    if (panel_bytes == 0) return nullptr;
    const int64_t need = panel_bytes * w.panels();
    if (!array || static_cast<int64_t>(array->size()) < need)
      throw nb::value_error((std::string("array '") + name + "' needs " + std::to_string(need) + " bytes").c_str());
    keep.push_back(*array);
    return keep.back().data();
  }
};

// Owns its views: nanobind's arrays may be given back without the interpreter lock.
struct LinearCall final : gsm::CallOp {
  Rows x;
  std::vector<RowsOut> outs;
  std::vector<const gsm::Weight*> weights;
  std::vector<float*> ys;
  gsm::Input input;
  void run(int64_t rows, int, int, int) override {
    gsm::linear(x.data(), rows, weights.data(), ys.data(), static_cast<int>(weights.size()), input);
  }
};

struct EmbedOp final : gsm::Op {
  const gsm::Weight* weight;
  const int32_t* ids;
  float* out;
  void check(int64_t rows) const override {
    for (int64_t m = 0; m < rows; ++m)
      if (ids[m] < 0 || ids[m] >= weight->rows)
        gsm::refuse("ids[" + std::to_string(m) + "] is " + std::to_string(ids[m]) + ", outside of a matrix of " +
                    std::to_string(weight->rows) + " rows");
  }
  bool alone(int64_t rows, int) const override { return rows * weight->cols * 8 < gsm::kTeamWork; }
  void run(int64_t rows, int, int thread, int threads) override {
    const gsm::Range r = gsm::share(rows, thread, threads);
    for (int64_t m = r.begin; m < r.end; ++m) {
      const int64_t id = ids[m];
      gsm::decode_rows(*weight, &id, 1, out + m * weight->cols);
    }
  }
};

void linear(Rows x, const std::vector<const PackedWeight*>& weights, const std::vector<RowsOut>& outs,
            const std::string& input) {
  const gsm::Input kind = pick(kInputs, "input format", input);
  if (weights.size() != outs.size()) throw nb::value_error("one output is needed per weight");
  auto op = std::make_unique<LinearCall>();
  op->input = kind;
  for (size_t i = 0; i < weights.size(); ++i) {
    if (!weights[i]) throw nb::type_error("a weight is None");
    const gsm::Weight& w = weights[i]->w;
    if (static_cast<int64_t>(x.shape(1)) != w.cols)
      throw nb::value_error(("the input has " + std::to_string(x.shape(1)) + " columns, the weight " +
                             std::to_string(w.cols)).c_str());
    if (outs[i].shape(0) != x.shape(0) || static_cast<int64_t>(outs[i].shape(1)) != w.rows)
      throw nb::value_error("an output does not have the shape [tokens, rows]");
    if (const char* why = gsm::refuse(w, kind)) throw nb::value_error(why);
    gsm::keep_if_recording(nb::find(weights[i]));
    op->weights.push_back(&w);
    op->ys.push_back(outs[i].data());
  }
  op->x = x;
  op->outs = outs;
  const auto tokens = static_cast<int64_t>(x.shape(0));
  nb::gil_scoped_release release;
  gsm::submit(std::move(op), tokens);
}

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
    throw nb::value_error("the output does not have the shape [ids, columns]");
  const int64_t* p = ids.data();
  for (int64_t i = 0; i < n; ++i)
    if (p[i] < 0 || p[i] >= weight.w.rows)
      throw nb::value_error(("row " + std::to_string(p[i]) + " is outside a matrix of " +
                             std::to_string(weight.w.rows) + " rows").c_str());
  float* y = out.data();
  nb::gil_scoped_release release;
  gsm::decode_rows(weight.w, p, n, y);
}

}  // namespace

// Arrays are never converted: an output of the wrong type would be filled in a copy that nobody sees.
void bind_linear(nb::module_& m) {
  nb::class_<PackedWeight>(m, "Weight")
      .def(nb::init<const std::string&, int64_t, int64_t, Bytes, std::optional<Bytes>, const std::string&,
                    std::optional<Bytes>, const std::string&, std::optional<Bytes>, int64_t, std::optional<Floats>>(),
           nb::arg("code"), nb::arg("rows"), nb::arg("cols"), nb::arg("codes").noconvert(),
           nb::arg("high").none().noconvert(), nb::arg("scale"), nb::arg("scales").none().noconvert(),
           nb::arg("offset"), nb::arg("offsets").none().noconvert(), nb::arg("group"),
           nb::arg("bias").none().noconvert())
      .def_prop_ro("rows", [](const PackedWeight& p) { return p.w.rows; })
      .def_prop_ro("cols", [](const PackedWeight& p) { return p.w.cols; })
      .def("refuse", [](const PackedWeight& p, const std::string& input) -> std::optional<std::string> {
        const char* why = gsm::refuse(p.w, pick(kInputs, "input format", input));
        return why ? std::optional<std::string>(why) : std::nullopt;
      });
  m.def("linear", &linear, nb::arg("x").noconvert(), nb::arg("weights"), nb::arg("outs").noconvert(), nb::arg("input"));
  m.def("embed", &embed, nb::arg("weight"), nb::arg("ids"), nb::arg("out"));
  m.def("decode_rows", &decode_rows, nb::arg("weight"), nb::arg("ids").noconvert(), nb::arg("out").noconvert());
}
