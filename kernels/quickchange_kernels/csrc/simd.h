// Vectors of QC_WIDTH floats in the compilers' portable vector extension, with the operations that
// the kernels need. Included once per instruction set, inside that set's namespace and target pragma.
// Whatever the width, an element's sum over k runs lane by lane in steps of QC_WIDTH and ends in
// one tree, so that a result depends on the instruction set and the length alone.

typedef float vec __attribute__((vector_size(QC_WIDTH * 4)));
typedef float vec_unaligned __attribute__((vector_size(QC_WIDTH * 4), aligned(4), may_alias));
typedef int32_t ints __attribute__((vector_size(QC_WIDTH * 4)));
typedef uint32_t bits32 __attribute__((vector_size(QC_WIDTH * 4)));
typedef uint16_t bits16 __attribute__((vector_size(QC_WIDTH * 2)));
typedef uint16_t bits16_unaligned __attribute__((vector_size(QC_WIDTH * 2), aligned(2), may_alias));

constexpr int64_t W = QC_WIDTH;

inline vec load(const float* p) { return *reinterpret_cast<const vec_unaligned*>(p); }

// Left to __builtin_convertvector, GCC 12 widens 16 halves in seven instructions instead of one.
#if QC_WIDTH == 16
inline bits32 widen(const bits16_unaligned* p) {
  return reinterpret_cast<bits32>(
      _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
}
inline bits16 narrowed(bits32 v) {
  return reinterpret_cast<bits16>(_mm512_cvtepi32_epi16(reinterpret_cast<__m512i>(v)));
}
#elif QC_WIDTH == 8
inline bits32 widen(const bits16_unaligned* p) {
  return reinterpret_cast<bits32>(
      _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
inline bits16 narrowed(bits32 v) { return __builtin_convertvector(v, bits16); }
#else
inline bits32 widen(const bits16_unaligned* p) { return __builtin_convertvector(*p, bits32); }
inline bits16 narrowed(bits32 v) { return __builtin_convertvector(v, bits16); }
#endif

inline vec load(const bf16* p) {
  return reinterpret_cast<vec>(widen(reinterpret_cast<const bits16_unaligned*>(p)) << 16);
}

// The first n of W elements; zero in the other lanes.
template <class T>
inline vec load_first(const T* p, int64_t n) {
  T buffer[W] = {};
  std::memcpy(buffer, p, n * sizeof(T));
  return load(buffer);
}

inline void store(float* p, vec v) { *reinterpret_cast<vec_unaligned*>(p) = v; }

// Round to nearest even; NaN stays NaN.
inline void store(bf16* p, vec v) {
  const bits32 raw = reinterpret_cast<bits32>(v);
  const bits32 rounded = (raw + 0x7fff + ((raw >> 16) & 1)) >> 16;
  const bits32 nan = reinterpret_cast<bits32>(v != v);
  const bits32 chosen = (rounded & ~nan) | (0x7fc0 & nan);
  *reinterpret_cast<bits16_unaligned*>(p) = narrowed(chosen);
}

template <class T>
inline void store_first(T* p, vec v, int64_t n) {
  T buffer[W];
  store(buffer, v);
  std::memcpy(p, buffer, n * sizeof(T));
}

inline vec splat(float value) { return value - vec{}; }

// Keeps the compiler from fusing a product with the sum that follows it.
inline vec rounded(vec v) {
#if defined(__x86_64__)
  asm("" : "+v"(v));
#elif defined(__aarch64__)
  asm("" : "+w"(v));
#else
  asm("" : "+m"(v));
#endif
  return v;
}

inline vec choose(bits32 mask, vec yes, vec no) {
  const bits32 kept = reinterpret_cast<bits32>(yes) & mask;
  return reinterpret_cast<vec>(kept | (reinterpret_cast<bits32>(no) & ~mask));
}

// b where either is NaN.
inline vec highest_of(vec a, vec b) {
#if QC_WIDTH == 16
  return reinterpret_cast<vec>(_mm512_max_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b)));
#elif QC_WIDTH == 8
  return reinterpret_cast<vec>(_mm256_max_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b)));
