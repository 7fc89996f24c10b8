// rms_norm, add_rms_norm, silu_mul and rotary_: see rms_norm.py, silu_mul.py and rotary.py.
#pragma once

#include "binding.h"

namespace quickchange {
namespace {

// Rows in pieces of about 32 Ki elements: less is not worth a second thread.
template <class Rows>
void share_rows(int64_t rows, int64_t width, const Rows& run) {
  const int64_t step = std::max<int64_t>(1, 32768 / std::max<int64_t>(1, width));
  share((rows + step - 1) / step, [&](int64_t i) { run(i * step, std::min((i + 1) * step, rows)); });
}

template <class T>
void run_rms_norm(
    const Tensor& x, const Tensor* delta, const Tensor& weight, double eps, double offset,
    Tensor* sum, Tensor& y) {
  const NormArgs<T> args{data<T>(x), x.stride(0), x.size(1), data<T>(weight), float(eps),
                         float(offset), data<T>(y), delta ? data<T>(*delta) : nullptr,
                         delta ? delta->stride(0) : 0, sum ? data<T>(*sum) : nullptr};
  const Kernels& version = kernels();
  share_rows(x.size(0), x.size(1), [&](int64_t from, int64_t to) { version.rms_norm(args, from, to); });
}

bool is_native_norm(const Tensor& x, const Tensor& weight) {
  return is_native(x.scalar_type()) && weight.scalar_type() == x.scalar_type() &&
         weight.is_contiguous() && x.dim() > 0 && weight.dim() == 1 &&
         weight.numel() == x.size(-1) && x.stride(-1) == 1 && x.numel() > 0;
}

Tensor rms_norm(const Tensor& x, const Tensor& weight, double eps, double offset) {
  if (!is_native_norm(x, weight))
    return plain_version<decltype(rms_norm)>("quickchange::rms_norm").call(x, weight, eps, offset);
  const Tensor rows = x.reshape({-1, x.size(-1)});
  Tensor y = at::empty(x.sizes(), x.options());
  if (x.scalar_type() == at::kFloat) run_rms_norm<float>(rows, nullptr, weight, eps, offset, nullptr, y);
  else run_rms_norm<bf16>(rows, nullptr, weight, eps, offset, nullptr, y);
  return y;
}

std::tuple<Tensor, Tensor> add_rms_norm(
    const Tensor& x, const Tensor& delta, const Tensor& weight, double eps, double offset) {
  TORCH_CHECK_VALUE(
      x.sizes() == delta.sizes(), "add_rms_norm: x ", x.sizes(), " and delta ", delta.sizes(),
      " must have one shape");
  const bool native = is_native_norm(x, weight) && delta.scalar_type() == x.scalar_type() &&
                      delta.stride(-1) == 1;
  if (!native)
    return plain_version<decltype(add_rms_norm)>("quickchange::add_rms_norm")
        .call(x, delta, weight, eps, offset);
  const Tensor rows = x.reshape({-1, x.size(-1)}), added = delta.reshape({-1, x.size(-1)});
  Tensor sum = at::empty(x.sizes(), x.options()), y = at::empty(x.sizes(), x.options());
  if (x.scalar_type() == at::kFloat) run_rms_norm<float>(rows, &added, weight, eps, offset, &sum, y);
  else run_rms_norm<bf16>(rows, &added, weight, eps, offset, &sum, y);
  return {sum, y};
}

template <class T>
void run_silu_mul(const Tensor& x, Tensor& y) {
  const GateArgs<T> args{data<T>(x), x.stride(0), x.size(1) / 2, data<T>(y)};
  const Kernels& version = kernels();
  share_rows(x.size(0), x.size(1), [&](int64_t from, int64_t to) { version.silu_mul(args, from, to); });
}

Tensor silu_mul(const Tensor& x) {
  const bool native = is_native(x.scalar_type()) && x.dim() > 0 && x.size(-1) % 2 == 0 &&
                      x.stride(-1) == 1 && x.numel() > 0;
  if (!native) return plain_version<decltype(silu_mul)>("quickchange::silu_mul").call(x);
  const Tensor rows = x.reshape({-1, x.size(-1)});
  auto shape = x.sizes().vec();
  shape.back() /= 2;
  Tensor y = at::empty(shape, x.options());
  if (x.scalar_type() == at::kFloat) run_silu_mul<float>(rows, y);
  else run_silu_mul<bf16>(rows, y);
  return y;
}

template <class T>
void run_rotary(Tensor& x, const Tensor& cos, const Tensor& sin) {
  const RotaryArgs<T> args{data<T>(x), x.stride(0), x.stride(1), x.size(1), data<T>(cos),
                           data<T>(sin), cos.stride(0), sin.stride(0), cos.size(1)};
  const Kernels& version = kernels();
  share_rows(x.size(0), x.size(1) * cos.size(1), [&](int64_t from, int64_t to) {
    version.rotary(args, from, to);
  });
}

void rotary_(Tensor& q, Tensor& k, const Tensor& cos, const Tensor& sin) {
  for (const Tensor* x : {&q, &k})
    TORCH_CHECK_VALUE(
        x->dim() == 3 && cos.dim() == 2 && cos.sizes() == sin.sizes() &&
            x->size(0) == cos.size(0) && cos.size(1) % 2 == 0 && cos.size(1) <= x->size(2),
        "rotary: q ", q.sizes(), ", k ", k.sizes(), ", cos ", cos.sizes(), " and sin ",
        sin.sizes(), " do not fit together");
  const auto type = q.scalar_type();
  const bool native = is_native(type) && k.scalar_type() == type && cos.scalar_type() == type &&
                      sin.scalar_type() == type && q.stride(2) == 1 && k.stride(2) == 1 &&
                      cos.stride(1) == 1 && sin.stride(1) == 1;
  if (!native) {
    plain_version<decltype(rotary_)>("quickchange::rotary_").call(q, k, cos, sin);
    return;
  }
  for (Tensor* x : {&q, &k}) {
    if (q.scalar_type() == at::kFloat) run_rotary<float>(*x, cos, sin);
    else run_rotary<bf16>(*x, cos, sin);
  }
}

}  // namespace
}  // namespace quickchange
