// The products, once for each instruction set: included after isa_*.h.
//
// Every output is summed in one order, whatever the rows beside it: inputs ascending, one fused
// multiply-add each (float kinds), or groups ascending, each an exact integer sum that is scaled
// and added by one fused multiply-add (integer kinds). Tiles of rows share weights, never sums.
#pragma once
#include "kernels.h"
#include "layout.h"

namespace {

using jaxserve::LinearJob;

// Writes up to `kLanes` columns of one row.
inline void store_columns(const LinearJob& job, int64_t row, int64_t column, V value) {
  const int64_t count = job.num_out - column;
  if (count <= 0) return;
  const int64_t at = row * job.num_out + column;
  if (count >= kLanes) {
    if (job.out_is_bfloat16) store_bfloat16(static_cast<uint16_t*>(job.out) + at, value);
    else store(static_cast<float*>(job.out) + at, value);
    return;
  }
  float lanes[kLanes];
  store(lanes, value);
  if (job.out_is_bfloat16) {
    uint16_t* out = static_cast<uint16_t*>(job.out) + at;
    for (int64_t i = 0; i < count; ++i) out[i] = jaxserve::float_to_bfloat16(lanes[i]);
  } else {
    float* out = static_cast<float*>(job.out) + at;
    for (int64_t i = 0; i < count; ++i) out[i] = lanes[i];
  }
}

constexpr int kVectors = jaxserve::kFloatColumns / kLanes;

// One input of R rows times its weights. A row is loaded when it is needed: registers are few.
template <int R>
inline void multiply_add(V (&sums)[R][kVectors], const float* x, int64_t num_in,
                         const V (&weights)[kVectors]) {
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r) {
    const V row = splat(x[r * num_in]);
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) sums[r][v] = fma(row, weights[v], sums[r][v]);
  }
}

template <int R, bool kIsBfloat16>
void float_tile(const LinearJob& job, const uint8_t* block, int64_t row, int64_t column) {
  const float* x = job.x + row * job.num_in;
  V sums[R][kVectors];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < kVectors; ++v) sums[r][v] = zero();
  if (kIsBfloat16) {
    for (int64_t k = 0; k < job.num_in; k += 2) {
      V first[kVectors], second[kVectors];
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v)
        load_pairs(block + (k * jaxserve::kFloatColumns + 2 * v * kLanes) * 2, first[v], second[v]);
      multiply_add(sums, x + k, job.num_in, first);
      if (k + 1 == job.num_in) break;  // the last pair of an odd number of inputs
      multiply_add(sums, x + k + 1, job.num_in, second);
    }
  } else {
    const float* weights = reinterpret_cast<const float*>(block);
    for (int64_t k = 0; k < job.num_in; ++k) {
      V loaded[kVectors];
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v)
        loaded[v] = load(weights + k * jaxserve::kFloatColumns + v * kLanes);
      multiply_add(sums, x + k, job.num_in, loaded);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < kVectors; ++v)
      store_columns(job, row + r, column + v * kLanes, sums[r][v]);
}

// The part of a block that stays in the caches while many rows meet it: float32 [num_in][32].
const float* widen_block(const LinearJob& job, const uint8_t* block, float* panel) {
  if (job.kind == jaxserve::kFloat32) return reinterpret_cast<const float*>(block);
  constexpr int64_t columns = jaxserve::kFloatColumns;
  for (int64_t k = 0; k < job.num_in; k += 2) {
    for (int64_t at = 0; at < columns; at += kLanes) {
      V first, second;
      load_pairs(block + (k * columns + 2 * at) * 2, first, second);
      store(panel + k * columns + at, first);
      store(panel + (k + 1) * columns + at, second);
    }
  }
  return panel;
}

// R rows, of which `x` holds [num_in][R].
template <int R>
void panel_tile(const LinearJob& job, const float* x, const float* panel, int64_t row, int64_t column) {
  for (int64_t first = 0; first < jaxserve::kFloatColumns; first += kPanelVectors * kLanes) {
    V sums[R][kPanelVectors];
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < kPanelVectors; ++v) sums[r][v] = zero();
    const float* weights = panel + first;
    for (int64_t k = 0; k < job.num_in; ++k) {
      V loaded[kPanelVectors];
#pragma GCC unroll 2
      for (int v = 0; v < kPanelVectors; ++v)
        loaded[v] = load(weights + k * jaxserve::kFloatColumns + v * kLanes);
#pragma GCC unroll 12
      for (int r = 0; r < R; ++r) {
        const V value = splat(x[k * R + r]);
#pragma GCC unroll 2
        for (int v = 0; v < kPanelVectors; ++v) sums[r][v] = fma(value, loaded[v], sums[r][v]);
      }
    }
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < kPanelVectors; ++v)
        store_columns(job, row + r, column + first + v * kLanes, sums[r][v]);
  }
}

