// draft_logits: some rows of x over some rows of an LM head. See draft_logits.py.

// Columns [begin, end) of one segment's rows; those past its tokens are -inf.
template <class T, class X>
void draft_logits(const DraftArgs<T, X>& a, int64_t begin, int64_t end) {
  const int64_t stop = std::min(end, a.tokens);
  for (int64_t n = begin; n < stop; n += W) {
    const T* w[W + MAX_AHEAD];
    float bias[W] = {};
    for (int i = 0; i < W + MAX_AHEAD; i++) {
      const int64_t token = a.vocabulary[std::min(n + i, a.tokens - 1)];
      w[i] = a.weight + token * a.ldw;
      if (a.bias && i < W) bias[i] = to_float(a.bias[token]);
    }
    for (int64_t m = 0; m < a.rows; m += TILE_ROWS)
      linear_columns(
          w, a.h + m * a.ldh, a.ldh, std::min(TILE_ROWS, a.rows - m), a.K, std::min(W, stop - n),
          a.bias ? bias : nullptr, a.out + m * a.width + n, a.width);
  }
  const int64_t first = std::max(begin, a.tokens);
  for (int64_t m = 0; m < a.rows && first < end; m++)
    std::fill(
        a.out + m * a.width + first, a.out + m * a.width + end,
        -std::numeric_limits<float>::infinity());
}
