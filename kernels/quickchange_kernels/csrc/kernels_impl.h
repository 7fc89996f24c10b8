// One instruction set's kernels. The including file sets QC_WIDTH (floats in a vector) and QC_ISA
// (the namespace), includes kernels.h, and only then turns the instruction set on.

namespace quickchange {
namespace QC_ISA {
#include "simd.h"
#include "dot_impl.h"
#include "linear_impl.h"
#include "linear_panels_impl.h"
#include "linear_int8_impl.h"
#include "quantized_impl.h"
#include "lowrank_impl.h"
#include "attention_impl.h"
#include "attention_chunk_impl.h"
#include "rows_impl.h"
#include "sample_impl.h"
#include "turbo_heads_impl.h"
#include "draft_logits_impl.h"

#define QC_STRING(text) #text
#define QC_NAME(text) QC_STRING(text)

class Versions final : public Kernels {
 public:
  const char* name() const override { return QC_NAME(QC_ISA); }
  void linear(const LinearArgs<float>& a, int64_t begin, int64_t end) const override {
    QC_ISA::linear(a, begin, end);
  }
  void linear(const LinearArgs<bf16>& a, int64_t begin, int64_t end) const override {
    QC_ISA::linear(a, begin, end);
  }
  void linear_panels(
      const PanelArgs<float>& a, int64_t begin, int64_t end, int64_t next) const override {
    QC_ISA::linear_panels(a, begin, end, next);
  }
  void linear_panels(
      const PanelArgs<bf16>& a, int64_t begin, int64_t end, int64_t next) const override {
    QC_ISA::linear_panels(a, begin, end, next);
  }
  void linear_int8(const Int8Args<float, float>& a, int64_t begin, int64_t end) const override {
    QC_ISA::linear_int8(a, begin, end);
  }
  void linear_int8(const Int8Args<bf16, float>& a, int64_t begin, int64_t end) const override {
    QC_ISA::linear_int8(a, begin, end);
  }
  void linear_int8(const Int8Args<bf16, bf16>& a, int64_t begin, int64_t end) const override {
    QC_ISA::linear_int8(a, begin, end);
  }
  int64_t activation_group_bytes() const override { return sizeof(ActivationGroup); }
  void quantize_activations(
      const ActivationArgs<float>& a, int64_t begin, int64_t end) const override {
    QC_ISA::quantize_activations(a, begin, end);
  }
  void quantize_activations(
      const ActivationArgs<bf16>& a, int64_t begin, int64_t end) const override {
    QC_ISA::quantize_activations(a, begin, end);
  }
  void linear_quantized(
      const QuantizedArgs<float>& a, int64_t begin, int64_t end) const override {
    QC_ISA::linear_quantized(a, begin, end);
  }
  void linear_quantized(const QuantizedArgs<bf16>& a, int64_t begin, int64_t end) const override {
    QC_ISA::linear_quantized(a, begin, end);
  }
  bool multiplies_bf16() const override {
#ifdef QC_BF16_DOT
    return true;
#else
    return false;
#endif
  }
  void down(const LowRankArgs<float, float>& a, int64_t begin, int64_t end) const override {
    lowrank_down(a, begin, end);
  }
  void down(const LowRankArgs<bf16, float>& a, int64_t begin, int64_t end) const override {
    lowrank_down(a, begin, end);
  }
  void down(const LowRankArgs<bf16, bf16>& a, int64_t begin, int64_t end) const override {
    lowrank_down(a, begin, end);
  }
  void up(const LowRankArgs<float, float>& a, int64_t begin, int64_t end) const override {
    lowrank_up(a, begin, end);
  }
  void up(const LowRankArgs<bf16, float>& a, int64_t begin, int64_t end) const override {
    lowrank_up(a, begin, end);
  }
  void up(const LowRankArgs<bf16, bf16>& a, int64_t begin, int64_t end) const override {
    lowrank_up(a, begin, end);
  }
  void attend(const AttentionArgs<float>& a, const AttentionItem& item) const override {
    QC_ISA::attend(a, item);
  }
  void attend(const AttentionArgs<bf16>& a, const AttentionItem& item) const override {
    QC_ISA::attend(a, item);
  }
  void attend_chunk(const AttentionArgs<float>& a, const AttentionItem& item) const override {
    QC_ISA::attend_chunk(a, item);
  }
  void attend_chunk(const AttentionArgs<bf16>& a, const AttentionItem& item) const override {
    QC_ISA::attend_chunk(a, item);
  }
  void rms_norm(const NormArgs<float>& a, int64_t begin, int64_t end) const override {
    QC_ISA::rms_norm(a, begin, end);
  }
  void rms_norm(const NormArgs<bf16>& a, int64_t begin, int64_t end) const override {
    QC_ISA::rms_norm(a, begin, end);
  }
  void silu_mul(const GateArgs<float>& a, int64_t begin, int64_t end) const override {
    QC_ISA::silu_mul(a, begin, end);
  }
  void silu_mul(const GateArgs<bf16>& a, int64_t begin, int64_t end) const override {
    QC_ISA::silu_mul(a, begin, end);
  }
  void rotary(const RotaryArgs<float>& a, int64_t begin, int64_t end) const override {
    QC_ISA::rotary(a, begin, end);
  }
  void rotary(const RotaryArgs<bf16>& a, int64_t begin, int64_t end) const override {
    QC_ISA::rotary(a, begin, end);
  }
  void heads(const HeadArgs<float, float, float>& a, int64_t begin, int64_t end) const override {
    QC_ISA::heads(a, begin, end);
  }
  void heads(const HeadArgs<bf16, float, float>& a, int64_t begin, int64_t end) const override {
    QC_ISA::heads(a, begin, end);
  }
  void heads(const HeadArgs<bf16, bf16, float>& a, int64_t begin, int64_t end) const override {
    QC_ISA::heads(a, begin, end);
  }
  void heads(const HeadArgs<bf16, bf16, bf16>& a, int64_t begin, int64_t end) const override {
    QC_ISA::heads(a, begin, end);
  }
  void draft_logits(const DraftArgs<float, float>& a, int64_t begin, int64_t end) const override {
    QC_ISA::draft_logits(a, begin, end);
  }
  void draft_logits(const DraftArgs<bf16, float>& a, int64_t begin, int64_t end) const override {
    QC_ISA::draft_logits(a, begin, end);
  }
  void draft_logits(const DraftArgs<bf16, bf16>& a, int64_t begin, int64_t end) const override {
    QC_ISA::draft_logits(a, begin, end);
  }
  void sample(const SampleArgs& a, const SampleScratch& s, int64_t begin, int64_t end)
      const override {
    QC_ISA::sample(a, s, begin, end);
  }
};
}  // namespace QC_ISA

#define QC_JOIN(a, b) a##b
#define QC_GETTER(isa) QC_JOIN(isa, _kernels)

const Kernels& QC_GETTER(QC_ISA)() {
  static const QC_ISA::Versions versions;
  return versions;
}

}  // namespace quickchange
