#include <nanobind/stl/string.h>

#include <cmath>

#include "bind.h"
#include "logits.h"
#include "op.h"
#include "probe.h"
#include "rows.h"
#include "sample.h"

namespace nb = nanobind;
using namespace nb::literals;
using gsm::Array;
using gsm::refuse;

namespace {

void run_or_record(std::unique_ptr<gsm::Op> op, int64_t rows) {
  nb::gil_scoped_release free;
  gsm::submit(std::move(op), rows);
}

void rmsnorm(nb::handle x_, nb::handle gain_, double eps, nb::handle out_) {
  const Array<const float> x(x_, "x"), gain(gain_, "gain");
  const Array<float> out(out_, "out");
  x.need_dims(2);
  gain.need_shape({x.size(1)});
  out.need_shape({x.size(0), x.size(1)});
  if (!(eps >= 0.0) || std::isinf(eps)) refuse("eps must be finite and at least 0");
  run_or_record(gsm::rmsnorm_op(x.data(), gain.data(), static_cast<float>(eps), out.data(), x.size(1)), x.size(0));
}

void rope(nb::handle q_, nb::handle k_, nb::handle cos_, nb::handle sin_) {
  const Array<float> q(q_, "q"), k(k_, "k");
  const Array<const float> cos(cos_, "cos"), sin(sin_, "sin");
  q.need_dims(3);
  k.need_dims(3);
  k.need_shape({q.size(0), k.size(1), q.size(2)});
  cos.need_dims(2);
  cos.need_shape({q.size(0), cos.size(1)});
  sin.need_shape({q.size(0), cos.size(1)});
  if (2 * cos.size(1) > q.size(2))
    refuse("cos has " + std::to_string(cos.size(1)) + " angles, more than half of the " + std::to_string(q.size(2)) +
           " dimensions of q");
  const gsm::Rope r{q.data(), k.data(), cos.data(), sin.data(), q.size(1), k.size(1), q.size(2), cos.size(1)};
  run_or_record(gsm::rope_op(r), q.size(0));
}

void angles(nb::handle positions_, nb::handle frequencies_, nb::handle cos_, nb::handle sin_) {
  const Array<const int32_t> positions(positions_, "positions");
  const Array<const float> frequencies(frequencies_, "frequencies");
  const Array<float> cos(cos_, "cos"), sin(sin_, "sin");
  positions.need_dims(1);
  frequencies.need_dims(1);
  cos.need_shape({positions.size(0), frequencies.size(0)});
  sin.need_shape({positions.size(0), frequencies.size(0)});
  run_or_record(gsm::angles_op(positions.data(), frequencies.data(), cos.data(), sin.data(), frequencies.size(0)),
                positions.size(0));
}

void gated(const char* kind, nb::handle gate_, nb::handle up_, nb::handle out_) {
  const std::string name = kind;
  gsm::Gate which;
  if (name == "silu") which = gsm::Gate::silu;
  else if (name == "gelu_tanh") which = gsm::Gate::gelu_tanh;
  else if (name == "gelu") which = gsm::Gate::gelu;
  else refuse("activation '" + name + "' is unknown; it must be one of silu, gelu_tanh, gelu");
  const Array<const float> gate(gate_, "gate"), up(up_, "up");
  const Array<float> out(out_, "out");
  gate.need_dims(2);
  up.need_shape({gate.size(0), gate.size(1)});
  out.need_shape({gate.size(0), gate.size(1)});
  run_or_record(gsm::gated_op(which, gate.data(), up.data(), out.data(), gate.size(1)), gate.size(0));
}

void add(nb::handle x_, nb::handle y_) {
  const Array<float> x(x_, "x");
  const Array<const float> y(y_, "y");
  x.need_dims(2);
  y.need_shape({x.size(0), x.size(1)});
  run_or_record(gsm::add_op(x.data(), y.data(), x.size(1)), x.size(0));
}

void scale(nb::handle x_, double s) {
  const Array<float> x(x_, "x");
  x.need_dims(2);
  run_or_record(gsm::scale_op(x.data(), static_cast<float>(s), x.size(1)), x.size(0));
}

void softcap(nb::handle x_, double cap) {
  const Array<float> x(x_, "x");
  const float c = static_cast<float>(cap);
  x.need_dims(2);
  if (!(c > 0.0f) || std::isinf(c)) refuse("cap must be finite and above 0");
  run_or_record(gsm::softcap_op(x.data(), c, x.size(1)), x.size(0));
}

void need_ids(const Array<const int32_t>& ids, int64_t vocab) {
  for (int64_t i = 0; i < ids.count(); ++i)
    if (ids.data()[i] < 0 || ids.data()[i] >= vocab)
      refuse(ids.name() + " holds the token " + std::to_string(ids.data()[i]) + ", outside of the " +
             std::to_string(vocab) + " of the vocabulary");
}

nb::tuple sample(nb::handle logits_, nb::handle recent_, double temperature, int64_t top_k, double top_p, double min_p,
                 double repeat_penalty, uint64_t seed, uint64_t step) {
  gsm::refuse_if_recording("sample");
  const Array<const float> logits(logits_, "logits");
  const Array<const int32_t> recent(recent_, "recent");
  logits.need_dims(1);
  recent.need_dims(1);
  const int64_t vocab = logits.size(0);
  if (vocab < 1 || vocab > INT32_MAX) refuse("logits must hold from 1 to 2147483647 values");
  need_ids(recent, vocab);
  gsm::Sampling how;
  how.temperature = static_cast<float>(temperature);
  how.repeat_penalty = static_cast<float>(repeat_penalty);
  if (!(temperature >= 0.0) || std::isinf(how.temperature)) refuse("temperature must be finite and at least 0");
  if (!(how.repeat_penalty > 0.0f) || std::isinf(how.repeat_penalty))
    refuse("repeat_penalty must be finite and above 0");
  if (top_k < 0) refuse("top_k must be at least 0 (0 keeps every token)");
  if (!(top_p > 0.0 && top_p <= 1.0)) refuse("top_p must be above 0 and at most 1");
  if (!(min_p >= 0.0 && min_p <= 1.0)) refuse("min_p must lie between 0 and 1");
  how.top_k = top_k;
  how.top_p = top_p;
  how.min_p = min_p;
  how.seed = seed;
  how.step = step;
  gsm::Sampled drawn;
  {
    nb::gil_scoped_release free;
    drawn = gsm::sample(logits.data(), vocab, recent.data(), recent.count(), how);
  }
  return nb::make_tuple(drawn.token, drawn.logprob);
}

void need_vocab(const gsm::Buffer& logits) {
  if (logits.size(1) < 1 || logits.size(1) > INT32_MAX)
    refuse(logits.name() + " must have from 1 to 2147483647 columns");
}

void nll(nb::handle logits_, nb::handle targets_, nb::handle out_) {
  gsm::refuse_if_recording("nll");
  const Array<const float> logits(logits_, "logits");
  const Array<const int32_t> targets(targets_, "targets");
  const Array<double> out(out_, "out");
  logits.need_dims(2);
  targets.need_shape({logits.size(0)});
  out.need_shape({logits.size(0)});
  need_vocab(logits);
  need_ids(targets, logits.size(1));
  nb::gil_scoped_release free;
  gsm::nll(logits.data(), targets.data(), out.data(), logits.size(0), logits.size(1));
}

void divergence(nb::handle base_, nb::handle other_, nb::handle kl_, nb::handle same_top_) {
  gsm::refuse_if_recording("divergence");
  const Array<const float> base(base_, "base"), other(other_, "other");
  const Array<double> kl(kl_, "kl");
  const Array<uint8_t> same_top(same_top_, "same_top");
  base.need_dims(2);
  other.need_shape({base.size(0), base.size(1)});
  kl.need_shape({base.size(0)});
  same_top.need_shape({base.size(0)});
  need_vocab(base);
  nb::gil_scoped_release free;
  gsm::divergence(base.data(), other.data(), kl.data(), same_top.data(), base.size(0), base.size(1));
}

}  // namespace

