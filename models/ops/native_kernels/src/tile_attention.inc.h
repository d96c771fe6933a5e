// Attention by the matrix unit (AMX) of bfloat16 queries and pages: included after tiles.inc.h and
// attention.inc.h, whose blocks of keys and online softmax these are.
//
// All is turned so that lanes are queries, 16 at once: scores [key][query] are the pages' keys as
// they lie times queries, outputs [dimension][query] are transposed values times weights. Nothing
// that a lane holds depends on the other lanes, and every sum has one order: so a row's bits are the
// same alone, in a tile of rows and beside others.
#pragma once
#include <algorithm>
#include <cmath>
#include <vector>

#include "exponential.inc.h"
#include "kernels.h"

namespace {

constexpr int64_t kLaneQueries = 16;
constexpr int64_t kPairs = kKeyBlock / 2;  // of neighbouring keys

// 16 queries and what belongs to them; vectors have a lane for each.
struct QueryLanes {
  uint16_t* q;      // [dim / 2][16][2]
  float* outputs;   // [dim][16], not yet over the totals
  float* peaks;     // [16]
  float* totals;    // [16]
};

struct KeyBlock {
  int64_t start, from, to;  // its first position; the first and last one that any row sees
  const uint8_t* keys[kKeyBlock / kTileRows];  // of 16 positions each; nullptr where no row looks
  int64_t stride_bytes;     // from one position to the next
  uint16_t* values;         // [dim][64]: transposed; zeros outside `from` .. `to`
  bool is_finite;           // all values

  bool has(int64_t tile) const { return keys[tile] != nullptr; }
};

inline const uint16_t* token_at(const AttentionJob& job, const int32_t* table, int64_t position,
                                int64_t kv_head) {
  const int64_t token = table[position / job.page_size] * job.page_size + position % job.page_size;
  return static_cast<const uint16_t*>(job.pages) + (token * 2 * job.num_kv_heads + kv_head) * job.head_dim;
}

// Values of two keys side by side in each lane, [16 dimensions]; nullptr stands for zeros.
inline V value_pairs(const uint16_t* even, const uint16_t* odd) {
  const auto wide = [](const uint16_t* p) {
    return p == nullptr ? _mm512_setzero_si512()
                        : _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  };
  return _mm512_castsi512_ps(_mm512_or_si512(wide(even), _mm512_slli_epi32(wide(odd), 16)));
}

// Whether each of the 32 bfloat16 in a vector is a number: an exponent of ones marks the others.
inline bool all_finite(V pairs) {
  const __m512i exponents = _mm512_set1_epi16(0x7f80);
  const __m512i bits = _mm512_and_si512(_mm512_castps_si512(pairs), exponents);
  return _mm512_cmpeq_epi16_mask(bits, exponents) == 0;
}

// Transposes values `block.from` .. `last`. `pairs` holds 16 vectors.
void load_values(const AttentionJob& job, const int32_t* table, int64_t kv_head, int64_t last,
                 float* pairs, KeyBlock& block) {
  const int64_t to_value = job.num_kv_heads * job.head_dim;
  block.is_finite = true;
  const uint16_t* rows[kKeyBlock];
  for (int64_t t = 0; t < kKeyBlock; ++t) {
    const int64_t position = block.start + t;
    const bool is_seen = position >= block.from && position <= last;
    rows[t] = is_seen ? token_at(job, table, position, kv_head) + to_value : nullptr;
  }
  const auto at = [&](int64_t t, int64_t d) { return rows[t] == nullptr ? nullptr : rows[t] + d; };
  for (int64_t half = 0; half < kPairs; half += kLanes) {
    for (int64_t d = 0; d < job.head_dim; d += kLanes) {
      for (int64_t j = 0; j < kLanes; ++j) {
        const V pair = value_pairs(at(2 * (half + j), d), at(2 * (half + j) + 1, d));
        block.is_finite &= all_finite(pair);
        store(pairs + j * kLanes, pair);
      }
      float* out = reinterpret_cast<float*>(block.values) + d * kPairs + half;
      transpose(pairs, kLanes, out, kPairs);
    }
  }
}

KeyBlock find_keys(const AttentionJob& job, const int32_t* table, int64_t kv_head, int64_t start,
                   int64_t from, int64_t to) {
  KeyBlock block{};
  block.start = start, block.from = from, block.to = to;
  block.stride_bytes = 2 * job.num_kv_heads * job.head_dim * 2;
  for (int64_t tile = 0; tile < kKeyBlock / kTileRows; ++tile) {
    const int64_t first = start + tile * kTileRows;
    if (first <= to && first + kTileRows > from)
      block.keys[tile] = reinterpret_cast<const uint8_t*>(token_at(job, table, first, kv_head));
  }
  return block;
}

// Tiles: scores or outputs in 0, what lies in rows (keys, values) in 4, what lies in columns in 6.
void shape_whole_tiles() {
  TileShapes shapes;
  for (int tile : {0, 4, 6}) shapes.set(tile, kTileRows, kLineBytes);
  write_memory();
  _tile_loadconfig(&shapes);
}

void score_keys(const QueryLanes& lanes, const KeyBlock& block, int64_t dim, float* scores) {
  write_memory();
  for (int64_t tile = 0; tile < kKeyBlock / kTileRows; ++tile) {
    if (!block.has(tile)) continue;
    _tile_zero(0);
    for (int64_t d = 0; d < dim; d += kTileInputs) {
      _tile_loadd(4, block.keys[tile] + 2 * d, block.stride_bytes);
      _tile_loadd(6, lanes.q + d * kLaneQueries, kLineBytes);
      _tile_dpbf16ps(0, 4, 6);
    }
    _tile_stored(0, scores + tile * kTileRows * kLaneQueries, kLineBytes);
  }
}

// What the lanes see: first[i] .. last[i], counted from the block's first key.
struct Seen {
  alignas(64) int32_t first[kLaneQueries], last[kLaneQueries];
  bool all_of_block;  // every lane sees all 64 keys

