// Attention straight over the pages, by tiles of keys with a running softmax. See
// paged_attention_contract.py. Tiles and splits lie at multiples of their size in the context,
// wherever the queries are: a query's result depends on its position and its sequence alone.

constexpr int64_t TILE = KEYS_PER_TILE;

// Keys and values of a tile, where they lie in the cache.
template <class T>
struct Tile {
  int64_t begin, count;  // positions
  int64_t runs;          // number of the blocks that it touches
  int64_t starts[TILE + 1];  // of `count`, each run's first key that the item sees; last `count`
  const T* keys[TILE];
  const T* values[TILE];
};

// Finds the tile at `begin`. Where the item sees no key, before its oldest and past its last, the
// next one that it sees stands in.
template <class T>
inline void find_tile(
    Tile<T>& tile, const AttentionArgs<T>& a, const AttentionItem& item, int64_t begin) {
  tile.begin = begin;
  tile.count = std::min(TILE, item.end - begin);
  const int64_t dead = std::max<int64_t>(0, item.oldest - begin);
  tile.runs = 0;
  int64_t block = (begin + dead) / a.block_size, offset = (begin + dead) % a.block_size, i = dead;
  while (i < tile.count) {
    const int64_t slot = (item.blocks[block] * a.Hkv + item.head) * a.block_size + offset;
    const int64_t run = std::min(a.block_size - offset, tile.count - i);
    tile.starts[tile.runs++] = i;
    for (int64_t n = 0; n < run; n++) {
      tile.keys[i + n] = a.k + (slot + n) * a.D;
      tile.values[i + n] = a.v + (slot + n) * a.Dv;
    }
    i += run;
    block++;
    offset = 0;
  }
  tile.starts[tile.runs] = tile.count;
  for (int64_t n = 0; n < dead; n++) {
    tile.keys[n] = tile.keys[dead];
    tile.values[n] = tile.values[dead];
  }
  for (; i < TILE; i++) {
    tile.keys[i] = tile.keys[tile.count - 1];
    tile.values[i] = tile.values[tile.count - 1];
  }
}

template <class T>
inline const T* query(
    const AttentionArgs<T>& a, const AttentionItem& item, int64_t head, int64_t row) {
  head = (item.head + head) * a.group + row % a.group;
  return a.q + (item.first_query + row / a.group) * a.q_row + head * a.q_head;
}

// Bits first .. last of a tile.
inline uint64_t bits_between(int64_t first, int64_t last) {
  first = std::max<int64_t>(first, 0);
  last = std::min<int64_t>(last, 63);
  return last < first ? 0 : (~uint64_t{0} >> (63 - (last - first))) << first;
}

// Keys of the tile at `begin` that the item's i-th query sees, as bits.
inline uint64_t visible(const AttentionItem& item, int64_t i, int64_t window, int64_t begin) {
  const int64_t last = item.past + item.first_index + i - begin;
  return bits_between(window > 0 ? last - window + 1 : 0, last);
}

// The number that is added to a query row's score for the key at `begin`, and to each further key's
// once more: the head's slope.
struct Bias {
  float first, slope;
};

template <class T>
inline Bias bias(
    const AttentionArgs<T>& a, const AttentionItem& item, int64_t head, int64_t row, int64_t begin) {
  if (!a.slopes) return {0.0f, 0.0f};
  const float slope = a.slopes[(item.head + head) * a.group + row % a.group];
  return {slope * float(begin - item.past - item.first_index - row / a.group), slope};
}

// Keys [begin, end) of a tile that lie in one block, for one head: a run of the cache's memory.
template <class T>
struct Run {
  const T* const* rows;  // of the item's first head, by key of the tile
  int64_t begin, end;
  int64_t offset;  // this head's, from the first head
  int64_t width;
  const T* ahead;  // a later run

  const T* row(int64_t n) const { return rows[n] + offset; }

  // Fetches what stands in the later run where `count` keys from n on stand in this one.
  void fetch(int64_t n, int64_t count) const {
    const char* from = reinterpret_cast<const char*>(ahead + (n - begin) * width);
    for (int64_t i = 0; i < count * width * int64_t(sizeof(T)); i += 64)
      __builtin_prefetch(from + i);
  }
};

