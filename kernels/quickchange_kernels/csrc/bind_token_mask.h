// token_mask_: see token_mask.py.
#pragma once

#include <limits>

#include "binding.h"

namespace quickchange {
namespace {

constexpr int64_t WORD_BITS = 32;

void mask_row(float* logits, const int32_t* bits, int64_t vocabulary) {
  const float never = -std::numeric_limits<float>::infinity();
  for (int64_t first = 0; first < vocabulary; first += WORD_BITS) {
    const uint32_t word = uint32_t(*bits++);
    if (word == ~uint32_t{0}) continue;
    const int64_t count = std::min(WORD_BITS, vocabulary - first);
    for (int64_t i = 0; i < count; i++)
      logits[first + i] = (word >> i & 1) ? logits[first + i] : never;
  }
}

void token_mask_(Tensor& logits, const Tensor& rows, const Tensor& bits) {
  if (logits.scalar_type() != at::kFloat || !bits.is_contiguous() || !rows.is_contiguous()) {
    plain_version<decltype(token_mask_)>("quickchange::token_mask_").call(logits, rows, bits);
    return;
  }
  TORCH_CHECK_VALUE(
      logits.dim() == 2 && logits.stride(1) == 1 && rows.scalar_type() == at::kLong &&
          bits.scalar_type() == at::kInt && bits.dim() == 2 && bits.size(0) == rows.numel() &&
          bits.size(1) == (logits.size(1) + WORD_BITS - 1) / WORD_BITS,
      "token_mask_: logits ", logits.sizes(), ", rows ", rows.sizes(), " and bits ", bits.sizes(),
      " must be [R, V] with contiguous rows, int64 [M] and int32 [M, ceil(V / 32)]");
  const int64_t* row = data<int64_t>(rows);
  check_indices("token_mask_: rows", row, 0, rows.numel(), logits.size(0));
  for (int64_t m = 0; m < rows.numel(); m++) {
    mask_row(
        data<float>(logits) + row[m] * logits.stride(0), data<int32_t>(bits) + m * bits.size(1),
        logits.size(1));
  }
}

}  // namespace
}  // namespace quickchange
