#define FASTWEIGHTS_KERNELS "fastweights/core/generalized_delta_rule-inl.hpp"
#define FASTWEIGHTS_FORMS generalized_delta_rule_forms
#define FASTWEIGHTS_MAKE_FORMS dplr_forms<GeneralizedDeltaRule, Real>()
#include "compile_rule-inl.hpp"
