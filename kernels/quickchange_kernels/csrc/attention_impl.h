// Attention straight over the pages, by tiles of keys with a running softmax. See
// paged_attention.py. Tiles and splits lie at multiples of their size in the context, wherever the
// queries are: a query's result depends on its position and its sequence alone.

constexpr int64_t TILE = 64;  // keys

// eˣ for x ≤ 0, exactly 0 below -87: Cody and Waite's reduction, a polynomial of degree 7.
inline vec exp_negative(vec x) {
  const vec shifted = x * 1.44269504f + 12582912.0f;  // the integer part lands in the low bits
  const vec n = shifted - 12582912.0f;
  const vec r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const bits32 power = (reinterpret_cast<bits32>(shifted) - 0x4B400000u + 127u) << 23;
  const vec value = p * reinterpret_cast<vec>(power);
  const bits32 kept = reinterpret_cast<bits32>(x > -87.0f);
  return reinterpret_cast<vec>(reinterpret_cast<bits32>(value) & kept);
}

// Pointers to one head's keys or values at positions begin .. begin + count - 1; the last repeats.
template <class T>
inline void point_at(
    const T** out, int64_t count, const T* cache, const AttentionArgs<T>& a,
    const AttentionItem& item, int64_t begin, int64_t room) {
  for (int64_t i = 0; i < room; i++) {
    const int64_t key = begin + std::min(i, count - 1);
    const int64_t block = item.blocks[key / a.block_size];
    out[i] = cache + ((block * a.Hkv + item.head) * a.block_size + key % a.block_size) * a.D;
  }
}

template <class T>
inline const T* query(const AttentionArgs<T>& a, const AttentionItem& item, int64_t row) {
  const int64_t head = item.head * a.group + row % a.group;
  return a.q + (item.first_query + row / a.group) * a.q_row + head * a.q_head;
}

// scores[row][key] = q · k for `count` keys, M query rows at a time.
template <int M, class T>
inline void score_by(
    const AttentionArgs<T>& a, const AttentionItem& item, const T* const* keys, int64_t count,
    float (*scores)[TILE]) {
  constexpr int N = rows_with<M>();
  const int64_t rows = item.queries * a.group;
  for (int64_t n = 0; n < count; n += N)
    for (int64_t m = 0; m < rows; m += M) {
      const T* q[M];
      for (int i = 0; i < M; i++) q[i] = query(a, item, std::min(m + i, rows - 1));
      float sums[W];
      store(sums, dot_block<M>(keys + n, q, a.D));
      for (int64_t i = 0; i < std::min<int64_t>(M, rows - m); i++)
        std::memcpy(&scores[m + i][n], &sums[i * N], N * sizeof(float));
    }
}

// Scores of one row become weights e^(score - maximum), zero where hidden. The maximum and the sum
// run over the tiles; returns the factor by which what was summed before shrinks.
template <class T>
inline float weigh(
    const AttentionArgs<T>& a, float* scores, int64_t begin, int64_t first, int64_t last,
    float* maximum, float* sum) {
  float highest = *maximum;
  for (int64_t i = 0; i < TILE; i++) {
    const int64_t key = begin + i;
    float score = scores[i] * a.scale;
    if (a.softcap > 0) score = a.softcap * std::tanh(score / a.softcap);
    scores[i] = key >= first && key <= last ? score : -std::numeric_limits<float>::infinity();
    highest = std::max(highest, scores[i]);
  }
  if (highest == -std::numeric_limits<float>::infinity()) {  // nothing seen yet
    std::memset(scores, 0, TILE * sizeof(float));
    return 1.0f;
  }
  const float shrink = std::exp(*maximum - highest);
  vec total{};
  for (int64_t i = 0; i < TILE; i += W) {
    const vec weight = exp_negative(load(scores + i) - highest);
    store(scores + i, weight);
    total += weight;
  }
  float added = 0;
  for (int64_t i = 0; i < W; i++) added += total[i];
  *maximum = highest;
  *sum = *sum * shrink + added;
  return shrink;
}

