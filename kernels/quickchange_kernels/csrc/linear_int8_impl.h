// linear over int8 weights with a scale per row and group. See linear_int8.py. Where rows of x are
// few, weights become numbers in registers, once for all of these rows; where they are many, W weight
// rows at a time become numbers in the cache, and linear's loops follow. Either way an element is
// the same products added in the same order.

// Type that int8 weights take to be multiplied with X. Up to FEW rows of x the conversion is done
// in registers: measured, see linear_int8.py.
template <class X>
struct Unpacked {
  using T = float;
  static constexpr int64_t FEW = 8;
};
#ifdef QC_BF16_DOT
template <>
struct Unpacked<bf16> {
  using T = bf16;
  static constexpr int64_t FEW = 2;
};
#endif

// GCC turns the portable conversion into one element after another, five times slower in all.
inline vec load(const int8_t* p) {
#if defined(__x86_64__) && QC_WIDTH == 16
  const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(raw));
#elif defined(__x86_64__) && QC_WIDTH == 8
  const __m128i raw = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(raw));
#else
  typedef int8_t int8s __attribute__((vector_size(QC_WIDTH), aligned(1), may_alias));
  typedef int32_t int32s __attribute__((vector_size(QC_WIDTH * 4)));
  const int8s raw = *reinterpret_cast<const int8s*>(p);
  return __builtin_convertvector(__builtin_convertvector(raw, int32s), vec);
#endif
}

// The weights of one step of Product, all of one group, times their scale.
inline void scale_step(const int8_t* w, vec scale, vec& out) { out = load(w) * scale; }

inline void store_step(float* out, vec step) { store(out, step); }

#ifdef QC_BF16_DOT
inline void scale_step(const int8_t* w, vec scale, __m512bh& out) {
  out = _mm512_cvtne2ps_pbh(load(w + W) * scale, load(w) * scale);
}

inline void store_step(bf16* out, __m512bh step) {
  _mm512_storeu_si512(out, reinterpret_cast<const __m512i&>(step));
}
#endif

// Weights [from, K) of a row, from a group's edge on, none of whose groups is whole.
template <class T>
inline void unpack_end(const int8_t* w, const bf16* scale, int64_t from, int64_t K, T* out) {
  for (int64_t k = from; k < K; k++)
    out[k - from] = from_float<T>(w[k] * to_float(scale[k / INT8_GROUP]));
}

// A row of K weights; `next` is the row that comes W later, fetched meanwhile.
template <class T>
inline void unpack_row(
    const int8_t* w, const bf16* scale, const int8_t* next, int64_t K, T* out) {
  using P = Product<T, T>;
  int64_t k = 0;
  for (; k + INT8_GROUP <= K; k += INT8_GROUP) {
    if (k % 64 == 0) __builtin_prefetch(next + k, 0, 2);
    const vec factor = splat(to_float(scale[k / INT8_GROUP]));
    for (int64_t i = k; i < k + INT8_GROUP; i += P::STEP) {
      typename P::Left step;
      scale_step(w + i, factor, step);
      store_step(out + i, step);
    }
  }
  unpack_end(w, scale, k, K, out + k);
}

// A weight row, and one further on to fetch meanwhile.
struct Int8Row {
  const int8_t* w;
  const bf16* scale;
  const int8_t* next;
};

// The last K - k products of `multiply_int8`, of no whole group.
template <int N, int M, class T, class X>
[[gnu::noinline]] void multiply_int8_end(
    const Int8Row* rows, const X* const* x, int64_t k, int64_t K, vec* acc, int stride) {
  using P = Product<T, X>;
  T ends[N][INT8_GROUP] = {};
  for (int n = 0; n < N; n++) unpack_end(rows[n].w, rows[n].scale, k, K, ends[n]);
  for (int m = 0; m < M; m++) {
    X end[INT8_GROUP] = {};
    std::memcpy(end, x[m] + k, (K - k) * sizeof(X));
    for (int n = 0; n < N; n++) {
      vec& sum = acc[m * stride + n];
      for (int64_t i = 0; i < K - k; i += P::STEP)
        sum = P::add(sum, P::left(ends[n] + i), P::right(end + i));
    }
  }
}