// Blocks of keys or values that are fetched ahead of their use: one or four are no faster.
constexpr int64_t RUNS_AHEAD = 2;

// Where the i-th run of a tile's keys, then values, then the next tile's keys begins.
template <class T>
inline const T* run_at(const Tile<T>& tile, const Tile<T>* next, int64_t i) {
  if (i < tile.runs) return tile.keys[tile.starts[i]];
  i -= tile.runs;
  if (i < tile.runs) return tile.values[tile.starts[i]];
  i -= tile.runs;
  if (next && i < next->runs) return next->keys[next->starts[i]];
  return tile.values[0];  // nothing to fetch: this is in the cache
}

// Calls use(run, head) for the runs of a tile's keys, or values, in the order in which they lie in
// memory: a block's heads follow one another.
template <bool VALUES, class T, class Use>
inline void for_runs(
    const AttentionArgs<T>& a, const AttentionItem& item, const Tile<T>& tile, const Tile<T>* next,
    const Use& use) {
  const int64_t width = VALUES ? a.Dv : a.D, stride = a.block_size * width;
  for (int64_t i = 0; i < tile.runs; i++) {
    const T* ahead = run_at(tile, next, i + RUNS_AHEAD + (VALUES ? tile.runs : 0));
    for (int64_t head = 0; head < item.heads; head++)
      use(Run<T>{VALUES ? tile.values : tile.keys, tile.starts[i], tile.starts[i + 1], head * stride,
                 width, ahead + head * stride},
          head);
  }
}

// acc[m * stride + n] = lanes of q row m times key n.
template <int N, int M, class T>
[[gnu::always_inline]] inline void dot_keys(const T* const* keys, const T* const* q, int64_t D, vec* acc, int stride) {
  using P = Product<T, T>;
  vec sum[M][N] = {};
  int64_t d = 0;
  for (; d + P::STEP <= D; d += P::STEP) {
    typename P::Left row[N];
    for (int n = 0; n < N; n++) row[n] = P::left(keys[n] + d);
    for (int m = 0; m < M; m++) {
      const typename P::Right value = P::right(q[m] + d);
      for (int n = 0; n < N; n++) sum[m][n] = P::add(sum[m][n], row[n], value);
    }
  }
  if (d < D) {
    T ends[N][P::STEP] = {};
    for (int n = 0; n < N; n++) std::memcpy(ends[n], keys[n] + d, (D - d) * sizeof(T));
    for (int m = 0; m < M; m++) {
      T end[P::STEP] = {};
      std::memcpy(end, q[m] + d, (D - d) * sizeof(T));
      for (int n = 0; n < N; n++)
        sum[m][n] = P::add(sum[m][n], P::left(ends[n]), P::right(end));
    }
  }
  for (int m = 0; m < M; m++)
    for (int n = 0; n < N; n++) acc[m * stride + n] = sum[m][n];
}

// scores[row][key] = q · k for the keys of a run, M query rows at a time. DIM: the head size, or 0 for
// any (24 to 19 ns a key at 64).
template <int M, int DIM, class T>
inline void score_by(
    const Run<T>& run, const T* const* queries, int64_t rows, float (*scores)[TILE]) {
  constexpr int N = W / M, PASS = std::min<int>(N, M == 1 && W == 16 ? 16 : 4);
  const int64_t D = DIM > 0 ? DIM : run.width;
  for (int64_t n = run.begin; n < run.end; n += N) {
    const T* keys[N];
    for (int i = 0; i < N; i++) keys[i] = run.row(std::min(n + i, run.end - 1));
    const int64_t live = std::min<int64_t>(N, run.end - n);
    run.fetch(n, live);
    for (int64_t m = 0; m < rows; m += M) {
      vec acc[W];
      for (int i = 0; i < N; i += PASS) dot_keys<PASS, M>(keys + i, queries + m, D, acc + i, N);
      float sums[W];
      store(sums, sum_lanes(acc));
      for (int64_t i = 0; i < std::min<int64_t>(M, rows - m); i++) {
        if (live == N) std::memcpy(&scores[m + i][n], &sums[i * N], N * sizeof(float));
        else std::memcpy(&scores[m + i][n], &sums[i * N], live * sizeof(float));
      }
    }
  }
}

