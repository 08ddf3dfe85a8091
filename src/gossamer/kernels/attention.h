// Exact attention over a paged key-value pool (online softmax: Milakov & Gimelshein 2018; paging: Kwon et al. 2023).
// Decode is bound by the bytes of the visible keys and values, prefill by fused multiply-adds.
#pragma once
#include <cstdint>

#include "isa.h"

namespace gsm {

enum class KvType { f32, f16, bf16, int8, uint4 };

// How many consecutive dimensions of a key (positions of a value) share a unit, and the bytes of a unit.
static inline int64_t kv_pack(KvType type) {
  return type == KvType::uint4 ? 8 : type == KvType::int8 ? 4 : type == KvType::bf16 ? 2 : 1;
}
static inline int64_t kv_unit(KvType type) { return type == KvType::f16 ? 2 : 4; }

constexpr int64_t kMaxHeadDim = 4096;

// One layer's pool. A unit is one f32 or f16, two bf16, four int8 (code + 128), or eight uint4: the low nibbles of four
// bytes, then the high ones. Keys lie transposed, so that one load takes a unit of 16 positions; values take their
// units along the positions. Both are multiplied without being moved. A row is a position of a head:
//   int8:  value = scale * (code - 128), scale f32 = max|x| / 127       [blocks, heads, block]
//   uint4: value = scale * code + min, scale and min f16                [blocks, heads, 2, block]
struct KvPool {
  KvType type;
  void* k;        // [blocks, heads, ceil(dim / pack), block, unit]
  void* v;        // [blocks, heads, block / pack, dim, unit]
  void* k_scale;  // int8 and uint4 only
  void* v_scale;
  int64_t heads, dim, block;  // dim is at most kMaxHeadDim, block a multiple of 16
};

static inline int64_t kv_key_bytes(const KvPool& p) {  // of one block and head
  return (p.dim + kv_pack(p.type) - 1) / kv_pack(p.type) * p.block * kv_unit(p.type);
}
static inline int64_t kv_value_bytes(const KvPool& p) { return p.block / kv_pack(p.type) * p.dim * kv_unit(p.type); }

// Token m belongs to sequence s = sequence[m]; what stands at its position p lies in block
// tables[s * max_blocks + p / block], slot p % block.
struct KvWrite {
  const float *k, *v;  // [tokens, pool.heads, pool.dim]
  const int32_t *positions, *sequence;
  const int32_t* tables;
  int64_t max_blocks;
  int64_t tokens;
  KvPool pool;
};

struct Attention {
  const float* q;  // [tokens, heads, pool.dim]; heads is a multiple of pool.heads
  const int32_t *positions, *sequence;  // a position of -1 sees no key
  const int32_t* tables;
  int64_t max_blocks;
  int64_t tokens, heads;
  KvPool pool;
  float scale;
  int64_t window;  // key j is visible to position p iff j <= p and (window == 0 or j > p - window)
  float softcap;   // scores become softcap * tanh(score / softcap); 0: none
  float* out;      // [tokens, heads, pool.dim]; a query without visible keys gives zeros
  float* lse;      // [tokens, heads], natural log of the sum of exponentials, -infinity without keys; may be null
  float* scratch = nullptr;  // threads * attention_scratch() floats, aligned to 64 bytes: for attention_part alone
};

// For a caller that has its own team: for each phase, attention_part on every thread, then a barrier. The number of
// phases depends on the positions. None of these allocates or throws.
int attention_phases(const Attention& a);
int64_t attention_scratch(const Attention& a);  // floats a thread, for whatever positions fit into the tables
void attention_part(const Attention& a, int phase, int thread, int threads);
static inline int kv_write_phases(const KvWrite&) { return 1; }
void kv_write_part(const KvWrite& w, int phase, int thread, int threads);

// The same at once, on the team.
void attention(const Attention& a);
void kv_write(const KvWrite& w);

// Throw std::invalid_argument for a sequence, position or block that is out of range. The kernels read the blocks
// between the first and the last visible key of each run of tokens of one sequence; other entries may hold anything.
void check_attention(const Attention& a, int64_t sequences, int64_t blocks);
void check_kv_write(const KvWrite& w, int64_t sequences, int64_t blocks);

GSM_DECLARE(void attention_part(const Attention& a, int phase, int thread, int threads))
GSM_DECLARE(void kv_write_part(const KvWrite& w, int thread, int threads))

// First key that position p sees.
static inline int64_t first_visible(int64_t p, int64_t window) {
  return window > 0 && p >= window ? p - window + 1 : 0;
}

}  // namespace gsm
