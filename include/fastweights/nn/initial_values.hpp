#pragma once

namespace fastweights::nn {

/// While it lives, projections that this thread makes have no initial values: their weights are
/// about to be replaced, and drawing them takes longer than reading a model.
class WithoutInitialValues {
 public:
  WithoutInitialValues();
  ~WithoutInitialValues();
  WithoutInitialValues(const WithoutInitialValues&) = delete;
  WithoutInitialValues& operator=(const WithoutInitialValues&) = delete;

 private:
  bool before_;
};

}  // namespace fastweights::nn
