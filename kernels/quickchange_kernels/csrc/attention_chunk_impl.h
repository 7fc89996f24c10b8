// Attention of a long chunk of queries: scores and outputs as blocked matrix products over tiles of
// keys, whose keys are transposed and whose values are spread to float32 once for all rows.

// Scratch of one item. Rows lie close together: with the widest head's stride a head of 64 would use
// a quarter of the first-level cache.
struct ChunkRoom {
  alignas(64) float q[MAX_CHUNK_ROWS * MAX_PRODUCT_DIM];    // [rows, D]
  alignas(64) float keys[MAX_PRODUCT_DIM * TILE];           // [D, TILE]
  alignas(64) float values[TILE * MAX_PRODUCT_DIM];         // [TILE, Dv]
  alignas(64) float scores[CHUNK_BLOCK * TILE];             // [CHUNK_BLOCK, TILE]
  alignas(64) float out[MAX_CHUNK_ROWS * MAX_PRODUCT_DIM];  // [rows, Dv]
  float maximum[MAX_CHUNK_ROWS], sum[MAX_CHUNK_ROWS];
};

// out[r] = out[r] · shrink[r] + Σ over k of left[r][k] · right[k], for R rows and V vectors. Without
// `shrink` the sum starts from zero.
template <int R, int V>
inline void product_block(
    const float* left, int64_t left_row, const float* right, int64_t right_row, int64_t K,
    const float* shrink, float* out, int64_t out_row) {
  vec acc[R][V] = {};
  if (shrink)
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
  const auto run = [&](auto height, int64_t r) {
    product_rows<decltype(height)::value>(
        left + r * left_row, left_row, right, right_row, K, shrink ? shrink + r : nullptr,
        out + r * out_row, out_row, columns);
  };
  int64_t r = 0;
  for (; r + 6 <= rows; r += 6) run(std::integral_constant<int, 6>(), r);
  for (; r + 3 <= rows; r += 3) run(std::integral_constant<int, 3>(), r);
  for (; r < rows; r++) run(std::integral_constant<int, 1>(), r);
}

template <class T>
inline void spread(const T* row, float* out, int64_t D, int64_t padded) {
  int64_t d = 0;
  for (; d + W <= D; d += W) store(out + d, load(row + d));
  if (d < padded) store(out + d, load_first(row + d, D - d));
}

// Lanes of the first, or the second, halves of a and b by turns.
#if QC_WIDTH == 16
#define QC_ZIP_FIRST 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define QC_ZIP_SECOND 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#elif QC_WIDTH == 8
#define QC_ZIP_FIRST 0, 8, 1, 9, 2, 10, 3, 11
#define QC_ZIP_SECOND 4, 12, 5, 13, 6, 14, 7, 15
#else
#define QC_ZIP_FIRST 0, 4, 1, 5
#define QC_ZIP_SECOND 2, 6, 3, 7
#endif

// Transposes W vectors of W lanes: log2(W) rounds, in each of which every lane's place doubles.
inline void transpose(vec* v) {
#pragma GCC unroll 4
  for (int round = 1; round < W; round *= 2) {
    vec from[W];
    for (int i = 0; i < W; i++) from[i] = v[i];
#pragma GCC unroll 8
    for (int i = 0; i < W / 2; i++) {
      v[2 * i] = __builtin_shufflevector(from[i], from[i + W / 2], QC_ZIP_FIRST);
      v[2 * i + 1] = __builtin_shufflevector(from[i], from[i + W / 2], QC_ZIP_SECOND);
    }
  }
}
#undef QC_ZIP_FIRST
#undef QC_ZIP_SECOND

// keys[d][n] = rows[n][d] for W rows.
template <class T>
inline void transpose_rows(const T* const* rows, int64_t D, float* keys) {
  for (int64_t d = 0; d < D; d += W) {
    vec block[W];
    for (int64_t n = 0; n < W; n++)
      block[n] = d + W <= D ? load(rows[n] + d) : load_first(rows[n] + d, D - d);
    transpose(block);
    for (int64_t i = 0; i < std::min(W, D - d); i++) store(keys + (d + i) * TILE, block[i]);
  }
}

inline int64_t padded(int64_t width) { return (width + W - 1) / W * W; }

// CHUNK_BLOCK rows at a time, whose scores stay in the first-level cache.
template <class T>
inline void chunk_tile(
    const AttentionArgs<T>& a, const AttentionItem& item, const Tile<T>& tile, ChunkRoom& room) {
  const int64_t rows = item.queries * a.group, lanes = padded(tile.count);
  const int64_t width = padded(a.D), value_width = padded(a.Dv);
  for (int64_t n = 0; n < lanes; n += W) transpose_rows(tile.keys + n, a.D, room.keys + n);
  for (int64_t n = 0; n < tile.count; n++)
    spread(tile.values[n], room.values + n * value_width, a.Dv, value_width);
  // Earlier queries see none of these keys.
  const int64_t unseeing = std::max<int64_t>(0, tile.begin - item.past - item.first_index);
  for (int64_t r = unseeing * a.group; r < rows; r += CHUNK_BLOCK) {
    const int64_t count = std::min(CHUNK_BLOCK, rows - r);
    float shrink[CHUNK_BLOCK];
    product(room.q + r * width, width, room.keys, TILE, a.D, nullptr, room.scores, TILE, count, lanes);
    for (int64_t i = 0; i < count; i++) {
      const uint64_t seen = visible(item, (r + i) / a.group, a.window, tile.begin);
      shrink[i] = weigh(
          a, room.scores + i * TILE, lanes, seen, bias(a, item, 0, r + i, tile.begin),
          room.maximum + r + i, room.sum + r + i);
    }
    product(room.scores, TILE, room.values, value_width, tile.count, shrink,
            room.out + r * value_width, value_width, count, value_width);
  }
}

// The output of the item's queries over all of its keys.
template <class T>
void attend_chunk(const AttentionArgs<T>& a, const AttentionItem& item) {
  static thread_local ChunkRoom room;
  const int64_t rows = item.queries * a.group, width = padded(a.D), value_width = padded(a.Dv);
  for (int64_t r = 0; r < rows; r++) {
    spread(query(a, item, 0, r), room.q + r * width, a.D, width);
    room.maximum[r] = -std::numeric_limits<float>::infinity();
    room.sum[r] = 0;
  }
  std::fill_n(room.out, rows * value_width, 0.0f);
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
    const float* from = room.out + r * value_width;
    int64_t d = 0;
    for (; d + W <= a.Dv; d += W) store(out + d, load(from + d) * factor);
    if (d < a.Dv) store_first(out + d, load(from + d) * factor, a.Dv - d);
  }
}
