// The delta rule, with a gate and without: one skeleton, for which a missing g is no gate.
#define FASTWEIGHTS_KERNELS "delta_rule-inl.hpp"
#define FASTWEIGHTS_FORMS delta_rule_forms
#define FASTWEIGHTS_MAKE_FORMS delta_rule_forms<Real>()
#include "compile_rule-inl.hpp"
