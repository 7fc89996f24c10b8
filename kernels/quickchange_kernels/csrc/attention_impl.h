// Attention straight over the pages, by tiles of keys with a running softmax. See
// paged_attention.py. Tiles and splits lie at multiples of their size in the context, wherever the
// queries are: a query's result depends on its position and its sequence alone.

constexpr int64_t TILE = KEYS_PER_TILE;

// Where a tile's keys and values lie.
template <class T>
struct Tile {
  int64_t begin, count;  // positions
  const T* keys[TILE + MAX_AHEAD];
  const T* values[TILE + MAX_AHEAD];
};

// Finds the tile at `begin`. Where the item sees no key, before its oldest and past its last, the
// next one that it sees stands in.
template <class T>
inline void find_tile(
    Tile<T>& tile, const AttentionArgs<T>& a, const AttentionItem& item, int64_t begin) {
  tile.begin = begin;
  tile.count = std::min(TILE, item.end - begin);
  const int64_t dead = std::max<int64_t>(0, item.oldest - begin);
  int64_t block = (begin + dead) / a.block_size, offset = (begin + dead) % a.block_size, i = dead;
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
  for (int64_t n = 0; n < dead; n++) {
    tile.keys[n] = tile.keys[dead];
    tile.values[n] = tile.values[dead];
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

// Bits first .. last of a tile.
inline uint64_t bits_between(int64_t first, int64_t last) {
  first = std::max<int64_t>(first, 0);
  last = std::min<int64_t>(last, 63);
  return last < first ? 0 : (~uint64_t{0} >> (63 - (last - first))) << first;
}

// Which keys of the tile at `begin` the item's i-th query sees.
inline uint64_t visible(const AttentionItem& item, int64_t i, int64_t window, int64_t begin) {
  if (item.tree == nullptr) {
    const int64_t last = item.past + item.first_index + i - begin;
    return bits_between(window > 0 ? last - window + 1 : 0, last);
  }
  uint64_t path = uint64_t(item.tree[i]);
  const int64_t length = __builtin_popcountll(path), past = item.past - begin;
  if (window > 0)
    for (int64_t dropped = window; dropped < length; dropped++) path &= path - 1;
  const int64_t first = window > 0 ? past + length - window : 0;
  const uint64_t before = bits_between(first, past - 1);
  if (past >= 64 || past <= -64) return before;
  return before | (past >= 0 ? path << past : path >> -past);
}

// scores[row][key] = q · k for the keys of a tile, M query rows at a time. Fetches those of the next
// tile meanwhile, spread over the products: a burst of fetches would hold them up.
template <int M, class T>
inline void score_by(
    const AttentionArgs<T>& a, const AttentionItem& item, const Tile<T>& tile, const Tile<T>& next,
    float (*scores)[TILE]) {
  constexpr int SLOTS = M == 3 ? 4 : M;
  constexpr int N = W / SLOTS, PASS = N < MAX_AHEAD ? N : MAX_AHEAD;
  const int64_t rows = item.queries * a.group;
  for (int64_t n = 0; n < tile.count; n += N)
    for (int64_t m = 0; m < rows; m += M) {
      const T* q[M];
      for (int i = 0; i < M; i++) q[i] = query(a, item, std::min(m + i, rows - 1));
      vec acc[W] = {};
      for (int i = 0; i < N; i += PASS) {
        const T* keys[2 * PASS];
        const Tile<T>& ahead = m == 0 ? next : tile;
        for (int j = 0; j < PASS; j++) {
          keys[j] = tile.keys[n + i + j];
          keys[PASS + j] = ahead.keys[n + i + j];
        }
        multiply<PASS, M>(keys, q, a.D, acc + i, N);
      }
      float sums[W];
      store(sums, sum_lanes(acc));
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

// Scores of one row become weights e^(score - maximum), zero for keys that are not seen. The maximum
// and the sum run over the tiles; returns the factor by which what was summed before shrinks.
template <class T>
inline float weigh(
    const AttentionArgs<T>& a, float* scores, int64_t lanes, uint64_t seen, float* maximum,
    float* sum) {
  constexpr float NONE = -std::numeric_limits<float>::infinity();
  bits32 lane;
  for (int i = 0; i < W; i++) lane[i] = i;
  vec top = splat(*maximum);
  for (int64_t i = 0; i < lanes; i += W) {
    vec score = load(scores + i) * a.scale;
    if (a.softcap > 0) score = cap(score, a.softcap);
    const bits32 shown = ((uint32_t(seen >> i) + bits32{}) >> lane & 1) != 0;
    score = choose(shown, score, splat(NONE));
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
// Fetches the same part of `next` meanwhile.
template <int R, int V, class T>
inline void gather_block(
    const T* const* values, const T* const* next, int64_t count, const float (*weights)[TILE],
    const float* shrink, float* out, int64_t D, int64_t d, int64_t live) {
  const bool whole = live == V * W;
  vec acc[R][V];
  for (int i = 0; i < R; i++)
    for (int v = 0; v < V; v++) {
      const float* p = out + i * D + d + v * W;
      acc[i][v] = (whole ? load(p) : load_first(p, live)) * shrink[i];
    }
  for (int64_t n = 0; n < count; n++) {
    vec value[V];
    for (int v = 0; v < V; v += 64 / int(W * sizeof(T)))
      __builtin_prefetch(next[n] + d + v * W, 0, 2);
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
    const T* const* values, const T* const* next, int64_t count, const float (*weights)[TILE],
    const float* shrink, float* out, int64_t D) {
  constexpr int V = 4;
  int64_t d = 0;
  for (; d + V * W <= D; d += V * W)
    gather_block<R, V>(values, next, count, weights, shrink, out, D, d, V * W);
  for (; d < D; d += W)
    gather_block<R, 1>(values, next, count, weights, shrink, out, D, d, std::min(W, D - d));
}

// Scores and weights of one tile for every row, and its share of the output.
template <class T>
inline void attend_tile(
    const AttentionArgs<T>& a, const AttentionItem& item, const Tile<T>& tile,
    const Tile<T>& next) {
  alignas(64) float scores[MAX_ATTENTION_ROWS][TILE];
  float shrink[MAX_ATTENTION_ROWS];
  const int64_t rows = item.queries * a.group;
  const int64_t lanes = (tile.count + W - 1) / W * W;
  switch (std::min<int64_t>(rows, 4)) {
    case 1: score_by<1>(a, item, tile, next, scores); break;
    case 2: score_by<2>(a, item, tile, next, scores); break;
    case 3: score_by<3>(a, item, tile, next, scores); break;
    default: score_by<4>(a, item, tile, next, scores);
  }
  for (int64_t i = 0; i < rows; i++) {
    const uint64_t seen = visible(item, i / a.group, a.window, tile.begin);
    shrink[i] = weigh(a, scores[i], lanes, seen, item.maximum + i, item.sum + i);
  }
  for (int64_t i = 0; i < rows; i += 4) {
    const auto weights = scores + i;
    const auto ahead = i == 0 ? next.values : tile.values;
    float* part = item.part + i * a.D;
    const int64_t count = tile.count;
    switch (std::min<int64_t>(rows - i, 4)) {
      case 1: gather_by<1>(tile.values, ahead, count, weights, shrink + i, part, a.D); break;
      case 2: gather_by<2>(tile.values, ahead, count, weights, shrink + i, part, a.D); break;
      case 3: gather_by<3>(tile.values, ahead, count, weights, shrink + i, part, a.D); break;
      default: gather_by<4>(tile.values, ahead, count, weights, shrink + i, part, a.D);
    }
  }
}

// The item's keys for its queries: maxima, sums and parts.
template <class T>
void attend(const AttentionArgs<T>& a, const AttentionItem& item) {
  const int64_t rows = item.queries * a.group;
  std::fill_n(item.maximum, rows, -std::numeric_limits<float>::infinity());
  std::fill_n(item.sum, rows, 0.0f);
  std::fill_n(item.part, rows * a.D, 0.0f);
  Tile<T> tiles[2];
  find_tile(tiles[0], a, item, item.begin);
  fetch_rows(tiles[0].keys, tiles[0].count, a.D);
  fetch_rows(tiles[0].values, tiles[0].count, a.D);
  for (int64_t begin = item.begin, i = 0; begin < item.end; begin += TILE, i ^= 1) {
    const bool last = begin + TILE >= item.end;
    if (!last) find_tile(tiles[i ^ 1], a, item, begin + TILE);
    attend_tile(a, item, tiles[i], tiles[last ? i : i ^ 1]);
  }
}
