// The operations as PyTorch sees them: check, lay out the work, share it over PyTorch's threads.
// Registered for the CPU under the schemas that the Python modules declare; dtypes and shapes
// that have no native version go to the same operation's overload `plain`.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include <atomic>
#include <optional>
#include <vector>

#include "kernels.h"

namespace quickchange {
namespace {

using at::Tensor;

const Kernels& best_kernels() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    return avx512_kernels();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return avx2_kernels();
#endif
  return baseline_kernels();
}

// The instruction set in use; `use_instruction_set` changes it, for tests.
std::atomic<const Kernels*> chosen{&best_kernels()};

const Kernels& kernels() { return *chosen.load(std::memory_order_relaxed); }

// Shares units 0 .. count - 1 over PyTorch's threads, each taking the next one that is free: a
// thread that the system holds up delays one unit, not a fixed share.
template <class Unit>
void share(int64_t count, const Unit& unit) {
  if (count == 1) return unit(0);
  std::atomic<int64_t> next{0};
  at::parallel_for(0, std::min<int64_t>(count, at::get_num_threads()), 1, [&](int64_t, int64_t) {
    for (int64_t i = next++; i < count; i = next++) unit(i);
  });
}

int64_t rounded_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

// Cuts columns in pieces for several units a thread; pieces are multiples of 16.
int64_t piece(int64_t columns, int64_t per_thread) {
  return rounded_up(std::max<int64_t>(1, columns / (at::get_num_threads() * per_thread)), 16);
}

bool is_native(at::ScalarType type) { return type == at::kFloat || type == at::kBFloat16; }

template <class T>
T* data(const Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}

template <class Signature>
auto plain_version(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "plain").typed<Signature>();
}

// --- linear

constexpr int64_t MAX_NATIVE_ROWS = 64;

template <class T>
void run_linear(
    const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& y) {
  LinearArgs<T> args{
      data<T>(x), x.stride(0), x.size(0), data<T>(weight), weight.stride(0), weight.size(0),
      weight.size(1), bias ? data<T>(*bias) : nullptr, data<T>(y)};
  const int64_t step = piece(args.N, 8);
  const Kernels& version = kernels();
  share((args.N + step - 1) / step, [&](int64_t i) {
    version.linear(args, i * step, std::min((i + 1) * step, args.N));
  });
}

Tensor linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  const bool native =
      is_native(weight.scalar_type()) && x.scalar_type() == weight.scalar_type() &&
      (!bias || (bias->scalar_type() == weight.scalar_type() && bias->is_contiguous())) &&
      weight.dim() == 2 && weight.numel() > 0 && weight.stride(1) == 1 && x.dim() > 0 &&
      x.size(-1) == weight.size(1) && x.numel() > 0 &&
      x.numel() <= MAX_NATIVE_ROWS * weight.size(1);
  if (!native) return at::linear(x, weight, bias);
  Tensor rows = x.reshape({-1, x.size(-1)});
  if (rows.stride(1) != 1) rows = rows.contiguous();
  auto shape = x.sizes().vec();
  shape.back() = weight.size(0);
  Tensor y = at::empty(shape, x.options());
  if (weight.scalar_type() == at::kFloat) run_linear<float>(rows, weight, bias, y);
  else run_linear<bf16>(rows, weight, bias, y);
  return y;
}

// --- lowrank_

constexpr int64_t ROWS_PER_ITEM = 32;  // the rows of x that pass while a page is in the cache

struct Segments {
  const Tensor& arena;
  const Tensor& directory;
  const Tensor& pages;
  const Tensor& scale;
  const Tensor& shift;
  const Tensor& rows;
  const Tensor& slot;
  const Tensor& weight;
  int64_t group;
};

void check_type(const Tensor& tensor, at::ScalarType type, const char* name) {
  TORCH_CHECK_TYPE(
      tensor.scalar_type() == type && tensor.is_contiguous(), "lowrank: ", name, " must be contiguous ",
      type, ", got ", tensor.scalar_type(), " with strides ", tensor.strides());
}

void check(const Segments& s) {
  check_type(s.directory, at::kInt, "directory");
  check_type(s.pages, at::kLong, "pages");
  check_type(s.scale, at::kFloat, "page_scale");
  check_type(s.shift, at::kFloat, "page_shift");
  check_type(s.rows, at::kInt, "segments.rows");
  check_type(s.slot, at::kInt, "segments.slot");
  check_type(s.weight, at::kFloat, "segments.weight");
  TORCH_CHECK_INDEX(
      s.group >= 0 && s.group < s.directory.size(1), "lowrank: group ", s.group,
      " is not in the directory's ", s.directory.size(1));
}

