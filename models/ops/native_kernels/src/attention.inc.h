// Causal attention over pages, once for each instruction set: included after isa_*.h.
//
// A row's keys are taken in blocks of 64 that begin at position 0, by an online softmax (Milakov
// and Gimelshein, "Online normalizer calculation for softmax", 2018). A block's keys are transposed,
// so that lanes are keys and queries share what is loaded. Within a block all sums have one order:
// a score adds dimensions ascending, an output keys ascending, one fused multiply-add each. So a
// row's bits depend neither on the rows beside it nor on how it was cut into tiles.
#pragma once
#include <algorithm>
#include <cmath>

#include "exponential.inc.h"
#include "kernels.h"

namespace {

using jaxserve::AttentionJob;
using jaxserve::kKeyBlock;

inline void load_row(const void* rows, bool is_bfloat16, int64_t at, int64_t count, int64_t padded,
                     float* out) {
  int64_t i = 0;
  if (is_bfloat16) {
    const uint16_t* source = static_cast<const uint16_t*>(rows) + at;
    for (; i + kLanes <= count; i += kLanes) store(out + i, load_bfloat16(source + i));
    for (; i < count; ++i) out[i] = jaxserve::bfloat16_to_float(source[i]);
  } else {
    const float* source = static_cast<const float*>(rows) + at;
    for (; i + kLanes <= count; i += kLanes) store(out + i, load(source + i));
    for (; i < count; ++i) out[i] = source[i];
  }
  for (; i < padded; ++i) out[i] = 0.0f;
}

// Rows of queries against one block of keys. Rows of `q` and `sums` lie `padded` apart, those of
// `weights` kKeyBlock apart.
struct Queries {
  float* q;        // scaled
  float* sums;     // of values by weights
  float* weights;  // of a block's keys: scores, then their exponentials
  float *peaks, *totals;
  int64_t group, window;
  int64_t position;  // of the first row, counted from the block's first key

  // A row sees keys first .. last of the block, none where last < first.
  int64_t last(int64_t i) const { return std::min(position + i / group, kKeyBlock - 1); }
  int64_t first(int64_t i) const {
    return std::max<int64_t>(position + i / group - window + 1, 0);
  }
};

// Scores of R rows with keys `from` .. `from` + kScoreVectors * kLanes.
template <int R>
void score(const float* q, const float* keys, int64_t dim, int64_t padded, int64_t from, float* out) {
  V sums[R][kScoreVectors];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < kScoreVectors; ++v) sums[r][v] = zero();
  for (int64_t d = 0; d < dim; ++d) {
    V loaded[kScoreVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kScoreVectors; ++v) loaded[v] = load(keys + d * kKeyBlock + from + v * kLanes);
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) {
      const V row = splat(q[r * padded + d]);
#pragma GCC unroll 4
      for (int v = 0; v < kScoreVectors; ++v) sums[r][v] = fma(row, loaded[v], sums[r][v]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < kScoreVectors; ++v) store(out + r * kKeyBlock + from + v * kLanes, sums[r][v]);
}

// A row's scores become weights; its sums shrink to the new peak.
inline void weigh(const Queries& rows, int64_t i, int64_t padded) {
  float* weights = rows.weights + i * kKeyBlock;
  const int64_t first = rows.first(i), last = rows.last(i);
  // Vectors that hold a key that the row sees.
  const int64_t begin = first / kLanes * kLanes, end = (last / kLanes + 1) * kLanes;
  for (int64_t t = begin; t < first; ++t) weights[t] = -1e30f;
  for (int64_t t = last + 1; t < end; ++t) weights[t] = -1e30f;
  V peaks = load(weights + begin);
  for (int64_t t = begin + kLanes; t < end; t += kLanes) peaks = vmax(peaks, load(weights + t));
  float peak = reduce_max(peaks);
  if (!(peak > rows.peaks[i])) peak = rows.peaks[i];
  // Only the first block shrinks from -inf, where there is nothing to shrink.
  float shrink = 1.0f;
  if (peak != rows.peaks[i]) {
    float lanes[kLanes];
    store(lanes, exp_negative(splat(rows.peaks[i] - peak)));
    shrink = lanes[0];
    for (int64_t d = 0; d < padded; d += kLanes)
      store(rows.sums + i * padded + d, mul(load(rows.sums + i * padded + d), splat(shrink)));
  }
  for (int64_t t = begin; t < end; t += kLanes)
    store(weights + t, exp_negative(sub(load(weights + t), splat(peak))));
  for (int64_t t = begin; t < first; ++t) weights[t] = 0.0f;
  for (int64_t t = last + 1; t < end; ++t) weights[t] = 0.0f;
  V totals = zero();
  for (int64_t t = begin; t < end; t += kLanes) totals = add(totals, load(weights + t));
  rows.totals[i] = rows.totals[i] * shrink + reduce_add(totals);
  rows.peaks[i] = peak;
}

// Adds values of keys first .. last to the sums of R rows.
template <int R>
void add_values(float* sums, const float* weights, const float* values, int64_t padded, int64_t first,
                int64_t last) {
  for (int64_t d = 0; d < padded; d += kScoreVectors * kLanes) {
    V kept[R][kScoreVectors];
    const auto is_inside = [&](int v) { return d + v * kLanes < padded; };
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < kScoreVectors; ++v)
        kept[r][v] = is_inside(v) ? load(sums + r * padded + d + v * kLanes) : zero();
    // The scratch goes on past a row's last value, which the next vectors then read in vain.
    const float* from = values + d;
    for (int64_t t = first; t <= last; ++t) {
      V loaded[kScoreVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kScoreVectors; ++v) loaded[v] = load(from + t * padded + v * kLanes);
#pragma GCC unroll 6
      for (int r = 0; r < R; ++r) {
        const V weight = splat(weights[r * kKeyBlock + t]);
#pragma GCC unroll 4
        for (int v = 0; v < kScoreVectors; ++v) kept[r][v] = fma(weight, loaded[v], kept[r][v]);
      }
    }
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < kScoreVectors; ++v)
        if (is_inside(v)) store(sums + r * padded + d + v * kLanes, kept[r][v]);
  }
}

