// 16 lanes. JAXSERVE_VNNI chooses vpdpbusd over the two- and three-instruction products; the
// integers are the same.
#pragma once
#include <immintrin.h>

#include <cstdint>

namespace {

constexpr int kLanes = 16;
constexpr int kFloatRows = 12;  // accumulators of 12 rows x 32 columns fill 24 of 32 registers
constexpr int kIntRows = 8;
constexpr int kPanelRows = 12, kPanelVectors = 2;  // of products of many rows: 24 accumulators
constexpr int kManyRows = 48;  // from so many on, a product gains by panels
constexpr int kQueryRows = 6, kScoreVectors = 4;  // of attention: 24 accumulators

using V = __m512;
using VI = __m512i;
using Nibbles = VI;

inline V load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, V v) { _mm512_storeu_ps(p, v); }
inline V splat(float x) { return _mm512_set1_ps(x); }
inline V zero() { return _mm512_setzero_ps(); }
inline V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
inline V add(V a, V b) { return _mm512_add_ps(a, b); }
inline V sub(V a, V b) { return _mm512_sub_ps(a, b); }
inline V mul(V a, V b) { return _mm512_mul_ps(a, b); }
inline V vdiv(V a, V b) { return _mm512_div_ps(a, b); }
// `negative` where x < 0, else `other`.
inline V where_negative(V x, V negative, V other) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(x, zero(), _CMP_LT_OQ), other, negative);
}
// The first lane in which both are equal, or -1.
inline int first_equal(V a, V b) {
  const uint32_t lanes = _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ);
  return lanes == 0 ? -1 : __builtin_ctz(lanes);
}
inline V vmax(V a, V b) { return _mm512_max_ps(a, b); }
inline V vmin(V a, V b) { return _mm512_min_ps(a, b); }
inline V vabs(V a) { return _mm512_abs_ps(a); }
inline V round_even(V a) { return _mm512_roundscale_ps(a, 8); }
inline float reduce_add(V a) { return _mm512_reduce_add_ps(a); }
inline float reduce_max(V a) { return _mm512_reduce_max_ps(a); }
// 2^n of integral floats in -126 .. 127.
inline V power_of_two(V n) {
  VI biased = _mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127));
  return _mm512_castsi512_ps(_mm512_slli_epi32(biased, 23));
}
inline V load_bfloat16(const uint16_t* p) {
  VI wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
// As float_to_bfloat16 rounds.
inline void store_bfloat16(uint16_t* p, V v) {
  const VI bits = _mm512_castps_si512(v), high = _mm512_srli_epi32(bits, 16);
  const VI half = _mm512_add_epi32(_mm512_and_si512(high, _mm512_set1_epi32(1)), _mm512_set1_epi32(0x7fff));
  const VI rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, half), 16);
  const VI quiet = _mm512_or_si512(high, _mm512_set1_epi32(0x40));
  const __mmask16 is_nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtepi32_epi16(_mm512_mask_blend_epi32(is_nan, rounded, quiet)));
}
inline V load_float16(const uint8_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
// Pairs of bfloat16: the first and the second of each.
inline void load_pairs(const uint8_t* p, V& first, V& second) {
  VI raw = _mm512_loadu_si512(p);
  first = _mm512_castsi512_ps(_mm512_slli_epi32(raw, 16));
  second = _mm512_castsi512_ps(_mm512_and_si512(raw, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
}
inline V to_float(VI a) { return _mm512_cvtepi32_ps(a); }
// Stores lanes as int8; they are within -127 .. 127.
inline void store_int8(int8_t* p, V v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(v)));
}

// 16 x 16 values.
inline void transpose(const float* in, int64_t in_stride, float* out, int64_t out_stride) {
  V a[16], b[16];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    const V even = load(in + 2 * i * in_stride), odd = load(in + (2 * i + 1) * in_stride);
    a[2 * i] = _mm512_unpacklo_ps(even, odd);
    a[2 * i + 1] = _mm512_unpackhi_ps(even, odd);
  }
  const auto low = [](V x, V y) {
    return _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(x), _mm512_castps_pd(y)));
  };
  const auto high = [](V x, V y) {
    return _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(x), _mm512_castps_pd(y)));
  };
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    b[i] = low(a[i], a[i + 2]), b[i + 1] = high(a[i], a[i + 2]);
    b[i + 2] = low(a[i + 1], a[i + 3]), b[i + 3] = high(a[i + 1], a[i + 3]);
  }
  // b[4 i + j] holds rows 4 i .. 4 i + 3 of columns j, 4 + j, 8 + j and 12 + j.
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const V first = _mm512_shuffle_f32x4(b[j], b[4 + j], 0x44);
    const V second = _mm512_shuffle_f32x4(b[8 + j], b[12 + j], 0x44);
    const V third = _mm512_shuffle_f32x4(b[j], b[4 + j], 0xee);
    const V fourth = _mm512_shuffle_f32x4(b[8 + j], b[12 + j], 0xee);
    store(out + j * out_stride, _mm512_shuffle_f32x4(first, second, 0x88));
    store(out + (4 + j) * out_stride, _mm512_shuffle_f32x4(first, second, 0xdd));
    store(out + (8 + j) * out_stride, _mm512_shuffle_f32x4(third, fourth, 0x88));
    store(out + (12 + j) * out_stride, _mm512_shuffle_f32x4(third, fourth, 0xdd));
  }
}