// softcap · tanh(score / softcap)
inline vec cap(vec score, float softcap) {
  const vec z = score * (1.0f / softcap);
  const vec e = exp_negative(-2.0f * highest_of(z, -z));
  const vec size = softcap * (1.0f - e) / (1.0f + e);
  return choose(reinterpret_cast<bits32>(z > 0.0f), size, -size);
}

// Products of one row become weights e^(score - maximum), zero for keys that are not seen. The maximum
// and the sum run over the tiles; returns the factor by which what was summed before shrinks.
template <class T>
inline float weigh(
    const AttentionArgs<T>& a, float* scores, int64_t lanes, uint64_t seen, Bias bias,
    float* maximum, float* sum) {
  constexpr float NONE = -std::numeric_limits<float>::infinity();
  bits32 lane;
  for (int i = 0; i < W; i++) lane[i] = i;
  const vec steps = bias.first + bias.slope * __builtin_convertvector(lane, vec);
  const bool all = (seen & bits_between(0, lanes - 1)) == bits_between(0, lanes - 1);
  vec top = splat(*maximum);
  for (int64_t i = 0; i < lanes; i += W) {
    vec score = load(scores + i) * a.scale;
    if (a.softcap > 0) score = cap(score, a.softcap);
    if (a.slopes) score += steps + bias.slope * float(i);
    if (!all) {
      const bits32 shown = ((uint32_t(seen >> i) + bits32{}) >> lane & 1) != 0;
      score = choose(shown, score, splat(NONE));
    }
    store(scores + i, score);
    top = highest_of(score, top);
  }
  const float highest = highest_lane(top);
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
  const float shrink = exp_negative(splat(*maximum - highest))[0];
  *maximum = highest;
  *sum = *sum * shrink + sum_of_lanes(total);
  return shrink;
}

template <int DIM, class T>
inline void score(
    const Run<T>& run, const T* const* queries, int64_t rows, float (*scores)[TILE]) {
  switch (std::min<int64_t>(rows, 4)) {
    case 1: return score_by<1, DIM>(run, queries, rows, scores);
    case 2: return score_by<2, DIM>(run, queries, rows, scores);
    case 3: return score_by<1, DIM>(run, queries, rows, scores);  // 3 would waste a quarter of the sums
    default: return score_by<4, DIM>(run, queries, rows, scores);
  }
}

// part[row] = part[row] · shrink + Σ weight · value, for R rows and V vectors of the head.
template <int R, int V, class T>
inline void gather_block(
    const Run<T>& run, const float (*weights)[TILE], const float* shrink, float* part, int64_t d,
    int64_t live) {
  const bool whole = live == V * W;
  vec acc[R][V];
  for (int i = 0; i < R; i++)
    for (int v = 0; v < V; v++) {
      const float* p = part + i * run.width + d + v * W;
      acc[i][v] = (whole ? load(p) : load_first(p, live)) * shrink[i];
    }
  for (int64_t n = run.begin; n < run.end; n++) {
    const T* p = run.row(n) + d;
    if (d == 0) run.fetch(n, 1);
    vec value[V];
    for (int v = 0; v < V; v++) value[v] = whole ? load(p + v * W) : load_first(p, live);
    for (int i = 0; i < R; i++)
      for (int v = 0; v < V; v++) acc[i][v] += splat(weights[i][n]) * value[v];
  }
  for (int i = 0; i < R; i++)
    for (int v = 0; v < V; v++) {
      float* p = part + i * run.width + d + v * W;
      if (whole) store(p, acc[i][v]);
      else store_first(p, acc[i][v], live);
    }
}

template <int R, class T>
inline void gather_by(
    const Run<T>& run, const float (*weights)[TILE], const float* shrink, float* part) {
  constexpr int V = 4;
  int64_t d = 0;
  for (; d + V * W <= run.width; d += V * W)
    gather_block<R, V>(run, weights, shrink, part, d, V * W);
  for (; d < run.width; d += W)
    gather_block<R, 1>(run, weights, shrink, part, d, std::min(W, run.width - d));
}

