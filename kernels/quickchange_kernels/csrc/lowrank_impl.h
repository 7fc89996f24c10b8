// lowrank_ in two halves. Down: h = act(A x + shift) · scale, shared out by items. Up: y += h B,
// shared out by columns, so that segments over the same rows never meet. All that is read of x, and
// of y as it was, is read in the first half. See lowrank_contract.py.

constexpr int64_t LINE = 64;  // bytes of a cache line

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

// `pages` items over the same rows, M rows of x at a time. `count`: items that may be prefetched.
template <int M, class T, class X>
inline void down_by(
    const LowRankArgs<T, X>& a, const LowRankItem<T>* items, int64_t pages, int64_t count) {
  constexpr int N = rows_with<M>();
  const LowRankItem<T>& first = items[0];
  const X* rows = a.x + first.row / a.y_per_x * a.ldx;
  for (int64_t r = 0; r < pages * RANKS; r += N) {
    const T* w[N + MAX_AHEAD];
    for (int i = 0; i < N + MAX_AHEAD; i++) w[i] = stacked_row(items, count, r + i, a.K);
    for (int64_t m = 0; m < first.rows; m += M) {
      const X* x[M];
      clamp_rows(x, M, rows + m * a.ldx, a.ldx, first.rows - m);
      float sums[W];
      store(sums, dot_block<M>(w, x, a.K));
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

// Fetches what `down_by` multiplies before the rows that it fetches itself.
template <class T>
inline void fetch_first(const LowRankItem<T>& item, int64_t K) {
  for (int64_t k = 0; k < MAX_AHEAD * K; k += LINE / sizeof(T)) __builtin_prefetch(item.a + k, 0, 2);
}

// Items [begin, end).
template <class T, class X>
void lowrank_down(const LowRankArgs<T, X>& a, int64_t begin, int64_t end) {
  if (a.x != nullptr && begin < end && a.items[begin].kind != PageKind::GAIN)
    fetch_first(a.items[begin], a.K);
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
}

constexpr int64_t BYTES_AHEAD = 16384;  // half and twice as many are no faster

// Fetches the rows of B that come next, over columns [begin, end) of y. They are too short, and lie
// too far apart, for the hardware to guess them: left to it, most of the time is spent waiting.
template <class T>
class RowsAhead {
 public:
  RowsAhead(const LowRankItem<T>* items, int64_t count, int64_t begin, int64_t end)
      : item_(items), last_(items + count), begin_(begin), end_(end) {
    if (item_ != last_) open();
  }

  void fetch(int64_t bytes) {
    for (; bytes > 0 && item_ != last_; bytes -= LINE) {
      __builtin_prefetch(next_, 0, 2);
      next_ += LINE / sizeof(T);
      if (next_ >= stop_) advance();
    }
  }

 private:
  void advance() {
    row_++;
    if (row_ == (item_->kind == PageKind::GAIN ? 1 : RANKS)) {
      row_ = 0;
      item_++;
      if (item_ == last_) return;
    }
    open();
  }

  void open() {
    const T* b = item_->b + row_ * item_->width;
    next_ = b + std::clamp<int64_t>(begin_ - item_->column, 0, item_->width);
    stop_ = b + std::clamp<int64_t>(end_ - item_->column, 0, item_->width);
  }

  const LowRankItem<T>*item_, *last_;
  int64_t begin_, end_, row_ = 0;
  const T* next_ = nullptr;
  const T* stop_ = nullptr;
};

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

// y[row .. row + R) += h B over columns [column, column + live) of the members' width, for `pages`
// items at one place; live is V · W, or less where V is 1.
template <int R, int V, class T, class X>
inline void up_block(
    const LowRankArgs<T, X>& a, const LowRankItem<T>* items, int64_t pages, int64_t m,
    int64_t column, int64_t live) {
  X* y = a.y + (items->row + m) * a.ldy + items->column + column;
  const bool whole = live == V * W;
  vec acc[R][V];
  for (int i = 0; i < R; i++)
    for (int v = 0; v < V; v++)
      acc[i][v] = whole ? load(y + i * a.ldy + v * W) : load_first(y + i * a.ldy, live);
  for (int64_t p = 0; p < pages; p++) {
    if (items[p].kind == PageKind::GAIN) {
      add_gain<R>(items[p], m, column, live, acc);
      continue;
    }
    const float* h = items[p].h + m * RANKS;
    for (int64_t j = 0; j < RANKS; j++) {
      const T* b = items[p].b + j * items[p].width + column;
      vec row[V];
      for (int v = 0; v < V; v++) row[v] = whole ? load(b + v * W) : load_first(b, live);
      for (int i = 0; i < R; i++)
        for (int v = 0; v < V; v++) acc[i][v] += splat(h[i * RANKS + j]) * row[v];
    }
  }
  for (int i = 0; i < R; i++)
    for (int v = 0; v < V; v++) {
      if (whole) store(y + i * a.ldy + v * W, acc[i][v]);
      else store_first(y + i * a.ldy, acc[i][v], live);
    }
}

// The items' rows over columns [begin, end) of their member, R rows and V vectors at a time.
template <int R, int V, class T, class X>
inline void up_by(
    const LowRankArgs<T, X>& a, const LowRankItem<T>* items, int64_t pages, int64_t first,
    int64_t begin, int64_t end, RowsAhead<T>& ahead) {
  const int64_t column_bytes = pages * RANKS * sizeof(T);
  for (int64_t m = first; m + R <= items->rows; m += R) {
    int64_t c = begin;
    for (; c + V * W <= end; c += V * W) {
      if (m == 0) ahead.fetch(V * W * column_bytes);
      up_block<R, V>(a, items, pages, m, c, V * W);
    }
    for (; c < end; c += W) {
      if (m == 0) ahead.fetch(W * column_bytes);
      up_block<R, 1>(a, items, pages, m, c, std::min(W, end - c));
    }
  }
}

// Items that follow items[0] over the same rows and columns, itself included: summed in one go, so
// that a narrow output is rounded once.
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
  RowsAhead<T> ahead(a.items, a.count, begin, end);
  ahead.fetch(BYTES_AHEAD);
  for (int64_t i = 0; i < a.count;) {
    const LowRankItem<T>* items = a.items + i;
    const int64_t pages = same_place(items, a.count - i);
    const int64_t from = std::max<int64_t>(begin - items->column, 0);
    const int64_t to = std::min(end - items->column, items->width);
    if (from < to) {
      const int64_t fours = items->rows / 4 * 4;
      up_by<4, 2>(a, items, pages, 0, from, to, ahead);
      up_by<1, 4>(a, items, pages, fours, from, to, ahead);
    }
    i += pages;
  }
}
