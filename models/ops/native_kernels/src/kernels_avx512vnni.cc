#if defined(__x86_64__)
#define JAXSERVE_VNNI
#include "isa_avx512.h"

#include "attention.inc.h"
#include "linear.inc.h"
#include "rows.inc.h"

namespace jaxserve {
extern const Kernels kAvx512Vnni = {
    "avx512vnni", linear_block, kManyRows, kPanelRows, pack_tile, nullptr, nullptr,
    quantize_row, attend, gate_row, find_peak};
}  // namespace jaxserve
#endif
