// 8 lanes.
#pragma once
#include <immintrin.h>

#include <cstdint>

namespace {

constexpr int kLanes = 8;
constexpr int kFloatRows = 3;
constexpr int kIntRows = 4;
constexpr int kPanelRows = 6, kPanelVectors = 2;  // of products of many rows: 12 accumulators
constexpr int kManyRows = 16;  // from so many on, a product gains by panels
constexpr int kQueryRows = 4, kScoreVectors = 2;  // of attention: 8 accumulators

using V = __m256;
using VI = __m256i;
using Nibbles = VI;

inline V load(const float* p) { return _mm256_loadu_ps(p); }
inline void store(float* p, V v) { _mm256_storeu_ps(p, v); }
inline V splat(float x) { return _mm256_set1_ps(x); }
inline V zero() { return _mm256_setzero_ps(); }
inline V fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
inline V add(V a, V b) { return _mm256_add_ps(a, b); }
inline V sub(V a, V b) { return _mm256_sub_ps(a, b); }
inline V mul(V a, V b) { return _mm256_mul_ps(a, b); }
inline V vdiv(V a, V b) { return _mm256_div_ps(a, b); }
// `negative` where x < 0, else `other`.
inline V where_negative(V x, V negative, V other) {
  return _mm256_blendv_ps(other, negative, _mm256_cmp_ps(x, zero(), _CMP_LT_OQ));
}
// The first lane in which both are equal, or -1.
inline int first_equal(V a, V b) {
  const int lanes = _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_EQ_OQ));
  return lanes == 0 ? -1 : __builtin_ctz(lanes);
}
inline V vmax(V a, V b) { return _mm256_max_ps(a, b); }
inline V vmin(V a, V b) { return _mm256_min_ps(a, b); }
inline V vabs(V a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
inline V round_even(V a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline float reduce_add(V a) {
  __m128 sum = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
  return _mm_cvtss_f32(_mm_add_ss(sum, _mm_shuffle_ps(sum, sum, 1)));
}
inline float reduce_max(V a) {
  __m128 peak = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  peak = _mm_max_ps(peak, _mm_movehl_ps(peak, peak));
  return _mm_cvtss_f32(_mm_max_ss(peak, _mm_shuffle_ps(peak, peak, 1)));
}
inline V power_of_two(V n) {
  VI biased = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
  return _mm256_castsi256_ps(_mm256_slli_epi32(biased, 23));
}
inline __m128i load_half(const void* p) {
  return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
}
inline V load_bfloat16(const uint16_t* p) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load_half(p)), 16));
}
// As float_to_bfloat16 rounds.
inline void store_bfloat16(uint16_t* p, V v) {
  const VI bits = _mm256_castps_si256(v), high = _mm256_srli_epi32(bits, 16);
  const VI half = _mm256_add_epi32(_mm256_and_si256(high, _mm256_set1_epi32(1)), _mm256_set1_epi32(0x7fff));
  const VI rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, half), 16);
  const VI quiet = _mm256_or_si256(high, _mm256_set1_epi32(0x40));
  const VI is_nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  const VI wide = _mm256_blendv_epi8(rounded, quiet, is_nan);
  const VI narrow = _mm256_permute4x64_epi64(_mm256_packus_epi32(wide, wide), 0xd8);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(narrow));
}
inline V load_float16(const uint8_t* p) { return _mm256_cvtph_ps(load_half(p)); }
inline void load_pairs(const uint8_t* p, V& first, V& second) {
  VI raw = _mm256_loadu_si256(reinterpret_cast<const VI*>(p));
  first = _mm256_castsi256_ps(_mm256_slli_epi32(raw, 16));
  second = _mm256_castsi256_ps(_mm256_and_si256(raw, _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
}
inline V to_float(VI a) { return _mm256_cvtepi32_ps(a); }
inline void store_int8(int8_t* p, V v) {
  VI words = _mm256_packs_epi32(_mm256_cvtps_epi32(v), _mm256_setzero_si256());
  VI bytes = _mm256_packs_epi16(words, words);
  int32_t low = _mm256_extract_epi32(bytes, 0), high = _mm256_extract_epi32(bytes, 4);
  __builtin_memcpy(p, &low, 4);
  __builtin_memcpy(p + 4, &high, 4);
}

// 8 x 8 values.
inline void transpose(const float* in, int64_t in_stride, float* out, int64_t out_stride) {
  V a[8], b[8];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const V even = load(in + 2 * i * in_stride), odd = load(in + (2 * i + 1) * in_stride);
    a[2 * i] = _mm256_unpacklo_ps(even, odd);
    a[2 * i + 1] = _mm256_unpackhi_ps(even, odd);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) {
    b[i] = _mm256_shuffle_ps(a[i], a[i + 2], 0x44), b[i + 1] = _mm256_shuffle_ps(a[i], a[i + 2], 0xee);
    b[i + 2] = _mm256_shuffle_ps(a[i + 1], a[i + 3], 0x44);
    b[i + 3] = _mm256_shuffle_ps(a[i + 1], a[i + 3], 0xee);
  }
  // b[4 i + j] holds rows 4 i .. 4 i + 3 of columns j and 4 + j.
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    store(out + j * out_stride, _mm256_permute2f128_ps(b[j], b[4 + j], 0x20));
    store(out + (4 + j) * out_stride, _mm256_permute2f128_ps(b[j], b[4 + j], 0x31));
  }
}

// Has the compiler add at once: it would else keep all products of a group and spill them.
inline void add_now(VI& sum) { asm("" : "+x"(sum)); }

inline VI four_codes(const int8_t* p) {
  int32_t word;
  __builtin_memcpy(&word, p, 4);
  return _mm256_set1_epi32(word);
}
inline void load_nibbles(const uint8_t* p, VI& low, VI& high) {
  const VI mask = _mm256_set1_epi8(15);
  VI raw = _mm256_loadu_si256(reinterpret_cast<const VI*>(p));
  low = _mm256_and_si256(raw, mask);
  high = _mm256_and_si256(_mm256_srli_epi16(raw, 4), mask);
}

struct NibbleSum {
  // A lane's 16 products of at most 15 * 127 stay within 16 bits.
  VI sum = _mm256_setzero_si256();
  void step(VI weights, VI codes) {
    sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(weights, codes));
    add_now(sum);
  }
  VI finish() const { return _mm256_madd_epi16(sum, _mm256_set1_epi16(1)); }
};
struct ByteWeights {
  VI low, high;
  explicit ByteWeights(const uint8_t* p)
      : low(_mm256_cvtepu8_epi16(load_half(p))), high(_mm256_cvtepu8_epi16(load_half(p + 16))) {}
};
struct ByteSum {
  VI low = _mm256_setzero_si256(), high = _mm256_setzero_si256();
  void step(const ByteWeights& weights, const int8_t*, const int16_t* wide_codes) {
    int64_t word;
    __builtin_memcpy(&word, wide_codes, 8);
    const VI wide = _mm256_set1_epi64x(word);
    low = _mm256_add_epi32(low, _mm256_madd_epi16(weights.low, wide));
    high = _mm256_add_epi32(high, _mm256_madd_epi16(weights.high, wide));
    add_now(low);
    add_now(high);
  }
  VI finish(int32_t start) const {  // a column's two halves are neighbours
    VI sum = _mm256_permute4x64_epi64(_mm256_hadd_epi32(low, high), 0xd8);
    return _mm256_add_epi32(sum, _mm256_set1_epi32(start));
  }
};

}  // namespace
