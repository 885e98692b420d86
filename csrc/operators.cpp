// Batch-Channel Normalization and Weight Standardization on the CPU: the operators.
//
// bcn_mm/ops/kernels/cpp.py calls them. From here arrows point one way:
//
//   operators.cpp            torch's tensors and schemas
//   batch_channel_norm.h     a pass forward, a pass backward
//   weight_standardization.h the same for weights
//   estimates.h              how running statistics move
//   tensors.h                whole tensors, shared out among threads
//   instruction_sets.h       passes.h for AVX-512, AVX2 and every other processor:
//   vectors.h                registers
//   rows.h, columns.h        passes over either layout
//   stages.h                 the algebra of groups

#include <torch/library.h>

#include <array>
#include <string>
#include <tuple>

#include "batch_channel_norm.h"
#include "weight_standardization.h"

namespace {

// What a kernel reads must be where it runs
void check_device(const MaybeTensor& t) {
  TORCH_CHECK(
      !t || t->is_cpu(), "the input is on the CPU, but a parameter or a running ",
      "statistic is on ", t->device(), ": move the layer");
}

template <class A> const A* data_of(const MaybeTensor& t, int64_t size) {
  if (!t) return nullptr;
  check_device(t);
  TORCH_CHECK(
      t->numel() == size && t->scalar_type() == c10::CppTypeToScalarType<A>::value &&
          t->is_contiguous(),
      "expected ", size, " values in the dtype of statistics, but got ", t->sizes(),
      " of ", t->scalar_type());
  return static_cast<const A*>(t->data_ptr());
}

// Affine parameters, of any strides
class Parameters {
 public:
  Parameters(
      const MaybeTensor& batch_weight, const MaybeTensor& batch_bias,
      const MaybeTensor& weight, const MaybeTensor& bias)
      : all_{dense(batch_weight), dense(batch_bias), dense(weight), dense(bias)} {}

  template <class A> Affine<A> of(const Shape& s) const {
    return {
        data_of<A>(all_[0], s.channels), data_of<A>(all_[1], s.channels),
        data_of<A>(all_[2], s.groups), data_of<A>(all_[3], s.groups)};
  }

 private:
  static MaybeTensor dense(const MaybeTensor& t) {
    return t ? MaybeTensor(t->contiguous()) : t;
  }

