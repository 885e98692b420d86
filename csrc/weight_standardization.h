// Weight Standardization: filters are rows, whatever order a row is in.

#pragma once

#include "tensors.h"

namespace {

// A weight as (1, out, K) rows
Shape filters(const Tensor& weight) {
  TORCH_CHECK(
      weight.dim() >= 2 && weight.numel() > 0 &&
          (weight.is_contiguous() || is_channels_last(weight)),
      "expected a contiguous or channels-last weight");
  const int64_t out = weight.size(0), fan = weight.numel() / out;
  return Shape(weight.as_strided({1, out, fan}, {weight.numel(), fan, 1}), 1);
}

// w' = gain (w - mean), and what the gradient is made of: (3, out), mean, gain
// and the slope of gain by the sum of (w - mean)^2, times -2
std::tuple<Tensor, Tensor> standardize(
    const Tensor& weight, double eps, bool unbiased, bool under_root) {
  const Shape s = filters(weight);
  Tensor result = at::empty_like(weight);
  Tensor saved = at::empty({3, s.channels}, weight.options());
  const double freedom = static_cast<double>(s.length - unbiased);
  std::vector<double> exact(2 * s.channels);
  std::vector<double> zeros;
  dispatch(weight, [&](auto zero) {
    using T = decltype(zero);
    if constexpr (std::is_same_v<T, Acc<T>>) {
      const T* w = static_cast<const T*>(weight.data_ptr());
      T *mean = static_cast<T*>(saved.data_ptr()), *gain = mean + s.channels;
      T* slope = gain + s.channels;
      std::vector<T> rounding(s.channels);
      all_moments<T>(s, w, exact.data(), exact.data() + s.channels);
      for (int64_t c = 0; c < s.channels; ++c) {
        const double var = exact[s.channels + c] * s.length / freedom;
        const double root = std::sqrt(under_root ? var + eps : var);
        const double g = 1 / (under_root ? root : root + eps);
        // a filter without variance has no direction to grow in
        const double d = under_root ? g * g * g : root == 0 ? 0 : g * g / root;
        mean[c] = static_cast<T>(exact[c]);
        gain[c] = static_cast<T>(g);
        slope[c] = static_cast<T>(d / freedom);
        rounding[c] = static_cast<T>(g * (mean[c] - exact[c]));
      }
      all_apply<T>(
          s, w, static_cast<T*>(result.data_ptr()), false, mean, gain, rounding.data());
    } else {
      TORCH_CHECK(false, "expected a weight of float or double");
    }
  });
  return {result, saved};
}

Tensor standardize_backward(const Tensor& grad, const Tensor& weight, const Tensor& saved) {
  const Shape s = filters(weight);
  TORCH_CHECK(
      is_alike(grad, weight),
      "expected a gradient of the dtype, shape and layout of the weight");
  Tensor result = at::empty_like(weight);
  dispatch(weight, [&](auto zero) {
    using T = decltype(zero);
    if constexpr (std::is_same_v<T, Acc<T>>) {
      const int64_t out = s.channels;
      const T* w = static_cast<const T*>(weight.data_ptr());
      const T* dy = static_cast<const T*>(grad.data_ptr());
      const T *mean = static_cast<const T*>(saved.data_ptr()), *gain = mean + out;
      const T* slope = gain + out;
      std::vector<double> sums(2 * out);
      std::vector<T> coefs(3 * out);
      T *dy_mean = coefs.data(), *w_scale = dy_mean + out, *none = w_scale + out;
      all_sums<T>(s, dy, w, false, mean, mean, mean, sums.data(), sums.data() + out);
      for (int64_t c = 0; c < out; ++c) {
        dy_mean[c] = static_cast<T>(sums[c] / s.length);
        w_scale[c] = static_cast<T>(-slope[c] * sums[out + c]);
      }
      all_apply_add<T>(
          s, dy, w, static_cast<T*>(result.data_ptr()), false,
          {dy_mean, mean, gain, w_scale, none, none, none});
    }
  });
  return result;
}

std::tuple<Tensor, Tensor> fake_standardize(const Tensor& weight, double, bool, bool) {
  return {at::empty_like(weight), at::empty({3, weight.size(0)}, weight.options())};
}

Tensor fake_standardize_backward(const Tensor&, const Tensor& weight, const Tensor&) {
  return at::empty_like(weight);
}

}  // namespace
