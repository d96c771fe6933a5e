// How weights lie in memory. models/ops/native.py packs them so; both must change together.
//
// A kernel [K inputs, N outputs] is cut into blocks of output columns, whose bytes follow one
// another. Columns past N and inputs past K hold zeros.
#pragma once
#include <cstdint>

namespace jaxserve {

enum Kind : int64_t {
  kFloat32 = 0,   // block of 32 columns: [K][32] float32
  kBfloat16 = 1,  // block of 32 columns: [K / 2][32][2] bfloat16, neighbouring inputs in pairs
  kInt8 = 2,      // block of 16 columns: groups of 32 inputs [8][16][4] uint8 (code + 128), then
                  // float32 [16], a column's scale
  kQ8 = 3,        // block of 16 columns: groups of 32 inputs, each [8][16][4] uint8 (code + 128)
                  // and float16 [16], the group's scales
  kQ4 = 4,        // block of 16 columns: groups of 32 inputs, each [4][16][4] uint8, whose low
                  // four bits are inputs 8 j + i and high ones 8 j + 4 + i, then float16 [16]
                  // scales and float16 [16] minima: a weight is scale * code + minimum
};

constexpr int64_t kGroup = 32;
constexpr int64_t kFloatColumns = 32;
constexpr int64_t kIntColumns = 16;
constexpr int64_t kQ8GroupBytes = 512 + 32;
constexpr int64_t kInt8GroupBytes = 512;
constexpr int64_t kQ4GroupBytes = 256 + 64;

static inline bool is_known(int64_t kind) { return kind >= kFloat32 && kind <= kQ4; }
static inline bool is_integer(int64_t kind) { return kind >= kInt8; }
static inline int64_t num_groups(int64_t num_in) { return (num_in + kGroup - 1) / kGroup; }
static inline int64_t block_columns(int64_t kind) {
  return is_integer(kind) ? kIntColumns : kFloatColumns;
}
static inline int64_t num_blocks(int64_t kind, int64_t num_out) {
  return (num_out + block_columns(kind) - 1) / block_columns(kind);
}
static inline int64_t block_bytes(int64_t kind, int64_t num_in) {
  switch (kind) {
    case kFloat32: return num_in * kFloatColumns * 4;
    case kBfloat16: return (num_in + 1) / 2 * kFloatColumns * 4;
    case kInt8: return num_groups(num_in) * kInt8GroupBytes + 64;
    case kQ8: return num_groups(num_in) * kQ8GroupBytes;
    default: return num_groups(num_in) * kQ4GroupBytes;
  }
}

}  // namespace jaxserve
