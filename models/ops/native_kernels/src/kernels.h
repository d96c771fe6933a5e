// What each instruction set implements, as a table of functions.
#pragma once
#include <cstdint>

namespace jaxserve {

// Rows times a packed kernel. Rows lie `num_in` apart, the quantised ones `num_groups * 32`.
struct LinearJob {
  int64_t kind;
  int64_t num_rows, num_in, num_out;
  const uint8_t* weights;
  const float* x;             // float kinds, few rows
  const float* tiles;         // float kinds, many rows: packed by pack_tile, num_in values a row
  const uint16_t* row_tiles;  // bfloat16 rows and weights: packed by pack_row_tile
  const int8_t* codes;        // integer kinds: rounded to multiples of a group's scale
  const int16_t* wide_codes;  // the same, for products of 16 bits
  const float* scales;        // [rows][groups]
  const int32_t* sums;        // [rows][groups]: of a group's codes
  const float* scaled_sums;   // [rows][groups]: times the scale
  void* out;                  // [rows][num_out]
  bool out_is_bfloat16;
};

// Causal attention over pages; see models/ops/attention/reference.py.
struct AttentionJob {
  int64_t num_heads, num_kv_heads, head_dim, page_size, table_width;
  const void* q;              // [T][H][D]
  void* out;                  // [T][H][D]
  bool rows_are_bfloat16;     // q and out
  const void* pages;          // one layer: [P + 1][page_size][2][K][D]
  bool pages_are_bfloat16;
  const int32_t* page_table;  // [S + 1][table_width]
  const int32_t* row_slots;
  const int32_t* row_positions;
  int64_t window;             // keys that a row sees, itself included
};

// A gated MLP's rows between its projections: activation(gate) * up.
struct GateJob {
  int64_t width;
  const void* x;   // [rows][gate, up][width]
  void* out;       // [rows][width]
  bool is_bfloat16;
  bool is_gelu;    // its tanh form; else SiLU
};

struct Kernels {
  const char* name;
  // One block of output columns, all rows. `scratch` holds panel_floats(...) if `tiles` are given.
  void (*linear_block)(const LinearJob& job, int64_t block, float* scratch);
  // Products of `many_rows` float rows and more take tiles of `panel_rows` each, the last one of
  // the rest. `tile` becomes [num_in][num_rows].
  int64_t many_rows, panel_rows;
  void (*pack_tile)(const void* x, bool is_bfloat16, int64_t num_in, int64_t num_rows, float* tile);
  // The same by a matrix unit, for blocks `begin` .. `end` - 1 of bfloat16 weights and rows of
  // bfloat16; nullptr where there is none. Rows are taken in tiles of kTileRows, the last one of the
  // rest, each [inputs / kTileInputs][num_rows][kTileInputs] and filled up with zeros.
  void (*tile_blocks)(const LinearJob& job, int64_t begin, int64_t end);
  void (*pack_row_tile)(const uint16_t* x, int64_t num_in, int64_t num_rows, uint16_t* tile);
  // One row's codes, scales and sums by groups of 32; codes past num_in are zero.
  void (*quantize_row)(const float* x, int64_t num_in, int8_t* codes, float* scales, int32_t* sums);
  // `num_rows` consecutive rows of one sequence, one KV head. `scratch` holds
  // attention_scratch_floats(...).
  void (*attend)(const AttentionJob& job, int64_t first_row, int64_t num_rows, int64_t kv_head,
                 float* scratch);
  void (*gate_row)(const GateJob& job, int64_t row);
  // The first place of the largest value, and whether all are finite. Where one is NaN, the place
  // is any.
  bool (*find_peak)(const float* x, int64_t count, int32_t* index);
};

constexpr int64_t kTileRows = 16, kTileInputs = 32;

constexpr int64_t kKeyBlock = 64;  // keys that the online softmax takes at once

static inline int64_t padded_dim(int64_t head_dim) { return (head_dim + 15) / 16 * 16; }
constexpr int64_t kMaxLanes = 16;
static inline int64_t attention_scratch_floats(int64_t queries, int64_t head_dim) {
  const int64_t num_queries = (queries + 15) / 16 * 16;  // tiles take 16 at once
  // Keys and values of a block, and keys on their way; queries and sums; weights; peaks and totals.
  return (2 * kKeyBlock + kMaxLanes) * padded_dim(head_dim) +
         num_queries * (2 * padded_dim(head_dim) + kKeyBlock + 2);
}

// A block of columns in float32; of an odd number of inputs, bfloat16 weights have one more.
static inline int64_t panel_floats(int64_t num_in) { return (num_in + 1) * 32; }

extern const Kernels kPlain;
#if defined(__x86_64__)
extern const Kernels kAvx2;
extern const Kernels kAvx512;
extern const Kernels kAvx512Vnni;
// nullptr if the compiler had no instructions for tiles.
const Kernels* amx_kernels();
#endif

// The best first; nullptr after the last. Only those that this processor runs.
const Kernels* const* available_kernels();

static inline float bfloat16_to_float(uint16_t bits) {
  uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  __builtin_memcpy(&value, &wide, 4);
  return value;
}
static inline uint16_t float_to_bfloat16(float value) {  // to the nearest, ties to even
  uint32_t bits;
  __builtin_memcpy(&bits, &value, 4);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40u);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

}  // namespace jaxserve
