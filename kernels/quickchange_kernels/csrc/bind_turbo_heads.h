// turbo_heads, head_logits, draft_logits: see turbo_heads_contract.py, draft_logits.py.
#pragma once

#include "binding.h"

namespace quickchange {
namespace {

constexpr int64_t HEAD_COLUMNS = 4 * PAGE_ROWS;  // columns of one unit of work

struct HeadIndices {
  const Tensor pages, matrices, items, segments;
};

// Throws unless every live segment names items, these rows of z and out, and a matrix whose pages
// cover N outputs and lie in the arena.
void check_heads(
    const Tensor& z, const Tensor& arena, const HeadIndices& at, const Tensor& out) {
  const int64_t T = z.size(0), K = z.size(1), wanted = (out.size(1) + PAGE_ROWS - 1) / PAGE_ROWS;
  const int32_t *matrix = data<int32_t>(at.matrices), *item = data<int32_t>(at.items);
  const int64_t* page = data<int64_t>(at.pages);
  for (int64_t s = 0; s < at.segments.size(0); s++) {
    const int32_t* own = data<int32_t>(at.segments) + 3 * s;
    if (own[0] == own[1]) continue;  // padding
    check_range("turbo_heads: segments", s, own[0], own[1], at.items.size(0));
    check_index("turbo_heads: segments' matrix", s, own[2], at.matrices.size(0));
    const int64_t first = matrix[2 * own[2]], end = matrix[2 * own[2] + 1];
    check_range("turbo_heads: matrices", own[2], first, end, at.pages.size(0));
    TORCH_CHECK_INDEX(
        end - first >= wanted, "turbo_heads: matrices[", own[2], "] has ", end - first,
        " pages; the outputs need ", wanted);
    for (int64_t p = first; p < end; p++)
      check_block("turbo_heads: pages", p, page[p], PAGE_ROWS, K + 1, arena.numel());
    for (int64_t i = own[0]; i < own[1]; i++) {
      check_index("turbo_heads: items' row", i, item[2 * i], T);
      check_index("turbo_heads: items' place", i, item[2 * i + 1], out.size(0));
    }
  }
}

template <class T, class X, class Y>
void run_heads(
    const Tensor* x, const Tensor& z, const Tensor& arena, const HeadIndices& at,
    const Tensor& out) {
  check_heads(z, arena, at, out);
  const int64_t N = out.size(1), pieces = (N + HEAD_COLUMNS - 1) / HEAD_COLUMNS;
  const int32_t* segment = data<int32_t>(at.segments);
  const int32_t* matrix = data<int32_t>(at.matrices);
  const Kernels& version = kernels();
  if (at.segments.size(0) * pieces == 0) return;
  share(at.segments.size(0) * pieces, [&](int64_t i) {
    const int32_t* own = segment + 3 * (i / pieces);
    if (own[0] >= own[1]) return;
    const int64_t begin = i % pieces * HEAD_COLUMNS;
    const int32_t* range = matrix + 2 * own[2];
    const HeadArgs<T, X, Y> args{
        x ? data<X>(*x) : nullptr, x ? x->stride(0) : 0, data<X>(z), z.stride(0), z.size(1),
        data<T>(arena), data<int64_t>(at.pages) + range[0], range[1] - range[0],
        data<int32_t>(at.items) + 2 * own[0], own[1] - own[0], data<Y>(out), N};
    version.heads(args, begin, std::min(begin + HEAD_COLUMNS, N));
  });
}

bool is_native_pair(const Tensor& rows, const Tensor& weights) {
  const auto of_rows = rows.scalar_type(), of_weights = weights.scalar_type();
  return is_native(of_rows) && is_native(of_weights) &&
         !(of_rows == at::kBFloat16 && of_weights == at::kFloat) && rows.dim() == 2 &&
         rows.stride(1) == 1 && rows.size(1) > 0;
}

HeadIndices head_indices(
    const Tensor& pages, const Tensor& matrices, const Tensor& items, const Tensor& segments) {
  TORCH_CHECK_VALUE(
      pages.scalar_type() == at::kLong && pages.dim() == 1 &&
          matrices.scalar_type() == at::kInt && matrices.dim() == 2 && matrices.size(1) == 2 &&
          items.scalar_type() == at::kInt && items.dim() == 2 && items.size(1) == 2 &&
          segments.scalar_type() == at::kInt && segments.dim() == 2 && segments.size(1) == 3,
      "turbo_heads: pages must be int64 [P], matrices int32 [G, 2], items int32 [I, 2] and segments "
      "int32 [S, 3]");
  return {pages.contiguous(), matrices.contiguous(), items.contiguous(), segments.contiguous()};
}

Tensor turbo_heads(
    const Tensor& x, const Tensor& z, const Tensor& arena, const Tensor& pages,
    const Tensor& matrices, const Tensor& items, const Tensor& segments) {
  const bool native = is_native_pair(z, arena) && x.scalar_type() == z.scalar_type() &&
                      x.stride(1) == 1 && arena.is_contiguous();
  if (!native)
    return plain_version<decltype(turbo_heads)>("quickchange::turbo_heads")
        .call(x, z, arena, pages, matrices, items, segments);
  TORCH_CHECK_VALUE(
      x.dim() == 2 && x.size(0) == z.size(0), "turbo_heads: x ", x.sizes(), " and z ", z.sizes(),
      " must have as many rows");
  const HeadIndices at = head_indices(pages, matrices, items, segments);
  Tensor out = at::empty({items.size(0), x.size(1)}, x.options());
  if (x.scalar_type() == at::kBFloat16) run_heads<bf16, bf16, bf16>(&x, z, arena, at, out);
  else if (arena.scalar_type() == at::kBFloat16) run_heads<bf16, float, float>(&x, z, arena, at, out);
  else run_heads<float, float, float>(&x, z, arena, at, out);
  return out;
}

Tensor head_logits(
    const Tensor& z, const Tensor& arena, const Tensor& pages, const Tensor& matrices,
    const Tensor& items, const Tensor& segments, int64_t width) {
  if (!is_native_pair(z, arena) || !arena.is_contiguous())
    return plain_version<decltype(head_logits)>("quickchange::head_logits")
        .call(z, arena, pages, matrices, items, segments, width);
  const HeadIndices at = head_indices(pages, matrices, items, segments);
  Tensor out = at::empty({items.size(0), width}, z.options().dtype(at::kFloat));
  if (z.scalar_type() == at::kBFloat16) run_heads<bf16, bf16, float>(nullptr, z, arena, at, out);
  else if (arena.scalar_type() == at::kBFloat16)
    run_heads<bf16, float, float>(nullptr, z, arena, at, out);
  else run_heads<float, float, float>(nullptr, z, arena, at, out);
  return out;
}

// Throws unless every live segment names rows of h, at most `width` tokens, and these are rows of
// the weight.
void check_draft_segments(
    const Tensor& h, const Tensor& weight, const Tensor& vocabulary, const Tensor& segments,
    int64_t width) {
  for (int64_t s = 0; s < segments.size(0); s++) {
    const int32_t* own = data<int32_t>(segments) + 4 * s;
    if (own[0] == own[1]) continue;  // padding
    check_range("draft_logits: segments' rows", s, own[0], own[1], h.size(0));
    check_range("draft_logits: segments' tokens", s, own[2], own[3], vocabulary.numel());
    TORCH_CHECK_INDEX(
        own[3] - own[2] <= width, "draft_logits: segments[", s, "] has ", own[3] - own[2],
        " tokens; the result has ", width, " columns");
    check_indices(
        "draft_logits: vocabulary", data<int32_t>(vocabulary), own[2], own[3], weight.size(0));
  }
}

template <class T, class X>
void run_draft_logits(
    const Tensor& h, const Tensor& weight, const std::optional<Tensor>& bias,
    const Tensor& vocabulary, const Tensor& segments, const Tensor& out) {
  const int64_t width = out.size(1), step = piece(width, 8), pieces = (width + step - 1) / step;
  const int32_t* segment = data<int32_t>(segments);
  const Kernels& version = kernels();
  if (segments.size(0) * pieces == 0) return;
  share(segments.size(0) * pieces, [&](int64_t i) {
    const int32_t* own = segment + 4 * (i / pieces);
    if (own[0] >= own[1]) return;
    const int64_t begin = i % pieces * step;
    const DraftArgs<T, X> args{
        data<X>(h) + own[0] * h.stride(0), h.stride(0), own[1] - own[0], data<T>(weight),
        weight.stride(0), h.size(1), bias ? data<T>(*bias) : nullptr,
        data<int32_t>(vocabulary) + own[2], own[3] - own[2], data<float>(out) + own[0] * width,
        width};
    version.draft_logits(args, begin, std::min(begin + step, width));
  });
}

Tensor draft_logits(
    const Tensor& h, const Tensor& weight, const std::optional<Tensor>& bias,
    const Tensor& vocabulary, const Tensor& segments, int64_t width) {
  const bool native = is_native_pair(h, weight) && weight.dim() == 2 && weight.stride(1) == 1 &&
                      (!bias || (bias->scalar_type() == weight.scalar_type() &&
                                 bias->is_contiguous() && bias->numel() == weight.size(0)));
  if (!native)
    return plain_version<decltype(draft_logits)>("quickchange::draft_logits")
        .call(h, weight, bias, vocabulary, segments, width);
  TORCH_CHECK_VALUE(
      vocabulary.scalar_type() == at::kInt && vocabulary.dim() == 1 &&
          segments.scalar_type() == at::kInt && segments.dim() == 2 && segments.size(1) == 4 &&
          h.size(1) == weight.size(1) && width > 0,
      "draft_logits: vocabulary must be int32 [S], segments int32 [R, 4] and width 1 at least; h ",
      h.sizes(), " and weight ", weight.sizes(), " must have as many columns");
  Tensor out = at::empty({h.size(0), width}, h.options().dtype(at::kFloat));
  const Tensor tokens = vocabulary.contiguous(), runs = segments.contiguous();
  check_draft_segments(h, weight, tokens, runs, width);
  if (h.scalar_type() == at::kBFloat16)
    run_draft_logits<bf16, bf16>(h, weight, bias, tokens, runs, out);
  else if (weight.scalar_type() == at::kBFloat16)
    run_draft_logits<bf16, float>(h, weight, bias, tokens, runs, out);
  else run_draft_logits<float, float>(h, weight, bias, tokens, runs, out);
  return out;
}

}  // namespace
}  // namespace quickchange
