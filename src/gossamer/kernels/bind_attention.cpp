#include <cmath>
#include <optional>

#include "arena.h"
#include "attention.h"
#include "bind.h"
#include "op.h"

namespace nb = nanobind;
using namespace nb::literals;
using gsm::Array;
using gsm::Buffer;
using gsm::refuse;

namespace {

// The checked arrays of one layer's pool.
class Pool {
 public:
  Pool(nb::handle K, nb::handle V, nb::handle k_scale, nb::handle v_scale, bool writable)
      : K_(K, "K", writable), V_(V, "V", writable) {
    if (!k_scale.is_none()) k_scale_.emplace(k_scale, "k_scale", writable);
    if (!v_scale.is_none()) v_scale_.emplace(v_scale, "v_scale", writable);
    pool.type = type();
    if (V_.format() != K_.format()) refuse("V must hold values of the same type as K");
    const int64_t pack = gsm::kv_pack(pool.type), per_unit = gsm::kv_unit(pool.type) / item();
    const bool units = per_unit > 1;
    K_.need_dims(units ? 5 : 4);
    V_.need_dims(units ? 5 : 4);
    blocks = K_.size(0);
    pool.heads = K_.size(1);
    pool.block = K_.size(3);
    pool.dim = V_.size(3);
    if (pool.heads < 1 || pool.block < 16 || pool.block % 16)
      refuse("K must have the shape [blocks, heads, units of dimensions, block, ...] with a block size that is a "
             "multiple of 16, not " + K_.shape());
    if (pool.dim < 1 || pool.dim > gsm::kMaxHeadDim)
      refuse("V must have from 1 to " + std::to_string(gsm::kMaxHeadDim) + " dimensions a head in its axis 3, not " +
             V_.shape());
    const int64_t steps = (pool.dim + pack - 1) / pack;
    if (units) {
      K_.need_shape({blocks, pool.heads, steps, pool.block, per_unit});
      V_.need_shape({blocks, pool.heads, pool.block / pack, pool.dim, per_unit});
    } else {
      K_.need_shape({blocks, pool.heads, steps, pool.block});
      V_.need_shape({blocks, pool.heads, pool.block, pool.dim});
    }
    pool.k = K_.data();
    pool.v = V_.data();
    pool.k_scale = scale(k_scale_, "k_scale");
    pool.v_scale = scale(v_scale_, "v_scale");
  }

  gsm::KvPool pool;
  int64_t blocks;

 private:
  gsm::KvType type() const {
    switch (K_.format()) {
      case 'f': return gsm::KvType::f32;
      case 'e': return gsm::KvType::f16;
      case 'H': return gsm::KvType::bf16;
      case 'B': break;
      default: refuse("K must hold float32, float16, bfloat16 (as uint16) values or codes (as uint8)");
    }
    if (!k_scale_) refuse("k_scale must be given for a pool of codes");
    if (k_scale_->format() == 'f') return gsm::KvType::int8;
    if (k_scale_->format() == 'e') return gsm::KvType::uint4;
    refuse("k_scale must hold float32 values (int8 codes) or float16 values (uint4 codes)");
  }
  int64_t item() const { return K_.format() == 'f' ? 4 : K_.format() == 'B' ? 1 : 2; }

  void* scale(const std::optional<Buffer>& array, const char* name) const {
    const bool eight = pool.type == gsm::KvType::int8, four = pool.type == gsm::KvType::uint4;
    if (array.has_value() != (eight || four))
      refuse(std::string(name) +
             (eight || four ? " must be given for a pool of codes" : " must be None unless the pool holds codes"));
    if (!array) return nullptr;
    if (array->format() != (eight ? 'f' : 'e'))
      refuse(std::string(name) + " must hold values of the same type as k_scale");
    if (eight) {
      array->need_shape({blocks, pool.heads, pool.block});
    } else {
      array->need_shape({blocks, pool.heads, 2, pool.block});
    }
    return array->data();
  }

  const Buffer K_, V_;
  std::optional<Buffer> k_scale_, v_scale_;
};

struct KvWriteOp final : gsm::Op {
  gsm::KvWrite w;
  int64_t sequences, blocks;

  gsm::KvWrite of(int64_t rows) const {
    gsm::KvWrite some = w;
    some.tokens = rows;
    return some;
  }
  void check(int64_t rows) const override { gsm::check_kv_write(of(rows), sequences, blocks); }
  bool alone(int64_t rows, int) const override { return rows * w.pool.heads * w.pool.dim * 8 < gsm::kTeamWork; }
  void run(int64_t rows, int phase, int thread, int threads) override { gsm::kv_write_part(of(rows), phase, thread, threads); }
};

struct AttentionOp final : gsm::Op {
  gsm::Attention a;
  int64_t sequences, blocks;
  mutable float* scratch = nullptr;  // given anew for each run

