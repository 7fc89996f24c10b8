// turbo_heads: out = x + silu(W x + b) for the items of one head. See turbo_heads.py.

inline vec silu(vec z) {
  const vec e = exp_negative(-highest_of(z, -z));
  return z * (choose(reinterpret_cast<bits32>(z > 0.0f), splat(1.0f), e) / (1.0f + e));
}

// Output columns [begin, end), M items at a time: all of them pass over W / M weight rows while
// these are in the first-level cache.
template <int M, class T, class X>
inline void turbo_by(const TurboArgs<T, X>& a, int64_t begin, int64_t end) {
  constexpr int N = rows_with<M>();
  for (int64_t n = begin; n < end; n += N) {
    const T* w[N + MAX_AHEAD];
    clamp_rows(w, N + MAX_AHEAD, a.w + n * a.H, a.H, a.H - n);
    const int64_t columns = std::min<int64_t>(N, end - n);
    for (int64_t m = 0; m < a.count; m += M) {
      const X* x[M];
      float bias[W] = {}, residual[W] = {};
      for (int i = 0; i < M; i++) {
        x[i] = a.x + a.items[2 * std::min<int64_t>(m + i, a.count - 1)] * a.ldx;
        for (int64_t j = 0; j < columns; j++) {
          bias[i * N + j] = to_float(a.b[n + j]);
          residual[i * N + j] = to_float(x[i][n + j]);
        }
      }
      float h[W];
      store(h, load(residual) + silu(dot_block<M>(w, x, a.H) + load(bias)));
      for (int64_t i = 0; i < std::min<int64_t>(M, a.count - m); i++)
        for (int64_t j = 0; j < columns; j++)
          a.out[a.items[2 * (m + i) + 1] * a.H + n + j] = from_float<X>(h[i * N + j]);
    }
  }
}

template <class T, class X>
void turbo_heads(const TurboArgs<T, X>& a, int64_t begin, int64_t end) {
  if (a.count == 1) return turbo_by<1>(a, begin, end);
  if (a.count == 2) return turbo_by<2>(a, begin, end);
  turbo_by<4>(a, begin, end);
}
