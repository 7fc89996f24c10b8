// lowrank_ in two halves. Down: h = act(A x + shift) · scale, shared out by items. Up: y += h B,
// shared out by columns, so that segments over the same rows never meet. All that is read of x, and
// of y as it was, is read in the first half. See lowrank_contract.py.

inline float activated(PageKind kind, float v) {
  switch (kind) {
    case PageKind::RELU: return std::max(v, 0.0f);
    case PageKind::GELU: return 0.5f * v * (1.0f + std::erf(v * 0.70710678f));
    case PageKind::GELU_TANH:
      return 0.5f * v * (1.0f + std::tanh(0.79788456f * (v + 0.044715f * v * v * v)));
    case PageKind::SILU: return v / (1.0f + std::exp(-v));
    case PageKind::TANH: return std::tanh(v);
    default: return v;
  }
}

// Row r of the A pages of consecutive items, as if they were stacked; those past the end repeat.
template <class T>
inline const T* stacked_row(const LowRankItem<T>* items, int64_t count, int64_t r, int64_t K) {
  return items[std::min(r / RANKS, count - 1)].a + r % RANKS * K;
}

// Fetches the first lines of a page's rows. The hardware guesses the rest of each row, but not where
// the next page lies.
template <class T>
inline void fetch_heads(const T* page, int64_t width) {
#pragma GCC unroll 8
  for (int64_t j = 0; j < RANKS; j++) {
    const char* row = reinterpret_cast<const char*>(page + j * width);
    __builtin_prefetch(row);
    __builtin_prefetch(row + 64);
  }
}

// dot_block for pages that are read once: up to eight rows at a time, as they lie in memory, and no
// fetching but of the next rows' heads (46 GB/s on two cores, more than adding up the same bytes; 33
// with four rows at a time and the next four fetched). w has RANKS pointers more.
template <int M, class T, class X>
inline vec dot_stream(const T* const* w, const X* const* x, int64_t K) {
  constexpr int N = rows_with<M>(), PASS = std::min(N, W == 16 ? 8 : 4);
  vec acc[W];
  for (int n = 0; n < N; n += PASS) {
    for (int i = 0; i < PASS; i++) {
      __builtin_prefetch(w[n + RANKS + i]);
      __builtin_prefetch(reinterpret_cast<const char*>(w[n + RANKS + i]) + 64);
    }
    multiply<PASS, M, 0>(w + n, x, w, K, acc + n, N);
  }
  return sum_lanes(acc);
}

// `pages` items over the same rows, M rows of x at a time. `count`: items that may be fetched.
template <int M, class T, class X>
inline void down_by(
    const LowRankArgs<T, X>& a, const LowRankItem<T>* items, int64_t pages, int64_t count) {
  constexpr int N = rows_with<M>();
  constexpr int AHEAD = std::max<int>(RANKS, MAX_AHEAD);
  const LowRankItem<T>& first = items[0];
  const X* rows = a.x + first.row / a.y_per_x * a.ldx;
  for (int64_t r = 0; r < pages * RANKS; r += N) {
    const T* w[N + AHEAD];
    for (int i = 0; i < N + AHEAD; i++) w[i] = stacked_row(items, count, r + i, a.K);
    for (int64_t m = 0; m < first.rows; m += M) {
      const X* x[M];
      clamp_rows(x, M, rows + m * a.ldx, a.ldx, first.rows - m);
      float sums[W];
      store(sums, first.rows > 4 ? dot_block<M>(w, x, a.K) : dot_stream<M>(w, x, a.K));
      for (int64_t i = 0; i < std::min<int64_t>(M, first.rows - m); i++)
        for (int64_t j = r; j < std::min(r + N, pages * RANKS); j++) {
          const LowRankItem<T>& item = items[j / RANKS];
          const float ax = sums[i * N + j - r] + item.shift[j % RANKS];
          item.h[(m + i) * RANKS + j % RANKS] = activated(item.kind, ax) * item.scale;
        }
    }
  }
}

// An embedding's A x is a column of A.
template <class T, class X>
inline void down_lookup(const LowRankArgs<T, X>& a, const LowRankItem<T>& item) {
  for (int64_t m = 0; m < item.rows; m++)
    for (int64_t j = 0; j < RANKS; j++) {
      const float ax = to_float(item.a[j * a.K + a.ids[item.row + m]]) + item.shift[j];
      item.h[m * RANKS + j] = activated(item.kind, ax) * item.scale;
    }
}