void bind_rows(nb::module_& m) {
  m.def("rmsnorm", &rmsnorm, "x"_a, "gain"_a, "eps"_a, "out"_a);
  m.def("rope", &rope, "q"_a, "k"_a, "cos"_a, "sin"_a);
  m.def("angles", &angles, "positions"_a, "frequencies"_a, "cos"_a, "sin"_a);
  m.def("gated", &gated, "kind"_a, "gate"_a, "up"_a, "out"_a);
  m.def("add", &add, "x"_a, "y"_a);
  m.def("scale", &scale, "x"_a, "s"_a);
  m.def("softcap", &softcap, "x"_a, "cap"_a);
  m.def("sample", &sample, "logits"_a, "recent"_a, "temperature"_a, "top_k"_a, "top_p"_a, "min_p"_a, "repeat_penalty"_a,
        "seed"_a, "step"_a);
  m.def("nll", &nll, "logits"_a, "targets"_a, "out"_a);
  m.def("divergence", &divergence, "base"_a, "other"_a, "kl"_a, "same_top"_a);
  m.def("read_bandwidth", &gsm::read_bandwidth, "bytes"_a, "seconds"_a, nb::call_guard<nb::gil_scoped_release>());
  m.def("dot_peak", &gsm::dot_peak, "kind"_a, "seconds"_a, nb::call_guard<nb::gil_scoped_release>());
  m.def("probe_release", &gsm::probe_release, nb::call_guard<nb::gil_scoped_release>());
}
