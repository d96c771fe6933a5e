// What is computed of one row alone, once for each instruction set: included after isa_*.h.
#pragma once
#include "exponential.inc.h"
#include "kernels.h"

namespace {

using jaxserve::GateJob;

// What the sigmoid is taken of: x * sigmoid(this) is the activation. For GELU, tanh(u) is
// 2 * sigmoid(2 u) - 1, and u = sqrt(2 / pi) * (x + 0.044715 x^3) (Hendrycks and Gimpel, "Gaussian
// Error Linear Units", 2016, section 2).
inline V gate_argument(V x, bool is_gelu) {
  if (!is_gelu) return x;
  const V cubed = mul(mul(x, x), x);
  return mul(splat(1.59576912f), fma(splat(0.044715f), cubed, x));
}

template <typename Load>
inline V gated(Load&& load_at, int64_t at, int64_t width, bool is_gelu) {
  const V x = load_at(at);
  return mul(mul(x, sigmoid(gate_argument(x, is_gelu))), load_at(at + width));
}

void gate_row(const GateJob& job, int64_t row) {
  const int64_t width = job.width, whole = width / kLanes * kLanes;
  const float* floats = static_cast<const float*>(job.x) + 2 * row * width;
  const uint16_t* halves = static_cast<const uint16_t*>(job.x) + 2 * row * width;
  const auto load_at = [&](int64_t at) {
    return job.is_bfloat16 ? load_bfloat16(halves + at) : load(floats + at);
  };
  const auto load_last = [&](int64_t at) {  // fewer than a vector
    float lanes[kLanes] = {};
    for (int64_t i = 0; i < width - whole; ++i)
      lanes[i] = job.is_bfloat16 ? jaxserve::bfloat16_to_float(halves[at + i]) : floats[at + i];
    return load(lanes);
  };
  for (int64_t at = 0; at < width; at += kLanes) {
    const bool is_whole = at < whole;
    const V value =
        is_whole ? gated(load_at, at, width, job.is_gelu) : gated(load_last, at, width, job.is_gelu);
    if (is_whole) {
      if (job.is_bfloat16) store_bfloat16(static_cast<uint16_t*>(job.out) + row * width + at, value);
      else store(static_cast<float*>(job.out) + row * width + at, value);
      continue;
    }
    float lanes[kLanes];
    store(lanes, value);
    for (int64_t i = 0; at + i < width; ++i) {
      if (job.is_bfloat16)
        static_cast<uint16_t*>(job.out)[row * width + at + i] = jaxserve::float_to_bfloat16(lanes[i]);
      else
        static_cast<float*>(job.out)[row * width + at + i] = lanes[i];
    }
  }
}

bool find_peak(const float* x, int64_t count, int32_t* index) {
  const int64_t whole = count / kLanes * kLanes;
  float peak = -__builtin_inff(), rest = 0.0f;
  V peaks = splat(peak), probe = zero();
  for (int64_t i = 0; i < whole; i += kLanes) {
    const V value = load(x + i);
    peaks = vmax(peaks, value);
    probe = fma(value, zero(), probe);  // NaN from what is not finite
  }
  for (int64_t i = whole; i < count; ++i) {
    peak = x[i] > peak ? x[i] : peak;
    rest += x[i] * 0.0f;
  }
  const float largest = reduce_max(peaks);
  const V wanted = splat(largest > peak ? largest : peak);
  *index = static_cast<int32_t>(count - 1);
  float last[kLanes];
  store(last, wanted);
  for (int64_t i = 0; i < whole; i += kLanes) {
    const int lane = first_equal(load(x + i), wanted);
    if (lane >= 0) {
      *index = static_cast<int32_t>(i + lane);
      return reduce_add(probe) + rest == 0.0f;
    }
  }
  for (int64_t i = count - 1; i >= whole; --i)
    if (x[i] == last[0]) *index = static_cast<int32_t>(i);
  return reduce_add(probe) + rest == 0.0f;
}

}  // namespace
