// linear_quantized: y = x Wᵀ + b over int8 or int4 weights in panels, x quantised on the way. See
// linear_quantized.py. Sums of a group are whole numbers, the same whatever the instruction set;
// groups are added in their order, so an element depends on its row, its column and K alone.

typedef uint32_t bits32_unaligned __attribute__((vector_size(QC_WIDTH * 4), aligned(4), may_alias));

constexpr int64_t STEP_VALUES = 4;  // values of a column that one instruction sums
constexpr int64_t STEPS = QUANTIZED_GROUP / STEP_VALUES;

// sum += four bytes of each column, 0 to 255, times four values of x.
#if defined(QC_VNNI)
using Activation = int8_t;
constexpr int ORDER[STEP_VALUES] = {0, 1, 2, 3};  // in which the four lie

struct ColumnBytes {
  bits32 bytes;
  explicit ColumnBytes(bits32 raw) : bytes(raw) {}
};

inline ints add_step(ints sum, const ColumnBytes& w, const Activation* x) {
  int32_t four;
  std::memcpy(&four, x, sizeof four);
  return reinterpret_cast<ints>(_mm512_dpbusd_epi32(
      reinterpret_cast<__m512i>(sum), reinterpret_cast<__m512i>(w.bytes), _mm512_set1_epi32(four)));
}
#elif defined(__x86_64__) && QC_WIDTH >= 8
// Pairs of 16 bits: bytes 0 and 2, then 1 and 3. Products of bytes in pairs would saturate.
using Activation = int16_t;
constexpr int ORDER[STEP_VALUES] = {0, 2, 1, 3};

struct ColumnBytes {
  bits32 even, odd;
  explicit ColumnBytes(bits32 raw) : even(raw & 0x00ff00ff), odd((raw >> 8) & 0x00ff00ff) {}
};

inline ints add_pairs(ints sum, bits32 w, const Activation* x) {
  int32_t two;
  std::memcpy(&two, x, sizeof two);
#if QC_WIDTH == 16
  const __m512i products = _mm512_madd_epi16(reinterpret_cast<__m512i>(w), _mm512_set1_epi32(two));
#else
  const __m256i products = _mm256_madd_epi16(reinterpret_cast<__m256i>(w), _mm256_set1_epi32(two));
#endif
  return sum + reinterpret_cast<ints>(products);
}

inline ints add_step(ints sum, const ColumnBytes& w, const Activation* x) {
  return add_pairs(add_pairs(sum, w.even, x), w.odd, x + 2);
}
#else
using Activation = int16_t;
constexpr int ORDER[STEP_VALUES] = {0, 1, 2, 3};

struct ColumnBytes {
  bits32 raw;
  explicit ColumnBytes(bits32 value) : raw(value) {}
};

inline ints add_step(ints sum, const ColumnBytes& w, const Activation* x) {
  for (int i = 0; i < STEP_VALUES; i++)
    sum += reinterpret_cast<ints>((w.raw >> (8 * i)) & 0xff) * int32_t(x[i]);
  return sum;
}
#endif

// Up to ACTIVATION_ROWS rows of one group of x.
struct alignas(64) ActivationGroup {
  Activation values[ACTIVATION_ROWS][QUANTIZED_GROUP];  // -127 to 127, each step in ORDER
  float scale[ACTIVATION_ROWS];
  int32_t offset[ACTIVATION_ROWS];  // what int8 weights, kept 128 higher, make too much
  float sum[ACTIVATION_ROWS];       // of the values, times their scale
};

// Bits of the largest magnitude; infinity and NaN are above all numbers.
inline uint32_t largest_magnitude(const float* values) {
  bits32 most = {};
  for (int64_t i = 0; i < QUANTIZED_GROUP; i += W) {
    const bits32 bits = reinterpret_cast<bits32>(load(values + i)) & 0x7fffffff;
    const bits32 above = reinterpret_cast<bits32>(bits > most);
    most = (bits & above) | (most & ~above);
  }
  uint32_t largest = 0;
  for (int64_t i = 0; i < W; i++) largest = std::max<uint32_t>(largest, most[i]);
  return largest;
}

