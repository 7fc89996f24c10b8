// rms_norm and silu_mul: see the Python files of these names.
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
void run_rms_norm(const Tensor& x, const Tensor& weight, double eps, double offset, Tensor& y) {
  const NormArgs<T> args{data<T>(x), x.stride(0), x.size(1), data<T>(weight), float(eps),
                         float(offset), data<T>(y)};
  const Kernels& version = kernels();
  share_rows(x.size(0), x.size(1), [&](int64_t from, int64_t to) { version.rms_norm(args, from, to); });
}

Tensor rms_norm(const Tensor& x, const Tensor& weight, double eps, double offset) {
  const bool native = is_native(x.scalar_type()) && weight.scalar_type() == x.scalar_type() &&
                      weight.is_contiguous() && x.dim() > 0 && weight.dim() == 1 &&
                      weight.numel() == x.size(-1) && x.stride(-1) == 1 && x.numel() > 0;
  if (!native)
    return plain_version<decltype(rms_norm)>("quickchange::rms_norm").call(x, weight, eps, offset);
  const Tensor rows = x.reshape({-1, x.size(-1)});
  Tensor y = at::empty(x.sizes(), x.options());
  if (x.scalar_type() == at::kFloat) run_rms_norm<float>(rows, weight, eps, offset, y);
  else run_rms_norm<bf16>(rows, weight, eps, offset, y);
  return y;
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

}  // namespace
}  // namespace quickchange
