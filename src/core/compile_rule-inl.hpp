// Compiles the kernels of one rule for each instruction set and chooses among them at run time.
// A rule's source says what it has and includes this file, once:
//
//   #define FASTWEIGHTS_KERNELS "fastweights/core/kda-inl.hpp"
//   #define FASTWEIGHTS_FORMS kda_forms                  // the function of cpu.hpp to define
//   #define FASTWEIGHTS_MAKE_FORMS dplr_forms<Kda, Real>()
//   #include "compile_rule-inl.hpp"
//
// The kernels are templates of a `Real`, float or double. FASTWEIGHTS_MAKE_FORMS is an expression
// in the namespace of one instruction set; its type, RuleForms<Real> or another struct of pointers
// to functions, is the one that the function in cpu.hpp returns a reference to.
//
// No include guard: Highway includes this file again for each instruction set.

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "compile_rule-inl.hpp"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

#include "fastweights/core/cpu.hpp"
#include FASTWEIGHTS_KERNELS

HWY_BEFORE_NAMESPACE();
namespace fastweights::core::HWY_NAMESPACE {
namespace {

template <class Real>
auto make_forms() {
  return FASTWEIGHTS_MAKE_FORMS;
}
// HWY_EXPORT takes no templates.
auto make_forms_float() { return make_forms<float>(); }
auto make_forms_double() { return make_forms<double>(); }

}  // namespace
}  // namespace fastweights::core::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE

namespace fastweights::core {

HWY_EXPORT(make_forms_float);
HWY_EXPORT(make_forms_double);

}  // namespace fastweights::core

namespace fastweights::cpu {

template <>
const decltype(core::HWY_NAMESPACE::make_forms_float())& FASTWEIGHTS_FORMS() {
  using namespace core;  // HWY_DYNAMIC_DISPATCH takes an unqualified name
  static const auto forms = HWY_DYNAMIC_DISPATCH(make_forms_float)();
  return forms;
}

template <>
const decltype(core::HWY_NAMESPACE::make_forms_double())& FASTWEIGHTS_FORMS() {
  using namespace core;
  static const auto forms = HWY_DYNAMIC_DISPATCH(make_forms_double)();
  return forms;
}

}  // namespace fastweights::cpu

#endif  // HWY_ONCE
