// linear for few rows: y = x Wᵀ + b over row-major weights, read once. See linear.py.

// Output columns [begin, end), M rows of x at a time: all of x passes over W / M weight rows while
// these are in the first-level cache.
template <int M, class T>
inline void linear_by(const LinearArgs<T>& a, int64_t begin, int64_t end) {
  constexpr int N = rows_with<M>();
  for (int64_t n = begin; n < end; n += N) {
    const T* w[N + MAX_AHEAD];
    clamp_rows(w, N + MAX_AHEAD, a.w + n * a.ldw, a.ldw, a.N - n);
    const int64_t columns = std::min<int64_t>(N, end - n);
    for (int64_t m = 0; m < a.rows; m += M) {
      const T* x[M];
      clamp_rows(x, M, a.x + m * a.ldx, a.ldx, a.rows - m);
      float sums[W];
      store(sums, dot_block<M>(w, x, a.K));
      for (int64_t i = 0; i < std::min<int64_t>(M, a.rows - m); i++)
        for (int64_t j = 0; j < columns; j++) {
          const float bias = a.bias ? to_float(a.bias[n + j]) : 0.0f;
          a.y[(m + i) * a.N + n + j] = from_float<T>(sums[i * N + j] + bias);
        }
    }
  }
}

template <class T>
void linear(const LinearArgs<T>& a, int64_t begin, int64_t end) {
  if (a.rows == 1) return linear_by<1>(a, begin, end);
  if (a.rows == 2) return linear_by<2>(a, begin, end);
  linear_by<4>(a, begin, end);
}
