// linear over packed panels: y = x Wᵀ + b. See linear_panels.py, which says how weights are packed.
//
// A tile holds the sums of up to `TileShape::rows` rows of x and `TileShape::vectors` vectors of
// columns in registers; along K it loads a step's columns once and broadcasts each row's value. So an
// element is summed over k from first to last, in one register, whatever the rows beside it.

constexpr int64_t PANEL_STEPS = 64;  // steps along K that all rows pass over while they stay in L1
constexpr int64_t PANEL_ROWS = 64;   // rows of x whose sums are kept at a time

// One step along K: its columns, a row's value there, and the multiply-add. A step of bf16 is two
// elements, side by side in a lane of 32 bits.
template <class T>
struct PanelStep;

template <>
struct PanelStep<float> {
  struct Columns {
    vec value;
  };
  struct Value {
    vec value;
  };
  static Columns columns(const float* p) { return {pinned(load(p))}; }
  static Value value(const float* p) { return {pinned(splat(*p))}; }
  static vec add(vec sum, const Columns& w, const Value& x) { return sum + w.value * x.value; }
};

#ifdef QC_BF16_DOT
template <>
struct PanelStep<bf16> {
  using Columns = __m512bh;
  using Value = __m512bh;
  static Columns columns(const bf16* p) { return pinned(Product<bf16, bf16>::left(p)); }
  static Value value(const bf16* p) {
    int32_t pair;
    std::memcpy(&pair, p, sizeof pair);
    const __m512i all = _mm512_set1_epi32(pair);
    return pinned(reinterpret_cast<const __m512bh&>(all));
  }
  static vec add(vec sum, Columns w, Value x) { return _mm512_dpbf16_ps(sum, w, x); }
};
#else
template <>
struct PanelStep<bf16> {
  struct Columns {
    vec first, second;
  };
  using Value = Columns;
  static Columns columns(const bf16* p) {
    bits32 raw;
    std::memcpy(&raw, p, sizeof raw);
    return {reinterpret_cast<vec>(raw << 16), reinterpret_cast<vec>(raw & 0xffff0000u)};
  }
  static Value value(const bf16* p) { return {splat(to_float(p[0])), splat(to_float(p[1]))}; }
  static vec add(vec sum, const Columns& w, const Value& x) {
    return (sum + w.first * x.first) + w.second * x.second;
  }
};
#endif

// Sums that fit the registers (32 of 512 bits, else 16) beside a step's columns and one value.
template <class T>
struct TileShape {
  static constexpr int vectors = W == 16 ? 3 : 2;
  static constexpr bool split = sizeof(typename PanelStep<T>::Columns) > sizeof(vec);
  static constexpr int rows = W == 16 ? (split ? 6 : 8) : (split ? 4 : W == 8 ? 6 : 4);
};

// Lines to fetch into the second-level cache while a tile is computed.
struct Ahead {
  const char* from;
  int64_t lines;  // with every four steps
};

// sums[m][n * W ..] of M rows of x, over `steps` steps of columns that lie `step` elements apart.
template <int M, int N, class T>
[[gnu::noinline]] void panel_tile(
    const T* w, int64_t step, const T* x, int64_t ldx, int64_t steps, float (*sums)[PANEL_WIDTH],
    Ahead ahead) {
  using Step = PanelStep<T>;
  vec sum[M][N];
#pragma GCC unroll 8
  for (int m = 0; m < M; m++)
#pragma GCC unroll 4
    for (int n = 0; n < N; n++) sum[m][n] = load(sums[m] + n * W);
  const auto multiply = [&](int64_t k) {
    typename Step::Columns columns[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; n++) columns[n] = Step::columns(w + k * step + n * W * PANEL_DEPTH<T>);
#pragma GCC unroll 8
    for (int m = 0; m < M; m++) {
      const typename Step::Value value = Step::value(x + m * ldx + k * PANEL_DEPTH<T>);
#pragma GCC unroll 4
      for (int n = 0; n < N; n++) sum[m][n] = Step::add(sum[m][n], columns[n], value);
    }
  };
  int64_t k = 0;
  for (; k + 4 <= steps; k += 4) {
    for (int64_t line = 0; line < ahead.lines; line++, ahead.from += 64)
      __builtin_prefetch(ahead.from, 0, 2);
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) multiply(k + i);
  }
  for (; k < steps; k++) multiply(k);
#pragma GCC unroll 8
  for (int m = 0; m < M; m++)
#pragma GCC unroll 4
    for (int n = 0; n < N; n++) store(sums[m] + n * W, sum[m][n]);
}

template <class T>
using PanelTile = void (*)(
    const T*, int64_t, const T*, int64_t, int64_t, float (*)[PANEL_WIDTH], Ahead);