#else
  return choose(reinterpret_cast<bits32>(a > b), a, b);
#endif
}

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

// One value of all lanes: halves are joined until one lane is left.
#if QC_WIDTH == 16
#define QC_JOIN_LANES(v, join)                                                                    \
  v = join(v, __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7)); \
  v = join(v, __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11)); \
  v = join(v, __builtin_shufflevector(v, v, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13)); \
  v = join(v, __builtin_shufflevector(v, v, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14));
#elif QC_WIDTH == 8
#define QC_JOIN_LANES(v, join)                                             \
  v = join(v, __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3));       \
  v = join(v, __builtin_shufflevector(v, v, 2, 3, 0, 1, 6, 7, 4, 5));       \
  v = join(v, __builtin_shufflevector(v, v, 1, 0, 3, 2, 5, 4, 7, 6));
#else
#define QC_JOIN_LANES(v, join)                         \
  v = join(v, __builtin_shufflevector(v, v, 2, 3, 0, 1)); \
  v = join(v, __builtin_shufflevector(v, v, 1, 0, 3, 2));
#endif

inline vec total_of(vec a, vec b) { return a + b; }

inline float highest_lane(vec v) {
  QC_JOIN_LANES(v, highest_of)
  return v[0];
}

inline float sum_of_lanes(vec v) {
  QC_JOIN_LANES(v, total_of)
  return v[0];
}
#undef QC_JOIN_LANES

// Sums the W lanes of each of W vectors: lane i of the result is the sum of v[i]. log2(W) rounds;
// each round adds the halves of every vector and packs two vectors in one. Clobbers v.
#if QC_WIDTH == 16
[[gnu::always_inline]] inline vec sum_lanes(vec* v) {
  for (int i = 0; i < 8; i++)
    v[i] = __builtin_shufflevector(v[i], v[i + 8], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
           __builtin_shufflevector(v[i], v[i + 8], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
  for (int i = 0; i < 4; i++)
    v[i] = __builtin_shufflevector(v[i], v[i + 4], 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27) +
           __builtin_shufflevector(v[i], v[i + 4], 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31);
  for (int i = 0; i < 2; i++)
    v[i] = __builtin_shufflevector(v[i], v[i + 2], 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
           __builtin_shufflevector(v[i], v[i + 2], 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
  return __builtin_shufflevector(v[0], v[1], 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30) +
         __builtin_shufflevector(v[0], v[1], 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31);
}
#elif QC_WIDTH == 8
[[gnu::always_inline]] inline vec sum_lanes(vec* v) {
  for (int i = 0; i < 4; i++)
    v[i] = __builtin_shufflevector(v[i], v[i + 4], 0, 1, 2, 3, 8, 9, 10, 11) +
           __builtin_shufflevector(v[i], v[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
  for (int i = 0; i < 2; i++)
    v[i] = __builtin_shufflevector(v[i], v[i + 2], 0, 1, 8, 9, 4, 5, 12, 13) +
           __builtin_shufflevector(v[i], v[i + 2], 2, 3, 10, 11, 6, 7, 14, 15);
  return __builtin_shufflevector(v[0], v[1], 0, 8, 2, 10, 4, 12, 6, 14) +
         __builtin_shufflevector(v[0], v[1], 1, 9, 3, 11, 5, 13, 7, 15);
}
#else
[[gnu::always_inline]] inline vec sum_lanes(vec* v) {
  for (int i = 0; i < 2; i++)
    v[i] = __builtin_shufflevector(v[i], v[i + 2], 0, 1, 4, 5) +
           __builtin_shufflevector(v[i], v[i + 2], 2, 3, 6, 7);
  return __builtin_shufflevector(v[0], v[1], 0, 4, 2, 6) +
         __builtin_shufflevector(v[0], v[1], 1, 5, 3, 7);
}
#endif
