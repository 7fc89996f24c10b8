// verify: see verify.py.
#pragma once

#include "binding.h"

namespace quickchange {
namespace {

constexpr int64_t MAX_VERIFIED_ROWS = 128;

// One sequence's longest path of drafts that hold; of equal ones the one that ends first. Writes its
// rows to `path`, then -1, and returns how many there are.
int64_t longest_path(
    const int64_t* sampled, const int64_t* drafted, const int32_t* parent, int64_t begin,
    int64_t end, int64_t longest, int32_t* path) {
  int64_t depth[MAX_VERIFIED_ROWS], above[MAX_VERIFIED_ROWS];
  const int64_t rows = end - begin;
  int64_t last = 0;
  depth[0] = 1;  // rows of the path down to each row; 0: its draft does not hold
  for (int64_t i = 1; i < rows; i++) {
    const int64_t row = begin + i;
    above[i] = parent ? parent[row] - begin : i - 1;
    const bool sound = above[i] >= 0 && above[i] < i && depth[above[i]] > 0;
    const bool holds = sound && drafted[row] == sampled[begin + above[i]];
    depth[i] = holds ? depth[above[i]] + 1 : 0;
    if (depth[i] > depth[last]) last = i;
  }
  const int64_t length = depth[last];
  for (int64_t place = length - 1; place > 0; place--, last = above[last])
    path[place] = int32_t(begin + last);
  path[0] = int32_t(begin);
  return length;
}

std::tuple<Tensor, Tensor, Tensor> verify(
    const Tensor& sampled, const Tensor& drafted, const Tensor& rows,
    const std::optional<Tensor>& parent, int64_t longest) {
  TORCH_CHECK_VALUE(
      sampled.scalar_type() == at::kLong && drafted.scalar_type() == at::kLong &&
          rows.scalar_type() == at::kInt && rows.dim() == 2 && rows.size(1) == 2 &&
          (!parent || parent->scalar_type() == at::kInt) && longest <= MAX_VERIFIED_ROWS,
      "verify: sampled and drafted must be int64 [T], rows int32 [B, 2] and parent int32 [T]");
  const Tensor tokens = sampled.contiguous(), drafts = drafted.contiguous(),
               ranges = rows.contiguous();
  const Tensor above = parent ? parent->contiguous() : Tensor();
  const int64_t count = rows.size(0), T = sampled.numel();
  Tensor accepted = at::zeros({count}, rows.options()), after = at::zeros({count}, sampled.options());
  Tensor path = at::full({count, longest}, -1, rows.options());
  for (int64_t b = 0; b < count; b++) {
    const int64_t begin = data<int32_t>(ranges)[2 * b];
    const int64_t end = std::min<int64_t>(data<int32_t>(ranges)[2 * b + 1], begin + longest);
    if (begin >= end) continue;  // padding
    TORCH_CHECK_INDEX(
        begin >= 0 && end <= T, "verify: rows ", begin, " to ", end, " are not among the ", T);
    int32_t* own = data<int32_t>(path) + b * longest;
    const int64_t length = longest_path(
        data<int64_t>(tokens), data<int64_t>(drafts), parent ? data<int32_t>(above) : nullptr,
        begin, end, longest, own);
    data<int32_t>(accepted)[b] = int32_t(length - 1);
    data<int64_t>(after)[b] = data<int64_t>(tokens)[own[length - 1]];
  }
  return {accepted, after, path};
}

}  // namespace
}  // namespace quickchange
