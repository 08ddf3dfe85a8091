#include "arena.h"

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <new>
#include <vector>

namespace gsm {

// It grows by half at least; the smaller blocks stay.
uint8_t* arena(int64_t bytes) {
  static std::mutex mutex;
  static std::vector<std::unique_ptr<uint8_t, decltype(&std::free)>> blocks;
  static int64_t size = 0;
  std::lock_guard lock(mutex);
  if (size < bytes) {
    const int64_t grown = (std::max(bytes, size + size / 2) + 4095) / 4096 * 4096;
    auto* memory = static_cast<uint8_t*>(std::aligned_alloc(64, static_cast<size_t>(grown)));
    if (!memory) throw std::bad_alloc();
    blocks.emplace_back(memory, &std::free);
    size = grown;
  }
  return blocks.empty() ? nullptr : blocks.back().get();
}

}  // namespace gsm