  gsm::Attention of(int64_t rows) const {
    gsm::Attention some = a;
    some.tokens = rows;
    some.scratch = scratch;
    return some;
  }
  void check(int64_t rows) const override {
    gsm::check_attention(of(rows), sequences, blocks);
    const int64_t floats = gsm::team_threads() * gsm::attention_scratch(of(rows));
    scratch = reinterpret_cast<float*>(gsm::arena(floats * static_cast<int64_t>(sizeof(float))));
  }
  int phases(int64_t rows) const override { return gsm::attention_phases(of(rows)); }
  void run(int64_t rows, int phase, int thread, int threads) override { gsm::attention_part(of(rows), phase, thread, threads); }
};

void kv_write(nb::handle k_, nb::handle v_, nb::handle positions_, nb::handle sequence_, nb::handle tables_,
              nb::handle K, nb::handle V, nb::handle k_scale, nb::handle v_scale) {
  const Array<const float> k(k_, "k"), v(v_, "v");
  const Array<const int32_t> positions(positions_, "positions"), sequence(sequence_, "sequence"),
      tables(tables_, "tables");
  const Pool p(K, V, k_scale, v_scale, true);
  k.need_dims(3);
  const int64_t tokens = k.size(0);
  k.need_shape({tokens, p.pool.heads, p.pool.dim});
  v.need_shape({tokens, p.pool.heads, p.pool.dim});
  positions.need_shape({tokens});
  sequence.need_shape({tokens});
  tables.need_dims(2);
  auto op = std::make_unique<KvWriteOp>();
  op->w = {k.data(), v.data(), positions.data(), sequence.data(), tables.data(), tables.size(1), tokens, p.pool};
  op->sequences = tables.size(0);
  op->blocks = p.blocks;
  nb::gil_scoped_release free;
  gsm::submit(std::move(op), tokens);
}

void attention(nb::handle q_, nb::handle positions_, nb::handle sequence_, nb::handle tables_, nb::handle K,
               nb::handle V, nb::handle k_scale, nb::handle v_scale, nb::handle out_, nb::handle lse_, double scale,
               int64_t window, double softcap) {
  const Array<const float> q(q_, "q");
  const Array<const int32_t> positions(positions_, "positions"), sequence(sequence_, "sequence"),
      tables(tables_, "tables");
  const Pool p(K, V, k_scale, v_scale, false);
  const Array<float> out(out_, "out");
  std::optional<Array<float>> lse;
  if (!lse_.is_none()) lse.emplace(lse_, "lse");
  q.need_dims(3);
  const int64_t tokens = q.size(0), heads = q.size(1);
  q.need_shape({tokens, heads, p.pool.dim});
  if (heads < 1 || heads % p.pool.heads)
    refuse("q has " + std::to_string(heads) + " heads, which is no multiple of the " + std::to_string(p.pool.heads) +
           " heads of the pool");
  out.need_shape({tokens, heads, p.pool.dim});
  if (lse) lse->need_shape({tokens, heads});
  positions.need_shape({tokens});
  sequence.need_shape({tokens});
  tables.need_dims(2);
  if (!std::isfinite(scale)) refuse("scale must be finite");
  if (window < 0) refuse("window must be at least 0 (0: no window)");
  const float cap = static_cast<float>(softcap);
  if (!(cap >= 0.0f) || std::isinf(cap)) refuse("softcap must be finite and at least 0 (0: none)");
  auto op = std::make_unique<AttentionOp>();
  op->a = {q.data(), positions.data(), sequence.data(), tables.data(), tables.size(1),
           tokens,   heads,            p.pool,          static_cast<float>(scale),
           window,   cap,              out.data(),      lse ? lse->data() : nullptr};
  op->sequences = tables.size(0);
  op->blocks = p.blocks;
  nb::gil_scoped_release free;
  gsm::submit(std::move(op), tokens);
}

}  // namespace

void bind_attention(nb::module_& m) {
  m.def("kv_write", &kv_write, "k"_a, "v"_a, "positions"_a, "sequence"_a, "tables"_a, "K"_a, "V"_a,
        "k_scale"_a.none() = nb::none(), "v_scale"_a.none() = nb::none());
  m.def("attention", &attention, "q"_a, "positions"_a, "sequence"_a, "tables"_a, "K"_a, "V"_a,
        "k_scale"_a.none(), "v_scale"_a.none(), "out"_a, "lse"_a.none(), "scale"_a, "window"_a, "softcap"_a);
}
