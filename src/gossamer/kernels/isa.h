// Instruction-set levels: every kernel family is compiled once per level; the best level that this
// machine (and its operating system) supports is picked at load. GOSSAMER_ISA forces a lower one.
#pragma once
#include <string>
#include <vector>

namespace gsm {

enum class Level { scalar, avx2, avx512, avx512bf16 };

const char* level_name(Level level);
std::vector<Level> supported_levels();  // ascending
Level current_level();
// Throws std::invalid_argument when the name is unknown or the machine lacks the level.
void set_level(const std::string& name);

}  // namespace gsm

// Calls gsm::LEVEL::CALL for the current level.
#if defined(__x86_64__)
#define GSM_DISPATCH(CALL)                                  \
  switch (::gsm::current_level()) {                         \
    case ::gsm::Level::avx512bf16: return ::gsm::avx512bf16::CALL; \
    case ::gsm::Level::avx512: return ::gsm::avx512::CALL;  \
    case ::gsm::Level::avx2: return ::gsm::avx2::CALL;      \
    default: return ::gsm::scalar::CALL;                    \
  }
// Declares the same function in the namespace of every level.
#define GSM_DECLARE(DECL)              \
  namespace scalar { DECL; }           \
  namespace avx2 { DECL; }             \
  namespace avx512 { DECL; }           \
  namespace avx512bf16 { DECL; }
#else
#define GSM_DISPATCH(CALL) return ::gsm::scalar::CALL;
#define GSM_DECLARE(DECL) \
  namespace scalar { DECL; }
#endif
