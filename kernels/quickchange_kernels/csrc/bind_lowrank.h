// lowrank_, lowrank_embedding_, lowrank_experts_: see lowrank_contract.py.
#pragma once

#include "binding.h"

namespace quickchange {
namespace {

constexpr int64_t ROWS_PER_ITEM = 32;  // the rows of x that pass while a page is in the cache
// Multiplications from which two rounds of waking and awaiting the other threads pay: one row under
// one rank-16 adapter (about 40,000) is done sooner by the thread that is awake.
constexpr int64_t WORTH_SHARING = 1 << 17;

// The tables of an adapter pool and a step's segments, in raw pointers: a tensor's take three calls.
struct Segments {
  const void* arena;
  int64_t room;  // elements of the arena
  const int32_t* directory;  // [slots, groups, 2]
  int64_t slots, groups;
  const int64_t* pages;  // [page_count, 4]
  int64_t page_count;
  const float* scale;   // [page_count]
  const float* shift;   // [page_count, 8]
  const int32_t* kind;  // [page_count]
  const int32_t* rows;  // [count, 2]
  const int32_t* slot;  // [count]
  const float* weight;  // [count]
  int64_t count;
  int64_t group;
};

template <class T>
const T* checked_data(const Tensor& tensor, at::ScalarType type, const char* name) {
  TORCH_CHECK_TYPE(
      tensor.scalar_type() == type && tensor.is_contiguous(), "lowrank: ", name, " must be contiguous ",
      type, ", got ", tensor.scalar_type(), " with strides ", tensor.strides());
  return data<T>(tensor);
}

Segments checked_segments(
    const Tensor& arena, const Tensor& directory, const Tensor& pages, const Tensor& scale,
    const Tensor& shift, const Tensor& kind, const Tensor& rows, const Tensor& slot,
    const Tensor& weight, int64_t group) {
  TORCH_CHECK_VALUE(
      directory.dim() == 3 && directory.size(2) == 2 && pages.dim() == 2 && pages.size(1) == 4 &&
          scale.numel() == pages.size(0) && shift.numel() == RANKS * pages.size(0) &&
          kind.numel() == pages.size(0) && rows.numel() == 2 * slot.numel() &&
          weight.numel() == slot.numel() && arena.is_contiguous(),
      "lowrank: directory ", directory.sizes(), ", pages ", pages.sizes(), ", page_scale ",
      scale.sizes(), ", page_shift ", shift.sizes(), ", page_kind ", kind.sizes(),
      ", segments.rows ", rows.sizes(), ", slot ", slot.sizes(), " and weight ", weight.sizes(),
      " do not fit together");
  TORCH_CHECK_INDEX(
      group >= 0 && group < directory.size(1), "lowrank: group ", group,
      " is not in the directory's ", directory.size(1));
  return {
      arena.data_ptr(), arena.numel(),
      checked_data<int32_t>(directory, at::kInt, "directory"), directory.size(0), directory.size(1),
      checked_data<int64_t>(pages, at::kLong, "pages"), pages.size(0),
      checked_data<float>(scale, at::kFloat, "page_scale"),
      checked_data<float>(shift, at::kFloat, "page_shift"),
      checked_data<int32_t>(kind, at::kInt, "page_kind"),
      checked_data<int32_t>(rows, at::kInt, "segments.rows"),
      checked_data<int32_t>(slot, at::kInt, "segments.slot"),
      checked_data<float>(weight, at::kFloat, "segments.weight"), slot.numel(), group};
}

// Throws unless `page` lies in the arena and its columns among N.
void check_page(const Segments& s, int64_t p, int64_t K, int64_t N) {
  const int64_t* page = s.pages + p * 4;
  const auto kind = PageKind(s.kind[p]);
  check_index("lowrank: page_kind", p, int64_t(kind), int64_t(PageKind::GAIN) + 1);
  check_index("lowrank: pages' column", p, page[2], N + 1);
  check_index("lowrank: pages' width", p, page[3], N - page[2] + 1);
  const bool gain = kind == PageKind::GAIN;
  if (!gain) check_block("lowrank: pages' A", p, page[0], RANKS, K, s.room);
  check_block("lowrank: pages' B", p, page[1], gain ? 1 : RANKS, page[3], s.room);
}

// The pages of a slot in one group, checked.
const int32_t* checked_pages(const Segments& s, int64_t slot, int64_t group, int64_t K, int64_t N) {
  const int64_t entry = slot * s.groups + group;
  const int32_t* range = s.directory + entry * 2;
  if (range[0] == range[1]) return range;  // no update here
  check_range("lowrank: directory", entry, range[0], range[1], s.page_count);
  for (int64_t p = range[0]; p < range[1]; p++) check_page(s, p, K, N);
  return range;
}

// The pages of segment i, which names rows of y, a slot, pages and, where there are ids, tokens.
// Throws where it does not.
const int32_t* checked_segment(
    const Segments& s, int64_t i, const int64_t* ids, int64_t K, const Tensor& y) {
  const int32_t* rows = s.rows + 2 * i;
  check_range("lowrank: segments.rows", i, rows[0], rows[1], y.size(0));
  check_index("lowrank: segments.slot", i, s.slot[i], s.slots);
  const int32_t* range = checked_pages(s, s.slot[i], s.group, K, y.size(1));
  if (ids && range[0] != range[1]) check_indices("lowrank: ids", ids, rows[0], rows[1], K);
  return range;
}

// Page p of segment i over some rows.
template <class T>
LowRankItem<T> item_of(const Segments& s, int64_t i, int64_t p, int64_t row, int64_t rows) {
  const T* arena = static_cast<const T*>(s.arena);
  const int64_t* page = s.pages + p * 4;
  return {PageKind(s.kind[p]), arena + page[0], arena + page[1], row, rows, page[2], page[3],
          s.shift + p * RANKS, s.weight[i] * s.scale[p], nullptr};
}

// Lists of one call, kept for the next: 120 calls a step would allocate them anew.
template <class T>
struct LowRankPlan {
  std::vector<LowRankItem<T>> items;
  std::vector<int64_t> first_row;  // least row of the items from i on
  std::vector<int64_t> cuts;
  std::vector<float> h;
};

// Every page of every segment, checked, its rows cut in short runs; pages innermost.
template <class T>
void list_items(
    std::vector<LowRankItem<T>>& items, const Segments& s, const Tensor& y, const int64_t* ids,
    int64_t K) {
  items.clear();
  for (int64_t i = 0; i < s.count; i++) {
    const int64_t begin = s.rows[2 * i], end = s.rows[2 * i + 1];
    if (begin == end) continue;  // padding
    const int32_t* range = checked_segment(s, i, ids, K, y);
    for (int64_t row = begin; row < end; row += ROWS_PER_ITEM)
      for (int64_t p = range[0]; p < range[1]; p++)
        items.push_back(item_of<T>(s, i, p, row, std::min(ROWS_PER_ITEM, end - row)));
  }
}

// The experts that rows of y are for.
struct Routing {
  const int64_t* expert;  // [rows of y]
  int64_t experts;
  int64_t choices;  // neighbouring rows of y that belong to one token
};

// As list_items, one row each: neighbouring rows go through different experts.
template <class T>
void list_expert_items(
    std::vector<LowRankItem<T>>& items, const Segments& s, const Tensor& y, const Routing& routing,
    int64_t K) {
  items.clear();
  for (int64_t i = 0; i < s.count; i++) {
    const int64_t begin = s.rows[2 * i], end = s.rows[2 * i + 1];
    if (begin == end) continue;  // padding
    check_range("lowrank: segments.rows", i, begin, end, y.size(0) / routing.choices);
    check_index("lowrank: segments.slot", i, s.slot[i], s.slots);
    for (int64_t r = begin * routing.choices; r < end * routing.choices; r++) {
      check_index("lowrank: expert", r, routing.expert[r], routing.experts);
      const int32_t* range = checked_pages(s, s.slot[i], s.group + routing.expert[r], K, y.size(1));
      for (int64_t p = range[0]; p < range[1]; p++) items.push_back(item_of<T>(s, i, p, r, 1));
    }
  }
}

// Where the items can be parted so that no row is on both sides: cuts 0, ..., items.size().
template <class T>
void cut_rows(LowRankPlan<T>& plan) {
  const auto& items = plan.items;
  plan.first_row.resize(items.size());
  int64_t least = std::numeric_limits<int64_t>::max();
  for (int64_t i = items.size() - 1; i >= 0; i--)
    plan.first_row[i] = least = std::min(least, items[i].row);
  plan.cuts.assign(1, 0);
  int64_t end = items[0].row + items[0].rows;
  for (int64_t i = 1; i < int64_t(items.size()); i++) {
    if (plan.first_row[i] >= end) plan.cuts.push_back(i);
    end = std::max(end, items[i].row + items[i].rows);
  }
  plan.cuts.push_back(items.size());
}

// Few rows under many adapters are shared out by rows, both halves in one go: no thread waits for
// another in between, and a page read from end to end comes faster than its parts do for several
// threads. Legal where x is y, too: a row's x is read before that row is written. False where the
// rows are not of that sort, or too few for the threads to be done at about the same time.
template <class T, class X>
bool share_by_rows(const LowRankArgs<T, X>& args, LowRankPlan<T>& plan, int64_t columns) {
  cut_rows(plan);
  const int64_t parts = plan.cuts.size() - 1, threads = num_threads();
  const int64_t rows = plan.items.back().row + plan.items.back().rows - plan.items[0].row;
  if ((parts % threads != 0 && parts < 4 * threads) || rows > 4 * parts) return false;
  const Kernels& version = kernels();
  share(parts, [&](int64_t i) {
    LowRankArgs<T, X> unit = args;
    unit.items += plan.cuts[i];
    unit.count = plan.cuts[i + 1] - plan.cuts[i];
    version.down(unit, 0, unit.count);
    version.up(unit, 0, columns);
  });
  return true;
}

// Rows that share pages: the down half by items, then the up half by columns, so that threads share
// the pages.
template <class T, class X>
void share_by_columns(const LowRankArgs<T, X>& args, int64_t columns) {
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
    const Segments& s, LowRankArgs<T, X> args, const Tensor& y, const Routing* routing) {
  const int64_t columns = y.size(1);
  static thread_local LowRankPlan<T> plan;
  auto& items = plan.items;
  if (routing) list_expert_items<T>(items, s, y, *routing, args.K);
  else list_items<T>(items, s, y, args.ids, args.K);
  if (items.empty()) return;
  int64_t room = 0, work = 0;
  for (const auto& item : items) {
    room += item.rows * item.h_row();
    work += item.rows * RANKS * (args.K + item.width);
  }
  if (int64_t(plan.h.size()) < room) plan.h.resize(room);
  float* next = plan.h.data();
  for (auto& item : items) {
    item.h = next;
    next += item.rows * item.h_row();
  }
  args.items = items.data();
  args.count = items.size();
  const Kernels& version = kernels();
  if (work < WORTH_SHARING) {
    version.down(args, 0, args.count);
    version.up(args, 0, columns);
    return;
  }
  if (!share_by_rows(args, plan, columns)) share_by_columns(args, columns);
}

template <class T, class X>
void run_lowrank(
    const Segments& s, const Tensor& y, const Tensor* x, const Tensor* ids, int64_t K,
    const Routing* routing) {
  LowRankArgs<T, X> args{};
  args.y_per_x = x && x->size(0) ? y.size(0) / x->size(0) : 1;
  if (x) {
    args.x = data<X>(*x);
    args.ldx = x->stride(0);
  } else {
    args.ids = data<int64_t>(*ids);
  }
  args.K = K;
  args.y = data<X>(y);
  args.ldy = y.stride(0);
  run_lowrank<T, X>(s, args, y, routing);
}

// False where there is no native version for these dtypes.
bool try_lowrank(
    const Segments& s, at::ScalarType stored, const Tensor& y, const Tensor* x, const Tensor* ids,
    int64_t K, const Routing* routing = nullptr) {
  TORCH_CHECK_VALUE(
      y.dim() == 2 && y.stride(1) == 1, "lowrank: y must be [T, N] with contiguous rows");
  const int64_t given = x ? x->size(0) : ids->numel();
  TORCH_CHECK_VALUE(
      (given == y.size(0) || (routing && given * routing->choices == y.size(0))) && K >= 0,
      "lowrank: y has ", y.size(0), " rows, ", x ? "x " : "ids ", given, "; they must be as many",
      routing ? ", or x one for each token" : "");
  const auto type = y.scalar_type();
  if (stored == at::kFloat && type == at::kFloat) run_lowrank<float, float>(s, y, x, ids, K, routing);
  else if (stored == at::kBFloat16 && type == at::kFloat)
    run_lowrank<bf16, float>(s, y, x, ids, K, routing);
  else if (stored == at::kBFloat16 && type == at::kBFloat16)
    run_lowrank<bf16, bf16>(s, y, x, ids, K, routing);
  else return false;
  return true;
}

void lowrank_(
    Tensor& y, const Tensor& x, const Tensor& arena, const Tensor& directory, const Tensor& pages,
    const Tensor& scale, const Tensor& shift, const Tensor& kind, const Tensor& rows,
    const Tensor& slot, const Tensor& weight, const std::optional<Tensor>& pieces,
    const std::optional<Tensor>& tiles, int64_t tile_height, int64_t group, int64_t most_pages,
    bool aligned) {
  TORCH_CHECK_VALUE(
      x.dim() == 2 && x.stride(1) == 1, "lowrank: x must be [T, K] with contiguous rows");
  TORCH_CHECK_TYPE(
      x.scalar_type() == y.scalar_type(), "lowrank: x is ", x.scalar_type(), ", y is ",
      y.scalar_type(), "; they must be the same");
  const Segments s = checked_segments(
      arena, directory, pages, scale, shift, kind, rows, slot, weight, group);
  if (try_lowrank(s, arena.scalar_type(), y, &x, nullptr, x.size(1))) return;
  plain_version<decltype(lowrank_)>("quickchange::lowrank_")
      .call(
          y, x, arena, directory, pages, scale, shift, kind, rows, slot, weight, pieces, tiles,
          tile_height, group, most_pages, aligned);
}

void lowrank_embedding_(
    Tensor& y, const Tensor& ids, const Tensor& arena, const Tensor& directory,
    const Tensor& pages, const Tensor& scale, const Tensor& shift, const Tensor& kind,
    const Tensor& rows, const Tensor& slot, const Tensor& weight,
    const std::optional<Tensor>& pieces, const std::optional<Tensor>& tiles, int64_t tile_height,
    int64_t group, int64_t most_pages, bool aligned, int64_t vocabulary) {
  checked_data<int64_t>(ids, at::kLong, "ids");
  const Segments s = checked_segments(
      arena, directory, pages, scale, shift, kind, rows, slot, weight, group);
  if (try_lowrank(s, arena.scalar_type(), y, nullptr, &ids, vocabulary)) return;
  plain_version<decltype(lowrank_embedding_)>("quickchange::lowrank_embedding_")
      .call(
          y, ids, arena, directory, pages, scale, shift, kind, rows, slot, weight, pieces, tiles,
          tile_height, group, most_pages, aligned, vocabulary);
}

void lowrank_experts_(
    Tensor& y, const Tensor& x, const Tensor& expert, int64_t choices, int64_t experts,
    const Tensor& arena, const Tensor& directory, const Tensor& pages, const Tensor& scale,
    const Tensor& shift, const Tensor& kind, const Tensor& rows, const Tensor& slot,
    const Tensor& weight, const std::optional<Tensor>& pieces, const std::optional<Tensor>& tiles,
    int64_t tile_height, int64_t group, int64_t most_pages, bool aligned) {
  TORCH_CHECK_VALUE(
      x.dim() == 2 && x.stride(1) == 1, "lowrank: x must be [T, K] with contiguous rows");
  TORCH_CHECK_TYPE(
      x.scalar_type() == y.scalar_type(), "lowrank: x is ", x.scalar_type(), ", y is ",
      y.scalar_type(), "; they must be the same");
  TORCH_CHECK_VALUE(
      choices > 0 && expert.numel() == y.size(0) && y.size(0) % choices == 0, "lowrank: y has ",
      y.size(0), " rows, expert ", expert.numel(), " for ", choices, " choices a token");
  const Segments s = checked_segments(
      arena, directory, pages, scale, shift, kind, rows, slot, weight, group);
  TORCH_CHECK_INDEX(
      experts > 0 && group + experts <= directory.size(1), "lowrank: group ", group, " and ",
      experts, " experts are not in the directory's ", directory.size(1));
  const Routing routing{
      checked_data<int64_t>(expert, at::kLong, "expert"), experts, choices};
  if (try_lowrank(s, arena.scalar_type(), y, &x, nullptr, x.size(1), &routing)) return;
  plain_version<decltype(lowrank_experts_)>("quickchange::lowrank_experts_")
      .call(
          y, x, expert, choices, experts, arena, directory, pages, scale, shift, kind, rows, slot,
          weight, pieces, tiles, tile_height, group, most_pages, aligned);
}

}  // namespace
}  // namespace quickchange
