// linear, linear_panels, linear_int8, linear_experts: see the files of these names.
#pragma once

#include "binding.h"

namespace quickchange {
namespace {

constexpr int64_t COLUMN_BLOCK = 16;  // columns that the widest kernels make at once

// Output columns [0, N) in pieces, several a thread: work(begin, end).
template <class Work>
void share_columns(int64_t N, const Work& work) {
  const int64_t step = piece(N, 8);
  share((N + step - 1) / step, [&](int64_t i) { work(i * step, std::min((i + 1) * step, N)); });
}

template <class T>
void run_linear(
    const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& y) {
  LinearArgs<T> args{
      data<T>(x), x.stride(0), x.size(0), data<T>(weight), weight.stride(0), weight.size(0),
      weight.size(1), bias ? data<T>(*bias) : nullptr, data<T>(y)};
  const Kernels& version = kernels();
  share_columns(args.N, [&](int64_t begin, int64_t end) { version.linear(args, begin, end); });
}

template <class X, class Y>
void run_linear_int8(
    const Tensor& x, const Tensor& weight, const Tensor& scale, const std::optional<Tensor>& bias,
    const Tensor& y) {
  const Int8Args<X, Y> args{
      data<X>(x), x.stride(0), x.size(0), data<int8_t>(weight), data<bf16>(scale), weight.size(0),
      weight.size(1), bias ? data<Y>(*bias) : nullptr, data<Y>(y), nullptr};
  const Kernels& version = kernels();
  share_columns(args.N, [&](int64_t begin, int64_t end) {
    constexpr int64_t LINE = 64 / sizeof(float);
    const std::unique_ptr<float[]> room(new float[COLUMN_BLOCK * args.K + LINE]);
    const auto address = reinterpret_cast<uintptr_t>(room.get());
    Int8Args<X, Y> own = args;
    own.room = reinterpret_cast<void*>((address + 63) / 64 * 64);
    version.linear_int8(own, begin, end);
  });
}

// x as rows whose elements are contiguous.
Tensor as_rows(const Tensor& x) {
  const Tensor rows = x.reshape({-1, x.size(-1)});
  return rows.stride(1) == 1 ? rows : rows.contiguous();
}

Tensor output_for(const Tensor& x, int64_t columns) {
  auto shape = x.sizes().vec();
  shape.back() = columns;
  return at::empty(shape, x.options());
}

bool fits(const std::optional<Tensor>& bias, const Tensor& weight, at::ScalarType type) {
  return !bias || (bias->scalar_type() == type && bias->is_contiguous() && bias->dim() == 1 &&
                   weight.dim() == 2 && bias->numel() == weight.size(0));
}

Tensor linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  const bool native = is_native(weight.scalar_type()) && x.scalar_type() == weight.scalar_type() &&
                      fits(bias, weight, weight.scalar_type()) && weight.dim() == 2 &&
                      weight.numel() > 0 && weight.stride(1) == 1 && x.dim() > 0 &&
                      x.size(-1) == weight.size(1) && x.numel() > 0;
  if (!native) return at::linear(x, weight, bias);
  const Tensor rows = as_rows(x);
  Tensor y = output_for(x, weight.size(0));
  if (weight.scalar_type() == at::kFloat) run_linear<float>(rows, weight, bias, y);
  else run_linear<bf16>(rows, weight, bias, y);
  return y;
}

// Panels in pieces, several a thread. A piece's last lines are followed by the first ones of the
// piece that the same thread is likely to take next.
template <class T>
void run_linear_panels(
    const Tensor& x, const Tensor& panels, int64_t columns, const std::optional<Tensor>& bias,
    const Tensor& y) {
  const PanelArgs<T> args{
      data<T>(x), x.stride(0), x.size(0), data<T>(panels), columns,
      x.size(1) / PANEL_DEPTH<T>, bias ? data<T>(*bias) : nullptr, data<T>(y)};
  const int64_t count = (columns + PANEL_WIDTH - 1) / PANEL_WIDTH, threads = num_threads();
  const int64_t step = std::max<int64_t>(1, count / (threads * 8));
  const Kernels& version = kernels();
  share((count + step - 1) / step, [&](int64_t i) {
    const int64_t next = (i + threads) * step;
    version.linear_panels(
        args, i * step, std::min((i + 1) * step, count), next < count ? next : -1);
  });
}

Tensor linear_panels(
    const Tensor& x, const Tensor& panels, int64_t columns, const std::optional<Tensor>& bias) {
  const bool native = is_native(panels.scalar_type()) && x.scalar_type() == panels.scalar_type() &&
                      panels.is_contiguous() && x.dim() > 0 && x.numel() > 0 && columns > 0 &&
                      (!bias || (bias->scalar_type() == panels.scalar_type() &&
                                 bias->is_contiguous() && bias->numel() == columns));
  const int64_t depth = panels.scalar_type() == at::kFloat ? PANEL_DEPTH<float> : PANEL_DEPTH<bf16>;
  if (!native || panels.numel() != rounded_up(columns, 16) * rounded_up(x.size(-1), depth)) {
    using Plain = Tensor(const Tensor&, const Tensor&, int64_t, const std::optional<Tensor>&);
    static const auto plain = plain_version<Plain>("quickchange::linear_panels");
    return plain.call(x, panels, columns, bias);
  }
  Tensor rows = as_rows(x);
  if (rows.size(1) % depth) rows = at::constant_pad_nd(rows, {0, depth - rows.size(1) % depth});
  Tensor y = output_for(x, columns);
  if (panels.scalar_type() == at::kFloat) run_linear_panels<float>(rows, panels, columns, bias, y);
  else run_linear_panels<bf16>(rows, panels, columns, bias, y);
  return y;
}

Tensor linear_int8(
    const Tensor& x, const Tensor& weight, const Tensor& scale,
    const std::optional<Tensor>& bias) {
  const int64_t groups = weight.dim() == 2 ? (weight.size(1) + INT8_GROUP - 1) / INT8_GROUP : 0;
  const bool native = is_native(x.scalar_type()) && weight.scalar_type() == at::kChar &&
                      scale.scalar_type() == at::kBFloat16 && fits(bias, weight, x.scalar_type()) &&
                      weight.is_contiguous() && scale.is_contiguous() && scale.dim() == 2 &&
                      weight.numel() > 0 && scale.size(0) == weight.size(0) &&
                      scale.size(1) == groups && x.dim() > 0 && x.size(-1) == weight.size(1) &&
                      x.numel() > 0;
  if (!native) {
    using Plain = Tensor(const Tensor&, const Tensor&, const Tensor&, const std::optional<Tensor>&);
    static const auto plain = plain_version<Plain>("quickchange::linear_int8");
    return plain.call(x, weight, scale, bias);
  }
  Tensor rows = as_rows(x);
  Tensor y = output_for(x, weight.size(0));
  const bool wide = x.scalar_type() == at::kFloat;
  if (wide && kernels().multiplies_bf16()) rows = rows.to(at::kBFloat16);
  if (rows.scalar_type() == at::kFloat) run_linear_int8<float, float>(rows, weight, scale, bias, y);
  else if (wide) run_linear_int8<bf16, float>(rows, weight, scale, bias, y);
  else run_linear_int8<bf16, bf16>(rows, weight, scale, bias, y);
  return y;
}

// The rows of y in the order of their experts, and where each expert's begin: [experts + 1].
struct RowsByExpert {
  std::vector<int64_t> row, begin;