template <int R>
void last_panel_tile(const LinearJob& job, const float* x, const float* panel, int64_t row,
                     int64_t column) {
  if (job.num_rows - row == R) panel_tile<R>(job, x, panel, row, column);
  else if constexpr (R > 1) last_panel_tile<R - 1>(job, x, panel, row, column);
}

void panel_block(const LinearJob& job, const uint8_t* block, int64_t column, float* scratch) {
  const float* panel = widen_block(job, block, scratch);
  int64_t row = 0;
  for (; row + kPanelRows <= job.num_rows; row += kPanelRows)
    panel_tile<kPanelRows>(job, job.tiles + row * job.num_in, panel, row, column);
  if (row < job.num_rows)
    last_panel_tile<kPanelRows - 1>(job, job.tiles + row * job.num_in, panel, row, column);
}

void pack_tile(const void* x, bool is_bfloat16, int64_t num_in, int64_t num_rows, float* tile) {
  constexpr int64_t kAtOnce = 64;  // inputs whose part of the tile stays in the L1 cache
  for (int64_t from = 0; from < num_in; from += kAtOnce) {
    const int64_t to = from + kAtOnce < num_in ? from + kAtOnce : num_in;
    for (int64_t r = 0; r < num_rows; ++r) {
      if (is_bfloat16) {
        const uint16_t* row = static_cast<const uint16_t*>(x) + r * num_in;
        for (int64_t k = from; k < to; ++k) tile[k * num_rows + r] = jaxserve::bfloat16_to_float(row[k]);
      } else {
        const float* row = static_cast<const float*>(x) + r * num_in;
        for (int64_t k = from; k < to; ++k) tile[k * num_rows + r] = row[k];
      }
    }
  }
}

template <int R>
void q4_tile(const LinearJob& job, const uint8_t* block, int64_t row, int64_t column) {
  const int64_t groups = jaxserve::num_groups(job.num_in), width = groups * jaxserve::kGroup;
  for (int64_t first = 0; first < jaxserve::kIntColumns; first += kLanes) {
    V sums[R];
    for (int r = 0; r < R; ++r) sums[r] = zero();
    for (int64_t g = 0; g < groups; ++g) {
      const uint8_t* group = block + g * jaxserve::kQ4GroupBytes;
      const int8_t* codes = job.codes + row * width + g * jaxserve::kGroup;
      NibbleSum products[R];
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        Nibbles low, high;
        load_nibbles(group + j * 64 + 4 * first, low, high);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
          products[r].step(low, four_codes(codes + r * width + 8 * j));
          products[r].step(high, four_codes(codes + r * width + 8 * j + 4));
        }
      }
      const V scale = load_float16(group + 256 + 2 * first);
      const V minimum = load_float16(group + 288 + 2 * first);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const int64_t at = (row + r) * groups + g;
        const V step = mul(scale, splat(job.scales[at]));
        sums[r] = fma(to_float(products[r].finish()), step, sums[r]);
        sums[r] = fma(minimum, splat(job.scaled_sums[at]), sums[r]);
      }
    }
    for (int r = 0; r < R; ++r) store_columns(job, row + r, column + first, sums[r]);
  }
}

template <int R, bool kHasGroupScales>
void byte_tile(const LinearJob& job, const uint8_t* block, int64_t row, int64_t column) {
  const int64_t groups = jaxserve::num_groups(job.num_in), width = groups * jaxserve::kGroup;
  const int64_t group_bytes =
      kHasGroupScales ? jaxserve::kQ8GroupBytes : jaxserve::kInt8GroupBytes;
  for (int64_t first = 0; first < jaxserve::kIntColumns; first += kLanes) {
    V sums[R];
    for (int r = 0; r < R; ++r) sums[r] = zero();
    for (int64_t g = 0; g < groups; ++g) {
      const uint8_t* group = block + g * group_bytes;
      const int64_t start = row * width + g * jaxserve::kGroup;
      ByteSum products[R];
#pragma GCC unroll 8
      for (int j = 0; j < 8; ++j) {
        const ByteWeights weights(group + j * 64 + 4 * first);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
          const int64_t at = start + r * width + 4 * j;
          products[r].step(weights, job.codes + at, job.wide_codes + at);
        }
      }
      V scale = zero();
      if (kHasGroupScales) scale = load_float16(group + 512 + 2 * first);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const int64_t at = (row + r) * groups + g;
        const V product = to_float(products[r].finish(-128 * job.sums[at]));
        const V step = splat(job.scales[at]);
        sums[r] = fma(product, kHasGroupScales ? mul(scale, step) : step, sums[r]);
      }
    }
    if (!kHasGroupScales) {
      const V scale = load(reinterpret_cast<const float*>(block + groups * group_bytes) + first);
      for (int r = 0; r < R; ++r) sums[r] = mul(sums[r], scale);
    }
    for (int r = 0; r < R; ++r) store_columns(job, row + r, column + first, sums[r]);
  }
}

