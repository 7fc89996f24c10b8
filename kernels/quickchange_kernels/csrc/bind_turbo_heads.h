// turbo_heads: see turbo_heads.py.
#pragma once

#include "binding.h"

namespace quickchange {
namespace {

constexpr int64_t TURBO_COLUMNS = 64;  // of one unit of work

template <class T, class X>
void run_turbo_heads(
    const Tensor& x, const Tensor& arena, const int64_t* offsets, const int32_t* items,
    const Tensor& segments, const Tensor& out) {
  const int64_t H = x.size(1), pieces = (H + TURBO_COLUMNS - 1) / TURBO_COLUMNS;
  const int32_t* segment = data<int32_t>(segments);
  const Kernels& version = kernels();
  if (segments.size(0) == 0) return;
  share(segments.size(0) * pieces, [&](int64_t i) {
    const int32_t* own = segment + 3 * (i / pieces);
    if (own[0] >= own[1]) return;
    const int64_t begin = i % pieces * TURBO_COLUMNS;
    const TurboArgs<T, X> args{
        data<X>(x), x.stride(0), H, data<T>(arena) + offsets[2 * own[2]],
        data<T>(arena) + offsets[2 * own[2] + 1], items + 2 * own[0], own[1] - own[0], data<X>(out)};
    version.turbo(args, begin, std::min(begin + TURBO_COLUMNS, H));
  });
}

Tensor turbo_heads(
    const Tensor& x, const Tensor& arena, const Tensor& offsets, const Tensor& items,
    const Tensor& segments) {
  const auto of_x = x.scalar_type(), of_arena = arena.scalar_type();
  const bool native = is_native(of_x) && is_native(of_arena) &&
                      !(of_x == at::kBFloat16 && of_arena == at::kFloat) && x.stride(1) == 1 &&
                      arena.is_contiguous() && x.size(1) > 0;
  if (!native)
    return plain_version<decltype(turbo_heads)>("quickchange::turbo_heads")
        .call(x, arena, offsets, items, segments);
  TORCH_CHECK_VALUE(
      offsets.scalar_type() == at::kLong && items.scalar_type() == at::kInt &&
          segments.scalar_type() == at::kInt && items.dim() == 2 && items.size(1) == 2 &&
          segments.dim() == 2 && segments.size(1) == 3,
      "turbo_heads: offsets must be int64 [G, 2], items int32 [I, 2] and segments int32 [S, 3]");
  Tensor out = at::empty({items.size(0), x.size(1)}, x.options());
  const Tensor places = offsets.contiguous(), own = items.contiguous(),
               runs = segments.contiguous();
  const int64_t* offset = data<int64_t>(places);
  const int32_t* item = data<int32_t>(own);
  if (of_x == at::kBFloat16) run_turbo_heads<bf16, bf16>(x, arena, offset, item, runs, out);
  else if (of_arena == at::kBFloat16) run_turbo_heads<bf16, float>(x, arena, offset, item, runs, out);
  else run_turbo_heads<float, float>(x, arena, offset, item, runs, out);
  return out;
}

}  // namespace
}  // namespace quickchange