// A gain multiplies y as it was.
template <class T, class X>
inline void keep_rows(const LowRankArgs<T, X>& a, const LowRankItem<T>& item) {
  for (int64_t m = 0; m < item.rows; m++) {
    const X* y = a.y + (item.row + m) * a.ldy + item.column;
    for (int64_t c = 0; c < item.width; c++)
      item.h[m * item.width + c] = to_float(y[c]) * item.scale;
  }
}

// Items that follow items[0] over the same rows, itself included.
template <class T>
inline int64_t same_rows(const LowRankItem<T>* items, int64_t count) {
  int64_t n = 1;
  while (n < count && items[n].row == items[0].row && items[n].rows == items[0].rows) n++;
  return n;
}

// Number of items[0 .. count) before the first gain.
template <class T>
inline int64_t before_gain(const LowRankItem<T>* items, int64_t count) {
  int64_t n = 0;
  while (n < count && items[n].kind != PageKind::GAIN) n++;
  return n;
}

// Items [begin, end).
template <class T, class X>
void lowrank_down(const LowRankArgs<T, X>& a, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end;) {
    const LowRankItem<T>* items = a.items + i;
    if (items->kind == PageKind::GAIN) {
      keep_rows(a, *items);
      i++;
      continue;
    }
    if (a.x == nullptr) {
      down_lookup(a, *items);
      i++;
      continue;
    }
    const int64_t stacked = before_gain(items, end - i);
    const int64_t pages = same_rows(items, stacked);
    if (items->rows == 1) down_by<1>(a, items, pages, stacked);
    else if (items->rows == 2) down_by<2>(a, items, pages, stacked);
    else down_by<4>(a, items, pages, stacked);
    i += pages;
  }
  if (begin < end && a.items[begin].kind != PageKind::GAIN)
    fetch_heads(a.items[begin].b, a.items[begin].width);
}

// acc[i][v] += h[i] ⊙ B over `live` columns of a gain.
template <int R, int V, class T>
inline void add_gain(
    const LowRankItem<T>& item, int64_t m, int64_t column, int64_t live, vec (*acc)[V]) {
  const bool whole = live == V * W;
  for (int v = 0; v < V; v++) {
    const T* b = item.b + column + v * W;
    const vec gain = whole ? load(b) : load_first(b, live);
    for (int i = 0; i < R; i++) {
      const float* h = item.h + (m + i) * item.width + column + v * W;
      acc[i][v] += (whole ? load(h) : load_first(h, live)) * gain;
    }
  }
}

// out[i] += h B over V · W columns from `column` on of the member's width, or over the `live` first of
// them where V is 1, for R rows of a page with factors h.
template <int R, int V, class T>
inline void add_block(
    const LowRankItem<T>& item, int64_t m, const vec (*h)[RANKS], int64_t column, int64_t live,
    float* out, int64_t ldo) {
  const bool whole = live == V * W;
  vec acc[R][V];
  for (int i = 0; i < R; i++)
    for (int v = 0; v < V; v++)
      acc[i][v] = whole ? load(out + i * ldo + v * W) : load_first(out + i * ldo, live);
  if (item.kind == PageKind::GAIN) {
    add_gain<R>(item, m, column, live, acc);
  } else {
    const T* b = item.b + column;
#pragma GCC unroll 8
    for (int64_t j = 0; j < RANKS; j++)
      for (int v = 0; v < V; v++) {
        const T* p = b + j * item.width + v * W;
        const vec row = whole ? load(p) : load_first(p, live);
        for (int i = 0; i < R; i++) acc[i][v] += h[i][j] * row;
      }
  }
  for (int i = 0; i < R; i++)
    for (int v = 0; v < V; v++) {
      if (whole) store(out + i * ldo + v * W, acc[i][v]);
      else store_first(out + i * ldo, acc[i][v], live);
    }
}