  std::array<MaybeTensor, 4> all_;
};

Tensor empty_saved(const Tensor& x) {
  return at::empty(
      {3 * x.size(0) * x.size(1) + x.size(1)}, x.options().dtype(statistics_type(x)));
}

void moved(const Tensor& t) {
  if (!t.is_inference()) t.unsafeGetTensorImpl()->bump_version();
}

void check_alike(const Tensor& dy, const Tensor& x) {
  TORCH_CHECK(
      is_alike(dy, x),
      "expected a tensor of the dtype, shape and layout of the input");
}

std::tuple<Tensor, Tensor> forward(
    const Tensor& x, const Tensor& running_mean, const Tensor& running_var,
    const MaybeTensor& num_batches_tracked, const MaybeTensor& batch_weight,
    const MaybeTensor& batch_bias, const MaybeTensor& weight, const MaybeTensor& bias,
    int64_t num_groups, double eps, bool relu, bool training, bool estimate,
    Maybe<double> momentum, std::string start, const MaybeTensor& batch,
    bool repeats, const MaybeTensor& coef) {
  const Shape s(x, num_groups);
  for (const auto* t : {&running_mean, &running_var}) {
    check_device(*t);
    TORCH_CHECK(
        t->dim() == 1 && t->size(0) == s.channels && Buffer::holds(t->scalar_type()) &&
            t->scalar_type() == running_mean.scalar_type(),
        "expected running statistics of ", s.channels, " channels and one dtype");
  }
  check_device(num_batches_tracked);
  const Parameters affine(batch_weight, batch_bias, weight, bias);
  Tensor y = at::empty_like(x), saved = empty_saved(x);
  const bool moves = training && !repeats;
  double* data = const_cast<double*>(data_of<double>(batch, 2 * s.channels));
  TORCH_CHECK(data || !repeats, "a pass that repeats another needs its batch");
  dispatch(x, [&](auto zero) {
    using T = decltype(zero);
    using A = Acc<T>;
    const auto parameters = affine.of<A>(s);
    A* kept = const_cast<A*>(data_of<A>(coef, 2 * s.rows()));
    // counts the pass, so that whatever may be wrong was looked at before
    const Rule rule =
        rule_of(moves, estimate, momentum, start, eps, num_batches_tracked);
    Forward<T>{s, rule, parameters, Saved<A>(static_cast<A*>(saved.data_ptr()), s),
               Buffer(running_mean), Buffer(running_var), data, repeats, kept}
        .run(static_cast<const T*>(x.data_ptr()), static_cast<T*>(y.data_ptr()), relu);
  });
  if (moves) {
    moved(running_mean);
    moved(running_var);
    if (num_batches_tracked) moved(*num_batches_tracked);
  }
  return {y, saved};
}

using Five = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

// Undefined, which is None in Python, where there is no such parameter
Tensor like(const MaybeTensor& t) { return t ? at::empty_like(*t) : Tensor(); }

Five backward(
    const Tensor& dy, const Tensor& x, const Tensor& saved,
    const MaybeTensor& batch_weight, const MaybeTensor& batch_bias,
    const MaybeTensor& weight, const MaybeTensor& bias, int64_t num_groups, double eps,
    bool relu, bool batch_statistics, bool needs_dx) {
  const Shape s(x, num_groups);
  check_alike(dy, x);
  const Parameters affine(batch_weight, batch_bias, weight, bias);
  Tensor dx = needs_dx ? at::empty_like(x) : Tensor();
  Tensor d_batch_weight = like(batch_weight), d_batch_bias = like(batch_bias);
  Tensor d_weight = like(weight), d_bias = like(weight);  // given together
  dispatch(x, [&](auto zero) {
    using T = decltype(zero);
    using A = Acc<T>;
    const auto data = [](Tensor& t) {
      return t.defined() ? static_cast<A*>(t.data_ptr()) : nullptr;
    };
    const Gradients<A> grads{
        data(d_batch_weight), data(d_batch_bias), data(d_weight), data(d_bias)};
    Backward<T>{s, eps, batch_statistics, affine.of<A>(s), grads,
                Saved<A>(static_cast<A*>(saved.data_ptr()), s)}
        .run(
            static_cast<const T*>(dy.data_ptr()), static_cast<const T*>(x.data_ptr()),
            needs_dx ? static_cast<T*>(dx.data_ptr()) : nullptr, relu);
  });
  return {dx, d_batch_weight, d_batch_bias, d_weight, d_bias};
}

// The passes by themselves, (N, C) coefficients between them

Tensor empty_rows(const Tensor& x) {
  return at::empty({x.size(0), x.size(1)}, x.options().dtype(at::kDouble));
}

std::tuple<Tensor, Tensor> moments(const Tensor& x) {
  const Shape s(x, 1);
  const auto options = x.options().dtype(statistics_type(x));
  Tensor mean = empty_rows(x), var = empty_rows(x);
  dispatch(x, [&](auto zero) {
    using T = decltype(zero);
    all_moments<T>(
        s, static_cast<const T*>(x.data_ptr()), static_cast<double*>(mean.data_ptr()),
        static_cast<double*>(var.data_ptr()));
  });
  return {mean.to(options), var.to(options)};
}

Tensor apply(
    const Tensor& x, const Tensor& mean, const Tensor& scale, const Tensor& at_mean,
    bool relu, const MaybeTensor& other) {
  const Shape s(x, 1);
  if (other) check_alike(*other, x);
  Tensor y = at::empty_like(x);
  dispatch(x, [&](auto zero) {
    using T = decltype(zero);
    using A = Acc<T>;
    all_apply<T>(
        s, static_cast<const T*>(x.data_ptr()), static_cast<T*>(y.data_ptr()), relu,
        data_of<A>(mean, s.rows()), data_of<A>(scale, s.rows()),
        data_of<A>(at_mean, s.rows()),
        other ? static_cast<const T*>(other->data_ptr()) : nullptr);
  });
  return y;
}

std::tuple<Tensor, Tensor> reduce(const Tensor& dy, const Tensor& x, const Tensor& mean) {
  const Shape s(x, 1);
  check_alike(dy, x);
  Tensor plain = empty_rows(x), centred = empty_rows(x);
  dispatch(x, [&](auto zero) {
    using T = decltype(zero);
    using A = Acc<T>;
    const A* m = data_of<A>(mean, s.rows());
    all_sums<T>(
        s, static_cast<const T*>(dy.data_ptr()), static_cast<const T*>(x.data_ptr()),
        false, m, m, m, static_cast<double*>(plain.data_ptr()),
        static_cast<double*>(centred.data_ptr()));
  });
  return {plain.to(mean.options()), centred.to(mean.options())};
}

Tensor apply_add(
    const Tensor& dy, const Tensor& x, const Tensor& dy_mean, const Tensor& mean,
    const Tensor& dy_scale, const Tensor& x_scale, const Tensor& at_mean) {
  const Shape s(x, 1);
  check_alike(dy, x);
  Tensor dx = at::empty_like(x);
  dispatch(x, [&](auto zero) {
    using T = decltype(zero);
    using A = Acc<T>;
    const int64_t rows = s.rows();
    const A* m = data_of<A>(mean, rows);
    all_apply_add<T>(
        s, static_cast<const T*>(dy.data_ptr()), static_cast<const T*>(x.data_ptr()),
        static_cast<T*>(dx.data_ptr()), false,
        {data_of<A>(dy_mean, rows), m, data_of<A>(dy_scale, rows),
         data_of<A>(x_scale, rows), data_of<A>(at_mean, rows), m, m});
  });
  return dx;
}

// -- of the shapes alone -----------------------------------------------------

// One tensor on the meta device is enough to bring a call here
void check_fake(const Tensor& x) {
  TORCH_CHECK(
      x.is_meta(), "the input is on ", x.device(), ", but a parameter or a running ",
      "statistic is on meta: load the layer, or move it with to_empty()");
}

std::tuple<Tensor, Tensor> fake_forward(
    const Tensor& x, const Tensor&, const Tensor&, const MaybeTensor&,
    const MaybeTensor&, const MaybeTensor&, const MaybeTensor&, const MaybeTensor&,
    int64_t, double, bool, bool, bool, Maybe<double>, std::string,
    const MaybeTensor&, bool, const MaybeTensor&) {
  check_fake(x);
  return {at::empty_like(x), empty_saved(x)};
}

Five fake_backward(
    const Tensor&, const Tensor& x, const Tensor&, const MaybeTensor& batch_weight,
    const MaybeTensor& batch_bias, const MaybeTensor& weight, const MaybeTensor&,
    int64_t, double, bool, bool, bool needs_dx) {
  check_fake(x);
  return {needs_dx ? at::empty_like(x) : Tensor(), like(batch_weight),
          like(batch_bias), like(weight), like(weight)};
}

std::tuple<Tensor, Tensor> fake_rows(const Tensor& x) {
  check_fake(x);
  const auto options = x.options().dtype(statistics_type(x));
  return {at::empty({x.size(0), x.size(1)}, options),
          at::empty({x.size(0), x.size(1)}, options)};
}

std::tuple<Tensor, Tensor> fake_reduce(const Tensor&, const Tensor& x, const Tensor&) {
  return fake_rows(x);
}

Tensor fake_apply(
    const Tensor& x, const Tensor&, const Tensor&, const Tensor&, bool,
    const MaybeTensor&) {
  check_fake(x);
  return at::empty_like(x);
}

Tensor fake_apply_add(
    const Tensor&, const Tensor& x, const Tensor&, const Tensor&, const Tensor&,
    const Tensor&, const Tensor&) {
  check_fake(x);
  return at::empty_like(x);
}

}  // namespace

