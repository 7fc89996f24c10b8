// sample and philox_uniform: see sample_contract.py and philox.py.
#pragma once

#include "binding.h"

namespace quickchange {
namespace {

using Optional = std::optional<Tensor>;

constexpr int64_t EDIT_KINDS = 4;

// Edits of row r, in place.
void edit_row(
    float* logits, int64_t r, const int32_t* begin, const int32_t* token, const float* value) {
  for (int kind = 0; kind < EDIT_KINDS; kind++)
    for (int64_t i = begin[4 * r + kind]; i < begin[4 * r + kind + 1]; i++) {
      float& now = logits[token[i]];
      if (kind == 0) now += value[i];
      else if (kind == 1) now = value[i];
      else if (kind == 2) now = now < 0 ? now * value[i] : now / value[i];
      else now -= value[i];
    }
}

// All edits, in place, checked before the first is made.
void edit(
    const Tensor& logits, const Optional& edit_begin, const Optional& edit_token,
    const Optional& edit_value) {
  const int64_t R = logits.size(0), V = logits.size(1);
  TORCH_CHECK_VALUE(
      edit_token && edit_value && edit_begin->scalar_type() == at::kInt &&
          edit_token->scalar_type() == at::kInt && edit_value->scalar_type() == at::kFloat &&
          edit_begin->numel() == EDIT_KINDS * R + 1 && edit_token->numel() == edit_value->numel(),
      "sample: edits must be begin int32 [", EDIT_KINDS * R + 1, "], token int32 [E] and value "
      "float32 [E]");
  const Tensor begin = edit_begin->contiguous();
  const Tensor token = edit_token->contiguous(), value = edit_value->contiguous();
  const int32_t *first = data<int32_t>(begin), *tokens = data<int32_t>(token);
  for (int64_t i = 0; i < EDIT_KINDS * R; i++)
    check_range("sample: edits.begin", i, first[i], first[i + 1], token.numel());
  check_indices("sample: edits.token", tokens, first[0], first[EDIT_KINDS * R], V);
  for (int64_t r = 0; r < R; r++)
    edit_row(data<float>(logits) + r * logits.stride(0), r, first, tokens, data<float>(value));
}

template <class T>
const T* data_or_null(const Optional& tensor) {
  return tensor ? data<const T>(*tensor) : nullptr;
}

void check_column(const Optional& column, int64_t rows) {
  TORCH_CHECK_VALUE(
      !column || (column->scalar_type() == at::kDouble && column->numel() == rows),
      "sample: temperature, uniform and filters must be float64 [", rows, "]");
}

Optional packed(const Optional& tensor) {
  return tensor ? Optional(tensor->contiguous()) : std::nullopt;
}

std::tuple<Tensor, Tensor> sample(
    Tensor& given, const Optional& temperature, const Optional& uniform,
    const c10::List<Optional>& filters, const Optional& edit_begin, const Optional& edit_token,
    const Optional& edit_value) {
  const Tensor logits = given.scalar_type() == at::kFloat ? given : given.to(at::kFloat);
  const int64_t R = logits.size(0), V = logits.size(1);
  TORCH_CHECK_VALUE(
      V > 0 && logits.stride(1) == 1 && temperature.has_value() == uniform.has_value(),
      "sample: logits must be [R, V] with contiguous rows, and temperature and uniform go together");
  TORCH_CHECK_VALUE(
      int64_t(filters.size()) <= MAX_FILTERS, "sample: ", filters.size(), " filters; at most ",
      MAX_FILTERS);
  for (const Optional& column : {temperature, uniform}) check_column(column, R);
  for (size_t i = 0; i < filters.size(); i++) check_column(filters.get(i), R);
  if (edit_begin) edit(logits, edit_begin, edit_token, edit_value);
  Tensor tokens = at::empty({R}, logits.options().dtype(at::kLong));
  Tensor sound = at::empty({R}, logits.options().dtype(at::kBool));
  const Optional t = packed(temperature), u = packed(uniform);
  SampleArgs args{
      data<float>(logits), logits.stride(0), V, data_or_null<double>(t), data_or_null<double>(u),
      {}, data<int64_t>(tokens), data<bool>(sound)};
  std::vector<Optional> columns;  // own the filters' packed copies
  for (size_t i = 0; i < filters.size(); i++) {
    columns.push_back(packed(filters.get(i)));
    args.filters[i] = data_or_null<double>(columns.back());
  }
  const Kernels& version = kernels();
  // Less than some 64 Ki tokens is not worth a second thread.
  const int64_t step = std::max<int64_t>(1, 65536 / V);
  if (R > 0)
    share((R + step - 1) / step, [&](int64_t i) {
      const int64_t blocks = (V + SAMPLE_BLOCK - 1) / SAMPLE_BLOCK;
      const std::unique_ptr<float[]> best(new float[blocks]);
      const std::unique_ptr<int64_t[]> sums(new int64_t[blocks]);
      const std::unique_ptr<int64_t[]> found(new int64_t[blocks * SAMPLE_BLOCK]);
      const SampleScratch scratch{best.get(), sums.get(), found.get()};
      version.sample(args, scratch, i * step, std::min((i + 1) * step, R));
    });
  return {tokens, sound};
}

#ifdef __SIZEOF_INT128__
// First word of Philox4x64-10 (Salmon et al., 2011).
uint64_t philox_word(uint64_t key0, uint64_t counter) {
  uint64_t x0 = counter, x1 = 0, x2 = 0, x3 = 0, key1 = 0;
  for (int round = 0; round < 10; round++) {
    const unsigned __int128 first = (unsigned __int128)(0xD2E7470EE14C6C93u) * x0;
    const unsigned __int128 second = (unsigned __int128)(0xCA5A826395121157u) * x2;
    x0 = uint64_t(second >> 64) ^ x1 ^ key0;
    x1 = uint64_t(second);
    x2 = uint64_t(first >> 64) ^ x3 ^ key1;
    x3 = uint64_t(first);
    key0 += 0x9E3779B97F4A7C15u;
    key1 += 0xBB67AE8584CAA73Bu;
  }
  return x0;
}

Tensor philox_uniform(const Tensor& seed, const Tensor& position) {
  TORCH_CHECK_VALUE(
      seed.dim() == 1 && seed.sizes() == position.sizes() && seed.scalar_type() == at::kLong &&
          position.scalar_type() == at::kLong,
      "philox_uniform: seed and position must be int64 [R]");
  const Tensor keys = seed.contiguous(), counters = position.contiguous();
  Tensor out = at::empty(seed.sizes(), seed.options().dtype(at::kDouble));
  for (int64_t i = 0; i < seed.numel(); i++) {
    const uint64_t word = philox_word(
        uint64_t(data<int64_t>(keys)[i]), uint64_t(data<int64_t>(counters)[i]));
    data<double>(out)[i] = double(word >> 11) * 0x1p-53;
  }
  return out;
}
#endif

}  // namespace
}  // namespace quickchange
