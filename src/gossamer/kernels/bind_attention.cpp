#include <algorithm>
#include <cmath>
#include <optional>

#include "attention.h"
#include "bind.h"
#include "program_adapters.h"

namespace nb = nanobind;
using namespace nb::literals;
using gsm::Array;
using gsm::Buffer;
using gsm::refuse;

namespace {

gsm::KvType type_of(const Buffer& array) {
  switch (array.format()) {
    case 'f': return gsm::KvType::f32;
    case 'e': return gsm::KvType::f16;
    case 'H': return gsm::KvType::bf16;
    case 'b': return gsm::KvType::int8;
    default: refuse(array.name() + " must hold float32, float16, bfloat16 (as uint16) or int8 values");
  }
}

// The checked arrays of one layer's pool.
class Pool {
 public:
  Pool(nb::handle K, nb::handle V, nb::handle k_scale, nb::handle v_scale, bool writable)
      : K_(K, "K", writable), V_(V, "V", writable) {
    pool.type = type_of(K_);
    if (V_.format() != K_.format()) refuse("V must hold values of the same type as K");
    K_.need_dims(4);
    blocks = K_.size(0);
    pool.heads = K_.size(1);
    pool.dim = K_.size(2);
    pool.block = K_.size(3);
    if (pool.heads < 1 || pool.dim < 1 || pool.block < 16 || pool.block % 16)
      refuse("K must have the shape [blocks, heads, dim, block] with a block size that is a multiple of 16, not " +
             K_.shape());
    V_.need_shape({blocks, pool.heads, pool.block, pool.dim});
    pool.k = K_.data();
    pool.v = V_.data();
    pool.k_scale = scale(k_scale, "k_scale", k_scale_, writable);
    pool.v_scale = scale(v_scale, "v_scale", v_scale_, writable);
  }

  gsm::KvPool pool;
  int64_t blocks;

 private:
  float* scale(nb::handle array, const char* name, std::optional<Buffer>& keep, bool writable) {
    const bool needed = pool.type == gsm::KvType::int8;
    if (array.is_none() == needed)
      refuse(std::string(name) +
             (needed ? " must be given for an int8 pool" : " must be None unless the pool holds int8"));
    if (!needed) return nullptr;
    keep.emplace(array, name, writable);
    if (keep->format() != 'f') refuse(std::string(name) + " must hold float32 values");
    keep->need_shape({blocks, pool.heads, pool.block});
    return static_cast<float*>(keep->data());
  }

