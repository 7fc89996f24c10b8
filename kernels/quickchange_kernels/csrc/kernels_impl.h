// One instruction set's kernels. The including file sets QC_WIDTH (floats in a vector) and QC_ISA
// (the namespace), includes kernels.h, and only then turns the instruction set on.

namespace quickchange {
namespace QC_ISA {
#include "simd.h"
// ---
#include "dot_impl.h"
// ---
#include "linear_impl.h"
// ---
#include "lowrank_impl.h"
// ---
#include "attention_impl.h"
}  // namespace QC_ISA

}  // namespace quickchange