template <int N, class T, int... M>
inline PanelTile<T> tile_of(int64_t rows, std::integer_sequence<int, M...>) {
  static constexpr PanelTile<T> tiles[] = {panel_tile<M + 1, N, T>...};
  return tiles[rows - 1];
}

// The tile of `rows` rows and `vectors` vectors, each at most what `TileShape` says.
template <class T>
inline PanelTile<T> panel_tile_of(int64_t rows, int64_t vectors) {
  constexpr std::make_integer_sequence<int, TileShape<T>::rows> all{};
  if constexpr (TileShape<T>::vectors == 3) {
    if (vectors == 3) return tile_of<3, T>(rows, all);
    if (vectors == 1) return tile_of<1, T>(rows, all);
  }
  return tile_of<2, T>(rows, all);
}

// sums[m][..] += x · a block of a panel, `width` columns wide. `ahead`: what is read after it, or null.
template <class T>
inline void add_panel_block(
    const T* w, int64_t width, const T* x, int64_t ldx, int64_t rows, int64_t steps,
    float (*sums)[PANEL_WIDTH], const T* ahead) {
  constexpr int64_t MOST = TileShape<T>::rows, VECTORS = TileShape<T>::vectors;
  const int64_t tiles = (rows + MOST - 1) / MOST, vectors = width / W;
  const int64_t parts = tiles * ((vectors + VECTORS - 1) / VECTORS), step = width * PANEL_DEPTH<T>;
  const int64_t lines = ahead ? (4 * step * int64_t(sizeof(T)) / 64 + parts - 1) / parts : 0;
  int64_t part = 0;
  for (int64_t v = 0; v < vectors; v += VECTORS)
    for (int64_t t = 0; t < tiles; t++, part++) {
      const int64_t first = t * rows / tiles, count = (t + 1) * rows / tiles - first;
      const Ahead own{
          reinterpret_cast<const char*>(ahead) + part * lines * (steps / 4) * 64, lines};
      panel_tile_of<T>(count, std::min(VECTORS, vectors - v))(
          w + v * W * PANEL_DEPTH<T>, step, x + first * ldx, ldx, steps,
          reinterpret_cast<float(*)[PANEL_WIDTH]>(sums[first] + v * W), own);
    }
}

// y[0 .. rows, 0 .. columns) = sums + bias.
template <class T>
inline void write_panel(
    const float (*sums)[PANEL_WIDTH], int64_t rows, int64_t columns, const T* bias, T* y,
    int64_t ldy) {
  for (int64_t n = 0; n < columns; n += W) {
    const int64_t own = std::min(W, columns - n);
    vec added = {};
    if (bias) added = own == W ? load(bias + n) : load_first(bias + n, own);
    for (int64_t m = 0; m < rows; m++) {
      const vec value = load(sums[m] + n) + added;
      if (own == W) store(y + m * ldy + n, value);
      else store_first(y + m * ldy + n, value, own);
    }
  }
}

// Panels [begin, end). next: the panel that this thread is likely to read after them.
template <class T>
void linear_panels(const PanelArgs<T>& a, int64_t begin, int64_t end, int64_t next) {
  alignas(64) float sums[PANEL_ROWS][PANEL_WIDTH];
  const int64_t size = a.steps * PANEL_DEPTH<T> * PANEL_WIDTH;  // elements of a panel
  const T* stop = a.w + end * size;
  for (int64_t m = 0; m < a.rows; m += PANEL_ROWS) {
    const int64_t rows = std::min(PANEL_ROWS, a.rows - m);
    for (int64_t p = begin; p < end; p++) {
      const int64_t columns = std::min(PANEL_WIDTH, a.N - p * PANEL_WIDTH);
      const int64_t width = (columns + 15) / 16 * 16, step = width * PANEL_DEPTH<T>;
      std::memset(sums, 0, rows * sizeof sums[0]);
      for (int64_t k = 0; k < a.steps; k += PANEL_STEPS) {
        const T* block = a.w + p * size + k * step;
        const int64_t steps = std::min(PANEL_STEPS, a.steps - k);
        const T* ahead = block + PANEL_STEPS * step;
        if (ahead >= stop) ahead = next < 0 ? nullptr : a.w + next * size + (ahead - stop);
        if (m > 0) ahead = nullptr;  // the first rows have brought them
        add_panel_block(
            block, width, a.x + m * a.ldx + k * PANEL_DEPTH<T>, a.ldx, rows, steps, sums, ahead);
      }
      write_panel(
          sums, rows, columns, a.bias ? a.bias + p * PANEL_WIDTH : nullptr,
          a.y + m * a.N + p * PANEL_WIDTH, a.N);
    }
  }
}
