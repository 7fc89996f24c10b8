// verify: see verify.py.
#pragma once

#include <numeric>

#include "binding.h"

namespace quickchange {
namespace {

std::tuple<Tensor, Tensor, Tensor> verify(
    const Tensor& sampled, const Tensor& drafted, const Tensor& rows, int64_t longest) {
  TORCH_CHECK_VALUE(
      sampled.scalar_type() == at::kLong && drafted.scalar_type() == at::kLong &&
          rows.scalar_type() == at::kInt && rows.dim() == 2 && rows.size(1) == 2 &&
          sampled.numel() == drafted.numel() && longest > 0,
      "verify: sampled and drafted must be int64 [T], rows int32 [B, 2] and longest 1 at least");
  const Tensor tokens = sampled.contiguous(), drafts = drafted.contiguous(),
               ranges = rows.contiguous();
  const int64_t count = rows.size(0), T = sampled.numel();
  Tensor accepted = at::zeros({count}, rows.options()), after = at::zeros({count}, sampled.options());
  Tensor path = at::full({count, longest}, -1, rows.options());
  for (int64_t b = 0; b < count; b++) {
    const int64_t begin = data<int32_t>(ranges)[2 * b];
    const int64_t end = std::min<int64_t>(data<int32_t>(ranges)[2 * b + 1], begin + longest);
    if (begin == end) continue;  // padding
    check_range("verify: rows", b, begin, end, T);
    const int64_t *token = data<int64_t>(tokens), *draft = data<int64_t>(drafts);
    int64_t row = begin + 1;
    while (row < end && draft[row] == token[row - 1]) row++;
    int32_t* own = data<int32_t>(path) + b * longest;
    std::iota(own, own + row - begin, int32_t(begin));
    data<int32_t>(accepted)[b] = int32_t(row - begin - 1);
    data<int64_t>(after)[b] = token[row - 1];
  }
  return {accepted, after, path};
}

}  // namespace
}  // namespace quickchange