  const Buffer K_, V_;
  std::optional<Buffer> k_scale_, v_scale_;
};

// Every position lies in [least, capacity of the table).
void need_positions(const Array<const int32_t>& positions, int64_t least, int64_t slots) {
  for (int64_t m = 0; m < positions.count(); ++m)
    if (const int64_t p = positions.data()[m]; p < least || p >= slots)
      refuse("positions holds " + std::to_string(p) + ", outside of the " + std::to_string(slots) +
             " slots of the block table");
}

void need_block(const Array<const int32_t>& table, int64_t i, int64_t blocks) {
  if (const int64_t b = table.data()[i]; b < 0 || b >= blocks)
    refuse("block_table[" + std::to_string(i) + "] is " + std::to_string(b) + ", outside of the " +
           std::to_string(blocks) + " blocks of the pool");
}

void kv_write(nb::handle k_, nb::handle v_, nb::handle positions_, nb::handle table_, nb::handle K, nb::handle V,
              nb::handle k_scale, nb::handle v_scale) {
  const Array<const float> k(k_, "k"), v(v_, "v");
  const Array<const int32_t> positions(positions_, "positions"), table(table_, "block_table");
  const Pool p(K, V, k_scale, v_scale, true);
  k.need_dims(3);
  k.need_shape({k.size(0), p.pool.heads, p.pool.dim});
  v.need_shape({k.size(0), p.pool.heads, p.pool.dim});
  positions.need_shape({k.size(0)});
  table.need_dims(1);
  need_positions(positions, 0, table.size(0) * p.pool.block);
  for (int64_t m = 0; m < positions.count(); ++m) need_block(table, positions.data()[m] / p.pool.block, p.blocks);
  nb::gil_scoped_release free;
  gsm::kv_write({k.data(), v.data(), positions.data(), table.data(), k.size(0), p.pool});
}

void attention(nb::handle q_, nb::handle positions_, nb::handle table_, nb::handle K, nb::handle V, nb::handle k_scale,
               nb::handle v_scale, nb::handle out_, nb::handle lse_, double scale, int64_t window, double softcap) {
  const Array<const float> q(q_, "q");
  const Array<const int32_t> positions(positions_, "positions"), table(table_, "block_table");
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
  table.need_dims(1);
  if (!std::isfinite(scale)) refuse("scale must be finite");
  if (window < 0) refuse("window must be at least 0 (0: no window)");
  const float cap = static_cast<float>(softcap);
  if (!(cap >= 0.0f) || std::isinf(cap)) refuse("softcap must be finite and at least 0 (0: none)");
  need_positions(positions, -1, table.size(0) * p.pool.block);
  // The kernel reads blocks between the first and the last visible key of the call; others may be gone already.
  int64_t low = INT64_MAX, high = -1;
  for (int64_t m = 0; m < tokens; ++m) {
    const int64_t at = positions.data()[m];
    if (at < 0) continue;
    low = std::min(low, gsm::first_visible(at, window));
    high = std::max(high, at);
  }
  if (high >= 0)
    for (int64_t i = low / p.pool.block; i <= high / p.pool.block; ++i) need_block(table, i, p.blocks);
  nb::gil_scoped_release free;
  gsm::attention({q.data(), positions.data(), table.data(), tokens, heads, p.pool, static_cast<float>(scale), window,
                  cap, out.data(), lse ? lse->data() : nullptr});
}

// ---------------------------------------------------------------- several sequences: one call for each run of tokens

// Tokens of one sequence follow each other; row sequence[m] of tables lists the blocks of token m's.
struct Batch {
  const int32_t *positions, *sequence, *tables;
  int64_t sequences, most_blocks, pool_blocks, block;

