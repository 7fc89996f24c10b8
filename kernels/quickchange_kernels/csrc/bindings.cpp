// Registers the operations for the CPU under the schemas that the Python modules declare. Their
// bindings check, lay out the work and share it over PyTorch's threads; dtypes and layouts that have
// no native version go to the same operation's overload `plain`. One file, because PyTorch's headers
// take most of the build.

#include <torch/library.h>

#include "bind_attention.h"
#include "bind_kv_write.h"
#include "bind_linear.h"
#include "bind_lowrank.h"
#include "bind_machine.h"
#include "bind_quantized.h"
#include "bind_rows.h"
#include "bind_sample.h"
#include "bind_token_mask.h"
#include "bind_turbo_heads.h"
#include "bind_verify.h"
#include "step_plan.h"

namespace quickchange {
namespace {

std::string instruction_set() { return kernels().name(); }

// For tests: the name of an instruction set that this machine has, or "best".
void use_instruction_set(const std::string& name) {
  const auto available = available_kernels();
  const Kernels* found = name == "best" ? available.front() : nullptr;
  for (const Kernels* candidate : available)
    if (name == candidate->name()) found = candidate;
  TORCH_CHECK_VALUE(found, "this machine has no ", name, "; its best is ", available.front()->name());
  chosen = found;
}

}  // namespace

TORCH_LIBRARY_IMPL(quickchange, CPU, m) {
  m.impl("linear", linear);
  m.impl("linear_panels", linear_panels);
  m.impl("linear_int8", linear_int8);
  m.impl("linear_quantized", linear_quantized);
  m.impl("linear_experts", linear_experts);
  m.impl("lowrank_", lowrank_);
  m.impl("lowrank_embedding_", lowrank_embedding_);
  m.impl("lowrank_experts_", lowrank_experts_);
  m.impl("paged_attention", paged_attention);
  m.impl("kv_write_", kv_write_);
  m.impl("rms_norm", rms_norm);
  m.impl("add_rms_norm", add_rms_norm);
  m.impl("silu_mul", silu_mul);
  m.impl("rotary_", rotary_);
  m.impl("turbo_heads", turbo_heads);
  m.impl("head_logits", head_logits);
  m.impl("draft_logits", draft_logits);
  m.impl("verify", verify);
  m.impl("sample", sample);
  m.impl("token_mask_", token_mask_);
#ifdef __SIZEOF_INT128__
  m.impl("philox_uniform", philox_uniform);
#endif
}

TORCH_LIBRARY(quickchange_native, m) {
  m.def("instruction_set() -> str", instruction_set);
  m.def("use_instruction_set(str name) -> ()", use_instruction_set);
  m.def("multiply_adds(str type, int rounds) -> float", multiply_adds);
  m.def("read_memory(Tensor data) -> float", read_memory);
  m.def("share_cost(int count) -> float", share_cost);
  m.class_<StepMemory>("StepMemory").def(torch::init<>()).def("bytes", &StepMemory::bytes);
  m.class_<StepPlan>("StepPlan")
      .def(torch::init<c10::intrusive_ptr<StepMemory>>())
      .def("begin", &StepPlan::begin)
      .def("end", &StepPlan::end)
      .def("run", &StepPlan::run)
      .def("held", &StepPlan::held)
      .def("length", &StepPlan::length);
}

}  // namespace quickchange
