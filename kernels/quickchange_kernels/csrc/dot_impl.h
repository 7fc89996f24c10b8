// The dot products that linear, lowrank and attention share.

// acc[m * stride + n] = the lanes' partial sums of x row m times weight row n. The only loop over k
// in the library, so that every element of every operation is summed in the same order.
// w holds 2 N pointers: the rows to multiply, and the rows that come next, which are prefetched.
template <int N, int M, class T, class X>
inline void multiply(const T* const* w, const X* const* x, int64_t K, vec* acc, int stride) {
  vec sum[M][N] = {};
  int64_t k = 0;
  for (; k + W <= K; k += W) {
    vec row[N];
    for (int n = 0; n < N; n++) row[n] = load(w[n] + k);
    // Into the second-level cache. Fetching only while the first rows of x pass is slower.
    for (int n = 0; n < N; n++) __builtin_prefetch(w[N + n] + k, 0, 2);
    for (int m = 0; m < M; m++) {
      const vec value = load(x[m] + k);
      for (int n = 0; n < N; n++) sum[m][n] += row[n] * value;
    }
  }
  if (k < K) {
    vec row[N];
    for (int n = 0; n < N; n++) row[n] = load_first(w[n] + k, K - k);
    for (int m = 0; m < M; m++) {
      const vec value = load_first(x[m] + k, K - k);
      for (int n = 0; n < N; n++) sum[m][n] += row[n] * value;
    }
  }
  for (int m = 0; m < M; m++)
    for (int n = 0; n < N; n++) acc[m * stride + n] = sum[m][n];
}

// How many weight rows go with M rows of x, so that W sums share one reduction.
template <int M>
constexpr int rows_with() {
  return W / M;
}

constexpr int MAX_AHEAD = 4;  // pointers that `dot_block` wants beyond the rows it multiplies

// out[m * (W / M) + n] = x row m · weight row n, for M rows of x and W / M weight rows.
template <int M, class T, class X>
inline vec dot_block(const T* const* w, const X* const* x, int64_t K) {
  constexpr int N = rows_with<M>();
  constexpr int PASS = N < MAX_AHEAD ? N : MAX_AHEAD;
  vec acc[W];
  for (int n = 0; n < N; n += PASS) multiply<PASS, M>(w + n, x, K, acc + n, N);
  return sum_lanes(acc);
}

// out[i] = rows[i] for i < count; the last row stands in for those past the end.
template <class T>
inline void clamp_rows(const T** out, int n, const T* first, int64_t stride, int64_t count) {
  for (int i = 0; i < n; i++) out[i] = first + std::min<int64_t>(i, count - 1) * stride;
}