TORCH_LIBRARY(bcn_mm_cpu, m) {
  m.def(
      "forward(Tensor x, Tensor(a!) running_mean, Tensor(b!) running_var, "
      "Tensor(c!)? num_batches_tracked, Tensor? batch_weight, Tensor? batch_bias, "
      "Tensor? weight, Tensor? bias, int num_groups, float eps, bool relu, "
      "bool training, bool estimate, float? momentum, str start, Tensor(d!)? batch, "
      "bool repeats, Tensor(e!)? coef) -> (Tensor, Tensor)");
  m.def(
      "backward(Tensor dy, Tensor x, Tensor saved, Tensor? batch_weight, "
      "Tensor? batch_bias, Tensor? weight, Tensor? bias, int num_groups, float eps, "
      "bool relu, bool batch_statistics, bool needs_dx) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("moments(Tensor x) -> (Tensor, Tensor)");
  m.def(
      "apply(Tensor x, Tensor mean, Tensor scale, Tensor at_mean, bool relu, "
      "Tensor? other) -> Tensor");
  m.def("reduce(Tensor dy, Tensor x, Tensor mean) -> (Tensor, Tensor)");
  m.def(
      "apply_add(Tensor dy, Tensor x, Tensor dy_mean, Tensor mean, Tensor dy_scale, "
      "Tensor x_scale, Tensor at_mean) -> Tensor");
  m.def(
      "standardize(Tensor weight, float eps, bool unbiased, bool under_root) "
      "-> (Tensor, Tensor)");
  m.def("standardize_backward(Tensor grad, Tensor weight, Tensor saved) -> Tensor");
  m.def("capability() -> str", [] { return capability(); });
}

TORCH_LIBRARY_IMPL(bcn_mm_cpu, CPU, m) {
  m.impl("forward", forward);
  m.impl("backward", backward);
  m.impl("moments", moments);
  m.impl("apply", apply);
  m.impl("reduce", reduce);
  m.impl("apply_add", apply_add);
  m.impl("standardize", standardize);
  m.impl("standardize_backward", standardize_backward);
}

TORCH_LIBRARY_IMPL(bcn_mm_cpu, Meta, m) {
  m.impl("forward", fake_forward);
  m.impl("backward", fake_backward);
  m.impl("moments", fake_rows);
  m.impl("apply", fake_apply);
  m.impl("reduce", fake_reduce);
  m.impl("apply_add", fake_apply_add);
  m.impl("standardize", fake_standardize);
  m.impl("standardize_backward", fake_standardize_backward);
}
