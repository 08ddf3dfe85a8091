// Exact attention over a paged key-value pool (online softmax: Milakov & Gimelshein 2018; paging: Kwon et al. 2023).
// Decode is bound by the bytes of the visible keys and values, prefill by fused multiply-adds.
#pragma once
#include <cstdint>

#include "isa.h"

namespace gsm {

enum class KvType { f32, f16, bf16, int8 };

// One layer's pool. Keys lie transposed so that 16 positions fill the lanes; int8 has one scale a (position, head).
struct KvPool {
  KvType type;
  void* k;         // [blocks, heads, dim, block]
  void* v;         // [blocks, heads, block, dim]
  float* k_scale;  // [blocks, heads, block], int8 only
  float* v_scale;
  int64_t heads, dim, block;  // block is a multiple of 16
};

// The token at position p lies in block table[p / block], slot p % block.
struct KvWrite {
  const float *k, *v;  // [tokens, pool.heads, pool.dim]
  const int32_t* positions;
  const int32_t* table;
  int64_t tokens;
  KvPool pool;
};

struct Attention {
  const float* q;            // [tokens, heads, pool.dim]; heads is a multiple of pool.heads
  const int32_t* positions;  // of the queries; -1 sees no key
  const int32_t* table;
  int64_t tokens, heads;
  KvPool pool;
  float scale;
  int64_t window;  // key j is visible to position p iff j <= p and (window == 0 or j > p - window)
  float softcap;   // scores become softcap * tanh(score / softcap); 0: none
  float* out;      // [tokens, heads, pool.dim]; a query without visible keys gives zeros
  float* lse;      // [tokens, heads], natural log of the sum of exponentials, -infinity without keys; may be null
};

GSM_DECLARE(void kv_write(const KvWrite& w))
GSM_DECLARE(void attention(const Attention& a))

inline void kv_write(const KvWrite& w) { GSM_DISPATCH(kv_write(w)) }
inline void attention(const Attention& a) { GSM_DISPATCH(attention(a)) }

// First key that position p sees.
inline int64_t first_visible(int64_t p, int64_t window) { return window > 0 && p >= window ? p - window + 1 : 0; }

}  // namespace gsm
