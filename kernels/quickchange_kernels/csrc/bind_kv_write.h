// kv_write_: see kv_write.py.
#pragma once

#include "binding.h"

namespace quickchange {
namespace {

constexpr int64_t PADDING_SLOT = -1;  // slot of a row that is written nowhere

void kv_write_(
    const Tensor& k, const Tensor& v, Tensor& k_cache, Tensor& v_cache, const Tensor& slots) {
  TORCH_CHECK_VALUE(
      k.dim() == 3 && v.dim() == 3 && k_cache.dim() == 4 && v_cache.dim() == 4,
      "kv_write: k and v must be [T, Hkv, D], the caches [num_blocks, Hkv, block_size, D]");
  const auto type = k_cache.scalar_type();
  const bool native = k.scalar_type() == type && v.scalar_type() == type &&
                      v_cache.scalar_type() == type && k.stride(2) == 1 && v.stride(2) == 1 &&
                      k_cache.is_contiguous() && v_cache.is_contiguous() &&
                      slots.scalar_type() == at::kLong && slots.is_contiguous();
  if (!native) {
    plain_version<decltype(kv_write_)>("quickchange::kv_write_").call(k, v, k_cache, v_cache, slots);
    return;
  }
  const int64_t heads = k_cache.size(1), block = k_cache.size(2);
  const auto fits = [&](const Tensor& from, const Tensor& to) {
    return from.size(0) == slots.numel() && from.size(1) == heads && from.size(2) == to.size(3);
  };
  TORCH_CHECK_VALUE(
      fits(k, k_cache) && fits(v, v_cache) && k_cache.sizes().slice(0, 3) == v_cache.sizes().slice(0, 3),
      "kv_write: k ", k.sizes(), ", v ", v.sizes(), ", k_cache ", k_cache.sizes(), ", v_cache ",
      v_cache.sizes(), " and slots ", slots.sizes(), " do not fit together");
  const int64_t bytes = k_cache.element_size();
  const int64_t* slot = data<int64_t>(slots);
  for (int64_t t = 0; t < slots.numel(); t++)  // before anything is written
    if (slot[t] != PADDING_SLOT) check_index("kv_write: slots", t, slot[t], k_cache.size(0) * block);
  for (int64_t t = 0; t < slots.numel(); t++) {
    if (slot[t] == PADDING_SLOT) continue;
    const auto copy = [&](const Tensor& from, Tensor& to, int64_t h) {
      const int64_t width = to.size(3) * bytes;
      const int64_t at = ((slot[t] / block * heads + h) * block + slot[t] % block) * width;
      const int64_t row = (t * from.stride(0) + h * from.stride(1)) * bytes;
      std::memcpy(data<char>(to) + at, data<char>(from) + row, width);
    };
    for (int64_t h = 0; h < heads; h++) {
      copy(k, k_cache, h);
      copy(v, v_cache, h);
    }
  }
}

}  // namespace
}  // namespace quickchange