// `count` values of a row of x, zeros behind them. A value that is no number makes the scale NaN,
// and with it all that the row gives.
template <class X>
inline void quantize_group(const X* x, int64_t count, int64_t row, ActivationGroup& out) {
  alignas(64) float values[QUANTIZED_GROUP] = {};
  if (count == QUANTIZED_GROUP) {
    for (int64_t i = 0; i < count; i += W) store(values + i, load(x + i));
  } else {
    for (int64_t i = 0; i < count; i++) values[i] = to_float(x[i]);
  }
  const uint32_t bits = largest_magnitude(values);
  float largest, scale = 0, steps = 0;
  std::memcpy(&largest, &bits, sizeof largest);
  if (bits >= 0x7f800000) {
    scale = std::numeric_limits<float>::quiet_NaN();
    std::memset(values, 0, sizeof values);
  } else if (largest >= LEAST_ACTIVATION) {
    scale = largest / 127.0f;
    steps = 127.0f / largest;
  }
  alignas(64) int32_t whole[QUANTIZED_GROUP];
  for (int64_t i = 0; i < QUANTIZED_GROUP; i += W) {
    // the product's own rounding, so that the integer is torch's
    const vec shifted = rounded(load(values + i) * steps) + 12582912.0f;
    const ints integers = reinterpret_cast<ints>(shifted) - 0x4B400000;
    std::memcpy(whole + i, &integers, sizeof integers);
  }
  int32_t sum = 0;
  for (int64_t i = 0; i < QUANTIZED_GROUP; i++) sum += whole[i];
  for (int64_t i = 0; i < QUANTIZED_GROUP; i += STEP_VALUES)
    for (int64_t j = 0; j < STEP_VALUES; j++)
      out.values[row][i + j] = Activation(whole[i + ORDER[j]]);
  out.scale[row] = scale;
  out.offset[row] = -128 * sum;
  out.sum[row] = scale * float(sum);
}

// Tiles [begin, end) of ACTIVATION_ROWS rows.
template <class X>
void quantize_activations(const ActivationArgs<X>& a, int64_t begin, int64_t end) {
  ActivationGroup* const groups = static_cast<ActivationGroup*>(a.out);
  for (int64_t tile = begin; tile < end; tile++) {
    const int64_t first = tile * ACTIVATION_ROWS;
    for (int64_t row = 0; row < std::min(ACTIVATION_ROWS, a.rows - first); row++)
      for (int64_t g = 0; g < a.groups; g++) {
        const int64_t k = g * QUANTIZED_GROUP;
        quantize_group(
            a.x + (first + row) * a.ldx + k, std::min(QUANTIZED_GROUP, a.K - k), row,
            groups[tile * a.groups + g]);
      }
  }
}

// W columns of a panel, from its first group on.
struct PanelPart {
  const uint8_t* w;
  const bf16* scale;
  const bf16* minimum;  // null for int8
};

constexpr int64_t AHEAD = 4096;  // bytes of weights fetched ahead: 16 rows in 0.6 of the time

