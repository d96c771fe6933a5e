// Only the builder knows whether the compiler has the flags for tiles, so this file may be empty.
#include "kernels.h"

#if defined(__x86_64__) && defined(__AMX_BF16__)
#define JAXSERVE_VNNI
#include "isa_avx512.h"

#include "attention.inc.h"
#include "linear.inc.h"
#include "rows.inc.h"
#include "tiles.inc.h"
#include "tile_attention.inc.h"

namespace jaxserve {
static const Kernels kAvx512Amx = {
    "avx512amx", linear_block, kManyRows, kPanelRows, pack_tile, tile_blocks, pack_row_tile,
    quantize_row, attend_tiles, gate_row, find_peak};
const Kernels* amx_kernels() { return &kAvx512Amx; }
}  // namespace jaxserve
#else
namespace jaxserve {
const Kernels* amx_kernels() { return nullptr; }
}  // namespace jaxserve
#endif
