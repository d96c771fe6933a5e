// Products by the matrix unit (AMX) of bfloat16 rows with bfloat16 weights: included after
// isa_avx512.h and linear.inc.h.
//
// A tile instruction takes 32 inputs at once: it sums those at even places and those at odd ones
// for themselves, adds both, and adds that to the output. One row or sixteen, the order is the same,
// so products of any number of rows go this way.
#pragma once
#include <immintrin.h>

#include <algorithm>
#include <cstring>

#include "kernels.h"
#include "layout.h"

namespace {

using jaxserve::kTileInputs;
using jaxserve::kTileRows;
using jaxserve::LinearJob;

constexpr int64_t kTileColumns = 16;     // of float32 sums, or pairs of bfloat16
constexpr int64_t kLineBytes = 64;       // of a tile's row

// Tile loads are instructions of which GCC does not know that they read memory: whatever they are to
// find must have been written before.
inline void write_memory() { asm volatile("" ::: "memory"); }

// As LDTILECFG reads it.
struct alignas(64) TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t num_rows[16] = {};

  void set(int tile, int64_t rows, int64_t bytes) {
    num_rows[tile] = static_cast<uint8_t>(rows), row_bytes[tile] = static_cast<uint16_t>(bytes);
  }
};

// Sums in tiles 0 .. 3, rows in 4 and 5, weights in 6 and 7. Without second rows 2, 3 and 5 are unused.
void shape_tiles(int64_t first_rows, int64_t second_rows) {
  TileShapes shapes;
  for (int tile : {0, 1, 4}) shapes.set(tile, first_rows, kLineBytes);
  if (second_rows > 0)
    for (int tile : {2, 3, 5}) shapes.set(tile, second_rows, kLineBytes);
  for (int tile : {6, 7}) shapes.set(tile, kTileRows, kLineBytes);
  write_memory();
  _tile_loadconfig(&shapes);
}

// Weights of 32 columns for 32 inputs: two tiles side by side, rows of which are pairs of inputs.
constexpr int64_t kWeightsStride = 2 * kLineBytes, kWeightsBytes = kTileRows * kWeightsStride;

struct Weights {
  const uint8_t* block;
  int64_t num_whole;  // steps of 32 inputs
  bool has_rest;
  alignas(64) uint8_t rest[kWeightsBytes];  // the last inputs, then zeros

  Weights(const LinearJob& job, const uint8_t* block)
      : block(block), num_whole(job.num_in / kTileInputs), has_rest(job.num_in % kTileInputs != 0) {
    if (!has_rest) return;
    const size_t left = static_cast<size_t>((job.num_in % kTileInputs + 1) / 2 * kWeightsStride);
    std::memcpy(rest, block + num_whole * kWeightsBytes, left);
    std::memset(rest + left, 0, sizeof rest - left);
  }
  int64_t num_steps() const { return num_whole + has_rest; }
  const uint8_t* at(int64_t step) const {
    return step < num_whole ? block + step * kWeightsBytes : rest;
  }
};

// Asks for the weights to come, a part in every step, so that they are in the L2 cache by then.
struct Ahead {
  const uint8_t *at, *end;
  int64_t bytes_per_step;

  void step() {
    const uint8_t* until = std::min(at + bytes_per_step, end);
    for (; at < until; at += kLineBytes)
      _mm_prefetch(reinterpret_cast<const char*>(at), _MM_HINT_T1);
  }
};

// `rows` holds [step][num_rows][32 inputs].
void multiply_one(const uint16_t* rows, int64_t num_rows, const Weights& weights, Ahead& ahead) {
  write_memory();
  _tile_zero(0);
  _tile_zero(1);
  for (int64_t step = 0; step < weights.num_steps(); ++step) {
    const uint8_t* block = weights.at(step);
    ahead.step();
    _tile_loadd(4, rows + step * num_rows * kTileInputs, kLineBytes);
    _tile_loadd(6, block, kWeightsStride);
    _tile_loadd(7, block + kLineBytes, kWeightsStride);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
  }
}

void multiply_two(const uint16_t* first, const uint16_t* second, int64_t second_rows,
                  const Weights& weights, Ahead& ahead) {
  write_memory();
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t step = 0; step < weights.num_steps(); ++step) {
    const uint8_t* block = weights.at(step);
    ahead.step();
    _tile_loadd(6, block, kWeightsStride);
    _tile_loadd(4, first + step * kTileRows * kTileInputs, kLineBytes);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, block + kLineBytes, kWeightsStride);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, second + step * second_rows * kTileInputs, kLineBytes);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
}

