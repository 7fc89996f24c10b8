// linear: y = x Wᵀ + b over row-major weights. See linear_float.py, linear_int8.py.

constexpr int64_t TILE_ROWS = 64;  // rows of x that pass over the same weight rows: they stay in L2

// y[0 .. rows, 0 .. columns) = sums + bias, where columns ≤ W. Whole vectors a row: written four
// columns at a time, the rows of a wide y would push one another out of the cache (their distance is
// often a multiple of a page).
template <class Y>
inline void write_columns(
    const float (*sums)[W], int64_t rows, int64_t columns, const Y* bias, Y* y, int64_t ldy) {
  vec added = {};
  if (bias) added = columns == W ? load(bias) : load_first(bias, columns);
  for (int64_t i = 0; i < rows; i++) {
    if (columns == W) store(y + i * ldy, load(sums[i]) + added);
    else store_first(y + i * ldy, load(sums[i]) + added, columns);
  }
}

// sums[i][j] = x row i · weight row j, M rows of x at a time: all of them pass over W / M weight rows
// while these are in the first-level cache.
template <int M, class T, class X>
inline void sum_columns(
    const T* const* w, const X* first, int64_t ldx, int64_t rows, int64_t K, int64_t columns,
    float (*sums)[W]) {
  constexpr int N = rows_with<M>();
  for (int64_t j = 0; j < columns; j += N)
    for (int64_t i = 0; i < rows; i += M) {
      const X* x[M];
      clamp_rows(x, M, first + i * ldx, ldx, rows - i);
      float lanes[W];
      store(lanes, rows > 2 * M ? dot_block_part<M>(w + j, x, K, i / M) : dot_block<M>(w + j, x, K));
      for (int r = 0; r < M; r++) std::memcpy(&sums[i + r][j], lanes + r * N, N * sizeof(float));
    }
}

// W columns (or the last few): w holds W + MAX_AHEAD weight rows.
template <class T, class X, class Y>
inline void linear_columns(
    const T* const* w, const X* x, int64_t ldx, int64_t rows, int64_t K, int64_t columns,
    const Y* bias, Y* y, int64_t ldy) {
  alignas(64) float sums[TILE_ROWS][W];
  if (rows == 1) sum_columns<1>(w, x, ldx, rows, K, columns, sums);
  else if (rows == 2) sum_columns<2>(w, x, ldx, rows, K, columns, sums);
  else sum_columns<4>(w, x, ldx, rows, K, columns, sums);
  write_columns(sums, rows, columns, bias, y, ldy);
}

// Output columns [begin, end).
template <class T>
void linear(const LinearArgs<T>& a, int64_t begin, int64_t end) {
  for (int64_t m = 0; m < a.rows; m += TILE_ROWS)
    for (int64_t n = begin; n < end; n += W) {
      const T* w[W + MAX_AHEAD];
      clamp_rows(w, W + MAX_AHEAD, a.w + n * a.ldw, a.ldw, a.N - n);
      linear_columns(
          w, a.x + m * a.ldx, a.ldx, std::min(TILE_ROWS, a.rows - m), a.K, std::min(W, end - n),
          a.bias ? a.bias + n : nullptr, a.y + m * a.N + n, a.N);
    }
}