template <class T>
inline void gather(
    const Run<T>& run, const float (*weights)[TILE], const float* shrink, int64_t rows,
    float* part) {
  for (int64_t i = 0; i < rows; i += 4, part += 4 * run.width) {
    switch (std::min<int64_t>(rows - i, 4)) {
      case 1: gather_by<1>(run, weights + i, shrink + i, part); break;
      case 2: gather_by<2>(run, weights + i, shrink + i, part); break;
      case 3: gather_by<3>(run, weights + i, shrink + i, part); break;
      default: gather_by<4>(run, weights + i, shrink + i, part);
    }
  }
}

// Scratch of one item.
struct AttentionRoom {
  alignas(64) float scores[MAX_ATTENTION_HEADS][MAX_ATTENTION_ROWS][TILE];
  float shrink[MAX_ATTENTION_HEADS][MAX_ATTENTION_ROWS];
};

// The scores of every head and row over a tile, their weights, and the values so weighed.
template <class T>
inline void attend_tile(
    const AttentionArgs<T>& a, const AttentionItem& item, const Tile<T>& tile, const Tile<T>* next,
    const T* const (*queries)[MAX_ATTENTION_ROWS + 3], AttentionRoom& room) {
  const int64_t rows = item.queries * a.group, lanes = (tile.count + W - 1) / W * W;
  for_runs<false>(a, item, tile, next, [&](const Run<T>& run, int64_t head) {
    if (a.D == 64) score<64>(run, queries[head], rows, room.scores[head]);
    else if (a.D == 128) score<128>(run, queries[head], rows, room.scores[head]);
    else score<0>(run, queries[head], rows, room.scores[head]);
  });
  for (int64_t head = 0; head < item.heads; head++)
    for (int64_t i = 0; i < rows; i++) {
      const uint64_t seen = visible(item, i / a.group, a.window, tile.begin);
      room.shrink[head][i] = weigh(
          a, room.scores[head][i], lanes, seen, bias(a, item, head, i, tile.begin),
          item.maximum + head * rows + i, item.sum + head * rows + i);
    }
  for_runs<true>(a, item, tile, next, [&](const Run<T>& run, int64_t head) {
    gather(run, room.scores[head], room.shrink[head], rows, item.part + head * rows * a.Dv);
    if (run.end < tile.count) std::fill_n(room.shrink[head], rows, 1.0f);
  });
}

// The item's keys for its queries: maxima, sums and parts.
template <class T>
void attend(const AttentionArgs<T>& a, const AttentionItem& item) {
  static thread_local AttentionRoom room;
  const int64_t rows = item.queries * a.group;
  std::fill_n(item.maximum, item.heads * rows, -std::numeric_limits<float>::infinity());
  std::fill_n(item.sum, item.heads * rows, 0.0f);
  std::fill_n(item.part, item.heads * rows * a.Dv, 0.0f);
  // The last stands in for those past the end.
  const T* queries[MAX_ATTENTION_HEADS][MAX_ATTENTION_ROWS + 3];
  for (int64_t head = 0; head < item.heads; head++)
    for (int64_t i = 0; i < rows + 3; i++)
      queries[head][i] = query(a, item, head, std::min(i, rows - 1));
  Tile<T> tiles[2];
  find_tile(tiles[0], a, item, item.begin);
  for (int64_t i = 0; i < std::min(RUNS_AHEAD, tiles[0].runs); i++) {
    const int64_t first = tiles[0].starts[i], keys = tiles[0].starts[i + 1] - first;
    for (int64_t head = 0; head < item.heads; head++)
      Run<T>{nullptr, 0, 0, 0, a.D, tiles[0].keys[first] + head * a.block_size * a.D}.fetch(0, keys);
  }
  int64_t now = 0;
  for (int64_t begin = item.begin; begin < item.end; begin += TILE, now = 1 - now) {
    const bool last = begin + TILE >= item.end;
    if (!last) find_tile(tiles[1 - now], a, item, begin + TILE);
    attend_tile(a, item, tiles[now], last ? nullptr : &tiles[1 - now], queries, room);
  }
}