  __mmask16 lanes(int64_t t) const {
    const __m512i key = _mm512_set1_epi32(static_cast<int32_t>(t));
    return _mm512_cmple_epi32_mask(_mm512_load_si512(first), key) &
           _mm512_cmpge_epi32_mask(_mm512_load_si512(last), key);
  }
};

// Scores become weights in bfloat16, two keys side by side: `pairs` is [32][16][2]. Returns what
// the outputs of before shrink by.
V weigh_lanes(const QueryLanes& lanes, const Seen& seen, float scale, float* scores, uint32_t* pairs) {
  constexpr int kChains = 4;  // of keys t, t + 4, ...: one sum would wait for itself
  const V lowest = splat(-1e30f), factor = splat(scale);
  V peaks[kChains] = {lowest, lowest, lowest, lowest}, sums[kChains] = {zero(), zero(), zero(), zero()};
  for (int64_t t = 0; t < kKeyBlock; ++t) {
    V score = mul(load(scores + t * kLanes), factor);
    if (!seen.all_of_block) score = _mm512_mask_mov_ps(lowest, seen.lanes(t), score);
    store(scores + t * kLanes, score);
    peaks[t % kChains] = vmax(peaks[t % kChains], score);
  }
  const V before = load(lanes.peaks);
  const V peak = vmax(vmax(vmax(peaks[0], peaks[1]), vmax(peaks[2], peaks[3])), before);
  const auto weight = [&](int64_t t) {
    const V value = exp_negative(sub(load(scores + t * kLanes), peak));
    return seen.all_of_block ? value : _mm512_maskz_mov_ps(seen.lanes(t), value);
  };
  for (int64_t t = 0; t < kKeyBlock; t += 2) {
    const V even = weight(t), odd = weight(t + 1);
    sums[t % kChains] = add(sums[t % kChains], even);
    sums[(t + 1) % kChains] = add(sums[(t + 1) % kChains], odd);
    const __m512i low = _mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(even)));
    const __m512i high = _mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(odd)));
    _mm512_storeu_si512(pairs + t / 2 * kLanes, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
  }
  const V shrink = exp_negative(sub(before, peak));
  const V total = add(add(sums[0], sums[1]), add(sums[2], sums[3]));
  store(lanes.totals, fma(load(lanes.totals), shrink, total));
  store(lanes.peaks, peak);
  return shrink;
}

