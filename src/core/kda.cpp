#define FASTWEIGHTS_KERNELS "fastweights/core/kda-inl.hpp"
#define FASTWEIGHTS_FORMS kda_forms
#define FASTWEIGHTS_MAKE_FORMS dplr_forms<Kda, Real>()
#include "compile_rule-inl.hpp"