// out[row] = out[row] · shrink + Σ weight · value, for R rows and V vectors of the head.
template <int R, int V, class T>
inline void gather_block(
    const T* const* values, int64_t count, const float (*weights)[TILE], const float* shrink,
    float* out, int64_t D, int64_t d, int64_t live) {
  const bool whole = live == V * W;
  vec acc[R][V];
  for (int i = 0; i < R; i++)
    for (int v = 0; v < V; v++) {
      const float* p = out + i * D + d + v * W;
      acc[i][v] = (whole ? load(p) : load_first(p, live)) * shrink[i];
    }
  for (int64_t n = 0; n < count; n++) {
    vec value[V];
    for (int v = 0; v < V; v++) {
      const T* p = values[n] + d + v * W;
      value[v] = whole ? load(p) : load_first(p, live);
    }
    for (int i = 0; i < R; i++)
      for (int v = 0; v < V; v++) acc[i][v] += splat(weights[i][n]) * value[v];
  }
  for (int i = 0; i < R; i++)
    for (int v = 0; v < V; v++) {
      float* p = out + i * D + d + v * W;
      if (whole) store(p, acc[i][v]);
      else store_first(p, acc[i][v], live);
    }
}

template <int R, class T>
inline void gather_by(
    const T* const* values, int64_t count, const float (*weights)[TILE], const float* shrink,
    float* out, int64_t D) {
  constexpr int V = 4;
  int64_t d = 0;
  for (; d + V * W <= D; d += V * W)
    gather_block<R, V>(values, count, weights, shrink, out, D, d, V * W);
  for (; d < D; d += W)
    gather_block<R, 1>(values, count, weights, shrink, out, D, d, std::min(W, D - d));
}

template <class T>
void attend(const AttentionArgs<T>& a, const AttentionItem& item) {
  const int64_t rows = item.queries * a.group;
  for (int64_t i = 0; i < rows; i++) {
    item.maximum[i] = -std::numeric_limits<float>::infinity();
    item.sum[i] = 0;
  }
  std::memset(item.out, 0, rows * a.D * sizeof(float));
  alignas(64) float scores[MAX_ATTENTION_ROWS][TILE];
  float shrink[MAX_ATTENTION_ROWS];
  const T* keys[TILE + MAX_AHEAD];
  const T* values[TILE + MAX_AHEAD];
  const int64_t oldest = a.window > 0 ? item.first_position - a.window + 1 : 0;
  const int64_t start = std::max(item.begin, std::max<int64_t>(oldest, 0) / TILE * TILE);
  const int64_t stop = std::min(item.end, item.first_position + item.queries);
  for (int64_t begin = start; begin < stop; begin += TILE) {
    const int64_t count = std::min(TILE, stop - begin);
    point_at(keys, count, a.k, a, item, begin, TILE + MAX_AHEAD);
    point_at(values, count, a.v, a, item, begin, TILE);
    if (rows == 1) score_by<1>(a, item, keys, count, scores);
    else if (rows == 2) score_by<2>(a, item, keys, count, scores);
    else score_by<4>(a, item, keys, count, scores);
    for (int64_t i = 0; i < rows; i++) {
      const int64_t position = item.first_position + i / a.group;
      const int64_t first = a.window > 0 ? position - a.window + 1 : 0;
      shrink[i] = weigh(
          a, scores[i], begin, first, position, item.maximum + i, item.sum + i);
    }
    int64_t i = 0;
    for (; i + 4 <= rows; i += 4)
      gather_by<4>(values, count, scores + i, shrink + i, item.out + i * a.D, a.D);
    for (; i < rows; i++)
      gather_by<1>(values, count, scores + i, shrink + i, item.out + i * a.D, a.D);
  }
}