// out[i] += h B over columns [begin, end), a page's eight rows side by side.
template <int R, int V, class T>
inline void add_page(
    const LowRankItem<T>& item, int64_t m, int64_t begin, int64_t end, float* out, int64_t ldo) {
  vec h[R][RANKS];
  for (int i = 0; i < R; i++)
    for (int64_t j = 0; j < RANKS; j++)
      h[i][j] = splat(item.kind == PageKind::GAIN ? 0 : item.h[(m + i) * RANKS + j]);
  int64_t c = begin;
  for (; c + V * W <= end; c += V * W)
    add_block<R, V>(item, m, h, c, V * W, out + c - begin, ldo);
  for (; c < end; c += W)
    add_block<R, 1>(item, m, h, c, std::min(W, end - c), out + c - begin, ldo);
}

// Fetches the heads of the next item's page, where there is one, from column `begin` of y on.
template <class T, class X>
inline void fetch_next(const LowRankArgs<T, X>& a, const LowRankItem<T>* item, int64_t begin) {
  item++;
  if (item == a.items + a.count || item->kind == PageKind::GAIN) return;
  fetch_heads(item->b + std::clamp<int64_t>(begin - item->column, 0, item->width), item->width);
}

// Columns [begin, end) of the member, for `pages` items at one place and their rows [m, m + R).
template <int R, int V, class T>
inline void up_rows(
    const LowRankArgs<T, float>& a, const LowRankItem<T>* items, int64_t pages, int64_t m,
    int64_t begin, int64_t end) {
  float* y = a.y + (items->row + m) * a.ldy + items->column + begin;
  for (int64_t p = 0; p < pages; p++) {
    if (m == 0) fetch_next(a, items + p, items->column + begin);
    add_page<R, V>(items[p], m, begin, end, y, a.ldy);
  }
}

// The same where y is narrow: it is summed in float32 and rounded once.
template <int R, int V, class T>
inline void up_rows(
    const LowRankArgs<T, bf16>& a, const LowRankItem<T>* items, int64_t pages, int64_t m,
    int64_t begin, int64_t end) {
  constexpr int64_t WIDTH = 4096 / R;
  alignas(64) float sums[R][WIDTH];
  for (int64_t from = begin; from < end; from += WIDTH) {
    const int64_t columns = std::min(WIDTH, end - from), whole = columns / W * W;
    const int64_t column = items->column + from;
    for (int i = 0; i < R; i++) {
      const bf16* y = a.y + (items->row + m + i) * a.ldy + column;
      for (int64_t c = 0; c < whole; c += W) store(sums[i] + c, load(y + c));
      if (whole < columns) store(sums[i] + whole, load_first(y + whole, columns - whole));
    }
    for (int64_t p = 0; p < pages; p++) {
      if (m == 0) fetch_next(a, items + p, column);
      add_page<R, V>(items[p], m, from, from + columns, sums[0], WIDTH);
    }
    for (int i = 0; i < R; i++) {
      bf16* y = a.y + (items->row + m + i) * a.ldy + column;
      for (int64_t c = 0; c < whole; c += W) store(y + c, load(sums[i] + c));
      if (whole < columns) store_first(y + whole, load(sums[i] + whole), columns - whole);
    }
  }
}

// Items that follow items[0] over the same rows and columns, itself included: a narrow output is
// rounded once for all of them.
template <class T>
inline int64_t same_place(const LowRankItem<T>* items, int64_t count) {
  int64_t n = 1;
  while (n < same_rows(items, count) && items[n].column == items[0].column &&
         items[n].width == items[0].width)
    n++;
  return n;
}

// Columns [begin, end) of y.
template <class T, class X>
void lowrank_up(const LowRankArgs<T, X>& a, int64_t begin, int64_t end) {
  for (int64_t i = 0; i < a.count;) {
    const LowRankItem<T>* items = a.items + i;
    const int64_t pages = same_place(items, a.count - i);
    const int64_t from = std::max<int64_t>(begin - items->column, 0);
    const int64_t to = std::min(end - items->column, items->width);
    int64_t m = 0;
    if (from < to) {
      for (; m + 4 <= items->rows; m += 4) up_rows<4, 2>(a, items, pages, m, from, to);
      for (; m + 2 <= items->rows; m += 2) up_rows<2, 2>(a, items, pages, m, from, to);
      for (; m < items->rows; m++) up_rows<1, 4>(a, items, pages, m, from, to);
    }
    i += pages;
  }
}
