// Memory that the ops of a run take turns with: they run one after another, and so do runs.
#pragma once
#include <cstdint>

namespace gsm {

// At least `bytes`, aligned to 64; the contents are undefined. What was given before stays valid, since the ops of one
// run ask one by one before the first begins.
uint8_t* arena(int64_t bytes);

}  // namespace gsm
