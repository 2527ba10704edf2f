#define FASTWEIGHTS_KERNELS "fastweights/core/momentum_delta_rule-inl.hpp"
#define FASTWEIGHTS_FORMS momentum_delta_rule_forms
#define FASTWEIGHTS_MAKE_FORMS momentum_forms<Real>()
#include "compile_rule-inl.hpp"