// R rows from `i` on against a block; each sees one of its keys at least.
template <int R>
void attend_rows(const Queries& rows, int64_t i, const float* keys, const float* values, int64_t dim,
                 int64_t padded) {
  constexpr int64_t step = kScoreVectors * kLanes;
  float* weights = rows.weights + i * kKeyBlock;
  for (int64_t from = rows.first(i) / step * step; from <= rows.last(i + R - 1); from += step)
    score<R>(rows.q + i * padded, keys, dim, padded, from, weights);
  for (int r = 0; r < R; ++r) weigh(rows, i + r, padded);
  // Keys that all R rows see, then what is left of each. A value that a row does not see may be
  // no number, which a weight of 0 would not hide.
  float* sums = rows.sums + i * padded;
  const int64_t first = rows.first(i + R - 1), last = rows.last(i);
  const auto add_one = [&](int r, int64_t from, int64_t to) {
    add_values<1>(sums + r * padded, weights + r * kKeyBlock, values, padded, from, to);
  };
  for (int r = 0; r < R; ++r) add_one(r, rows.first(i + r), std::min(first - 1, rows.last(i + r)));
  if (first <= last) add_values<R>(sums, weights, values, padded, first, last);
  for (int r = 0; r < R; ++r) add_one(r, std::max(first, last + 1), rows.last(i + r));
}

// Copies keys and values `from` .. `to` of one head: values [position - start][padded], keys
// transposed to [padded][kKeyBlock]. `plain` holds kLanes rows.
inline void load_block(const AttentionJob& job, const int32_t* table, int64_t kv_head, int64_t start,
                       int64_t from, int64_t to, float* plain, float* keys, float* values) {
  const int64_t dim = job.head_dim, padded = jaxserve::padded_dim(dim);
  int64_t in_page = from % job.page_size, page = from / job.page_size;
  const int64_t stride = 2 * job.num_kv_heads * dim;  // from a token to the next one of its page
  const bool can_copy = !job.pages_are_bfloat16 && dim == padded;
  for (int64_t first = (from - start) / kLanes * kLanes; first <= to - start; first += kLanes) {
    if (can_copy && first >= from - start && first + kLanes - 1 <= to - start &&
        in_page + kLanes <= job.page_size) {
      const float* rows = static_cast<const float*>(job.pages) +
                          (table[page] * job.page_size + in_page) * stride + kv_head * dim;
      for (int64_t d = 0; d < dim; d += kLanes)
        transpose(rows + d, stride, keys + d * kKeyBlock + first, kKeyBlock);
      for (int64_t t = 0; t < kLanes; ++t)
        for (int64_t d = 0; d < dim; d += kLanes)
          store(values + (first + t) * padded + d, load(rows + t * stride + stride / 2 + d));
      in_page += kLanes;
      if (in_page == job.page_size) in_page = 0, ++page;
      continue;
    }
    for (int64_t t = first; t < first + kLanes; ++t) {
      float* row = plain + (t - first) * padded;
      if (t < from - start || t > to - start) {
        for (int64_t d = 0; d < padded; d += kLanes) store(row + d, zero());
        continue;
      }
      const int64_t token = table[page] * job.page_size + in_page;
      const int64_t at = token * stride + kv_head * dim;
      load_row(job.pages, job.pages_are_bfloat16, at, dim, padded, row);
      load_row(job.pages, job.pages_are_bfloat16, at + stride / 2, dim, padded, values + t * padded);
      if (++in_page == job.page_size) in_page = 0, ++page;
    }
    for (int64_t d = 0; d < dim; d += kLanes)
      transpose(plain + d, padded, keys + d * kKeyBlock + first, kKeyBlock);
  }
}