// Two neighbouring tiles of sums, [rows][32], to the output.
void store_sums(const LinearJob& job, const float* sums, int64_t row, int64_t num_rows, int64_t column) {
  const bool is_whole = column + jaxserve::kFloatColumns <= job.num_out;
  for (int64_t r = 0; r < num_rows; ++r) {
    const V low = load(sums + r * jaxserve::kFloatColumns);
    const V high = load(sums + r * jaxserve::kFloatColumns + kLanes);
    if (is_whole && job.out_is_bfloat16) {
      uint16_t* out = static_cast<uint16_t*>(job.out) + (row + r) * job.num_out + column;
      // To the nearest, ties to even; what is too small for a normal number becomes 0, as in tiles.
      const __m512bh both = _mm512_cvtne2ps_pbh(high, low);
      std::memcpy(out, &both, sizeof both);
      continue;
    }
    store_columns(job, row + r, column, low);
    store_columns(job, row + r, column + kLanes, high);
  }
}

// Rows from `row` on, two tiles of them or what is left.
void tile_rows(const LinearJob& job, const Weights& weights, int64_t row, int64_t column,
               Ahead& ahead) {
  constexpr int64_t sums_stride = jaxserve::kFloatColumns * 4;
  alignas(64) float sums[2 * kTileRows * jaxserve::kFloatColumns];
  float* second_sums = sums + kTileRows * jaxserve::kFloatColumns;
  const int64_t left = std::min(2 * kTileRows, job.num_rows - row);
  const int64_t first_rows = std::min(kTileRows, left), second_rows = left - first_rows;
  const int64_t width = weights.num_steps() * kTileInputs;
  const uint16_t* first = job.row_tiles + row * width;
  if (second_rows == 0) {
    multiply_one(first, first_rows, weights, ahead);
  } else {
    multiply_two(first, first + kTileRows * width, second_rows, weights, ahead);
    _tile_stored(2, second_sums, sums_stride);
    _tile_stored(3, second_sums + kTileColumns, sums_stride);
  }
  _tile_stored(0, sums, sums_stride);
  _tile_stored(1, sums + kTileColumns, sums_stride);
  store_sums(job, sums, row, left, column);
}

void tile_blocks(const LinearJob& job, int64_t begin, int64_t end) {
  if (job.num_rows == 0) return;  // a step may have no live row
  const int64_t bytes = jaxserve::block_bytes(job.kind, job.num_in);
  const int64_t whole = job.num_rows / (2 * kTileRows) * (2 * kTileRows), rest = job.num_rows - whole;
  bool is_shaped = false;
  for (int64_t index = begin; index < end; ++index) {
    const uint8_t* block = job.weights + index * bytes;
    const Weights weights(job, block);
    const int64_t num_steps = weights.num_steps() * ((job.num_rows + 2 * kTileRows - 1) / (2 * kTileRows));
    Ahead ahead{block + bytes, index + 1 < end ? block + 2 * bytes : block + bytes,
                (bytes / num_steps + kLineBytes) / kLineBytes * kLineBytes};
    const int64_t column = index * jaxserve::kFloatColumns;
    if (whole > 0 && (rest > 0 || !is_shaped)) shape_tiles(kTileRows, kTileRows);
    for (int64_t row = 0; row < whole; row += 2 * kTileRows) tile_rows(job, weights, row, column, ahead);
    if (rest > 0 && (whole > 0 || !is_shaped))
      shape_tiles(std::min(rest, kTileRows), std::max<int64_t>(rest - kTileRows, 0));
    if (rest > 0) tile_rows(job, weights, whole, column, ahead);
    is_shaped = true;
  }
  _tile_release();
}

// Up to 16 rows to [step][num_rows][32 inputs], inputs past num_in zeros.
void pack_row_tile(const uint16_t* x, int64_t num_in, int64_t num_rows, uint16_t* tile) {
  for (int64_t r = 0; r < num_rows; ++r) {
    for (int64_t from = 0; from < num_in; from += kTileInputs) {
      uint16_t* out = tile + from * num_rows + r * kTileInputs;
      const int64_t count = std::min(kTileInputs, num_in - from);
      std::memcpy(out, x + r * num_in + from, static_cast<size_t>(count) * 2);
      std::memset(out + count, 0, static_cast<size_t>(kTileInputs - count) * 2);
    }
  }
}

}  // namespace