// Every page of every segment, its rows cut in short runs; pages innermost.
template <class T>
std::vector<LowRankItem<T>> list_items(const Segments& s) {
  std::vector<LowRankItem<T>> items;
  const T* arena = data<T>(s.arena);
  const int32_t* rows = data<int32_t>(s.rows);
  for (int64_t i = 0; i < s.slot.numel(); i++) {
    const int64_t entry = data<int32_t>(s.slot)[i] * s.directory.size(1) + s.group;
    const int32_t* range = data<int32_t>(s.directory) + entry * 2;
    for (int64_t row = rows[2 * i]; row < rows[2 * i + 1]; row += ROWS_PER_ITEM)
      for (int64_t p = range[0]; p < range[1]; p++) {
        const int64_t* page = data<int64_t>(s.pages) + p * 4;
        items.push_back(
            {arena + page[0], arena + page[1], row,
             std::min<int64_t>(ROWS_PER_ITEM, rows[2 * i + 1] - row), page[2], page[3],
             data<float>(s.shift) + p * RANKS, data<float>(s.weight)[i] * data<float>(s.scale)[p],
             nullptr});
      }
  }
  return items;
}

template <class T, class X>
void run_lowrank(const Segments& s, LowRankArgs<T, X> args, int64_t columns) {
  std::vector<LowRankItem<T>> items = list_items<T>(s);
  if (items.empty()) return;
  int64_t rows = 0;
  for (const auto& item : items) rows += item.rows;
  const std::unique_ptr<float[]> h(new float[rows * RANKS]);
  float* next = h.get();
  for (auto& item : items) {
    item.h = next;
    next += item.rows * RANKS;
  }
  args.items = items.data();
  args.count = items.size();
  const Kernels& version = kernels();
  // Pairs of pages, because sixteen sums of one row are made together.
  share((args.count + 1) / 2, [&](int64_t i) {
    version.down(args, 2 * i, std::min(2 * i + 2, args.count));
  });
  const int64_t step = piece(columns, 3);
  share((columns + step - 1) / step, [&](int64_t i) {
    version.up(args, i * step, std::min((i + 1) * step, columns));
  });
}

template <class T, class X>
void run_lowrank(
    const Segments& s, const Tensor& y, const Tensor* x, const Tensor* ids, int64_t K) {
  LowRankArgs<T, X> args{};
  if (x) {
    args.x = data<X>(*x);
    args.ldx = x->stride(0);
  } else {
    args.ids = data<int64_t>(*ids);
  }
  args.K = K;
  args.y = data<X>(y);
  args.ldy = y.stride(0);
  run_lowrank<T, X>(s, args, y.size(1));
}

// False where there is no native version for these dtypes.
bool try_lowrank(
    const Segments& s, const Tensor& y, const Tensor* x, const Tensor* ids, int64_t K) {
  check(s);
  TORCH_CHECK_VALUE(
      y.dim() == 2 && y.stride(1) == 1, "lowrank: y must be [T, N] with contiguous rows");
  const auto type = y.scalar_type(), stored = s.arena.scalar_type();
  if (stored == at::kFloat && type == at::kFloat) run_lowrank<float, float>(s, y, x, ids, K);
  else if (stored == at::kBFloat16 && type == at::kFloat) run_lowrank<bf16, float>(s, y, x, ids, K);
  else if (stored == at::kBFloat16 && type == at::kBFloat16) run_lowrank<bf16, bf16>(s, y, x, ids, K);
  else return false;
  return true;
}

void lowrank_(
    Tensor& y, const Tensor& x, const Tensor& arena, const Tensor& directory, const Tensor& pages,
    const Tensor& scale, const Tensor& shift, const Tensor& rows, const Tensor& slot,
    const Tensor& weight, int64_t group) {
  TORCH_CHECK_VALUE(
      x.dim() == 2 && x.stride(1) == 1, "lowrank: x must be [T, K] with contiguous rows");
  TORCH_CHECK_TYPE(
      x.scalar_type() == y.scalar_type(), "lowrank: x is ", x.scalar_type(), ", y is ",
      y.scalar_type(), "; they must be the same");
  const Segments s{arena, directory, pages, scale, shift, rows, slot, weight, group};
  if (try_lowrank(s, y, &x, nullptr, x.size(1))) return;
  plain_version<decltype(lowrank_)>("quickchange::lowrank_")
      .call(y, x, arena, directory, pages, scale, shift, rows, slot, weight, group);
}