  RowsByExpert(const int64_t* expert, int64_t rows, int64_t experts)
      : row(rows), begin(experts + 1, 0) {
    for (int64_t i = 0; i < rows; i++) begin[expert[i] + 1]++;
    for (int64_t e = 0; e < experts; e++) begin[e + 1] += begin[e];
    std::vector<int64_t> next(begin.begin(), begin.end() - 1);
    for (int64_t i = 0; i < rows; i++) row[next[expert[i]]++] = i;
  }
};

// Rows are gathered by expert, so that an expert's weights pass once for all of them.
template <class T>
void run_linear_experts(
    const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& expert,
    const Tensor& y) {
  const int64_t rows = y.size(0), N = weight.size(1), K = weight.size(2), share_of = rows / x.size(0);
  const RowsByExpert order(data<int64_t>(expert), rows, weight.size(0));
  const std::unique_ptr<T[]> inputs(new T[rows * K]), outputs(new T[rows * N]);
  for (int64_t i = 0; i < rows; i++)
    std::memcpy(&inputs[i * K], data<T>(x) + order.row[i] / share_of * x.stride(0), K * sizeof(T));
  std::vector<int64_t> used;
  for (int64_t e = 0; e < weight.size(0); e++)
    if (order.begin[e] < order.begin[e + 1]) used.push_back(e);
  const int64_t pieces = std::max<int64_t>(1, 8 / int64_t(used.size()));
  const int64_t step = piece(N, pieces), cuts = (N + step - 1) / step;
  const Kernels& version = kernels();
  share(used.size() * cuts, [&](int64_t unit) {
    const int64_t e = used[unit / cuts], first = order.begin[e], from = unit % cuts * step;
    const LinearArgs<T> args{
        &inputs[first * K], K, order.begin[e + 1] - first, data<T>(weight) + e * weight.stride(0),
        weight.stride(1), N, K, bias ? data<T>(*bias) + e * N : nullptr, &outputs[first * N]};
    version.linear(args, from, std::min(from + step, N));
  });
  for (int64_t i = 0; i < rows; i++)
    std::memcpy(data<T>(y) + order.row[i] * N, &outputs[i * N], N * sizeof(T));
}

Tensor linear_experts(
    const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& expert) {
  const bool native = is_native(weight.scalar_type()) && x.scalar_type() == weight.scalar_type() &&
                      weight.dim() == 3 && weight.numel() > 0 && weight.stride(2) == 1 &&
                      x.dim() == 2 && x.size(1) == weight.size(2) && x.size(0) > 0 &&
                      expert.scalar_type() == at::kLong && expert.is_contiguous() &&
                      expert.numel() > 0 && expert.numel() % x.size(0) == 0 &&
                      (!bias || (bias->scalar_type() == weight.scalar_type() &&
                                 bias->is_contiguous() && bias->dim() == 2 &&
                                 bias->size(0) == weight.size(0) && bias->size(1) == weight.size(1)));
  if (!native)
    return plain_version<decltype(linear_experts)>("quickchange::linear_experts")
        .call(x, weight, bias, expert);
  check_indices("linear: expert", data<int64_t>(expert), 0, expert.numel(), weight.size(0));
  const Tensor rows = x.stride(1) == 1 ? x : x.contiguous();
  Tensor y = at::empty({expert.numel(), weight.size(1)}, x.options());
  if (weight.scalar_type() == at::kFloat) run_linear_experts<float>(rows, weight, bias, expert, y);
  else run_linear_experts<bf16>(rows, weight, bias, expert, y);
  return y;
}

}  // namespace
}  // namespace quickchange
