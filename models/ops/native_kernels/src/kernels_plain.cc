#include "isa_plain.h"

#include "attention.inc.h"
#include "linear.inc.h"
#include "rows.inc.h"

namespace jaxserve {
extern const Kernels kPlain = {
    "plain", linear_block, kManyRows, kPanelRows, pack_tile, nullptr, nullptr,
    quantize_row, attend, gate_row, find_peak};
}  // namespace jaxserve
