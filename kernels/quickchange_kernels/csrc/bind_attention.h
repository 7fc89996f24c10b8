// paged_attention: see paged_attention_contract.py.
#pragma once

#include "binding.h"

namespace quickchange {
namespace {

constexpr int64_t MAX_SPLIT_QUERIES = 64;  // a longer chunk of a prompt goes through matrices

// Queries of one sequence and head whose splits are merged into the output.
struct AttentionUnit {
  int64_t first_item, splits;
};

// Lists of one call, kept for the next: every layer of a step would allocate them anew.
struct AttentionPlan {
  std::vector<AttentionItem> chunks;
  std::vector<AttentionItem> items;
  std::vector<AttentionUnit> units;
  std::vector<int64_t> unit_of_item;
  std::vector<std::atomic<int64_t>> open;  // of each unit, splits that are not done; or longer
  std::vector<float> room;
};

// Block tables and lengths of the sequences.
struct AttentionTables {
  const int32_t* blocks;  // [B, width]
  int64_t width;
  const int32_t* lengths;  // [B]
  const int32_t* starts;   // [B + 1]
  int64_t sequences;
  int64_t rows;    // of q
  int64_t blocks_held;  // by the cache
};

// One sequence's items: tiles of queries, and for few queries splits of the keys.
template <class T>
void plan_sequence(
    AttentionPlan& plan, const AttentionArgs<T>& args, const AttentionTables& tables,
    int64_t heads, int64_t b) {
  const int64_t row = tables.starts[b], count = tables.starts[b + 1] - row;
  const int64_t past = tables.lengths[b] - count;
  const bool chunk = count > MAX_SPLIT_QUERIES && std::max(args.D, args.Dv) <= MAX_PRODUCT_DIM;
  const int64_t step = (chunk ? MAX_CHUNK_ROWS : MAX_ATTENTION_ROWS) / args.group;
  for (int64_t first = 0; first < count; first += step) {
    AttentionItem item{};
    item.blocks = tables.blocks + b * tables.width;
    item.first_query = row + first;
    item.first_index = first;
    item.queries = std::min(step, count - first);
    item.past = past;
    const int64_t position = past + first;  // the first query's
    item.oldest = args.window > 0 ? std::max<int64_t>(0, position - args.window + 1) : 0;
    const int64_t start = item.oldest / KEYS_PER_TILE * KEYS_PER_TILE;
    const int64_t end = position + item.queries;
    item.heads = chunk ? 1 : heads;
    for (item.head = 0; item.head < args.Hkv; item.head += item.heads) {
      item.heads = std::min(item.heads, args.Hkv - item.head);
      item.begin = start;
      item.end = end;
      if (chunk) {
        plan.chunks.push_back(item);
        continue;
      }
      const int64_t before = plan.items.size();
      for (int64_t k = start / KEYS_PER_SPLIT * KEYS_PER_SPLIT; k < end; k += KEYS_PER_SPLIT) {
        item.begin = std::max(k, start);
        item.end = std::min(k + KEYS_PER_SPLIT, end);
        plan.items.push_back(item);
        plan.unit_of_item.push_back(plan.units.size());
      }
      plan.units.push_back({before, int64_t(plan.items.size()) - before});
    }
  }
}

// Key heads of one item: all, since their keys lie side by side, unless threads would lack work.
// No result depends on it.
template <class T>
int64_t heads_together(const AttentionArgs<T>& args, const AttentionTables& tables) {
  int64_t items = 0;
  for (int64_t b = 0; b < tables.sequences; b++)
    if (tables.starts[b + 1] > tables.starts[b]) items += 1 + tables.lengths[b] / KEYS_PER_SPLIT;
  const int64_t wanted = 4 * num_threads();
  const int64_t pieces = std::max<int64_t>(1, (wanted + items - 1) / std::max<int64_t>(1, items));
  return std::clamp<int64_t>(args.Hkv / pieces, 1, MAX_ATTENTION_HEADS);
}

// Throws unless sequence b's queries are rows of q, its keys fit in its blocks, and every block that
// a query sees is in the cache.
template <class T>
void check_sequence(const AttentionArgs<T>& args, const AttentionTables& tables, int64_t b) {
  const int64_t length = tables.lengths[b], start = tables.starts[b], end = tables.starts[b + 1];
  check_range("paged_attention: query_start", b, start, end, tables.rows);
  const int64_t count = end - start;
  TORCH_CHECK_VALUE(
      count <= length && length <= tables.width * args.block_size, "paged_attention: sequence ", b,
      " has ", count, " queries and ", length, " keys; its block table has room for ",
      tables.width * args.block_size);
  if (count == 0) return;
  const int64_t oldest =
      args.window > 0 ? std::max<int64_t>(0, length - count - args.window + 1) : 0;
  check_indices(
      "paged_attention: block_tables", tables.blocks, b * tables.width + oldest / args.block_size,
      b * tables.width + (length + args.block_size - 1) / args.block_size, tables.blocks_held);
}

template <class T>
void plan_attention(
    AttentionPlan& plan, const AttentionArgs<T>& args, const AttentionTables& tables) {
  plan.chunks.clear();
  plan.items.clear();
  plan.units.clear();
  plan.unit_of_item.clear();
  const int64_t heads = heads_together(args, tables);
  for (int64_t b = 0; b < tables.sequences; b++) {
    if (tables.lengths[b] == 0) continue;  // padding
    check_sequence(args, tables, b);
    plan_sequence(plan, args, tables, heads, b);
  }
}

// Σ over splits of e^(maximum - highest) · part, over the same of sum and the head's sink.
template <class T>
void merge(const AttentionArgs<T>& args, const AttentionItem* items, int64_t splits) {
  const int64_t D = args.Dv;
  const int64_t rows = items->queries * args.group;
  for (int64_t row = 0; row < items->heads * rows; row++) {
    const int64_t head = (items->head + row / rows) * args.group + row % args.group;
    float highest = items->maximum[row];
    for (int64_t s = 1; s < splits; s++) highest = std::max(highest, items[s].maximum[row]);
    if (args.sinks) highest = std::max(highest, args.sinks[head]);
    float* total = items->part + row * D;
    float sum = args.sinks ? std::exp(args.sinks[head] - highest) : 0;
    for (int64_t s = 0; s < splits; s++) {
      const float factor = std::exp(items[s].maximum[row] - highest);
      const float* part = items[s].part + row * D;
      sum += factor * items[s].sum[row];
      for (int64_t d = 0; d < D; d++)
        total[d] = s == 0 ? factor * part[d] : total[d] + factor * part[d];
    }
    const int64_t query = items->first_query + row % rows / args.group;
    T* target = args.out + (query * args.Hkv * args.group + head) * D;
    for (int64_t d = 0; d < D; d++) target[d] = from_float<T>(total[d] / sum);
  }
}

template <class T>
void run_attention(const AttentionArgs<T>& args, const AttentionTables& tables) {
  static thread_local AttentionPlan kept;
  AttentionPlan& plan = kept;  // the caller's, also where another thread runs a unit
  plan_attention(plan, args, tables);
  int64_t rows = 0;
  for (const auto& item : plan.items) rows += item.heads * item.queries * args.group;
  const int64_t wanted = rows * (args.Dv + 2), units = plan.units.size();
  if (int64_t(plan.room.size()) < wanted) plan.room = std::vector<float>(wanted);
  float* next = plan.room.data();
  for (auto& item : plan.items) {
    const int64_t own = item.heads * item.queries * args.group;
    item.part = next;
    item.maximum = next + own * args.Dv;
    item.sum = item.maximum + own;
    next += own * (args.Dv + 2);
  }
  if (int64_t(plan.open.size()) < units) plan.open = std::vector<std::atomic<int64_t>>(units);
  for (int64_t u = 0; u < units; u++) plan.open[u] = plan.units[u].splits;
  const Kernels& version = kernels();
  const int64_t chunks = plan.chunks.size();
  // Chunks are the larger pieces, and the last of a chunk's items the largest: those go first.
  share(chunks + plan.items.size(), [&](int64_t i) {
    if (i < chunks) return version.attend_chunk(args, plan.chunks[chunks - 1 - i]);
    version.attend(args, plan.items[i - chunks]);
    const int64_t unit = plan.unit_of_item[i - chunks];
    if (--plan.open[unit] == 0)  // the thread that finishes a unit merges it
      merge(args, plan.items.data() + plan.units[unit].first_item, plan.units[unit].splits);
  });
}

template <class T>
AttentionArgs<T> attention_args(
    const Tensor& q, const Tensor& k, const Tensor& v, double scale, int64_t window, double softcap,
    const float* sinks, const float* slopes, const Tensor& out) {
  return {data<T>(q), q.stride(0), q.stride(1), data<T>(k), data<T>(v), k.size(2), k.size(1),
          q.size(1) / k.size(1), k.size(3), v.size(3), float(scale), float(softcap), window, sinks,
          slopes, data<T>(out)};
}

// A float for each query head, or null. Throws for anything else.
const float* by_head(const char* name, const std::optional<Tensor>& values, int64_t heads) {
  if (!values) return nullptr;
  TORCH_CHECK_TYPE(
      values->scalar_type() == at::kFloat && values->is_contiguous(), "paged_attention: ", name,
      " must be contiguous float32");
  TORCH_CHECK_VALUE(
      values->dim() == 1 && values->numel() == heads, "paged_attention: ", name, " ", values->sizes(),
      " must be one for each of ", heads, " query heads");
  return data<float>(*values);
}

Tensor paged_attention(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& tables, const Tensor& lengths,
    const Tensor& starts, double scale, int64_t window, double softcap,
    const std::optional<Tensor>& sinks, const std::optional<Tensor>& slopes) {
  for (const Tensor* t : {&tables, &lengths, &starts})
    TORCH_CHECK_TYPE(
        t->scalar_type() == at::kInt && t->is_contiguous(),
        "paged_attention: block_tables, seq_lens and query_start must be contiguous int32");
  TORCH_CHECK_VALUE(
      starts.numel() == lengths.numel() + 1 && tables.dim() == 2 &&
          tables.size(0) == lengths.numel() && q.dim() == 3 && k.dim() == 4 && v.dim() == 4 &&
          k.size(1) > 0 && k.size(2) > 0 && k.size(3) > 0 && v.size(3) > 0 &&
          q.size(2) == k.size(3) && q.size(1) % k.size(1) == 0 &&
          k.sizes().slice(0, 3) == v.sizes().slice(0, 3),
      "paged_attention: q ", q.sizes(), ", k_cache ", k.sizes(), ", v_cache ", v.sizes(),
      ", block_tables ", tables.sizes(), ", seq_lens ", lengths.sizes(), " and query_start ",
      starts.sizes(), " do not fit together");
  const float* const sink = by_head("sinks", sinks, q.size(1));
  const float* const slope = by_head("slopes", slopes, q.size(1));
  const bool native = is_native(q.scalar_type()) && k.scalar_type() == q.scalar_type() &&
                      v.scalar_type() == q.scalar_type() && q.stride(2) == 1 &&
                      k.is_contiguous() && v.is_contiguous() &&
                      q.size(1) / k.size(1) <= MAX_ATTENTION_ROWS;
  if (!native)
    return plain_version<decltype(paged_attention)>("quickchange::paged_attention")
        .call(q, k, v, tables, lengths, starts, scale, window, softcap, sinks, slopes);
  const Tensor out = at::empty({q.size(0), q.size(1), v.size(3)}, q.options());
  const AttentionTables indices{
      data<int32_t>(tables), tables.size(1), data<int32_t>(lengths), data<int32_t>(starts),
      lengths.numel(), q.size(0), k.size(0)};
  if (q.scalar_type() == at::kFloat)
    run_attention(attention_args<float>(q, k, v, scale, window, softcap, sink, slope, out), indices);
  else
    run_attention(attention_args<bf16>(q, k, v, scale, window, softcap, sink, slope, out), indices);
  return out;
}

}  // namespace
}  // namespace quickchange