// sums[m] = M rows of a tile, from `row` on, times W columns.
template <int M, bool NIBBLES>
inline void quantized_product(
    PanelPart p, const ActivationGroup* x, int64_t row, int64_t groups, float (*sums)[W]) {
  constexpr int64_t LINE = PANEL_COLUMNS * STEP_VALUES;  // bytes of a step of all columns
  vec total[M] = {};
  for (int64_t g = 0; g < groups; g++) {
    const Activation(*values)[QUANTIZED_GROUP] = x[g].values + row;
    ints part[M];
#pragma GCC unroll 16
    for (int m = 0; m < M; m++) part[m] = NIBBLES ? ints{} : ints{} + x[g].offset[row + m];
#pragma GCC unroll 8
    for (int64_t step = 0; step < (NIBBLES ? STEPS / 2 : STEPS); step++) {
      const bits32 raw = *reinterpret_cast<const bits32_unaligned*>(p.w + step * LINE);
      __builtin_prefetch(p.w + step * LINE + AHEAD, 0, 3);
      const ColumnBytes low(NIBBLES ? raw & 0x0f0f0f0f : raw);
#pragma GCC unroll 16
      for (int m = 0; m < M; m++)
        part[m] = add_step(part[m], low, values[m] + step * STEP_VALUES);
      if (!NIBBLES) continue;
      const ColumnBytes high((raw >> 4) & 0x0f0f0f0f);
#pragma GCC unroll 16
      for (int m = 0; m < M; m++)
        part[m] = add_step(part[m], high, values[m] + (STEPS / 2 + step) * STEP_VALUES);
    }
    const vec scale = load(p.scale);
#pragma GCC unroll 16
    for (int m = 0; m < M; m++)
      total[m] += __builtin_convertvector(part[m], vec) * (scale * x[g].scale[row + m]);
    if (NIBBLES) {
      const vec minimum = load(p.minimum);
#pragma GCC unroll 16
      for (int m = 0; m < M; m++) total[m] += minimum * x[g].sum[row + m];
      p.minimum += PANEL_COLUMNS;
    }
    p.w += (NIBBLES ? STEPS / 2 : STEPS) * LINE;
    p.scale += PANEL_COLUMNS;
  }
#pragma GCC unroll 16
  for (int m = 0; m < M; m++) store(sums[m], total[m]);
}

constexpr int64_t MOST_ROWS = W == 16 ? 16 : 4;  // whose sums fit the registers

// `rows` rows of a tile, or a few more, which the tile has room for.
template <bool NIBBLES>
inline void quantized_rows(
    const PanelPart& p, const ActivationGroup* x, int64_t rows, int64_t groups, float (*sums)[W]) {
  for (int64_t row = 0; row < rows; row += MOST_ROWS) {
    const int64_t left = rows - row;
    if (left == 1) quantized_product<1, NIBBLES>(p, x, row, groups, sums + row);
    else if (left == 2) quantized_product<2, NIBBLES>(p, x, row, groups, sums + row);
    else if (left <= 4 || W < 16) quantized_product<4, NIBBLES>(p, x, row, groups, sums + row);
    else if (left <= 8) quantized_product<8, NIBBLES>(p, x, row, groups, sums + row);
    else if (left <= 12) quantized_product<12, NIBBLES>(p, x, row, groups, sums + row);
    else quantized_product<16, NIBBLES>(p, x, row, groups, sums + row);
  }
}

// Output columns [begin, end), `begin` a multiple of PANEL_COLUMNS.
template <class Y>
void linear_quantized(const QuantizedArgs<Y>& a, int64_t begin, int64_t end) {
  constexpr int64_t PASS = 16;  // tiles that pass over the same weights: they stay in L2
  const ActivationGroup* const x = static_cast<const ActivationGroup*>(a.x);
  const int64_t tiles = (a.rows + ACTIVATION_ROWS - 1) / ACTIVATION_ROWS;
  const int64_t panel_bytes = a.groups * QUANTIZED_GROUP * PANEL_COLUMNS / (a.minimum ? 2 : 1);
  for (int64_t first = 0; first < tiles; first += PASS)
    for (int64_t n = begin; n < end; n += W) {
      const int64_t panel = n / PANEL_COLUMNS, column = n % PANEL_COLUMNS;
      const int64_t scales = panel * a.groups * PANEL_COLUMNS + column;
      const PanelPart part{
          a.w + panel * panel_bytes + column * STEP_VALUES, a.scale + scales,
          a.minimum ? a.minimum + scales : nullptr};
      for (int64_t tile = first; tile < std::min(first + PASS, tiles); tile++) {
        alignas(64) float sums[ACTIVATION_ROWS][W];
        const int64_t row = tile * ACTIVATION_ROWS, rows = std::min(ACTIVATION_ROWS, a.rows - row);
        if (a.minimum) quantized_rows<true>(part, x + tile * a.groups, rows, a.groups, sums);
        else quantized_rows<false>(part, x + tile * a.groups, rows, a.groups, sums);
        write_columns(
            sums, rows, std::min(W, end - n), a.bias ? a.bias + n : nullptr, a.y + row * a.N + n,
            a.N);
      }
    }
}
