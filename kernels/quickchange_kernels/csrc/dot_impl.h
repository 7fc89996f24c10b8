// The dot products that linear, lowrank and attention share.

// Product of T and X: the loads for STEP elements, and their sum.
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

// A value that stays in its register. Left alone, GCC folds its load into each multiply-add that uses
// it, and then the loads are the limit: 0.76 of the peak instead of 0.99.
template <class V>
inline V pinned(V value) {
#if defined(__x86_64__)
  asm("" : "+v"(value));
#endif
  return value;
}

// The last K - k products of `multiply`: out of line, so that its buffers take nothing from the loop.
template <int N, int M, class T, class X>
[[gnu::noinline]] void multiply_end(
    const T* const* w, const X* const* x, int64_t k, int64_t K, vec* acc, int stride) {
  using P = Product<T, X>;
  T ends[N][P::STEP] = {};
  for (int n = 0; n < N; n++) std::memcpy(ends[n], w[n] + k, (K - k) * sizeof(T));
  for (int m = 0; m < M; m++) {
    X end[P::STEP] = {};
    std::memcpy(end, x[m] + k, (K - k) * sizeof(X));
    for (int n = 0; n < N; n++) {
      vec& sum = acc[m * stride + n];
      sum = P::add(sum, P::left(ends[n]), P::right(end));
    }
  }
}

// acc[m * stride + n] = the lanes' partial sums of x row m times weight row n. The only loop over k
// in the library, so that every element of every operation is summed in the same order.
// `ahead` are AHEAD rows that come next: they are fetched into the second-level cache.
template <int N, int M, int AHEAD, class T, class X>
inline void multiply(
    const T* const* w, const X* const* x, const T* const* ahead, int64_t K, vec* acc, int stride) {
  using P = Product<T, X>;
  vec sum[M][N] = {};
  int64_t k = 0;
  for (; k + P::STEP <= K; k += P::STEP) {
    typename P::Left row[N];
#pragma GCC unroll 16
    for (int n = 0; n < N; n++) row[n] = pinned(P::left(w[n] + k));
#pragma GCC unroll 16
    for (int n = 0; n < AHEAD; n++) __builtin_prefetch(ahead[n] + k, 0, 2);
#pragma GCC unroll 16
    for (int m = 0; m < M; m++) {
      const typename P::Right value = pinned(P::right(x[m] + k));
#pragma GCC unroll 16
      for (int n = 0; n < N; n++) sum[m][n] = P::add(sum[m][n], row[n], value);
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < M; m++)
#pragma GCC unroll 16
    for (int n = 0; n < N; n++) acc[m * stride + n] = sum[m][n];
  if (k < K) multiply_end<N, M>(w, x, k, K, acc, stride);
}

// The same where w holds 2 N pointers: the rows to multiply, and those that come next.
template <int N, int M, class T, class X>
inline void multiply(const T* const* w, const X* const* x, int64_t K, vec* acc, int stride) {
  multiply<N, M, N>(w, x, w + N, K, acc, stride);
}

// Weight rows that go with M rows of x, so that W sums share one reduction.
template <int M>
constexpr int rows_with() {
  return W / M;
}

constexpr int MAX_AHEAD = 4;  // pointers that `dot_block` wants beyond the rows it multiplies

// out[m * (W / M) + n] = x row m · weight row n, for M rows of x and W / M weight rows. While w[n]
// is multiplied w[n + MAX_AHEAD] is fetched.
template <int M, class T, class X>
inline vec dot_block(const T* const* w, const X* const* x, int64_t K) {
  constexpr int N = rows_with<M>();
  constexpr int PASS = N < MAX_AHEAD ? N : MAX_AHEAD;
  vec acc[W];
  for (int n = 0; n < N; n += PASS) multiply<PASS, M>(w + n, x, K, acc + n, N);
  return sum_lanes(acc);
}

// The same where many blocks of rows of x pass over the same weight rows: block `part` fetches one
// of the N weight rows that come next, so that the memory is never asked for more at once than it
// brings in the meantime.
template <int M, class T, class X>
inline vec dot_block_part(const T* const* w, const X* const* x, int64_t K, int64_t part) {
  constexpr int N = rows_with<M>();
  vec acc[W];
  if (part < N) multiply<N, M, 1>(w, x, w + N + part, K, acc, N);
  else multiply<N, M, 0>(w, x, w, K, acc, N);
  return sum_lanes(acc);
}

// out[i] = rows[i] for i < count; the last row stands in for those past the end.
template <class T>
inline void clamp_rows(const T** out, int n, const T* first, int64_t stride, int64_t count) {
  for (int i = 0; i < n; i++) out[i] = first + std::min<int64_t>(i, count - 1) * stride;
}
