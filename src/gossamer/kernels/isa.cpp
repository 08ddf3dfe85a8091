#include "isa.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

namespace gsm {

const char* level_name(Level level) {
  switch (level) {
    case Level::avx512bf16: return "avx512bf16";
    case Level::avx512: return "avx512";
    case Level::avx2: return "avx2";
    default: return "scalar";
  }
}

std::vector<Level> supported_levels() {
  std::vector<Level> levels{Level::scalar};
#if defined(__x86_64__)
  // __builtin_cpu_supports also asks the operating system for the register state (XGETBV).
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vnni");
  const bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
  if (avx2) levels.push_back(Level::avx2);
  if (avx512) levels.push_back(Level::avx512);
  if (bf16) levels.push_back(Level::avx512bf16);
#endif
  return levels;
}

namespace {

Level parse(const std::string& name) {
  std::string have;
  for (Level level : supported_levels()) {
    if (name == level_name(level)) return level;
    have += std::string(have.empty() ? "" : ", ") + level_name(level);
  }
  throw std::invalid_argument("instruction set '" + name + "' is not one this machine runs; it has: " + have);
}

Level initial() {
  const char* forced = std::getenv("GOSSAMER_ISA");
  return forced && *forced ? parse(forced) : supported_levels().back();
}

std::atomic<int> g_level{-1};

}  // namespace

Level current_level() {
  int level = g_level.load(std::memory_order_relaxed);
  if (level < 0) {
    level = static_cast<int>(initial());
    g_level.store(level, std::memory_order_relaxed);
  }
  return static_cast<Level>(level);
}

void set_level(const std::string& name) { g_level.store(static_cast<int>(parse(name)), std::memory_order_relaxed); }

}  // namespace gsm
