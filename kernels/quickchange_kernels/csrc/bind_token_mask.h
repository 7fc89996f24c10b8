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
  const int64_t* row = data<int64_t>(rows);
  for (int64_t m = 0; m < rows.numel(); m++) {
    TORCH_CHECK_INDEX(
        row[m] >= 0 && row[m] < logits.size(0), "token_mask_: row ", row[m], " is not among the ",
        logits.size(0));
    mask_row(
        data<float>(logits) + row[m] * logits.stride(0), data<int32_t>(bits) + m * bits.size(1),
        logits.size(1));
  }
}

}  // namespace
}  // namespace quickchange
