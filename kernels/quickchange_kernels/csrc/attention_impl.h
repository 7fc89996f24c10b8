// Attention straight over the pages, by tiles of keys with a running softmax. See
// paged_attention.py. Tiles and splits lie at multiples of their size in the context, wherever the
// queries are: a query's result depends on its position and its sequence alone.

constexpr int64_t TILE = 64;  // keys

// Where a tile's keys and values lie.
template <class T>
struct Tile {
  int64_t begin, count;  // positions
  const T* keys[TILE + MAX_AHEAD];
  const T* values[TILE + MAX_AHEAD];
};

// Finds the tile at `begin`, at most up to `stop`; past its end the last position repeats.
template <class T>
inline void find_tile(
    Tile<T>& tile, const AttentionArgs<T>& a, const AttentionItem& item, int64_t begin,
    int64_t stop) {
  tile.begin = begin;
  tile.count = std::min(TILE, stop - begin);
  int64_t block = begin / a.block_size, offset = begin % a.block_size, i = 0;
  while (i < tile.count) {
    const int64_t start = ((item.blocks[block] * a.Hkv + item.head) * a.block_size + offset) * a.D;
    const int64_t run = std::min(a.block_size - offset, tile.count - i);
    for (int64_t n = 0; n < run; n++) {
      tile.keys[i + n] = a.k + start + n * a.D;
      tile.values[i + n] = a.v + start + n * a.D;
    }
    i += run;
    block++;
    offset = 0;
  }
  for (; i < TILE + MAX_AHEAD; i++) {
    tile.keys[i] = tile.keys[tile.count - 1];
    tile.values[i] = tile.values[tile.count - 1];
  }
}

// Rows of D elements, into the second-level cache.
template <class T>
inline void fetch_rows(const T* const* rows, int64_t count, int64_t D) {
  for (int64_t i = 0; i < count; i++)
    for (int64_t d = 0; d < D; d += 64 / int64_t(sizeof(T))) __builtin_prefetch(rows[i] + d, 0, 2);
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

// softcap · tanh(score / softcap)
inline vec cap(vec score, float softcap) {
  const vec z = score * (1.0f / softcap);
  const vec e = exp_negative(-2.0f * highest_of(z, -z));
  const vec size = softcap * (1.0f - e) / (1.0f + e);
  return choose(reinterpret_cast<bits32>(z > 0.0f), size, -size);
}

// Scores of one row become weights e^(score - maximum), zero but for keys first .. last of the tile.
// The maximum and the sum run over the tiles; returns the factor by which what was summed before
// shrinks.
template <class T>
inline float weigh(
    const AttentionArgs<T>& a, float* scores, int64_t lanes, int64_t first, int64_t last,
    float* maximum, float* sum) {
  constexpr float NONE = -std::numeric_limits<float>::infinity();
  typedef int32_t ints __attribute__((vector_size(QC_WIDTH * 4)));
  ints index;
  for (int i = 0; i < W; i++) index[i] = i;
  const int32_t low = int32_t(std::max<int64_t>(first, 0));
  const int32_t high = int32_t(std::clamp<int64_t>(last, -1, TILE));
  vec top = splat(*maximum);
  for (int64_t i = 0; i < lanes; i += W) {
    vec score = load(scores + i) * a.scale;
    if (a.softcap > 0) score = cap(score, a.softcap);
    const ints key = index + int32_t(i);
    score = choose(reinterpret_cast<bits32>((key >= low) & (key <= high)), score, splat(NONE));
    store(scores + i, score);
    top = highest_of(score, top);
  }
  float highest = top[0];
  for (int i = 1; i < W; i++) highest = std::max<float>(highest, top[i]);
  if (highest == NONE) {  // nothing seen yet
    std::memset(scores, 0, lanes * sizeof(float));
    return 1.0f;
  }
  vec total{};
  for (int64_t i = 0; i < lanes; i += W) {
    const vec weight = exp_negative(load(scores + i) - highest);
    store(scores + i, weight);
    total += weight;
  }
  float added = 0;
  for (int i = 0; i < W; i++) added += total[i];
  const float shrink = std::exp(*maximum - highest);
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

// Scores and weights of one tile for every row, and its share of the output.
template <class T>
inline void attend_tile(const AttentionArgs<T>& a, const AttentionItem& item, const Tile<T>& tile) {
  alignas(64) float scores[MAX_ATTENTION_ROWS][TILE];
  float shrink[MAX_ATTENTION_ROWS];
  const int64_t rows = item.queries * a.group;
  const int64_t lanes = (tile.count + W - 1) / W * W;
  if (rows == 1) score_by<1>(a, item, tile.keys, tile.count, scores);
  else if (rows == 2) score_by<2>(a, item, tile.keys, tile.count, scores);
  else score_by<4>(a, item, tile.keys, tile.count, scores);
  for (int64_t i = 0; i < rows; i++) {
    const int64_t last = item.first_position + i / a.group - tile.begin;
    const int64_t first = a.window > 0 ? last - a.window + 1 : 0;
    shrink[i] = weigh(a, scores[i], lanes, first, last, item.maximum + i, item.sum + i);
  }
  for (int64_t i = 0; i < rows; i += 4) {
    const auto weights = scores + i;
    float* out = item.out + i * a.D;
    switch (std::min<int64_t>(rows - i, 4)) {
      case 1: gather_by<1>(tile.values, tile.count, weights, shrink + i, out, a.D); break;
      case 2: gather_by<2>(tile.values, tile.count, weights, shrink + i, out, a.D); break;
      case 3: gather_by<3>(tile.values, tile.count, weights, shrink + i, out, a.D); break;
      default: gather_by<4>(tile.values, tile.count, weights, shrink + i, out, a.D);
    }
  }
}

template <class T>
void attend(const AttentionArgs<T>& a, const AttentionItem& item) {
  const int64_t rows = item.queries * a.group;
  std::fill_n(item.maximum, rows, -std::numeric_limits<float>::infinity());
  std::fill_n(item.sum, rows, 0.0f);
  std::fill_n(item.out, rows * a.D, 0.0f);
  const int64_t oldest = a.window > 0 ? item.first_position - a.window + 1 : 0;
  const int64_t start = std::max(item.begin, std::max<int64_t>(oldest, 0) / TILE * TILE);
  const int64_t stop = std::min(item.end, item.first_position + item.queries);
  if (start >= stop) return;
  Tile<T> tiles[2];
  find_tile(tiles[0], a, item, start, stop);
  fetch_rows(tiles[0].keys, tiles[0].count, a.D);
  for (int64_t begin = start, i = 0; begin < stop; begin += TILE, i ^= 1) {
    fetch_rows(tiles[i].values, tiles[i].count, a.D);
    if (begin + TILE < stop) {
      find_tile(tiles[i ^ 1], a, item, begin + TILE, stop);
      fetch_rows(tiles[i ^ 1].keys, tiles[i ^ 1].count, a.D);
    }
    attend_tile(a, item, tiles[i]);
  }
}