void add_weighted_values(const QueryLanes& lanes, const KeyBlock& block, V shrink, int64_t dim,
                         const uint32_t* pairs) {
  if (_mm512_cmp_ps_mask(shrink, splat(1.0f), _CMP_NEQ_UQ) != 0)
    for (int64_t d = 0; d < dim; ++d)
      store(lanes.outputs + d * kLanes, mul(load(lanes.outputs + d * kLanes), shrink));
  write_memory();
  for (int64_t d = 0; d < dim; d += kTileRows) {
    _tile_loadd(0, lanes.outputs + d * kLanes, kLineBytes);
    for (int64_t key = 0; key < kKeyBlock; key += kTileInputs) {
      if (!block.has(key / kTileRows) && !block.has(key / kTileRows + 1)) continue;
      _tile_loadd(4, block.values + d * kKeyBlock + key, kKeyBlock * 2);
      _tile_loadd(6, pairs + key / 2 * kLanes, kLineBytes);
      _tile_dpbf16ps(0, 4, 6);
    }
    _tile_stored(0, lanes.outputs + d * kLanes, kLineBytes);
  }
}

// One KV head's part of the scratch; `num_lanes` groups of 16 queries.
struct TileScratch {
  float *scores, *transposing, *state;
  uint32_t* pairs;
  uint16_t* values;
  int64_t dim;

  TileScratch(float* memory, int64_t dim) : dim(dim) {
    scores = memory;
    transposing = scores + kKeyBlock * kLanes;
    pairs = reinterpret_cast<uint32_t*>(transposing + kLanes * kLanes);
    values = reinterpret_cast<uint16_t*>(pairs + kPairs * kLanes);
    state = reinterpret_cast<float*>(values + dim * kKeyBlock);
  }
  QueryLanes lanes(int64_t index) const {
    float* own = state + index * kLaneQueries * (dim / 2 + dim + 2);
    float* outputs = own + kLaneQueries * dim / 2;
    float* peaks = outputs + kLaneQueries * dim;
    return {reinterpret_cast<uint16_t*>(own), outputs, peaks, peaks + kLaneQueries};
  }
};

struct TileRun {
  const AttentionJob& job;
  int64_t first_row, num_rows, kv_head;
  TileScratch scratch;

  int64_t group() const { return job.num_heads / job.num_kv_heads; }
  int64_t num_queries() const { return num_rows * group(); }
  int64_t num_lanes() const { return (num_queries() + kLaneQueries - 1) / kLaneQueries; }
  int64_t place(int64_t i) const {
    return ((first_row + i / group()) * job.num_heads + kv_head * group() + i % group()) * job.head_dim;
  }
  int64_t position(int64_t i) const { return job.row_positions[first_row] + i / group(); }

  void load_queries() const {
    const uint32_t* q = static_cast<const uint32_t*>(job.q);  // pairs of dimensions
    for (int64_t index = 0; index < num_lanes(); ++index) {
      const QueryLanes lanes = scratch.lanes(index);
      uint32_t* pairs = reinterpret_cast<uint32_t*>(lanes.q);
      for (int64_t lane = 0; lane < kLaneQueries; ++lane) {
        const int64_t i = index * kLaneQueries + lane;
        const uint32_t* row = i < num_queries() ? q + place(i) / 2 : nullptr;
        for (int64_t d = 0; d < job.head_dim / 2; ++d)
          pairs[d * kLaneQueries + lane] = row == nullptr ? 0 : row[d];
      }
      for (int64_t d = 0; d < job.head_dim; ++d) store(lanes.outputs + d * kLanes, zero());
      store(lanes.peaks, splat(-1e30f));
      store(lanes.totals, zero());
    }
  }

  // What the queries from index * 16 on see of a block; those outside begin .. end - 1 see nothing.
  bool look(int64_t index, const KeyBlock& block, int64_t begin, int64_t end, Seen& seen) const {
    bool any = false;
    seen.all_of_block = true;
    for (int64_t lane = 0; lane < kLaneQueries; ++lane) {
      const int64_t i = index * kLaneQueries + lane, at = position(i) - block.start;
      const bool is_in = i >= begin && i < end;
      const int64_t first = std::max<int64_t>(at - job.window + 1, 0);
      const int64_t last = is_in ? std::min(at, kKeyBlock - 1) : -1;
      seen.first[lane] = static_cast<int32_t>(std::min(first, kKeyBlock));
      seen.last[lane] = static_cast<int32_t>(std::max<int64_t>(last, -1));
      any |= last >= first;
      // Lanes without a query may see what they like.
      seen.all_of_block &= i >= num_queries() || (first == 0 && last == kKeyBlock - 1);
    }
    return any;
  }

