// Kernels that share out their own work, as steps of a program.
#pragma once
#include "op.h"

namespace gsm {

// An op that one thread calls and that itself wakes the team.
struct CallOp : Op {};

}  // namespace gsm
