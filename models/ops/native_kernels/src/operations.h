// The operations as the FFI's handlers and the kernels' own test call them.
#pragma once
#include <cstdint>

#include "kernels.h"

namespace jaxserve {

// Rows [num_rows][num_in] times one packed kernel; `x` and `out` are float32 or bfloat16.
struct LinearArgs {
  int64_t kind, num_rows, num_in, num_out;
  const void* x;
  bool x_is_bfloat16;
  const uint8_t* weights;
  void* out;
  bool out_is_bfloat16;
};
void linear(const Kernels& kernels, const LinearArgs& args);

// The first `num_rows` rows.
void gate(const Kernels& kernels, const GateJob& job, int64_t num_rows);

// Of each of `num_rows` rows [count]: see Kernels::find_peak.
void find_peaks(const Kernels& kernels, const float* x, int64_t num_rows, int64_t count,
                int32_t* indices, int32_t* are_finite);

struct AttentionItems {
  const int32_t* starts;
  const int32_t* num_rows;  // nullptr: one each
  int64_t count;
};
// Rows in no item are not written.
void attention(const Kernels& kernels, const AttentionJob& job, const AttentionItems& decodes,
               const AttentionItems& tiles);

// The kernels in use; the best at first.
const Kernels& chosen_kernels();
// Whether `name` is one of those that this processor runs, which is then in use.
bool choose_kernels(const char* name);

}  // namespace jaxserve