  void attend_block(const KeyBlock& block, int64_t begin, int64_t end) const {
    const float scale = 1.0f / std::sqrt(static_cast<float>(job.head_dim));
    for (int64_t index = begin / kLaneQueries; index * kLaneQueries < end; ++index) {
      Seen seen;
      if (!look(index, block, begin, end, seen)) continue;
      const QueryLanes lanes = scratch.lanes(index);
      score_keys(lanes, block, job.head_dim, scratch.scores);
      const V shrink = weigh_lanes(lanes, seen, scale, scratch.scores, scratch.pairs);
      add_weighted_values(lanes, block, shrink, job.head_dim, scratch.pairs);
    }
  }

  // The same, and the lanes of other rows keep what they have.
  void attend_alone(const KeyBlock& block, int64_t begin, int64_t end) const {
    const int64_t first = begin / kLaneQueries, last = (end - 1) / kLaneQueries;
    const int64_t size = job.head_dim * kLaneQueries;
    std::vector<float> before(static_cast<size_t>((last - first + 1) * size));
    for (int64_t index = first; index <= last; ++index)
      std::copy_n(scratch.lanes(index).outputs, size, before.data() + (index - first) * size);
    attend_block(block, begin, end);
    for (int64_t i = first * kLaneQueries; i < (last + 1) * kLaneQueries; ++i) {
      if (i >= begin && i < end) continue;
      const int64_t index = i / kLaneQueries, lane = i % kLaneQueries;
      for (int64_t at = lane; at < size; at += kLaneQueries)
        scratch.lanes(index).outputs[at] = before[static_cast<size_t>((index - first) * size + at)];
    }
  }

  void store_outputs() const {
    for (int64_t i = 0; i < num_queries(); ++i) {
      const QueryLanes lanes = scratch.lanes(i / kLaneQueries);
      const int64_t lane = i % kLaneQueries;
      const float inverse = 1.0f / lanes.totals[lane];
      uint16_t* out = static_cast<uint16_t*>(job.out) + place(i);
      for (int64_t d = 0; d < job.head_dim; ++d)
        out[d] = jaxserve::float_to_bfloat16(lanes.outputs[d * kLanes + lane] * inverse);
    }
  }
};

void attend_tiles(const AttentionJob& job, int64_t first_row, int64_t num_rows, int64_t kv_head,
                  float* memory) {
  if (!job.rows_are_bfloat16 || !job.pages_are_bfloat16 || job.head_dim % kTileInputs != 0 ||
      job.page_size % kTileRows != 0)
    return attend(job, first_row, num_rows, kv_head, memory);
  const TileRun run{job, first_row, num_rows, kv_head, TileScratch(memory, job.head_dim)};
  const int32_t* table = job.page_table + job.row_slots[first_row] * job.table_width;
  const int64_t first_position = run.position(0), last_position = first_position + num_rows - 1;
  const int64_t first_key = std::max<int64_t>(first_position - job.window + 1, 0);
  shape_whole_tiles();
  run.load_queries();
  for (int64_t start = first_key / kKeyBlock * kKeyBlock; start <= last_position; start += kKeyBlock) {
    KeyBlock block = find_keys(job, table, kv_head, start, std::max(start, first_key),
                               std::min(last_position, start + kKeyBlock - 1));
    block.values = run.scratch.values;
    load_values(job, table, kv_head, block.to, run.scratch.transposing, block);
    if (block.is_finite) {
      run.attend_block(block, 0, run.num_queries());
      continue;
    }
    // A weight of 0 does not hide what is no number: every row meets only what it sees.
    for (int64_t row = 0; row < num_rows; ++row) {
      const int64_t last = std::min(first_position + row, block.to);
      if (last < start) continue;
      block.from = std::max(start, first_position + row - job.window + 1);
      load_values(job, table, kv_head, last, run.scratch.transposing, block);
      run.attend_alone(block, row * run.group(), (row + 1) * run.group());
    }
  }
  run.store_outputs();
  _tile_release();
}

}  // namespace