// `multiply` over weights that are unpacked on the way: the same sums. A single row is a stream that
// the machine fetches ahead by itself, better than by prefetch instructions; several aren't.
template <int N, int M, class T, class X>
inline void multiply_int8(const Int8Row* rows, const X* const* x, int64_t K, vec* acc, int stride) {
  using P = Product<T, X>;
  vec sum[M][N] = {};
  int64_t k = 0;
  for (; k + INT8_GROUP <= K; k += INT8_GROUP) {
    vec factor[N];
#pragma GCC unroll 16
    for (int n = 0; n < N; n++) {
      factor[n] = splat(to_float(rows[n].scale[k / INT8_GROUP]));
      if (N > 1 && k % 64 == 0) __builtin_prefetch(rows[n].next + k, 0, 2);
    }
#pragma GCC unroll 16
    for (int64_t i = k; i < k + INT8_GROUP; i += P::STEP) {
      typename P::Left row[N];
#pragma GCC unroll 16
      for (int n = 0; n < N; n++) {
        scale_step(rows[n].w + i, factor[n], row[n]);
        row[n] = pinned(row[n]);
      }
#pragma GCC unroll 16
      for (int m = 0; m < M; m++) {
        const typename P::Right value = pinned(P::right(x[m] + i));
#pragma GCC unroll 16
        for (int n = 0; n < N; n++) sum[m][n] = P::add(sum[m][n], row[n], value);
      }
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < M; m++)
#pragma GCC unroll 16
    for (int n = 0; n < N; n++) acc[m * stride + n] = sum[m][n];
  if (k < K) multiply_int8_end<N, M, T>(rows, x, k, K, acc, stride);
}

// Output columns [begin, end) for up to FEW rows of x, M at a time.
template <int M, class X, class Y>
void linear_int8_few(const Int8Args<X, Y>& a, int64_t begin, int64_t end) {
  using T = typename Unpacked<X>::T;
  constexpr int N = rows_with<M>();
  constexpr int PASS = M < 4 ? 1 : N;
  const int64_t groups = (a.K + INT8_GROUP - 1) / INT8_GROUP;
  for (int64_t n = begin; n < end; n += W) {
    const int64_t columns = std::min(W, end - n);
    Int8Row rows[W];
    for (int64_t j = 0; j < W; j++) {
      const int64_t row = std::min(n + j, a.N - 1), next = std::min(n + j + W, a.N - 1);
      rows[j] = {a.w + row * a.K, a.scale + row * groups, a.w + next * a.K};
    }
    alignas(64) float sums[Unpacked<X>::FEW + M][W];
    for (int64_t i = 0; i < a.rows; i += M) {
      const X* x[M];
      clamp_rows(x, M, a.x + i * a.ldx, a.ldx, a.rows - i);
      for (int64_t j = 0; j < columns; j += N) {
        vec acc[W];
        for (int p = 0; p < N; p += PASS)
          multiply_int8<PASS, M, T>(rows + j + p, x, a.K, acc + p, N);
        float lanes[W];
        store(lanes, sum_lanes(acc));
        for (int r = 0; r < M; r++) std::memcpy(&sums[i + r][j], lanes + r * N, N * sizeof(float));
      }
    }
    write_columns(sums, a.rows, columns, a.bias ? a.bias + n : nullptr, a.y + n, a.N);
  }
}

// Output columns [begin, end); a.room holds W rows of K floats and is 64-byte aligned.
template <class X, class Y>
void linear_int8(const Int8Args<X, Y>& a, int64_t begin, int64_t end) {
  if (a.rows == 1) return linear_int8_few<1>(a, begin, end);
  if (a.rows == 2) return linear_int8_few<2>(a, begin, end);
  if (a.rows <= Unpacked<X>::FEW) return linear_int8_few<4>(a, begin, end);
  using T = typename Unpacked<X>::T;
  T* const room = static_cast<T*>(a.room);
  const int64_t groups = (a.K + INT8_GROUP - 1) / INT8_GROUP;
  const T* w[W + MAX_AHEAD];
  clamp_rows(w, W + MAX_AHEAD, static_cast<const T*>(room), a.K, W);
  for (int64_t n = begin; n < end; n += W) {
    const int64_t columns = std::min(W, end - n);
    for (int64_t j = 0; j < W; j++) {
      // rows past the end repeat the last, so that no lane ever holds what wasn't written
      const int64_t row = std::min(n + j, end - 1), next = std::min(n + j + W, a.N - 1);
      unpack_row(a.w + row * a.K, a.scale + row * groups, a.w + next * a.K, a.K, room + j * a.K);
    }
    for (int64_t m = 0; m < a.rows; m += TILE_ROWS)
      linear_columns(
          w, a.x + m * a.ldx, a.ldx, std::min(TILE_ROWS, a.rows - m), a.K, columns,
          a.bias ? a.bias + n : nullptr, a.y + m * a.N + n, a.N);
  }
}
