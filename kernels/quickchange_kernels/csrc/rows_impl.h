// rms_norm, add_rms_norm, silu_mul and rotary_: one pass over each row. See rms_norm.py, silu_mul.py
// and rotary.py.

template <class T>
inline vec load_up_to(const T* p, int64_t n) {
  return n == W ? load(p) : load_first(p, n);
}

template <class T>
inline void store_up_to(T* p, vec v, int64_t n) {
  if (n == W) store(p, v);
  else store_first(p, v, n);
}

// sum = x + delta over one row; returns the row to go on with.
template <class T>
inline const T* add_rows(const NormArgs<T>& a, int64_t row) {
  const T* x = a.x + row * a.ldx;
  if (a.delta == nullptr) return x;
  const T* delta = a.delta + row * a.ldd;
  T* sum = a.sum + row * a.width;
  for (int64_t i = 0; i < a.width; i += W) {
    const int64_t n = std::min(W, a.width - i);
    store_up_to(sum + i, load_up_to(x + i, n) + load_up_to(delta + i, n), n);
  }
  return sum;
}

template <class T>
void rms_norm(const NormArgs<T>& a, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; row++) {
    const T* x = add_rows(a, row);
    vec squares{};
    for (int64_t i = 0; i < a.width; i += W) {
      const vec value = load_up_to(x + i, std::min(W, a.width - i));
      squares += value * value;
    }
    float sum = 0;
    for (int i = 0; i < W; i++) sum += squares[i];
    const float factor = 1.0f / std::sqrt(sum / float(a.width) + a.eps);
    for (int64_t i = 0; i < a.width; i += W) {
      const int64_t n = std::min(W, a.width - i);
      const vec gain = load_up_to(a.weight + i, n) + a.offset;
      store_up_to(a.y + row * a.width + i, load_up_to(x + i, n) * factor * gain, n);
    }
  }
}

template <class T>
void silu_mul(const GateArgs<T>& a, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; row++) {
    const T* gate = a.x + row * a.ldx;
    for (int64_t i = 0; i < a.width; i += W) {
      const int64_t n = std::min(W, a.width - i);
      const vec g = load_up_to(gate + i, n);
      const vec e = exp_negative(-highest_of(g, -g));
      const vec numerator = choose(reinterpret_cast<bits32>(g > 0.0f), splat(1.0f), e);
      const vec up = load_up_to(gate + a.width + i, n);
      store_up_to(a.y + row * a.width + i, g * (numerator / (1.0f + e)) * up, n);
    }
  }
}

template <class T>
void rotary(const RotaryArgs<T>& a, int64_t begin, int64_t end) {
  const int64_t half = a.width / 2;
  for (int64_t row = begin; row < end; row++) {
    const T* cos = a.cos + row * a.ldc;
    const T* sin = a.sin + row * a.lds;
    for (int64_t head = 0; head < a.heads; head++) {
      T* x = a.x + row * a.row_stride + head * a.head_stride;
      for (int64_t i = 0; i < half; i += W) {
        const int64_t n = std::min(W, half - i);
        const vec first = load_up_to(x + i, n), second = load_up_to(x + half + i, n);
        const vec c1 = load_up_to(cos + i, n), c2 = load_up_to(cos + half + i, n);
        const vec s1 = load_up_to(sin + i, n), s2 = load_up_to(sin + half + i, n);
        store_up_to(x + i, first * c1 - second * s1, n);
        store_up_to(x + half + i, second * c2 + first * s2, n);
      }
    }
  }
}
