// paged_attention: see paged_attention.py.
#pragma once

#include "binding.h"

namespace quickchange {
namespace {

constexpr int64_t MAX_NATIVE_QUERIES = 64;  // a longer chunk of a prompt goes through matrices

// Queries of one sequence and head whose splits are merged into the output.
struct AttentionUnit {
  int64_t first_item, splits;
};

struct AttentionPlan {
  std::vector<AttentionItem> items;
  std::vector<AttentionUnit> units;
  std::vector<int64_t> chunks;  // sequences with more than MAX_NATIVE_QUERIES
};

template <class T>
AttentionPlan plan_attention(
    const AttentionArgs<T>& args, const Tensor& tables, const Tensor& lengths,
    const Tensor& starts) {
  AttentionPlan plan;
  const int64_t step = MAX_ATTENTION_ROWS / args.group;
  for (int64_t b = 0; b < lengths.numel(); b++) {
    const int64_t length = data<int32_t>(lengths)[b];
    const int64_t row = data<int32_t>(starts)[b], count = data<int32_t>(starts)[b + 1] - row;
    TORCH_CHECK_VALUE(
        count <= length && length <= tables.size(1) * args.block_size,
        "paged_attention: sequence ", b, " has ", count, " queries and ", length,
        " keys; its block table has room for ", tables.size(1) * args.block_size);
    if (count > MAX_NATIVE_QUERIES) {
      plan.chunks.push_back(b);
      continue;
    }
    const int32_t* blocks = data<int32_t>(tables) + b * tables.size(1);
    for (int64_t first = 0; first < count; first += step) {
      const int64_t queries = std::min(step, count - first);
      const int64_t position = length - count + first, end = position + queries;
      const int64_t oldest = args.window > 0 ? std::max<int64_t>(0, position - args.window + 1) : 0;
      for (int64_t head = 0; head < args.Hkv; head++) {
        const int64_t before = plan.items.size();
        for (int64_t k = oldest / KEYS_PER_SPLIT * KEYS_PER_SPLIT; k < end; k += KEYS_PER_SPLIT)
          plan.items.push_back(
              {blocks, row + first, position, queries, head, k, std::min(k + KEYS_PER_SPLIT, end),
               nullptr, nullptr, nullptr});
        plan.units.push_back({before, int64_t(plan.items.size()) - before});
      }
    }
  }
  return plan;
}

// Σ over splits of e^(maximum - highest) · out, over the same of sum.
template <class T>
void merge(const AttentionArgs<T>& args, const AttentionItem* items, int64_t splits, T* out) {
  const int64_t D = args.D;
  for (int64_t row = 0; row < items->queries * args.group; row++) {
    float highest = items->maximum[row];
    for (int64_t s = 1; s < splits; s++) highest = std::max(highest, items[s].maximum[row]);
    float* total = items->out + row * D;
    float sum = 0;
    for (int64_t s = 0; s < splits; s++) {
      const float factor = std::exp(items[s].maximum[row] - highest);
      const float* part = items[s].out + row * D;
      sum += factor * items[s].sum[row];
      for (int64_t d = 0; d < D; d++)
        total[d] = s == 0 ? factor * part[d] : total[d] + factor * part[d];
    }
    const int64_t head = items->head * args.group + row % args.group;
    const int64_t query = items->first_query + row / args.group;
    T* target = out + (query * args.Hkv * args.group + head) * D;
    for (int64_t d = 0; d < D; d++) target[d] = from_float<T>(total[d] / sum);
  }
}

template <class T>
std::vector<int64_t> run_attention(
    const AttentionArgs<T>& args, const Tensor& tables, const Tensor& lengths,
    const Tensor& starts, T* out) {
  AttentionPlan plan = plan_attention(args, tables, lengths, starts);
  int64_t rows = 0;
  for (const auto& item : plan.items) rows += item.queries * args.group;
  const std::unique_ptr<float[]> room(new float[rows * (args.D + 2)]);
  float* next = room.get();
  for (auto& item : plan.items) {
    const int64_t own = item.queries * args.group;
    item.out = next;
    item.maximum = next + own * args.D;
    item.sum = item.maximum + own;
    next += own * (args.D + 2);
  }
  const Kernels& version = kernels();
  share(plan.items.size(), [&](int64_t i) { version.attend(args, plan.items[i]); });
  for (const auto& unit : plan.units)
    merge(args, plan.items.data() + unit.first_item, unit.splits, out);
  return plan.chunks;
}

template <class T>
std::vector<int64_t> run_attention(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& tables, const Tensor& lengths,
    const Tensor& starts, double scale, int64_t window, double softcap, const Tensor& out) {
  const AttentionArgs<T> args{
      data<T>(q), q.stride(0), q.stride(1), data<T>(k), data<T>(v), k.size(2), k.size(1),
      q.size(1) / k.size(1), k.size(3), float(scale), float(softcap), window};
  return run_attention(args, tables, lengths, starts, data<T>(out));
}

Tensor paged_attention(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& tables, const Tensor& lengths,
    const Tensor& starts, double scale, int64_t window, double softcap) {
  const auto plain = plain_version<decltype(paged_attention)>("quickchange::paged_attention");
  for (const Tensor* t : {&tables, &lengths, &starts})
    TORCH_CHECK_TYPE(
        t->scalar_type() == at::kInt && t->is_contiguous(),
        "paged_attention: block_tables, seq_lens and query_start must be contiguous int32");
  TORCH_CHECK_VALUE(
      starts.numel() == lengths.numel() + 1 && q.dim() == 3 && k.dim() == 4 &&
          q.size(2) == k.size(3) && q.size(1) % k.size(1) == 0 && k.sizes() == v.sizes(),
      "paged_attention: q ", q.sizes(), ", k_cache ", k.sizes(), ", v_cache ", v.sizes(),
      ", seq_lens ", lengths.sizes(), " and query_start ", starts.sizes(), " do not fit together");
  const bool native = is_native(q.scalar_type()) && k.scalar_type() == q.scalar_type() &&
                      v.scalar_type() == q.scalar_type() && q.stride(2) == 1 &&
                      k.is_contiguous() && v.is_contiguous() &&
                      q.size(1) / k.size(1) <= MAX_ATTENTION_ROWS;
  if (!native) return plain.call(q, k, v, tables, lengths, starts, scale, window, softcap);
  Tensor out = at::empty(q.sizes(), q.options());
  const auto chunks =
      q.scalar_type() == at::kFloat
          ? run_attention<float>(q, k, v, tables, lengths, starts, scale, window, softcap, out)
          : run_attention<bf16>(q, k, v, tables, lengths, starts, scale, window, softcap, out);
  for (const int64_t b : chunks) {
    const int32_t first = data<int32_t>(starts)[b], last = data<int32_t>(starts)[b + 1];
    const Tensor own = at::tensor({0, last - first}, at::kInt);
    out.slice(0, first, last)
        .copy_(plain.call(
            q.slice(0, first, last), k, v, tables.slice(0, b, b + 1), lengths.slice(0, b, b + 1),
            own, scale, window, softcap));
  }
  return out;
}

}  // namespace
}  // namespace quickchange
