// Arguments of the kernels, and the table of them that each instruction set fills. No torch here.
// Every kernel does one part of an operation on the calling thread; bindings.cpp shares the parts
// out. Pointers and strides are in elements.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

namespace quickchange {

struct bf16 {
  uint16_t bits;
};

inline float to_float(float value) { return value; }

inline float to_float(bf16 value) {
  const uint32_t bits = uint32_t(value.bits) << 16;
  float out;
  std::memcpy(&out, &bits, sizeof out);
  return out;
}

template <class T>
inline T from_float(float value);

template <>
inline float from_float<float>(float value) {
  return value;
}

// Round to nearest even; NaN stays NaN.
template <>
inline bf16 from_float<bf16>(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  if (value != value) return {0x7fc0};
  return {uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}

template <class T>
struct LinearArgs {
  const T* x;  // [rows, K]
  int64_t ldx, rows;
  const T* w;  // [N, K]
  int64_t ldw, N, K;
  const T* bias;  // [N] or null
  T* y;           // [rows, N]
};

constexpr int64_t PANEL_WIDTH = 48;  // columns of a panel; the last one's are a multiple of 16

template <class T>
constexpr int64_t PANEL_DEPTH = 4 / sizeof(T);  // neighbours along K that lie together

template <class T>
struct PanelArgs {
  const T* x;  // [rows, steps * PANEL_DEPTH]
  int64_t ldx, rows;
  const T* w;  // panels of [steps, width, PANEL_DEPTH], one behind another
  int64_t N, steps;
  const T* bias;  // [N] or null
  T* y;           // [rows, N]
};

constexpr int64_t INT8_GROUP = 32;  // weights of a row that share a scale

template <class X, class Y>
struct Int8Args {
  const X* x;  // [rows, K]
  int64_t ldx, rows;
  const int8_t* w;    // [N, K]
  const bf16* scale;  // [N, ceil(K / INT8_GROUP)]
  int64_t N, K;
  const Y* bias;  // [N] or null
  Y* y;           // [rows, N]
  void* room;     // the calling thread's scratch: 16 K floats, 64-byte aligned
};

constexpr int64_t QUANTIZED_GROUP = 32;   // values of a row that share a scale
constexpr int64_t PANEL_COLUMNS = 16;     // output columns whose weights lie together
constexpr int64_t ACTIVATION_ROWS = 16;   // rows of x that lie together once quantised
constexpr float LEAST_ACTIVATION = 0x1p-100f;  // a group whose largest is less is zero

template <class X>
struct ActivationArgs {
  const X* x;  // [rows, K]
  int64_t ldx, rows, K, groups;
  void* out;  // [ceil(rows / ACTIVATION_ROWS), groups] of the instruction set's own form
};

template <class Y>
struct QuantizedArgs {
  const void* x;  // as ActivationArgs' out
  int64_t rows;
  const uint8_t* w;     // [panels, groups, 8, PANEL_COLUMNS, 4], or 4 for 8 where there are minima
  const bf16* scale;    // [panels, groups, PANEL_COLUMNS]
  const bf16* minimum;  // the same, or null: int8
  int64_t N, groups;
  const Y* bias;  // [N] or null
  Y* y;           // [rows, N]
};

constexpr int64_t RANKS = 8;  // ranks of a page

// As in lowrank_tables.py.
enum class PageKind : int32_t { IDENTITY, RELU, GELU, GELU_TANH, SILU, TANH, GAIN };

// Some rows of one segment through one page of its adapter.
template <class T>
struct LowRankItem {
  PageKind kind;
  const T* a;  // [8, K], or [8, vocabulary]; a gain has none
  const T* b;  // [8, width]; a gain's [width]
  int64_t row, rows;
  int64_t column, width;
  const float* shift;  // [8]
  float scale;
  // Between the two halves: [rows, 8], act(A x + shift) · scale; a gain's [rows, width], y · scale
  float* h;

  int64_t h_row() const { return kind == PageKind::GAIN ? width : RANKS; }
};

template <class T, class X>
struct LowRankArgs {
  const X* x;          // [T, K], or null
  const int64_t* ids;  // [T] where x is null
  int64_t ldx, K;
  int64_t y_per_x;  // neighbouring rows of y that read one row of x; items of one row where it is not 1
  X* y;  // [T, N]
  int64_t ldy;
  const LowRankItem<T>* items;
  int64_t count;
};

constexpr int64_t KEYS_PER_TILE = 64;        // one step of the running softmax
constexpr int64_t KEYS_PER_SPLIT = 256;      // contexts are cut at its multiples, whatever the batch
constexpr int64_t MAX_ATTENTION_ROWS = 64;   // queries · group, of one item
constexpr int64_t MAX_ATTENTION_HEADS = 8;   // key heads of one item
constexpr int64_t MAX_PRODUCT_DIM = 256;     // head sizes in `attend_chunk`
constexpr int64_t MAX_CHUNK_ROWS = 192;      // queries · group of one of its items: keys are transposed once
constexpr int64_t CHUNK_BLOCK = 24;          // of its rows, whose scores are made and used together

template <class T>
struct AttentionArgs {
  const T* q;  // [T, Hq, D]
  int64_t q_row, q_head;
  const T* k;  // [num_blocks, Hkv, block_size, D]
  const T* v;  // [num_blocks, Hkv, block_size, Dv]
  int64_t block_size, Hkv, group, D, Dv;
  float scale, softcap;
  int64_t window;
  const float* sinks;   // [Hq] or null
  const float* slopes;  // [Hq] or null
  T* out;               // [T, Hq, Dv]
};

// Some queries of one sequence and some key heads over some of the keys.
struct AttentionItem {
  const int32_t* blocks;
  int64_t first_query;  // its row in q
  int64_t first_index;  // and among the sequence's queries
  int64_t queries;
  int64_t past;  // keys of the sequence before this step
  int64_t head, heads;  // first key head, and their number
  int64_t oldest, begin, end;  // the first key that any query sees; keys, from a tile's edge
  float* maximum;  // [heads, queries * group]
  float* sum;      // [heads, queries * group]
  float* part;     // [heads, queries * group, Dv], not yet divided by sum
};

template <class T>
struct NormArgs {
  const T* x;  // [rows, width]
  int64_t ldx, width;
  const T* weight;  // [width]
  float eps, offset;
  T* y;            // [rows, width]
  const T* delta;  // [rows, width], or null: nothing is added to x
  int64_t ldd;
  T* sum;  // [rows, width] x + delta, where there is a delta
};

template <class T>
struct GateArgs {
  const T* x;  // [rows, 2 width]
  int64_t ldx, width;
  T* y;  // [rows, width]
};

template <class T>
struct RotaryArgs {
  T* x;  // [rows, heads, at least width]
  int64_t row_stride, head_stride, heads;
  const T* cos;  // [rows, width]
  const T* sin;
  int64_t ldc, lds, width;
};

constexpr int64_t PAGE_ROWS = 16;  // outputs in a page of a draft head's matrix

// The items of one matrix.
template <class T, class X, class Y>
struct HeadArgs {
  const X* x;  // [rows, N], or null: neither residual nor activation
  int64_t ldx;
  const X* z;  // [rows, K]
  int64_t ldz, K;
  const T* arena;
  const int64_t* pages;  // [count_pages] each W [16, K], b [16]
  int64_t count_pages;
  const int32_t* items;  // [count, 2] (row of x and z, row of out)
  int64_t count;
  Y* out;  // [.., N]
  int64_t N;
};

// The rows of one segment.
template <class T, class X>
struct DraftArgs {
  const X* h;  // [rows, K]
  int64_t ldh, rows;
  const T* weight;  // [V, K]
  int64_t ldw, K;
  const T* bias;  // [V] or null
  const int32_t* vocabulary;  // [tokens] rows of weight
  int64_t tokens;
  float* out;  // [rows, width]
  int64_t width;
};

constexpr int MASS_BITS = 42;
constexpr float SMALLEST_TEMPERATURE = 1e-30f;
// 2^f = 1 + f (c0 + f (c1 + ...)), as in sample_plain.py
constexpr float EXP2[6] = {0.6931471824645996f,    0.24022650718688965f,  0.055503569543361664f,
                           0.009618056938052177f, 0.0013390866806730628f, 0.00015461447765119374f};

constexpr int64_t MAX_FILTERS = 16;

// A filter that no row uses is null.
struct SampleArgs {
  const float* logits;  // [rows, V], edited
  int64_t ld, V;
  const double* temperature;  // [rows], like those below
  const double* uniform;
  const double* filters[MAX_FILTERS];  // in the order of Filter in sample_impl.h
  int64_t* tokens;
  bool* sound;
};

constexpr int64_t SAMPLE_BLOCK = 256;  // tokens

// Scratch of one thread, for a vocabulary in blocks of SAMPLE_BLOCK.
struct SampleScratch {
  float* best;     // [blocks]
  int64_t* sums;   // [blocks]
  int64_t* found;  // [blocks * SAMPLE_BLOCK]
};

// One instruction set's versions. Ranges are of output columns (linear,
// up, heads, draft_logits), of panels (linear_panels), of items (down), or of rows.
class Kernels {
 public:
  virtual const char* name() const = 0;
  virtual void linear(const LinearArgs<float>&, int64_t begin, int64_t end) const = 0;
  virtual void linear(const LinearArgs<bf16>&, int64_t begin, int64_t end) const = 0;
  virtual void linear_panels(
      const PanelArgs<float>&, int64_t begin, int64_t end, int64_t next) const = 0;
  virtual void linear_panels(
      const PanelArgs<bf16>&, int64_t begin, int64_t end, int64_t next) const = 0;
  virtual void linear_int8(const Int8Args<float, float>&, int64_t begin, int64_t end) const = 0;
  virtual void linear_int8(const Int8Args<bf16, float>&, int64_t begin, int64_t end) const = 0;
  virtual void linear_int8(const Int8Args<bf16, bf16>&, int64_t begin, int64_t end) const = 0;
  virtual int64_t activation_group_bytes() const = 0;  // of ACTIVATION_ROWS rows of a group
  virtual void quantize_activations(
      const ActivationArgs<float>&, int64_t begin, int64_t end) const = 0;
  virtual void quantize_activations(
      const ActivationArgs<bf16>&, int64_t begin, int64_t end) const = 0;
  virtual void linear_quantized(const QuantizedArgs<float>&, int64_t begin, int64_t end) const = 0;
  virtual void linear_quantized(const QuantizedArgs<bf16>&, int64_t begin, int64_t end) const = 0;
  virtual bool multiplies_bf16() const = 0;  // bf16 operands are twice as fast as float32
  virtual void down(const LowRankArgs<float, float>&, int64_t begin, int64_t end) const = 0;
  virtual void down(const LowRankArgs<bf16, float>&, int64_t begin, int64_t end) const = 0;
  virtual void down(const LowRankArgs<bf16, bf16>&, int64_t begin, int64_t end) const = 0;
  virtual void up(const LowRankArgs<float, float>&, int64_t begin, int64_t end) const = 0;
  virtual void up(const LowRankArgs<bf16, float>&, int64_t begin, int64_t end) const = 0;
  virtual void up(const LowRankArgs<bf16, bf16>&, int64_t begin, int64_t end) const = 0;
  virtual void attend(const AttentionArgs<float>&, const AttentionItem&) const = 0;
  virtual void attend(const AttentionArgs<bf16>&, const AttentionItem&) const = 0;
  virtual void attend_chunk(const AttentionArgs<float>&, const AttentionItem&) const = 0;
  virtual void attend_chunk(const AttentionArgs<bf16>&, const AttentionItem&) const = 0;
  virtual void rms_norm(const NormArgs<float>&, int64_t begin, int64_t end) const = 0;
  virtual void rms_norm(const NormArgs<bf16>&, int64_t begin, int64_t end) const = 0;
  virtual void silu_mul(const GateArgs<float>&, int64_t begin, int64_t end) const = 0;
  virtual void silu_mul(const GateArgs<bf16>&, int64_t begin, int64_t end) const = 0;
  virtual void rotary(const RotaryArgs<float>&, int64_t begin, int64_t end) const = 0;
  virtual void rotary(const RotaryArgs<bf16>&, int64_t begin, int64_t end) const = 0;
  virtual void heads(const HeadArgs<float, float, float>&, int64_t begin, int64_t end) const = 0;
  virtual void heads(const HeadArgs<bf16, float, float>&, int64_t begin, int64_t end) const = 0;
  virtual void heads(const HeadArgs<bf16, bf16, float>&, int64_t begin, int64_t end) const = 0;
  virtual void heads(const HeadArgs<bf16, bf16, bf16>&, int64_t begin, int64_t end) const = 0;
  virtual void draft_logits(const DraftArgs<float, float>&, int64_t begin, int64_t end) const = 0;
  virtual void draft_logits(const DraftArgs<bf16, float>&, int64_t begin, int64_t end) const = 0;
  virtual void draft_logits(const DraftArgs<bf16, bf16>&, int64_t begin, int64_t end) const = 0;
  virtual void sample(
      const SampleArgs&, const SampleScratch&, int64_t begin, int64_t end) const = 0;

 protected:
  ~Kernels() = default;
};

const Kernels& avx512_bf16_kernels();
const Kernels& avx512_vnni_kernels();
const Kernels& avx512_kernels();
const Kernels& avx2_kernels();
const Kernels& baseline_kernels();

}  // namespace quickchange
