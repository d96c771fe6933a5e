// Four lanes in plain C++: for processors without the others, and the oracle of their integers.
#pragma once
#include <cstdint>
#include <cstring>

#include "kernels.h"

namespace {

constexpr int kLanes = 4;
constexpr int kFloatRows = 1;
constexpr int kIntRows = 1;
constexpr int kPanelRows = 4, kPanelVectors = 2;  // of products of many rows
constexpr int kManyRows = 8;  // from so many on, a product gains by panels
constexpr int kQueryRows = 4, kScoreVectors = 1;  // of attention

typedef float V __attribute__((vector_size(16)));
typedef int32_t VI __attribute__((vector_size(16)));
struct Bytes {
  uint8_t at[16];
};

inline V load(const float* p) {
  V v;
  std::memcpy(&v, p, 16);
  return v;
}
inline void store(float* p, V v) { std::memcpy(p, &v, 16); }
inline V splat(float x) { return V{x, x, x, x}; }
inline V zero() { return V{}; }
inline V fma(V a, V b, V c) { return a * b + c; }
inline V add(V a, V b) { return a + b; }
inline V sub(V a, V b) { return a - b; }
inline V mul(V a, V b) { return a * b; }
inline V vdiv(V a, V b) { return a / b; }
// `negative` where x < 0, else `other`.
inline V where_negative(V x, V negative, V other) {
  for (int i = 0; i < 4; ++i) other[i] = x[i] < 0 ? negative[i] : other[i];
  return other;
}
// The first lane in which both are equal, or -1.
inline int first_equal(V a, V b) {
  for (int i = 0; i < 4; ++i)
    if (a[i] == b[i]) return i;
  return -1;
}
inline V vmax(V a, V b) {
  for (int i = 0; i < 4; ++i) a[i] = a[i] > b[i] ? a[i] : b[i];
  return a;
}
inline V vmin(V a, V b) {
  for (int i = 0; i < 4; ++i) a[i] = a[i] < b[i] ? a[i] : b[i];
  return a;
}
inline V vabs(V a) { return vmax(a, -a); }
inline V round_even(V a) {  // for |a| < 2^22
  for (int i = 0; i < 4; ++i) a[i] = __builtin_rintf(a[i]);
  return a;
}
inline float reduce_add(V a) { return (a[0] + a[2]) + (a[1] + a[3]); }
inline float reduce_max(V a) {
  float x = a[0] > a[1] ? a[0] : a[1], y = a[2] > a[3] ? a[2] : a[3];
  return x > y ? x : y;
}
inline V power_of_two(V n) {
  VI bits;
  for (int i = 0; i < 4; ++i) bits[i] = (static_cast<int32_t>(n[i]) + 127) << 23;
  V v;
  std::memcpy(&v, &bits, 16);
  return v;
}
inline float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline V load_bfloat16(const uint16_t* p) {
  V v;
  for (int i = 0; i < 4; ++i) v[i] = from_bits(static_cast<uint32_t>(p[i]) << 16);
  return v;
}
inline void store_bfloat16(uint16_t* p, V v) {
  for (int i = 0; i < 4; ++i) p[i] = jaxserve::float_to_bfloat16(v[i]);
}
inline float half_to_float(uint16_t half) {
  uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
  uint32_t exponent = (half >> 10) & 31u, fraction = half & 1023u;
  if (exponent == 0) {  // zero or subnormal: fraction * 2^-24
    float value = static_cast<float>(fraction) * from_bits(0x33800000u);
    return sign ? -value : value;
  }
  uint32_t wide = exponent == 31 ? 255u : exponent + 112u;
  return from_bits(sign | (wide << 23) | (fraction << 13));
}
inline V load_float16(const uint8_t* p) {
  V v;
  for (int i = 0; i < 4; ++i) {
    uint16_t half;
    std::memcpy(&half, p + 2 * i, 2);
    v[i] = half_to_float(half);
  }
  return v;
}
inline void load_pairs(const uint8_t* p, V& first, V& second) {
  for (int i = 0; i < 4; ++i) {
    uint32_t pair;
    std::memcpy(&pair, p + 4 * i, 4);
    first[i] = from_bits(pair << 16);
    second[i] = from_bits(pair & 0xffff0000u);
  }
}
inline void transpose(const float* in, int64_t in_stride, float* out, int64_t out_stride) {
  for (int i = 0; i < 4; ++i)
    for (int j = 0; j < 4; ++j) out[j * out_stride + i] = in[i * in_stride + j];
}
inline V to_float(VI a) {
  V v;
  for (int i = 0; i < 4; ++i) v[i] = static_cast<float>(a[i]);
  return v;
}
inline void store_int8(int8_t* p, V v) {
  for (int i = 0; i < 4; ++i) p[i] = static_cast<int8_t>(v[i]);
}

using Nibbles = Bytes;
inline const int8_t* four_codes(const int8_t* p) { return p; }
inline void load_nibbles(const uint8_t* p, Bytes& low, Bytes& high) {
  for (int i = 0; i < 16; ++i) {
    low.at[i] = p[i] & 15;
    high.at[i] = p[i] >> 4;
  }
}
inline void add_products(VI& sum, const uint8_t* weights, const int8_t* codes) {
  for (int i = 0; i < 16; ++i) sum[i / 4] += weights[i] * codes[i % 4];
}
struct NibbleSum {
  VI sum{};
  void step(const Bytes& weights, const int8_t* codes) { add_products(sum, weights.at, codes); }
  VI finish() const { return sum; }
};
struct ByteWeights {
  const uint8_t* raw;
  explicit ByteWeights(const uint8_t* p) : raw(p) {}
};
struct ByteSum {
  VI sum{};
  void step(const ByteWeights& weights, const int8_t* codes, const int16_t*) {
    add_products(sum, weights.raw, codes);
  }
  VI finish(int32_t start) const { return sum + VI{start, start, start, start}; }
};

}  // namespace
