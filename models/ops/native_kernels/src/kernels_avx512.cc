#if defined(__x86_64__)
#include "isa_avx512.h"

#include "attention.inc.h"
#include "linear.inc.h"
#include "rows.inc.h"

namespace jaxserve {
extern const Kernels kAvx512 = {
    "avx512", linear_block, kManyRows, kPanelRows, pack_tile, nullptr, nullptr,
    quantize_row, attend, gate_row, find_peak};
}  // namespace jaxserve
#endif