// Rows `begin` .. `end` - 1, in tiles.
void attend_block(const Queries& rows, int64_t begin, int64_t end, const float* keys,
                  const float* values, int64_t dim, int64_t padded) {
  for (int64_t i = begin; i < end;) {
    const int64_t left = std::min<int64_t>(end - i, kQueryRows);
    if constexpr (kQueryRows >= 6) {
      if (left >= 6) {
        attend_rows<6>(rows, i, keys, values, dim, padded), i += 6;
        continue;
      }
    }
    if (left >= 4) attend_rows<4>(rows, i, keys, values, dim, padded), i += 4;
    else if (left >= 3) attend_rows<3>(rows, i, keys, values, dim, padded), i += 3;
    else if (left >= 2) attend_rows<2>(rows, i, keys, values, dim, padded), i += 2;
    else attend_rows<1>(rows, i, keys, values, dim, padded), i += 1;
  }
}

inline void store_row(const AttentionJob& job, int64_t at, const float* sums, float total) {
  const float inverse = 1.0f / total;
  int64_t d = 0;
  for (; d + kLanes <= job.head_dim; d += kLanes) {
    const V values = mul(load(sums + d), splat(inverse));
    if (job.rows_are_bfloat16) store_bfloat16(static_cast<uint16_t*>(job.out) + at + d, values);
    else store(static_cast<float*>(job.out) + at + d, values);
  }
  for (; d < job.head_dim; ++d) {
    const float value = sums[d] * inverse;
    if (job.rows_are_bfloat16)
      static_cast<uint16_t*>(job.out)[at + d] = jaxserve::float_to_bfloat16(value);
    else
      static_cast<float*>(job.out)[at + d] = value;
  }
}

void attend(const AttentionJob& job, int64_t first_row, int64_t num_rows, int64_t kv_head,
            float* scratch) {
  const int64_t group = job.num_heads / job.num_kv_heads, dim = job.head_dim;
  const int64_t padded = jaxserve::padded_dim(dim), num_queries = num_rows * group;
  const float scale = 1.0f / std::sqrt(static_cast<float>(dim));
  float* keys = scratch;
  float* values = keys + kKeyBlock * padded;
  float* plain = values + kKeyBlock * padded;
  Queries rows{};
  rows.q = plain + jaxserve::kMaxLanes * padded;
  rows.sums = rows.q + num_queries * padded;
  rows.weights = rows.sums + num_queries * padded;
  rows.peaks = rows.weights + num_queries * kKeyBlock;
  rows.totals = rows.peaks + num_queries;
  rows.group = group, rows.window = job.window;
  const auto place = [&](int64_t i) {
    return ((first_row + i / group) * job.num_heads + kv_head * group + i % group) * dim;
  };
  for (int64_t i = 0; i < num_queries; ++i) {
    load_row(job.q, job.rows_are_bfloat16, place(i), dim, padded, rows.q + i * padded);
    for (int64_t d = 0; d < padded; ++d)
      rows.q[i * padded + d] *= scale, rows.sums[i * padded + d] = 0.0f;
    rows.peaks[i] = -1e30f, rows.totals[i] = 0.0f;
  }
  const int64_t first_position = job.row_positions[first_row];
  const int64_t last_position = first_position + num_rows - 1;
  const int32_t* table = job.page_table + job.row_slots[first_row] * job.table_width;
  const int64_t first_key = std::max<int64_t>(first_position - job.window + 1, 0);
  for (int64_t start = first_key / kKeyBlock * kKeyBlock; start <= last_position; start += kKeyBlock) {
    load_block(job, table, kv_head, start, std::max(start, first_key),
               std::min(last_position, start + kKeyBlock - 1), plain, keys, values);
    rows.position = first_position - start;
    // Rows before the block see none of it, nor do those whose windows begin after it.
    int64_t begin = 0, end = num_queries;
    while (begin < end && rows.last(begin) < 0) begin += group;
    while (begin < end && rows.first(end - 1) >= kKeyBlock) end -= group;
    attend_block(rows, begin, end, keys, values, dim, padded);
  }
  for (int64_t i = 0; i < num_queries; ++i)
    store_row(job, place(i), rows.sums + i * padded, rows.totals[i]);
}

}  // namespace
