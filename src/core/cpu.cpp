#include "fastweights/core/cpu.hpp"

#include "delta_rule_kernels.hpp"

namespace fastweights::cpu {

const char* instruction_set() { return detail::instruction_set(); }

}  // namespace fastweights::cpu
