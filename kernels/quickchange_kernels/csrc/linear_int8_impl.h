// linear over int8 weights with a scale per row and group. W weight rows at a time are turned into
// numbers in the cache, and then the same products as linear's follow. See linear_int8.py.

// What int8 weights become to be multiplied with X.
template <class X>
struct Unpacked {
  using T = float;
};
#ifdef QC_BF16_DOT
template <>
struct Unpacked<bf16> {
  using T = bf16;
};
#endif

typedef int8_t int8s __attribute__((vector_size(QC_WIDTH)));
typedef int8_t int8s_unaligned __attribute__((vector_size(QC_WIDTH), aligned(1), may_alias));
typedef int32_t int32s __attribute__((vector_size(QC_WIDTH * 4)));

inline vec load(const int8_t* p) {
  const int8s raw = *reinterpret_cast<const int8s_unaligned*>(p);
  return __builtin_convertvector(__builtin_convertvector(raw, int32s), vec);
}

// A whole group times its scale.
inline void unpack_group(const int8_t* w, vec scale, float* out) {
  for (int64_t i = 0; i < INT8_GROUP; i += W) store(out + i, load(w + i) * scale);
}

inline void unpack_group(const int8_t* w, vec scale, bf16* out) {
#ifdef QC_BF16_DOT
  static_assert(INT8_GROUP == 2 * W);
  const __m512bh both = _mm512_cvtne2ps_pbh(load(w + W) * scale, load(w) * scale);
  _mm512_storeu_si512(out, reinterpret_cast<const __m512i&>(both));
#else
  for (int64_t i = 0; i < INT8_GROUP; i += W) store(out + i, load(w + i) * scale);
#endif
}

// A row of K weights; `next` is the row that comes W later, fetched meanwhile.
template <class T>
inline void unpack_row(
    const int8_t* w, const bf16* scale, const int8_t* next, int64_t K, T* out) {
  int64_t k = 0;
  for (; k + INT8_GROUP <= K; k += INT8_GROUP) {
    if (k % 64 == 0) __builtin_prefetch(next + k, 0, 2);
    unpack_group(w + k, splat(to_float(scale[k / INT8_GROUP])), out + k);
  }
  for (; k < K; k++) out[k] = from_float<T>(w[k] * to_float(scale[k / INT8_GROUP]));
}

// Output columns [begin, end); a.room holds W rows of K floats and is 64-byte aligned.
template <class X, class Y>
void linear_int8(const Int8Args<X, Y>& a, int64_t begin, int64_t end) {
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
