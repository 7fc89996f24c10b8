// linear_quantized: see linear_quantized.py.
#pragma once

#include "binding.h"
#include "bind_linear.h"

namespace quickchange {
namespace {

// x quantised, in tiles of ACTIVATION_ROWS rows, on the calling thread where there is little of it.
template <class X>
std::unique_ptr<char[]> quantized_activations(
    const Kernels& version, const Tensor& x, int64_t groups, void*& first) {
  constexpr int64_t LINE = 64, FEW = 1 << 16;
  const int64_t tiles = (x.size(0) + ACTIVATION_ROWS - 1) / ACTIVATION_ROWS;
  const int64_t size = tiles * groups * version.activation_group_bytes();
  std::unique_ptr<char[]> room(new char[size + LINE]());  // rows that a tile lacks are zeros
  first = reinterpret_cast<void*>(rounded_up(reinterpret_cast<intptr_t>(room.get()), LINE));
  const ActivationArgs<X> args{data<X>(x), x.stride(0), x.size(0), x.size(1), groups, first};
  if (x.numel() <= FEW) version.quantize_activations(args, 0, tiles);
  else share(tiles, [&](int64_t i) { version.quantize_activations(args, i, i + 1); });
  return room;
}

template <class Y>
void run_linear_quantized(
    const Tensor& x, const Tensor& weight, const Tensor& scale,
    const std::optional<Tensor>& minimum, const std::optional<Tensor>& bias, const Tensor& y) {
  const Kernels& version = kernels();
  void* quantized;
  const auto room = quantized_activations<Y>(version, x, weight.size(1), quantized);
  const QuantizedArgs<Y> args{
      quantized, x.size(0), data<uint8_t>(weight), data<bf16>(scale),
      minimum ? data<bf16>(*minimum) : nullptr, y.size(-1), weight.size(1),
      bias ? data<Y>(*bias) : nullptr, data<Y>(y)};
  share_columns(
      args.N, [&](int64_t begin, int64_t end) { version.linear_quantized(args, begin, end); });
}

bool is_scale(const Tensor& scale, const Tensor& weight) {
  return scale.scalar_type() == at::kBFloat16 && scale.is_contiguous() && scale.dim() == 3 &&
         scale.size(0) == weight.size(0) && scale.size(1) == weight.size(1) &&
         scale.size(2) == PANEL_COLUMNS;
}

Tensor linear_quantized(
    const Tensor& x, const Tensor& weight, const Tensor& scale,
    const std::optional<Tensor>& minimum, const std::optional<Tensor>& bias, int64_t columns) {
  const bool native =
      is_native(x.scalar_type()) && weight.scalar_type() == at::kByte && weight.dim() == 5 &&
      weight.is_contiguous() && weight.numel() > 0 && weight.size(2) == (minimum ? 4 : 8) &&
      weight.size(3) == PANEL_COLUMNS && weight.size(4) == 4 && is_scale(scale, weight) &&
      (!minimum || is_scale(*minimum, weight)) && x.dim() > 0 && x.numel() > 0 &&
      rounded_up(x.size(-1), QUANTIZED_GROUP) == weight.size(1) * QUANTIZED_GROUP && columns > 0 &&
      rounded_up(columns, PANEL_COLUMNS) == weight.size(0) * PANEL_COLUMNS &&
      (!bias || (bias->scalar_type() == x.scalar_type() && bias->is_contiguous() &&
                 bias->dim() == 1 && bias->numel() == columns));
  if (!native) {
    using Plain = Tensor(
        const Tensor&, const Tensor&, const Tensor&, const std::optional<Tensor>&,
        const std::optional<Tensor>&, int64_t);
    static const auto plain = plain_version<Plain>("quickchange::linear_quantized");
    return plain.call(x, weight, scale, minimum, bias, columns);
  }
  const Tensor rows = as_rows(x);
  Tensor y = output_for(x, columns);
  if (x.scalar_type() == at::kFloat)
    run_linear_quantized<float>(rows, weight, scale, minimum, bias, y);
  else run_linear_quantized<bf16>(rows, weight, scale, minimum, bias, y);
  return y;
}

}  // namespace
}  // namespace quickchange
