#define FASTWEIGHTS_KERNELS "fastweights/core/softmax_delta_rule_backward-inl.hpp"
#define FASTWEIGHTS_FORMS softmax_delta_rule_forms
#define FASTWEIGHTS_MAKE_FORMS softmax_delta_rule_forms<Real>()
#include "compile_rule-inl.hpp"