void lowrank_embedding_(
    Tensor& y, const Tensor& ids, const Tensor& arena, const Tensor& directory,
    const Tensor& pages, const Tensor& scale, const Tensor& shift, const Tensor& rows,
    const Tensor& slot, const Tensor& weight, int64_t group, int64_t vocabulary) {
  check_type(ids, at::kLong, "ids");
  const Segments s{arena, directory, pages, scale, shift, rows, slot, weight, group};
  if (try_lowrank(s, y, nullptr, &ids, vocabulary)) return;
  plain_version<decltype(lowrank_embedding_)>("quickchange::lowrank_embedding_")
      .call(y, ids, arena, directory, pages, scale, shift, rows, slot, weight, group, vocabulary);
}

// --- paged_attention

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

// --- kv_write_

void kv_write_(
    const Tensor& k, const Tensor& v, Tensor& k_cache, Tensor& v_cache, const Tensor& slots) {
  const auto type = k_cache.scalar_type();
  const bool native = k.scalar_type() == type && v.scalar_type() == type &&
                      v_cache.scalar_type() == type && k.stride(2) == 1 && v.stride(2) == 1 &&
                      k_cache.is_contiguous() && v_cache.is_contiguous() &&
                      slots.scalar_type() == at::kLong && slots.is_contiguous();
  if (!native) {
    plain_version<decltype(kv_write_)>("quickchange::kv_write_").call(k, v, k_cache, v_cache, slots);
    return;
  }
  const int64_t heads = k_cache.size(1), block = k_cache.size(2), D = k_cache.size(3);
  TORCH_CHECK_VALUE(
      k.size(0) == slots.numel() && k.size(1) == heads && k.size(2) == D && k.sizes() == v.sizes(),
      "kv_write: k ", k.sizes(), ", v ", v.sizes(), ", k_cache ", k_cache.sizes(), " and slots ",
      slots.sizes(), " do not fit together");
  const int64_t bytes = k_cache.element_size();
  const int64_t* slot = data<int64_t>(slots);
  for (int64_t t = 0; t < slots.numel(); t++) {
    TORCH_CHECK_INDEX(
        slot[t] >= 0 && slot[t] < k_cache.size(0) * block, "kv_write: slot ", slot[t],
        " is not among the cache's ", k_cache.size(0) * block);
    for (int64_t h = 0; h < heads; h++) {
      const int64_t at = ((slot[t] / block * heads + h) * block + slot[t] % block) * D * bytes;
      const auto copy = [&](const Tensor& from, Tensor& to) {
        std::memcpy(
            data<char>(to) + at, data<char>(from) + (t * from.stride(0) + h * from.stride(1)) * bytes,
            D * bytes);
      };
      copy(k, k_cache);
      copy(v, v_cache);
    }
  }
}

// --- the instruction set

std::string instruction_set() { return kernels().name(); }

// For tests: one of those that this machine has, or "best".
void use_instruction_set(const std::string& name) {
  const Kernels& best = best_kernels();
  const Kernels* found = name == "best" || name == best.name() ? &best : nullptr;
  if (name == "baseline") found = &baseline_kernels();
#if defined(__x86_64__)
  if (name == "avx2" && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
    found = &avx2_kernels();
#endif
  TORCH_CHECK_VALUE(found, "this machine has no ", name, "; its best is ", best.name());
  chosen = found;
}

}  // namespace

TORCH_LIBRARY_IMPL(quickchange, CPU, m) {
  m.impl("linear", linear);
  m.impl("lowrank_", lowrank_);
  m.impl("lowrank_embedding_", lowrank_embedding_);
  m.impl("paged_attention", paged_attention);
  m.impl("kv_write_", kv_write_);
}

TORCH_LIBRARY(quickchange_native, m) {
  m.def("instruction_set() -> str", instruction_set);
  m.def("use_instruction_set(str name) -> ()", use_instruction_set);
}

}  // namespace quickchange
