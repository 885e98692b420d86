// What moves between passes: bcn_mm/ops/estimates.py, in double.

#pragma once

#include "tensors.h"

namespace {

// How a pass moves them: bcn_mm.ops.estimates.Rule, and what follows from it
struct Rule {
  bool training, estimate;
  double eps;
  double rate = 0;   // how far they move
  double large = 0;  // the same where it is above the momentum, else 0
};

Rule rule_of(
    bool training, bool estimate, Maybe<double> momentum,
    const std::string& start, double eps, const MaybeTensor& passes) {
  Rule rule{training, estimate, eps};
  if (!training) return rule;
  double number = 1;
  if (passes) {
    if (passes->scalar_type() == at::kLong) {  // as a layer's is
      number = static_cast<double>(++*passes->data_ptr<int64_t>());
    } else {
      Tensor count = *passes;
      number = count.add_(1).item<double>();
    }
  }
  if (momentum && start == "identity") {
    rule.rate = *momentum;
    return rule;
  }
  TORCH_CHECK(passes, "momentum and start need num_batches_tracked");
  const double floor = momentum.value_or(0);
  rule.rate = !momentum || start == "average" ? 1 / number : number == 1;
  rule.rate = std::max(rule.rate, floor);
  rule.large = rule.rate > floor ? rule.rate : 0;
  return rule;
}

// A running statistic of any dtype
class Buffer {
 public:
  explicit Buffer(const Tensor& t)
      : data_(t.data_ptr()), type_(t.scalar_type()), stride_(t.dim() ? t.stride(0) : 0) {}

  static bool holds(at::ScalarType type) {
    return type == at::kFloat || type == at::kDouble || type == at::kHalf ||
           type == at::kBFloat16;
  }

  double get(int64_t c) const {
    switch (type_) {
      case at::kFloat: return get_as<float>(c);
      case at::kDouble: return get_as<double>(c);
      case at::kHalf: return get_as<c10::Half>(c);
      default: return get_as<c10::BFloat16>(c);
    }
  }

  // What it would hold of a value
  double rounded(double value) const {
    switch (type_) {
      case at::kFloat: return static_cast<float>(value);
      case at::kDouble: return value;
      case at::kHalf: return static_cast<c10::Half>(static_cast<float>(value));
      default: return static_cast<c10::BFloat16>(static_cast<float>(value));
    }
  }

  void set(int64_t c, double value) {
    switch (type_) {
      case at::kFloat: set_as<float>(c, value); break;
      case at::kDouble: set_as<double>(c, value); break;
      case at::kHalf: set_as<c10::Half>(c, value); break;
      default: set_as<c10::BFloat16>(c, value); break;
    }
  }

 private:
  template <class B> double get_as(int64_t c) const {
    return static_cast<double>(static_cast<const B*>(data_)[c * stride_]);
  }
  template <class B> void set_as(int64_t c, double value) {
    static_cast<B*>(data_)[c * stride_] = static_cast<B>(value);
  }

  void* data_;
  at::ScalarType type_;
  int64_t stride_;
};

// Moves the estimates of channel c, and returns the variance that it is
// normalized with; `centre` is that of its batch, `spread` the variance about it,
// and `centre` becomes the mean that it is normalized with.
template <class A>
double move(
    const Rule& rule, int64_t c, double values, double spread, double& centre,
    Buffer& running_mean, Buffer& running_var) {
  const double old_mean = running_mean.get(c), old_var = running_var.get(c);
  double target = spread;
  if (rule.estimate) {
    // about the old mean, or, at a rate that is not small, what the estimates are a
    // mean of; not as a difference of large squares
    target += (1 - rule.large) * (centre - old_mean) * (centre - old_mean);
  } else {
    target *= values / std::max(values - 1, 1.0);  // unbiased, as BatchNorm's
  }
  // a channel that is not finite, in the dtype of statistics or of the buffers,
  // stays as it is
  if (std::isfinite(static_cast<A>(centre)) && std::isfinite(static_cast<A>(target)) &&
      std::isfinite(running_mean.rounded(centre)) &&
      std::isfinite(running_var.rounded(target))) {
    running_mean.set(c, old_mean + rule.rate * (centre - old_mean));
    running_var.set(c, old_var + rule.rate * (target - old_var));
  }
  if (!rule.estimate) return spread;
  centre = running_mean.get(c);
  return running_var.get(c);
}

}  // namespace
