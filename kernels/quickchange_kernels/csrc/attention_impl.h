// Attention straight over the pages, by tiles of keys with a running softmax. See
// paged_attention_contract.py. Tiles and splits lie at multiples of their size in the context,
// wherever the queries are: a query's result depends on its position and its sequence alone.

constexpr int64_t TILE = KEYS_PER_TILE;

// Keys and values of a tile, where they lie in the cache.
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
    const int64_t slot = (item.blocks[block] * a.Hkv + item.head) * a.block_size + offset;
    const int64_t run = std::min(a.block_size - offset, tile.count - i);
    for (int64_t n = 0; n < run; n++) {
      tile.keys[i + n] = a.k + (slot + n) * a.D;
      tile.values[i + n] = a.v + (slot + n) * a.Dv;
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

// Fetches an item's keys and values into the second-level cache a few lines at a time, in the order
// in which they lie in memory: a block's heads follow one another, and longer runs are faster (2
// cores reading blocks in random order: 21.7 GB/s in runs of 4 KiB, 16.7 in runs of 2).
template <class T>
class Fetcher {
 public:
  Fetcher(const AttentionArgs<T>& a, const AttentionItem& item)
      : a_(a), item_(item), stop_key_(std::max(item.begin, item.oldest)) {
    next_piece();
  }

  // Four lines at a time; up to three past the end of a run are fetched in vain.
  void fetch(int64_t quads) {
    for (; quads > 0 && at_ < stop_; quads--) {
      for (int i = 0; i < 4; i++) __builtin_prefetch(at_ + 64 * i, 0, 2);
      at_ += 256;
      if (at_ >= stop_) next_run();
    }
  }

 private:
  // Keys that lie in one block and one tile.
  void next_piece() {
    key_ = stop_key_;
    if (key_ >= item_.end) {
      at_ = stop_ = nullptr;
      return;
    }
    const int64_t of_block = a_.block_size - key_ % a_.block_size, of_tile = TILE - key_ % TILE;
    stop_key_ = std::min({item_.end, key_ + of_block, key_ + of_tile});
    head_ = 0;
    values_ = false;
    set_run();
  }

  void next_run() {
    if (++head_ == item_.heads) {
      if (values_) return next_piece();
      head_ = 0;
      values_ = true;
    }
    set_run();
  }

  void set_run() {
    const int64_t block = item_.blocks[key_ / a_.block_size] * a_.Hkv + item_.head + head_;
    const int64_t width = values_ ? a_.Dv : a_.D;
    const T* run = (values_ ? a_.v : a_.k) + (block * a_.block_size + key_ % a_.block_size) * width;
    at_ = reinterpret_cast<const char*>(run);
    stop_ = reinterpret_cast<const char*>(run + (stop_key_ - key_) * width);
  }

  const AttentionArgs<T>& a_;
  const AttentionItem& item_;
  int64_t key_ = 0, stop_key_, head_ = 0;
  bool values_ = false;
  const char* at_ = nullptr;
  const char* stop_ = nullptr;
};

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

// One head's part of a tile of keys for its query rows.
template <class T>
struct HeadTile {
  const T* const* keys;  // rows of the item's first head
  const T* const* values;
  int64_t count;
  int64_t offset, value_offset;  // this head's, from the first head
  int64_t D, Dv;
  int64_t lines;  // cache lines of one key
};

// acc[m * stride + n] = lanes of q row m times key n.
template <int N, int M, class T>
inline void dot_keys(const T* const* keys, const T* const* q, int64_t D, vec* acc, int stride) {
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

// scores[row][key] = q · k for the keys of a tile, M query rows at a time. Fetches meanwhile, spread
// over the products: a burst of fetches would hold them up. DIM: the head size, or 0 for any (24 to
// 19 ns a key at 64).
template <int M, int DIM, class T>
inline void score_by(
    const HeadTile<T>& tile, const T* const* queries, int64_t rows, Fetcher<T>& fetcher,
    float (*scores)[TILE]) {
  constexpr int SLOTS = M == 3 ? 4 : M;
  constexpr int N = W / SLOTS, PASS = N < MAX_AHEAD ? N : MAX_AHEAD;
  const int64_t D = DIM > 0 ? DIM : tile.D;
  for (int64_t n = 0; n < tile.count; n += N) {
    if (n % 4 == 0) fetcher.fetch(tile.lines);
    const T* keys[N];
    for (int i = 0; i < N; i++)
      keys[i] = tile.keys[std::min(n + i, tile.count - 1)] + tile.offset;
    for (int64_t m = 0; m < rows; m += M) {
      vec acc[W] = {};
      for (int i = 0; i < N; i += PASS) dot_keys<PASS, M>(keys + i, queries + m, D, acc + i, N);
      float sums[W];
      store(sums, sum_lanes(acc));
      for (int64_t i = 0; i < std::min<int64_t>(M, rows - m); i++)
        std::memcpy(&scores[m + i][n], &sums[i * N], N * sizeof(float));
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
  vec top = splat(*maximum);
  for (int64_t i = 0; i < lanes; i += W) {
    vec score = load(scores + i) * a.scale;
    if (a.softcap > 0) score = cap(score, a.softcap);
    if (a.slopes) score += steps + bias.slope * float(i);
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

template <int DIM, class T>
inline void score(
    const HeadTile<T>& tile, const T* const* queries, int64_t rows, Fetcher<T>& fetcher,
    float (*scores)[TILE]) {
  switch (std::min<int64_t>(rows, 4)) {
    case 1: return score_by<1, DIM>(tile, queries, rows, fetcher, scores);
    case 2: return score_by<2, DIM>(tile, queries, rows, fetcher, scores);
    case 3: return score_by<3, DIM>(tile, queries, rows, fetcher, scores);
    default: return score_by<4, DIM>(tile, queries, rows, fetcher, scores);
  }
}

// part[row] = part[row] · shrink + Σ weight · value, for R rows and V vectors of the head.
// Fetches `lines` lines a key meanwhile.
template <int R, int V, class T>
inline void gather_block(
    const HeadTile<T>& tile, const float (*weights)[TILE], const float* shrink, float* part,
    int64_t d, int64_t live, Fetcher<T>& fetcher, int64_t lines) {
  const bool whole = live == V * W;
  vec acc[R][V];
  for (int i = 0; i < R; i++)
    for (int v = 0; v < V; v++) {
      const float* p = part + i * tile.Dv + d + v * W;
      acc[i][v] = (whole ? load(p) : load_first(p, live)) * shrink[i];
    }
  for (int64_t n = 0; n < tile.count; n++) {
    if (n % 4 == 0) fetcher.fetch(lines);
    vec value[V];
    for (int v = 0; v < V; v++) {
      const T* p = tile.values[n] + tile.value_offset + d + v * W;
      value[v] = whole ? load(p) : load_first(p, live);
    }
    for (int i = 0; i < R; i++)
      for (int v = 0; v < V; v++) acc[i][v] += splat(weights[i][n]) * value[v];
  }
  for (int i = 0; i < R; i++)
    for (int v = 0; v < V; v++) {
      float* p = part + i * tile.Dv + d + v * W;
      if (whole) store(p, acc[i][v]);
      else store_first(p, acc[i][v], live);
    }
}

template <int R, class T>
inline void gather_by(
    const HeadTile<T>& tile, const float (*weights)[TILE], const float* shrink, float* part,
    Fetcher<T>& fetcher) {
  constexpr int V = 4;
  constexpr int64_t LINES = std::max<int64_t>(1, V * W * int64_t(sizeof(T)) / 64);
  int64_t d = 0;
  for (; d + V * W <= tile.Dv; d += V * W)
    gather_block<R, V>(tile, weights, shrink, part, d, V * W, fetcher, LINES);
  for (; d < tile.Dv; d += W)
    gather_block<R, 1>(tile, weights, shrink, part, d, std::min(W, tile.Dv - d), fetcher, 1);
}

// Scores and weights of one head's tile for every row, and its share of the output.
template <class T>
inline void attend_tile(
    const AttentionArgs<T>& a, const AttentionItem& item, int64_t begin, const HeadTile<T>& tile,
    const T* const* queries, int64_t head, Fetcher<T>& fetcher) {
  alignas(64) float scores[MAX_ATTENTION_ROWS][TILE];
  float shrink[MAX_ATTENTION_ROWS];
  const int64_t rows = item.queries * a.group, first = head * rows;
  const int64_t lanes = (tile.count + W - 1) / W * W;
  if (a.D == 64) score<64>(tile, queries, rows, fetcher, scores);
  else if (a.D == 128) score<128>(tile, queries, rows, fetcher, scores);
  else score<0>(tile, queries, rows, fetcher, scores);
  for (int64_t i = 0; i < rows; i++) {
    const uint64_t seen = visible(item, i / a.group, a.window, begin);
    shrink[i] = weigh(
        a, scores[i], lanes, seen, bias(a, item, head, i, begin), item.maximum + first + i,
        item.sum + first + i);
  }
  for (int64_t i = 0; i < rows; i += 4) {
    const auto weights = scores + i;
    float* part = item.part + (first + i) * a.Dv;
    switch (std::min<int64_t>(rows - i, 4)) {
      case 1: gather_by<1>(tile, weights, shrink + i, part, fetcher); break;
      case 2: gather_by<2>(tile, weights, shrink + i, part, fetcher); break;
      case 3: gather_by<3>(tile, weights, shrink + i, part, fetcher); break;
      default: gather_by<4>(tile, weights, shrink + i, part, fetcher);
    }
  }
}

// The item's keys for its queries: maxima, sums and parts.
template <class T>
void attend(const AttentionArgs<T>& a, const AttentionItem& item) {
  const int64_t rows = item.queries * a.group;
  std::fill_n(item.maximum, item.heads * rows, -std::numeric_limits<float>::infinity());
  std::fill_n(item.sum, item.heads * rows, 0.0f);
  std::fill_n(item.part, item.heads * rows * a.Dv, 0.0f);
  const T* queries[MAX_ATTENTION_HEADS][MAX_ATTENTION_ROWS + 3];  // the last stands in past the end
  for (int64_t head = 0; head < item.heads; head++)
    for (int64_t i = 0; i < rows + 3; i++)
      queries[head][i] = query(a, item, head, std::min(i, rows - 1));
  const int64_t lines = (a.D * int64_t(sizeof(T)) + 63) / 64;
  const int64_t value_lines = (a.Dv * int64_t(sizeof(T)) + 63) / 64;
  Fetcher<T> fetcher(a, item);
  fetcher.fetch(
      std::min(TILE, item.end - item.begin) * item.heads * (lines + value_lines) / 4 + 1);
  Tile<T> tile;
  for (int64_t begin = item.begin; begin < item.end; begin += TILE) {
    find_tile(tile, a, item, begin);
    for (int64_t head = 0; head < item.heads; head++) {
      const int64_t slot = head * a.block_size;
      const HeadTile<T> own{
          tile.keys, tile.values, tile.count, slot * a.D, slot * a.Dv, a.D, a.Dv, lines};
      attend_tile(a, item, begin, own, queries[head], head, fetcher);
    }
  }
}
