// linear: see linear.py.
#pragma once

#include "binding.h"

namespace quickchange {
namespace {

constexpr int64_t MAX_NATIVE_ROWS = 64;

template <class T>
void run_linear(
    const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& y) {
  LinearArgs<T> args{
      data<T>(x), x.stride(0), x.size(0), data<T>(weight), weight.stride(0), weight.size(0),
      weight.size(1), bias ? data<T>(*bias) : nullptr, data<T>(y)};
  const int64_t step = piece(args.N, 8);
  const Kernels& version = kernels();
  share((args.N + step - 1) / step, [&](int64_t i) {
    version.linear(args, i * step, std::min((i + 1) * step, args.N));
  });
}

Tensor linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  const bool native =
      is_native(weight.scalar_type()) && x.scalar_type() == weight.scalar_type() &&
      (!bias || (bias->scalar_type() == weight.scalar_type() && bias->is_contiguous())) &&
      weight.dim() == 2 && weight.numel() > 0 && weight.stride(1) == 1 && x.dim() > 0 &&
      x.size(-1) == weight.size(1) && x.numel() > 0 &&
      x.numel() <= MAX_NATIVE_ROWS * weight.size(1);
  if (!native) return at::linear(x, weight, bias);
  Tensor rows = x.reshape({-1, x.size(-1)});
  if (rows.stride(1) != 1) rows = rows.contiguous();
  auto shape = x.sizes().vec();
  shape.back() = weight.size(0);
  Tensor y = at::empty(shape, x.options());
  if (weight.scalar_type() == at::kFloat) run_linear<float>(rows, weight, bias, y);
  else run_linear<bf16>(rows, weight, bias, y);
  return y;
}

}  // namespace
}  // namespace quickchange
