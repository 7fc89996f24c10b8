// turbo_heads, head_logits: items of one matrix, which lies in pages. See turbo_heads_contract.py.

inline vec silu(vec z) {
  const vec e = exp_negative(-highest_of(z, -z));
  return z * (choose(reinterpret_cast<bits32>(z > 0.0f), splat(1.0f), e) / (1.0f + e));
}

// Weight row n of the matrix; the last page's last row stands in for those past the end.
template <class T, class X, class Y>
inline const T* paged_row(const HeadArgs<T, X, Y>& a, int64_t n) {
  n = std::min(n, a.count_pages * PAGE_ROWS - 1);
  return a.arena + a.pages[n / PAGE_ROWS] + n % PAGE_ROWS * a.K;
}

// Output columns [n, n + columns) of items [m, m + M), of which those past the end repeat the last:
// sums holds W / M columns an item.
template <int M, class T, class X, class Y>
inline void finish_heads(
    const HeadArgs<T, X, Y>& a, int64_t m, int64_t n, int64_t columns, vec sums) {
  constexpr int N = rows_with<M>();
  // N divides a page's rows
  const T* biases = a.arena + a.pages[n / PAGE_ROWS] + PAGE_ROWS * a.K + n % PAGE_ROWS;
  const int64_t live = std::min<int64_t>(M, a.count - m);
  float bias[W] = {}, residual[W] = {}, out[W];
  for (int64_t i = 0; i < live; i++) {
    for (int64_t j = 0; j < columns; j++) bias[i * N + j] = to_float(biases[j]);
    if (a.x == nullptr) continue;
    const X* x = a.x + a.items[2 * (m + i)] * a.ldx + n;
    for (int64_t j = 0; j < columns; j++) residual[i * N + j] = to_float(x[j]);
  }
  sums += load(bias);
  store(out, a.x ? load(residual) + silu(sums) : sums);
  for (int64_t i = 0; i < live; i++) {
    Y* row = a.out + a.items[2 * (m + i) + 1] * a.N + n;
    for (int64_t j = 0; j < columns; j++) row[j] = from_float<Y>(out[i * N + j]);
  }
}

// Output columns [begin, end), M items at a time: all of them pass over W / M weight rows while
// these are in the first-level cache.
template <int M, class T, class X, class Y>
inline void heads_by(const HeadArgs<T, X, Y>& a, int64_t begin, int64_t end) {
  constexpr int N = rows_with<M>();
  for (int64_t n = begin; n < end; n += N) {
    const T* w[N + MAX_AHEAD];
    for (int i = 0; i < N + MAX_AHEAD; i++) w[i] = paged_row(a, n + i);
    for (int64_t m = 0; m < a.count; m += M) {
      const X* z[M];
      for (int i = 0; i < M; i++)
        z[i] = a.z + a.items[2 * std::min<int64_t>(m + i, a.count - 1)] * a.ldz;
      const vec sums = a.count > 2 * M ? dot_block_part<M>(w, z, a.K, m / M)
                                       : dot_block<M>(w, z, a.K);
      finish_heads<M>(a, m, n, std::min<int64_t>(N, end - n), sums);
    }
  }
}

template <class T, class X, class Y>
void heads(const HeadArgs<T, X, Y>& a, int64_t begin, int64_t end) {
  if (a.count == 1) return heads_by<1>(a, begin, end);
  if (a.count == 2) return heads_by<2>(a, begin, end);
  heads_by<4>(a, begin, end);
}
