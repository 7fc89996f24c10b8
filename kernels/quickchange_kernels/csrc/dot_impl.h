// The dot products that linear, lowrank and attention share.

// How a product of T and X is summed: what is loaded for STEP elements, and how it is added.
template <class T, class X>
struct Product {
  static constexpr int64_t STEP = W;
  using Left = vec;
  using Right = vec;
  static Left left(const T* p) { return load(p); }
  static Right right(const X* p) { return load(p); }
  static vec add(vec sum, Left a, Right b) { return sum + a * b; }
};

#ifdef QC_BF16_DOT
// Two products a lane and instruction, with a float32 sum.
template <>
struct Product<bf16, bf16> {
  static constexpr int64_t STEP = 2 * W;
  using Left = __m512bh;
  using Right = __m512bh;
  static Left left(const bf16* p) {
    const __m512i raw = _mm512_loadu_si512(p);
    return reinterpret_cast<const Left&>(raw);
  }
  static Right right(const bf16* p) { return left(p); }
  static vec add(vec sum, Left a, Right b) { return _mm512_dpbf16_ps(sum, a, b); }
};
#endif

// Keeps a loaded value in its register. Left alone, GCC folds the load into each multiply-add that
// uses it, and then the loads are the limit (0.76 of the peak instead of 0.99).
template <class V>
inline void pin(V& value) {
#if defined(__x86_64__)
  asm("" : "+v"(value));
#endif
}

// acc[m * stride + n] = the lanes' partial sums of x row m times weight row n. The only loop over k
// in the library, so that every element of every operation is summed in the same order.
// w holds 2 N pointers: the rows to multiply, and the rows that come next, which are prefetched.
template <int N, int M, class T, class X>
inline void multiply(const T* const* w, const X* const* x, int64_t K, vec* acc, int stride) {
  using P = Product<T, X>;
  vec sum[M][N] = {};
  int64_t k = 0;
  for (; k + P::STEP <= K; k += P::STEP) {
    typename P::Left row[N];
    for (int n = 0; n < N; n++) pin(row[n] = P::left(w[n] + k));
    // Into the second-level cache. Fetching only while the first rows of x pass is slower.
    for (int n = 0; n < N; n++) __builtin_prefetch(w[N + n] + k, 0, 2);
    for (int m = 0; m < M; m++) {
      typename P::Right value = P::right(x[m] + k);
      pin(value);
      for (int n = 0; n < N; n++) sum[m][n] = P::add(sum[m][n], row[n], value);
    }
  }
  if (k < K) {
    T ends[N][P::STEP] = {};
    for (int n = 0; n < N; n++) std::memcpy(ends[n], w[n] + k, (K - k) * sizeof(T));
    for (int m = 0; m < M; m++) {
      X end[P::STEP] = {};
      std::memcpy(end, x[m] + k, (K - k) * sizeof(X));
      for (int n = 0; n < N; n++)
        sum[m][n] = P::add(sum[m][n], P::left(ends[n]), P::right(end));
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