template <int R>
void tile(const LinearJob& job, const uint8_t* block, int64_t row, int64_t column) {
  switch (job.kind) {
    case jaxserve::kFloat32:
      if constexpr (R <= kFloatRows) float_tile<R, false>(job, block, row, column);
      break;
    case jaxserve::kBfloat16:
      if constexpr (R <= kFloatRows) float_tile<R, true>(job, block, row, column);
      break;
    case jaxserve::kInt8:
      if constexpr (R <= kIntRows) byte_tile<R, false>(job, block, row, column);
      break;
    case jaxserve::kQ8:
      if constexpr (R <= kIntRows) byte_tile<R, true>(job, block, row, column);
      break;
    default:
      if constexpr (R <= kIntRows) q4_tile<R>(job, block, row, column);
  }
}

void linear_block(const LinearJob& job, int64_t index, float* scratch) {
  const uint8_t* block = job.weights + index * jaxserve::block_bytes(job.kind, job.num_in);
  const int64_t column = index * jaxserve::block_columns(job.kind);
  if (job.tiles != nullptr) return panel_block(job, block, column, scratch);
  const int64_t most = jaxserve::is_integer(job.kind) ? kIntRows : kFloatRows;
  int64_t row = 0;
  while (row < job.num_rows) {
    const int64_t left = job.num_rows - row < most ? job.num_rows - row : most;
    int64_t taken;
    if (left >= 12) tile<12>(job, block, row, column), taken = 12;
    else if (left >= 8) tile<8>(job, block, row, column), taken = 8;
    else if (left >= 6) tile<6>(job, block, row, column), taken = 6;
    else if (left >= 4) tile<4>(job, block, row, column), taken = 4;
    else if (left >= 3) tile<3>(job, block, row, column), taken = 3;
    else if (left >= 2) tile<2>(job, block, row, column), taken = 2;
    else tile<1>(job, block, row, column), taken = 1;
    row += taken;
  }
}

void quantize_row(const float* x, int64_t num_in, int8_t* codes, float* scales, int32_t* sums) {
  const int64_t groups = jaxserve::num_groups(num_in);
  for (int64_t g = 0; g < groups; ++g) {
    float padded[jaxserve::kGroup];
    const float* values = x + g * jaxserve::kGroup;
    const int64_t count = num_in - g * jaxserve::kGroup;
    if (count < jaxserve::kGroup) {
      for (int64_t i = 0; i < jaxserve::kGroup; ++i) padded[i] = i < count ? values[i] : 0.0f;
      values = padded;
    }
    V peak = zero(), probes = zero();
    for (int64_t i = 0; i < jaxserve::kGroup; i += kLanes) {
      const V value = load(values + i);
      peak = vmax(peak, vabs(value));
      probes = fma(value, zero(), probes);
    }
    const float largest = reduce_max(peak);
    // NaN and infinity must not vanish: the scale carries them into every output.
    const float probe = reduce_add(probes);
    const bool is_sound = probe == 0.0f;
    const float inverse = largest > 0.0f && is_sound ? 127.0f / largest : 0.0f;
    scales[g] = is_sound ? largest / 127.0f : probe;
    int8_t* group = codes + g * jaxserve::kGroup;
    const V limit = splat(127.0f), low = splat(-127.0f), factor = splat(inverse);
    for (int64_t i = 0; i < jaxserve::kGroup; i += kLanes) {
      V scaled = is_sound ? round_even(mul(load(values + i), factor)) : zero();
      store_int8(group + i, vmin(vmax(scaled, low), limit));
    }
    int32_t sum = 0;
    for (int64_t i = 0; i < jaxserve::kGroup; ++i) sum += group[i];
    sums[g] = sum;
  }
}

}  // namespace