  // fn(first token, tokens, block table) for each run of tokens of one sequence.
  template <class Fn>
  void each(int64_t tokens, const Fn& fn) const {
    for (int64_t from = 0, to; from < tokens; from = to) {
      for (to = from + 1; to < tokens && sequence[to] == sequence[from];) ++to;
      fn(from, to - from, tables + sequence[from] * most_blocks);
    }
  }
  void check(int64_t tokens, int64_t least, int64_t window) const {
    for (int64_t m = 0; m < tokens; ++m) {
      if (sequence[m] < 0 || sequence[m] >= sequences)
        refuse("sequence holds " + std::to_string(sequence[m]) + ", outside of the " + std::to_string(sequences) +
               " rows of tables");
      if (positions[m] < least || positions[m] >= most_blocks * block)
        refuse("positions holds " + std::to_string(positions[m]) + ", outside of the " +
               std::to_string(most_blocks * block) + " slots of the block table");
    }
    each(tokens, [&](int64_t from, int64_t n, const int32_t* table) {
      int64_t low = INT64_MAX, high = -1;
      for (int64_t m = from; m < from + n; ++m) {
        if (positions[m] < 0) continue;
        low = std::min(low, window < 0 ? positions[m] : gsm::first_visible(positions[m], window));
        high = std::max<int64_t>(high, positions[m]);
      }
      for (int64_t i = low / block; high >= 0 && i <= high / block; ++i)
        if (table[i] < 0 || table[i] >= pool_blocks)
          refuse("block " + std::to_string(i) + " of a sequence is " + std::to_string(table[i]) + ", outside of the " +
                 std::to_string(pool_blocks) + " blocks of the pool");
    });
  }
};

Batch batch_of(const Array<const int32_t>& positions, const Array<const int32_t>& sequence,
               const Array<const int32_t>& tables, int64_t tokens, const Pool& p) {
  positions.need_shape({tokens});
  sequence.need_shape({tokens});
  tables.need_dims(2);
  return {positions.data(), sequence.data(), tables.data(), tables.size(0), tables.size(1), p.blocks, p.pool.block};
}

struct KvWriteCall final : gsm::CallOp {
  Batch batch;
  gsm::KvWrite call;
  void check(int64_t rows) const override { batch.check(rows, 0, -1); }
  void run(int64_t rows, int, int, int) override {
    const int64_t width = call.pool.heads * call.pool.dim;
    batch.each(rows, [&](int64_t from, int64_t n, const int32_t* table) {
      gsm::kv_write({call.k + from * width, call.v + from * width, batch.positions + from, table, n, call.pool});
    });
  }
};

struct AttentionCall final : gsm::CallOp {
  Batch batch;
  gsm::Attention call;
  void check(int64_t rows) const override { batch.check(rows, -1, call.window); }
  void run(int64_t rows, int, int, int) override {
    batch.each(rows, [&](int64_t from, int64_t n, const int32_t* table) {
      gsm::Attention part = call;
      part.q += from * call.heads * call.pool.dim;
      part.out += from * call.heads * call.pool.dim;
      if (part.lse) part.lse += from * call.heads;
      part.positions = batch.positions + from;
      part.table = table;
      part.tokens = n;
      gsm::attention(part);
    });
  }
};

void kv_write_batch(nb::handle k_, nb::handle v_, nb::handle positions_, nb::handle sequence_, nb::handle tables_,
                    nb::handle K, nb::handle V, nb::handle k_scale, nb::handle v_scale) {
  const Array<const float> k(k_, "k"), v(v_, "v");
  const Array<const int32_t> positions(positions_, "positions"), sequence(sequence_, "sequence"),
      tables(tables_, "tables");
  const Pool p(K, V, k_scale, v_scale, true);
  k.need_dims(3);
  k.need_shape({k.size(0), p.pool.heads, p.pool.dim});
  v.need_shape({k.size(0), p.pool.heads, p.pool.dim});
  auto op = std::make_unique<KvWriteCall>();
  op->batch = batch_of(positions, sequence, tables, k.size(0), p);
  op->call = {k.data(), v.data(), nullptr, nullptr, 0, p.pool};
  nb::gil_scoped_release free;
  gsm::submit(std::move(op), k.size(0));
}

void attention_batch(nb::handle q_, nb::handle positions_, nb::handle sequence_, nb::handle tables_, nb::handle K,
                     nb::handle V, nb::handle k_scale, nb::handle v_scale, nb::handle out_, nb::handle lse_,
                     double scale, int64_t window, double softcap) {
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
  if (!std::isfinite(scale)) refuse("scale must be finite");
  if (window < 0) refuse("window must be at least 0 (0: no window)");
  const float cap = static_cast<float>(softcap);
  if (!(cap >= 0.0f) || std::isinf(cap)) refuse("softcap must be finite and at least 0 (0: none)");
  auto op = std::make_unique<AttentionCall>();
  op->batch = batch_of(positions, sequence, tables, tokens, p);
  op->call = {q.data(), nullptr, nullptr, 0,      heads, p.pool, static_cast<float>(scale), window, cap,
              out.data(), lse ? lse->data() : nullptr};
  nb::gil_scoped_release free;
  gsm::submit(std::move(op), tokens);
}

}  // namespace

void bind_attention(nb::module_& m) {
  m.def("kv_write", &kv_write, "k"_a, "v"_a, "positions"_a, "block_table"_a, "K"_a, "V"_a,
        "k_scale"_a.none() = nb::none(), "v_scale"_a.none() = nb::none());
  m.def("attention", &attention, "q"_a, "positions"_a, "block_table"_a, "K"_a, "V"_a, "k_scale"_a.none(),
        "v_scale"_a.none(), "out"_a, "lse"_a.none(), "scale"_a, "window"_a, "softcap"_a);
  m.def("kv_write", &kv_write_batch, "k"_a, "v"_a, "positions"_a, "sequence"_a, "tables"_a, "K"_a, "V"_a,
        "k_scale"_a.none(), "v_scale"_a.none());
  m.def("attention", &attention_batch, "q"_a, "positions"_a, "sequence"_a, "tables"_a, "K"_a, "V"_a, "k_scale"_a.none(),
        "v_scale"_a.none(), "out"_a, "lse"_a.none(), "scale"_a, "window"_a, "softcap"_a);
}
