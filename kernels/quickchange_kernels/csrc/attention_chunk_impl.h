// Attention of a long chunk of queries: scores and outputs as blocked matrix products over tiles of
// keys, whose keys are transposed and whose values are spread to float32 once for all rows.

// Scratch of one item. Heads are padded to whole vectors.
struct ChunkRoom {
  alignas(64) float q[MAX_ATTENTION_ROWS][MAX_PRODUCT_DIM];
  alignas(64) float keys[MAX_PRODUCT_DIM][TILE];  // transposed
  alignas(64) float values[TILE][MAX_PRODUCT_DIM];
  alignas(64) float scores[MAX_ATTENTION_ROWS][TILE];
  alignas(64) float out[MAX_ATTENTION_ROWS][MAX_PRODUCT_DIM];
  float maximum[MAX_ATTENTION_ROWS], sum[MAX_ATTENTION_ROWS], shrink[MAX_ATTENTION_ROWS];
};

// out[r] = out[r] · shrink[r] + Σ over k of left[r][k] · right[k], for R rows and V vectors.
template <int R, int V>
inline void product_block(
    const float* left, int64_t left_row, const float* right, int64_t right_row, int64_t K,
    const float* shrink, float* out, int64_t out_row) {
  vec acc[R][V];
  for (int r = 0; r < R; r++)
    for (int v = 0; v < V; v++) acc[r][v] = load(out + r * out_row + v * W) * shrink[r];
  for (int64_t k = 0; k < K; k++) {
    vec row[V];
    for (int v = 0; v < V; v++) row[v] = load(right + k * right_row + v * W);
    for (int r = 0; r < R; r++) {
      const vec factor = splat(left[r * left_row + k]);
      for (int v = 0; v < V; v++) acc[r][v] += factor * row[v];
    }
  }
  for (int r = 0; r < R; r++)
    for (int v = 0; v < V; v++) store(out + r * out_row + v * W, acc[r][v]);
}

template <int R>
inline void product_rows(
    const float* left, int64_t left_row, const float* right, int64_t right_row, int64_t K,
    const float* shrink, float* out, int64_t out_row, int64_t columns) {
  constexpr int V = W == 16 ? 4 : 2;  // R · V sums and V factors fit the registers
  int64_t n = 0;
  for (; n + V * W <= columns; n += V * W)
    product_block<R, V>(left, left_row, right + n, right_row, K, shrink, out + n, out_row);
  for (; n < columns; n += W)
    product_block<R, 1>(left, left_row, right + n, right_row, K, shrink, out + n, out_row);
}

// The whole product; `columns` is a multiple of W.
inline void product(
    const float* left, int64_t left_row, const float* right, int64_t right_row, int64_t K,
    const float* shrink, float* out, int64_t out_row, int64_t rows, int64_t columns) {
  constexpr int R = 6;
  int64_t r = 0;
  for (; r + R <= rows; r += R)
    product_rows<R>(left + r * left_row, left_row, right, right_row, K, shrink + r,
                    out + r * out_row, out_row, columns);
  for (; r < rows; r++)
    product_rows<1>(left + r * left_row, left_row, right, right_row, K, shrink + r,
                    out + r * out_row, out_row, columns);
}

template <class T>
inline void spread(const T* row, float* out, int64_t D, int64_t padded) {
  int64_t d = 0;
  for (; d + W <= D; d += W) store(out + d, load(row + d));
  if (d < padded) store(out + d, load_first(row + d, D - d));
}

// keys[d][n] = rows[n][d] for W rows.
template <class T>
inline void transpose_rows(const T* const* rows, int64_t D, float* keys) {
  for (int64_t d = 0; d < D; d += W) {
    alignas(64) float block[W][W];
    for (int64_t n = 0; n < W; n++)
      store(block[n], d + W <= D ? load(rows[n] + d) : load_first(rows[n] + d, D - d));
    for (int64_t i = 0; i < std::min(W, D - d); i++) {
      vec column;
      for (int64_t n = 0; n < W; n++) column[n] = block[n][i];
      store(keys + (d + i) * TILE, column);
    }
  }
}

template <class T>
inline void chunk_tile(
    const AttentionArgs<T>& a, const AttentionItem& item, const Tile<T>& tile, ChunkRoom& room) {
  const int64_t rows = item.queries * a.group, padded = (a.Dv + W - 1) / W * W;
  const int64_t lanes = (tile.count + W - 1) / W * W;
  for (int64_t n = 0; n < lanes; n += W) transpose_rows(tile.keys + n, a.D, &room.keys[0][n]);
  for (int64_t n = 0; n < tile.count; n++) spread(tile.values[n], room.values[n], a.Dv, padded);
  std::fill_n(room.shrink, rows, 0.0f);
  for (int64_t r = 0; r < rows; r++) std::fill_n(room.scores[r], lanes, 0.0f);
  product(room.q[0], MAX_PRODUCT_DIM, room.keys[0], TILE, a.D, room.shrink, room.scores[0], TILE,
          rows, lanes);
  for (int64_t r = 0; r < rows; r++) {
    const uint64_t seen = visible(item, r / a.group, a.window, tile.begin);
    room.shrink[r] = weigh(
        a, room.scores[r], lanes, seen, bias(a, item, 0, r, tile.begin), room.maximum + r,
        room.sum + r);
  }
  product(room.scores[0], TILE, room.values[0], MAX_PRODUCT_DIM, tile.count, room.shrink,
          room.out[0], MAX_PRODUCT_DIM, rows, padded);
}

// The output of the item's queries over all of its keys.
template <class T>
void attend_chunk(const AttentionArgs<T>& a, const AttentionItem& item) {
  static thread_local ChunkRoom room;
  const int64_t rows = item.queries * a.group;
  for (int64_t r = 0; r < rows; r++) {
    spread(query(a, item, 0, r), room.q[r], a.D, (a.D + W - 1) / W * W);
    std::fill_n(room.out[r], (a.Dv + W - 1) / W * W, 0.0f);
    room.maximum[r] = -std::numeric_limits<float>::infinity();
    room.sum[r] = 0;
  }
  Tile<T> tile;
  for (int64_t begin = item.begin; begin < item.end; begin += TILE) {
    find_tile(tile, a, item, begin);
    chunk_tile(a, item, tile, room);
  }
  for (int64_t r = 0; r < rows; r++) {
    const int64_t head = item.head * a.group + r % a.group;
    T* out = a.out + ((item.first_query + r / a.group) * a.Hkv * a.group + head) * a.Dv;
    float shrink = 1.0f, sum = room.sum[r];
    if (a.sinks) {
      const float highest = std::max(room.maximum[r], a.sinks[head]);
      shrink = std::exp(room.maximum[r] - highest);
      sum = sum * shrink + std::exp(a.sinks[head] - highest);
    }
    const vec factor = splat(shrink / sum);
    int64_t d = 0;
    for (; d + W <= a.Dv; d += W) store(out + d, load(room.out[r] + d) * factor);
    if (d < a.Dv) store_first(out + d, load(room.out[r] + d) * factor, a.Dv - d);
  }
}
