#include "kernels.h"

#define QC_WIDTH 4
#define QC_ISA baseline
#include "kernels_impl.h"
