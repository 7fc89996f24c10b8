// Loops that do nothing but multiply and add, in registers: how fast a core can, at each width of
// operands. Each returns the multiply-adds that it has done in `rounds` rounds. No torch here.
#pragma once

#include <cstdint>
#include <cstring>
#include <string>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace quickchange {

using PeakLoop = int64_t (*)(int64_t rounds);

// A value that the compiler can neither know nor drop: no product moves out of the loop.
template <class V>
inline __attribute__((always_inline)) V unknown(V value) {
#if defined(__x86_64__)
  asm volatile("" : "+v"(value));
#endif
  return value;
}

// Sums that wait for nothing but their own last value: more than a core's units times their latency.
#define QC_PEAK(name, target_set, V, CHAINS, PER_ADD, start, add)       \
  __attribute__((target(target_set))) inline int64_t name(int64_t rounds) { \
    V sums[CHAINS], a, b;                                               \
    std::memset(sums, 0, sizeof sums);                                  \
    std::memset(&a, 1, sizeof a);                                       \
    std::memset(&b, 1, sizeof b);                                       \
    a = unknown(a);                                                     \
    b = unknown(b);                                                     \
    for (int64_t i = 0; i < rounds; i++) {                              \
      _Pragma("GCC unroll 32") for (int c = 0; c < CHAINS; c++) {       \
        start;                                                          \
        sums[c] = add;                                                  \
      }                                                                 \
      _Pragma("GCC unroll 32") for (int c = 0; c < CHAINS; c++) sums[c] = unknown(sums[c]); \
    }                                                                   \
    return rounds * CHAINS * PER_ADD;                                   \
  }

#if defined(__x86_64__)
QC_PEAK(peak_float32_avx512, "avx512f", __m512, 24, 16, , _mm512_fmadd_ps(a, b, sums[c]))
QC_PEAK(peak_bfloat16_avx512, "avx512f,avx512bf16", __m512, 24, 32, ,
        _mm512_dpbf16_ps(sums[c], (__m512bh)a, (__m512bh)b))
QC_PEAK(peak_int8_avx512, "avx512f,avx512vnni", __m512i, 24, 64, , _mm512_dpbusd_epi32(sums[c], a, b))
QC_PEAK(peak_float32_avx2, "avx2,fma", __m256, 12, 8, , _mm256_fmadd_ps(a, b, sums[c]))
// pairs of bytes to 16 bits, pairs of these to 32: no VNNI
QC_PEAK(peak_int8_avx2, "avx2", __m256i, 12, 32, a = unknown(a),
        _mm256_add_epi32(sums[c], _mm256_madd_epi16(_mm256_maddubs_epi16(a, b), b)))
#endif

typedef float peak_vec __attribute__((vector_size(16)));

inline int64_t peak_float32_baseline(int64_t rounds) {
  constexpr int CHAINS = 8;
  peak_vec sums[CHAINS] = {}, a = unknown(peak_vec{}), b = unknown(peak_vec{});
  for (int64_t i = 0; i < rounds; i++)
    for (int c = 0; c < CHAINS; c++) sums[c] = unknown(sums[c] + a * b);
  return rounds * CHAINS * 4;
}

// The fastest loop for operands of a type within an instruction set of `Kernels`; null for a type
// that there is none for, whose operands become float32 first.
inline PeakLoop peak_loop(const std::string& type, const std::string& instruction_set) {
#if defined(__x86_64__)
  const bool avx512 = instruction_set.rfind("avx512", 0) == 0;
  if (type == "float32")
    return avx512 ? peak_float32_avx512
                  : instruction_set == "avx2" ? peak_float32_avx2 : peak_float32_baseline;
  if (type == "bfloat16" && instruction_set == "avx512_bf16") return peak_bfloat16_avx512;
  if (type == "int8" && avx512 && __builtin_cpu_supports("avx512vnni")) return peak_int8_avx512;
  if (type == "int8" && (avx512 || instruction_set == "avx2")) return peak_int8_avx2;
  return nullptr;
#else
  return type == "float32" ? peak_float32_baseline : nullptr;
#endif
}

// Reads `bytes` bytes in four streams, the way of weight rows; what it returns is only there so that
// they are read.
#define QC_READ(name, target_set)                                                        \
  __attribute__((target(target_set))) inline uint64_t name(const char* from, int64_t bytes) { \
    typedef uint64_t line __attribute__((vector_size(64), aligned(1), may_alias));       \
    constexpr int STREAMS = 4;                                                           \
    const int64_t stretch = bytes / STREAMS / 64 * 64;                                   \
    line all = {};                                                                       \
    for (int64_t i = 0; i < stretch; i += 64)                                            \
      for (int s = 0; s < STREAMS; s++)                                                  \
        all ^= *reinterpret_cast<const line*>(from + s * stretch + i);                   \
    uint64_t sum = 0;                                                                    \
    for (int i = 0; i < 8; i++) sum ^= all[i];                                           \
    return sum;                                                                          \
  }

#if defined(__x86_64__)
QC_READ(read_avx512, "avx512f")
QC_READ(read_avx2, "avx2")
#endif

inline uint64_t read_baseline(const char* from, int64_t bytes) {
  uint64_t sum = 0, value;
  for (int64_t i = 0; i + 8 <= bytes; i += 8) {
    std::memcpy(&value, from + i, 8);
    sum ^= value;
  }
  return sum;
}

using ReadLoop = uint64_t (*)(const char*, int64_t);

inline ReadLoop read_loop(const std::string& instruction_set) {
#if defined(__x86_64__)
  if (instruction_set.rfind("avx512", 0) == 0) return read_avx512;
  if (instruction_set == "avx2") return read_avx2;
#endif
  return read_baseline;
}

}  // namespace quickchange
