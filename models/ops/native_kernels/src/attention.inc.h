// Causal attention over pages, once for each instruction set: included after isa_*.h.
//
// A row's keys are taken in blocks of 64 that begin at position 0, by an online softmax (Milakov
// and Gimelshein, "Online normalizer calculation for softmax", 2018). Within a block all sums have
// one order, so a row's bits depend neither on the rows beside it nor on how it was cut into tiles.
#pragma once
#include <cmath>

#include "kernels.h"

namespace {

using jaxserve::AttentionJob;
using jaxserve::kKeyBlock;

// e^x for x <= 0: e^x = 2^n * e^r, |r| <= ln(2) / 2, and Taylor's polynomial of degree 7 (its
// remainder is below 4e-9). What float32 cannot hold becomes 0.
inline V exp_negative(V x) {
  const V floored = vmax(splat(-87.0f), x);  // in this order a NaN stays
  const V n = round_even(mul(floored, splat(1.44269504f)));
  V r = fma(n, splat(-0.693145752f), floored);
  r = fma(n, splat(-1.42860677e-6f), r);
  V p = splat(1.0f / 5040);
  p = fma(p, r, splat(1.0f / 720));
  p = fma(p, r, splat(1.0f / 120));
  p = fma(p, r, splat(1.0f / 24));
  p = fma(p, r, splat(1.0f / 6));
  p = fma(p, r, splat(0.5f));
  p = fma(p, r, splat(1.0f));
  p = fma(p, r, splat(1.0f));
  return mul(p, power_of_two(n));
}

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

struct Query {
  float* q;        // [padded], scaled
  float* sum;      // [padded]: of values by weights
  float* scores;   // [kKeyBlock]
  float peak, total;
};

// Adds keys first .. last of the block (offsets in it) to one query's sums.
inline void add_keys(Query& query, const float* keys, const float* values, int64_t padded,
                     int64_t first, int64_t last) {
  const float masked = -1e30f;
  for (int64_t t = 0; t < kKeyBlock; ++t) {
    if (t < first || t > last) {
      query.scores[t] = masked;
      continue;
    }
    V dot = zero();
    for (int64_t d = 0; d < padded; d += kLanes)
      dot = fma(load(query.q + d), load(keys + t * padded + d), dot);
    query.scores[t] = reduce_add(dot);
  }
  V peaks = load(query.scores);
  for (int64_t t = kLanes; t < kKeyBlock; t += kLanes) peaks = vmax(peaks, load(query.scores + t));
  float peak = reduce_max(peaks);
  if (!(peak > query.peak)) peak = query.peak;
  // Only the first block shrinks from -inf, where there is nothing to shrink.
  float shrink = 1.0f;
  if (peak != query.peak) {
    float lanes[kLanes];
    store(lanes, exp_negative(splat(query.peak - peak)));
    shrink = lanes[0];
  }
  V totals = zero();
  for (int64_t t = 0; t < kKeyBlock; t += kLanes) {
    const V weights = exp_negative(sub(load(query.scores + t), splat(peak)));
    store(query.scores + t, weights);
  }
  for (int64_t t = 0; t < kKeyBlock; ++t)
    if (t < first || t > last) query.scores[t] = 0.0f;
  for (int64_t t = 0; t < kKeyBlock; t += kLanes) totals = add(totals, load(query.scores + t));
  query.total = query.total * shrink + reduce_add(totals);
  query.peak = peak;
  for (int64_t d = 0; d < padded; d += 4 * kLanes) {
    const int64_t width = padded - d < 4 * kLanes ? padded - d : 4 * kLanes;
    V sums[4];
    const V factor = splat(shrink);
#pragma GCC unroll 4
    for (int64_t v = 0; v < 4; ++v)
      sums[v] = v * kLanes < width ? mul(load(query.sum + d + v * kLanes), factor) : zero();
    for (int64_t t = first; t <= last; ++t) {
      const V weight = splat(query.scores[t]);
#pragma GCC unroll 4
      for (int64_t v = 0; v < 4; ++v)
        if (v * kLanes < width)
          sums[v] = fma(weight, load(values + t * padded + d + v * kLanes), sums[v]);
    }
#pragma GCC unroll 4
    for (int64_t v = 0; v < 4; ++v)
      if (v * kLanes < width) store(query.sum + d + v * kLanes, sums[v]);
  }
}

void attend(const AttentionJob& job, int64_t first_row, int64_t num_rows, int64_t kv_head,
            float* scratch) {
  const int64_t group = job.num_heads / job.num_kv_heads, dim = job.head_dim;
  const int64_t padded = jaxserve::padded_dim(dim), num_queries = num_rows * group;
  const float scale = 1.0f / std::sqrt(static_cast<float>(dim));
  float* keys = scratch;
  float* values = keys + kKeyBlock * padded;
  float* q = values + kKeyBlock * padded;
  float* sum = q + num_queries * padded;
  float* scores = sum + num_queries * padded;
  float* peaks = scores + num_queries * kKeyBlock;
  float* totals = peaks + num_queries;
  const int64_t head = kv_head * group;
  for (int64_t i = 0; i < num_queries; ++i) {
    const int64_t at = ((first_row + i / group) * job.num_heads + head + i % group) * dim;
    load_row(job.q, job.rows_are_bfloat16, at, dim, padded, q + i * padded);
    for (int64_t d = 0; d < padded; ++d) q[i * padded + d] *= scale, sum[i * padded + d] = 0.0f;
    peaks[i] = -1e30f, totals[i] = 0.0f;
  }
  const int64_t first_position = job.row_positions[first_row];
  const int64_t last_position = first_position + num_rows - 1;
  const int32_t* table = job.page_table + job.row_slots[first_row] * job.table_width;
  const int64_t first_key = first_position - job.window + 1 > 0 ? first_position - job.window + 1 : 0;
  for (int64_t start = first_key / kKeyBlock * kKeyBlock; start <= last_position; start += kKeyBlock) {
    const int64_t end = last_position < start + kKeyBlock - 1 ? last_position : start + kKeyBlock - 1;
    for (int64_t position = start < first_key ? first_key : start; position <= end; ++position) {
      const int64_t page = table[position / job.page_size];
      const int64_t token = page * job.page_size + position % job.page_size;
      const int64_t key = ((token * 2) * job.num_kv_heads + kv_head) * dim;
      load_row(job.pages, job.pages_are_bfloat16, key, dim, padded, keys + (position - start) * padded);
      load_row(job.pages, job.pages_are_bfloat16, key + job.num_kv_heads * dim, dim, padded,
               values + (position - start) * padded);
    }
    for (int64_t i = 0; i < num_queries; ++i) {
      const int64_t position = first_position + i / group;
      int64_t first = position - job.window + 1 - start, last = position - start;
      if (first < 0) first = 0;
      if (last > kKeyBlock - 1) last = kKeyBlock - 1;
      if (first > last) continue;
      Query query{q + i * padded, sum + i * padded, scores + i * kKeyBlock, peaks[i], totals[i]};
      add_keys(query, keys, values, padded, first, last);
      peaks[i] = query.peak, totals[i] = query.total;
    }
  }
  for (int64_t i = 0; i < num_queries; ++i) {
    const int64_t at = ((first_row + i / group) * job.num_heads + head + i % group) * dim;
    const float inverse = 1.0f / totals[i];
    for (int64_t d = 0; d < dim; ++d) {
      const float value = sum[i * padded + d] * inverse;
      if (job.rows_are_bfloat16)
        static_cast<uint16_t*>(job.out)[at + d] = jaxserve::float_to_bfloat16(value);
      else
        static_cast<float*>(job.out)[at + d] = value;
    }
  }
}

}  // namespace
