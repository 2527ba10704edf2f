#define FASTWEIGHTS_KERNELS "fastweights/core/linear_attention-inl.hpp"
#define FASTWEIGHTS_FORMS linear_attention_forms
#define FASTWEIGHTS_MAKE_FORMS dplr_forms<LinearAttention, Real>()
#include "compile_rule-inl.hpp"
