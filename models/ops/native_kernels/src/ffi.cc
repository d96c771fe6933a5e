// XLA's side: handlers that check shapes and dtypes, and plain C functions for ctypes.
#include <algorithm>
#include <cstring>
#include <string>

#include "layout.h"
#include "operations.h"
#include "pool.h"
#include "xla/ffi/api/ffi.h"

namespace jaxserve {
namespace {

namespace ffi = xla::ffi;

ffi::Error invalid(const std::string& what) { return ffi::Error::InvalidArgument(what); }

bool is_float(ffi::DataType dtype) { return dtype == ffi::F32 || dtype == ffi::BF16; }

ffi::Error linear_handler(ffi::AnyBuffer x, ffi::Buffer<ffi::U8> weights, ffi::Buffer<ffi::S32> layer,
                          ffi::Buffer<ffi::S32> num_live, ffi::Result<ffi::AnyBuffer> out,
                          int64_t kind) {
  if (!is_known(kind)) return invalid("linear: unknown kind of weights");
  if (x.dimensions().size() != 2 || out->dimensions().size() != 2 ||
      weights.dimensions().size() != 2)
    return invalid("linear: x, weights and out must have two axes");
  if (!is_float(x.element_type()) || !is_float(out->element_type()))
    return invalid("linear: x and out must be float32 or bfloat16");
  const int64_t num_rows = x.dimensions()[0], num_in = x.dimensions()[1];
  const int64_t num_out = out->dimensions()[1], bytes = weights.dimensions()[1];
  if (out->dimensions()[0] != num_rows) return invalid("linear: x and out differ in rows");
  if (bytes != num_blocks(kind, num_out) * block_bytes(kind, num_in))
    return invalid("linear: the packed weights have another size than x and out need");
  const int32_t index = layer.typed_data()[0];
  if (index < 0 || index >= weights.dimensions()[0]) return invalid("linear: no such layer");
  // Rows past the live ones cost nothing and are zero.
  const int64_t live = std::clamp<int64_t>(num_live.typed_data()[0], 0, num_rows);
  const size_t live_bytes = out->size_bytes() / std::max<int64_t>(num_rows, 1) * live;
  std::memset(static_cast<char*>(out->untyped_data()) + live_bytes, 0,
              out->size_bytes() - live_bytes);
  linear(chosen_kernels(),
         {kind, live, num_in, num_out, x.untyped_data(), x.element_type() == ffi::BF16,
          weights.typed_data() + index * bytes, out->untyped_data(),
          out->element_type() == ffi::BF16});
  return ffi::Error::Success();
}

// Rows past the live ones are zero.
ffi::Error gate_handler(ffi::AnyBuffer x, ffi::Buffer<ffi::S32> num_live,
                        ffi::Result<ffi::AnyBuffer> out, bool is_gelu) {
  if (x.dimensions().size() != 2 || out->dimensions().size() != 2 ||
      out->dimensions()[0] != x.dimensions()[0] || 2 * out->dimensions()[1] != x.dimensions()[1])
    return invalid("gate: x must be [T, 2 F], and out [T, F]");
  if (!is_float(x.element_type()) || out->element_type() != x.element_type())
    return invalid("gate: x and out must both be float32 or bfloat16");
  const int64_t num_rows = x.dimensions()[0];
  const int64_t live = std::clamp<int64_t>(num_live.typed_data()[0], 0, num_rows);
  const size_t live_bytes = out->size_bytes() / std::max<int64_t>(num_rows, 1) * live;
  std::memset(static_cast<char*>(out->untyped_data()) + live_bytes, 0,
              out->size_bytes() - live_bytes);
  gate(chosen_kernels(),
       {out->dimensions()[1], x.untyped_data(), out->untyped_data(),
        x.element_type() == ffi::BF16, is_gelu},
       live);
  return ffi::Error::Success();
}

ffi::Error peaks_handler(ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::S32> num_live,
                         ffi::Result<ffi::Buffer<ffi::S32>> indices,
                         ffi::Result<ffi::Buffer<ffi::S32>> are_finite) {
  if (x.dimensions().size() != 2 || x.dimensions()[1] < 1)
    return invalid("peaks: x must be [N, V], and V not 0");
  const int64_t num_rows = x.dimensions()[0], count = x.dimensions()[1];
  if (indices->element_count() != static_cast<size_t>(num_rows) ||
      are_finite->element_count() != static_cast<size_t>(num_rows))
    return invalid("peaks: there must be a result for each row");
  const int64_t live = std::clamp<int64_t>(num_live.typed_data()[0], 0, num_rows);
  std::fill(indices->typed_data() + live, indices->typed_data() + num_rows, 0);
  std::fill(are_finite->typed_data() + live, are_finite->typed_data() + num_rows, 0);
  find_peaks(chosen_kernels(), x.typed_data(), live, count, indices->typed_data(),
             are_finite->typed_data());
  return ffi::Error::Success();
}

// Pools: [L, P + 1, page_size, 2, K, D], float32, or bfloat16 as its bits.
bool is_pool(const ffi::AnyBuffer& pool) {
  return pool.dimensions().size() == 6 && pool.dimensions()[3] == 2 &&
         (pool.element_type() == ffi::F32 || pool.element_type() == ffi::U16);
}

ffi::Error write_handler(ffi::AnyBuffer pool, ffi::AnyBuffer k, ffi::AnyBuffer v,
                         ffi::Buffer<ffi::S32> layer, ffi::Buffer<ffi::S32> page_table,
                         ffi::Buffer<ffi::S32> row_slots, ffi::Buffer<ffi::S32> row_positions,
                         ffi::Result<ffi::AnyBuffer> out) {
  if (!is_pool(pool)) return invalid("write: not a pool");
  if (!is_float(k.element_type()) || v.element_type() != k.element_type())
    return invalid("write: k and v must both be float32 or bfloat16");
  if (out->untyped_data() != pool.untyped_data()) return invalid("write: the pool was copied");
  const auto dims = pool.dimensions();
  const int64_t page_size = dims[2], width = dims[4] * dims[5], rows = row_slots.element_count();
  if (k.dimensions().size() != 3 || k.element_count() != static_cast<size_t>(rows * width) ||
      v.element_count() != k.element_count())
    return invalid("write: k and v do not fit the pool");
  const int64_t table_width = page_table.dimensions()[1];
  const int64_t layer_tokens = layer.typed_data()[0] * dims[1] * page_size;
  const bool pool_is_bfloat16 = pool.element_type() == ffi::U16;
  const bool rows_are_bfloat16 = k.element_type() == ffi::BF16;
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t position = row_positions.typed_data()[row];
    const int64_t page = page_table.typed_data()[row_slots.typed_data()[row] * table_width +
                                                 position / page_size];
    const int64_t token = layer_tokens + page * page_size + position % page_size;
    for (int half = 0; half < 2; ++half) {
      const int64_t at = (token * 2 + half) * width;
      const void* source = half == 0 ? k.untyped_data() : v.untyped_data();
      const float* floats = static_cast<const float*>(source) + row * width;
      const uint16_t* halves = static_cast<const uint16_t*>(source) + row * width;
      float* wide = static_cast<float*>(pool.untyped_data()) + at;
      uint16_t* narrow = static_cast<uint16_t*>(pool.untyped_data()) + at;
      for (int64_t i = 0; i < width; ++i) {
        if (pool_is_bfloat16)
          narrow[i] = rows_are_bfloat16 ? halves[i] : float_to_bfloat16(floats[i]);
        else
          wide[i] = rows_are_bfloat16 ? bfloat16_to_float(halves[i]) : floats[i];
      }
    }
  }
  return ffi::Error::Success();
}

ffi::Error attention_handler(ffi::AnyBuffer q, ffi::AnyBuffer pool, ffi::Buffer<ffi::S32> layer,
                             ffi::Buffer<ffi::S32> window, ffi::Buffer<ffi::S32> page_table,
                             ffi::Buffer<ffi::S32> row_slots, ffi::Buffer<ffi::S32> row_positions,
                             ffi::Buffer<ffi::S32> decode_rows, ffi::Buffer<ffi::S32> num_decodes,
                             ffi::Buffer<ffi::S32> tile_starts,
                             ffi::Buffer<ffi::S32> tile_num_rows, ffi::Buffer<ffi::S32> num_tiles,
                             ffi::Result<ffi::AnyBuffer> out) {
  if (!is_pool(pool)) return invalid("attention: not a pool");
  if (q.dimensions().size() != 3 || !is_float(q.element_type()) ||
      out->element_type() != q.element_type() || out->element_count() != q.element_count())
    return invalid("attention: q and out must be [T, H, D], both float32 or bfloat16");
  const auto dims = pool.dimensions();
  AttentionJob job{};
  job.num_heads = q.dimensions()[1], job.num_kv_heads = dims[4], job.head_dim = dims[5];
  if (q.dimensions()[2] != job.head_dim || job.num_heads % job.num_kv_heads != 0)
    return invalid("attention: q does not fit the pool");
  job.page_size = dims[2], job.table_width = page_table.dimensions()[1];
  job.q = q.untyped_data(), job.out = out->untyped_data();
  job.rows_are_bfloat16 = q.element_type() == ffi::BF16;
  job.pages_are_bfloat16 = pool.element_type() == ffi::U16;
  const int64_t layer_bytes = dims[1] * dims[2] * 2 * dims[4] * dims[5] * (job.pages_are_bfloat16 ? 2 : 4);
  job.pages = static_cast<const uint8_t*>(pool.untyped_data()) + layer.typed_data()[0] * layer_bytes;
  job.page_table = page_table.typed_data();
  job.row_slots = row_slots.typed_data();
  job.row_positions = row_positions.typed_data();
  job.window = window.typed_data()[0];
  std::memset(out->untyped_data(), 0, out->size_bytes());
  attention(chosen_kernels(), job, {decode_rows.typed_data(), nullptr, num_decodes.typed_data()[0]},
            {tile_starts.typed_data(), tile_num_rows.typed_data(), num_tiles.typed_data()[0]});
  return ffi::Error::Success();
}

// A result that is left as it was allocated: memory that nobody touches is no memory in use.
ffi::Error untouched_handler(ffi::Result<ffi::AnyBuffer>) { return ffi::Error::Success(); }

}  // namespace
}  // namespace jaxserve

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxserve_linear, jaxserve::linear_handler,
                              xla::ffi::Ffi::Bind()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::U8>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Attr<int64_t>("kind"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxserve_gate, jaxserve::gate_handler,
                              xla::ffi::Ffi::Bind()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Attr<bool>("is_gelu"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxserve_peaks, jaxserve::peaks_handler,
                              xla::ffi::Ffi::Bind()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::S32>>());

#define JAXSERVE_S32 Arg<xla::ffi::Buffer<xla::ffi::S32>>()

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxserve_write, jaxserve::write_handler,
                              xla::ffi::Ffi::Bind()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .JAXSERVE_S32.JAXSERVE_S32.JAXSERVE_S32.JAXSERVE_S32
                                  .Ret<xla::ffi::AnyBuffer>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxserve_attention, jaxserve::attention_handler,
                              xla::ffi::Ffi::Bind()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .JAXSERVE_S32.JAXSERVE_S32.JAXSERVE_S32.JAXSERVE_S32.JAXSERVE_S32
                                  .JAXSERVE_S32.JAXSERVE_S32.JAXSERVE_S32.JAXSERVE_S32.JAXSERVE_S32
                                  .Ret<xla::ffi::AnyBuffer>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxserve_untouched, jaxserve::untouched_handler,
                              xla::ffi::Ffi::Bind().Ret<xla::ffi::AnyBuffer>());

extern "C" {

void jaxserve_set_num_threads(int64_t num_threads) { jaxserve::set_num_threads(num_threads); }
int64_t jaxserve_get_num_threads() { return jaxserve::get_num_threads(); }
// Returns 1 if the kernels `name` are now in use, 0 if this processor does not run them.
int jaxserve_choose_kernels(const char* name) { return jaxserve::choose_kernels(name); }
// The name of the i-th best kernels that this processor runs; nullptr past the last.
const char* jaxserve_kernels_name(int64_t i) {
  const jaxserve::Kernels* const* kernels = jaxserve::available_kernels();
  for (int64_t at = 0; kernels[at] != nullptr; ++at)
    if (at == i) return kernels[at]->name;
  return nullptr;
}
}