// Has the compiler add at once: it would else keep all products of a group and spill them.
inline void add_now(VI& sum) { asm("" : "+v"(sum)); }

inline VI four_codes(const int8_t* p) {
  int32_t word;
  __builtin_memcpy(&word, p, 4);
  return _mm512_set1_epi32(word);
}
inline void load_nibbles(const uint8_t* p, VI& low, VI& high) {
  const VI mask = _mm512_set1_epi8(15);
  VI raw = _mm512_loadu_si512(p);
  low = _mm512_and_si512(raw, mask);
  high = _mm512_and_si512(_mm512_srli_epi16(raw, 4), mask);
}

#if defined(JAXSERVE_VNNI)
struct NibbleSum {  // of unsigned 4-bit codes times signed 8-bit ones
  VI sum = _mm512_setzero_si512();
  void step(VI weights, VI codes) { sum = _mm512_dpbusd_epi32(sum, weights, codes); }
  VI finish() const { return sum; }
};
struct ByteWeights {
  VI raw;
  explicit ByteWeights(const uint8_t* p) : raw(_mm512_loadu_si512(p)) {}
};
struct ByteSum {  // of unsigned 8-bit codes times signed 8-bit ones
  VI sum = _mm512_setzero_si512();
  void step(const ByteWeights& weights, const int8_t* codes, const int16_t*) {
    sum = _mm512_dpbusd_epi32(sum, weights.raw, four_codes(codes));
  }
  VI finish(int32_t start) const { return _mm512_add_epi32(sum, _mm512_set1_epi32(start)); }
};
#else
struct NibbleSum {
  // A lane's 16 products of at most 15 * 127 stay within 16 bits.
  VI sum = _mm512_setzero_si512();
  void step(VI weights, VI codes) {
    sum = _mm512_add_epi16(sum, _mm512_maddubs_epi16(weights, codes));
    add_now(sum);
  }
  VI finish() const { return _mm512_madd_epi16(sum, _mm512_set1_epi16(1)); }
};
struct ByteWeights {
  VI low, high;
  explicit ByteWeights(const uint8_t* p)
      : low(_mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))),
        high(_mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p) + 1))) {}
};
struct ByteSum {
  VI low = _mm512_setzero_si512(), high = _mm512_setzero_si512();
  void step(const ByteWeights& weights, const int8_t*, const int16_t* wide_codes) {
    int64_t word;
    __builtin_memcpy(&word, wide_codes, 8);
    const VI wide = _mm512_set1_epi64(word);
    low = _mm512_add_epi32(low, _mm512_madd_epi16(weights.low, wide));
    high = _mm512_add_epi32(high, _mm512_madd_epi16(weights.high, wide));
    add_now(low);
    add_now(high);
  }
  VI finish(int32_t start) const {  // a column's two halves are neighbours
    const VI even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const VI odd = _mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
    VI sum = _mm512_add_epi32(_mm512_permutex2var_epi32(low, even, high),
                              _mm512_permutex2var_epi32(low, odd, high));
    return _mm512_add_epi32(sum, _mm512_set1_epi32(start));
  }
};
#endif

}  // namespace
