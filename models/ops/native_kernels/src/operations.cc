#include "operations.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <vector>

#include "layout.h"
#include "pool.h"

namespace jaxserve {
namespace {

constexpr int64_t kSmallWork = 1 << 15;     // multiplications below which threads cost more
constexpr int64_t kPiecesPerThread = 16;    // so that a thread that is held up holds up little

// Memory of the calling thread that grows and stays: a step allocates nothing. It begins with a
// cache line: vectors across two lines take twice as long.
template <typename T, int kUse>
T* scratch(int64_t count) {
  constexpr size_t kLine = 64;
  thread_local std::vector<T> memory;
  const size_t wanted = static_cast<size_t>(count) + kLine / sizeof(T);
  if (memory.size() < wanted) memory.resize(wanted);
  const uintptr_t start = reinterpret_cast<uintptr_t>(memory.data());
  return memory.data() + (-start % kLine) / sizeof(T);
}

void for_each(int64_t count, bool in_parallel, void (*piece)(void*, int64_t), void* context) {
  if (in_parallel) {
    run_pieces(count, piece, context);
  } else {
    for (int64_t i = 0; i < count; ++i) piece(context, i);
  }
}

template <typename Piece>
void each(int64_t count, bool in_parallel, Piece&& piece) {
  for_each(count, in_parallel,
           [](void* context, int64_t i) { (*static_cast<Piece*>(context))(i); }, &piece);
}

const float* as_floats(const LinearArgs& args) {
  if (!args.x_is_bfloat16) return static_cast<const float*>(args.x);
  const int64_t count = args.num_rows * args.num_in;
  float* wide = scratch<float, 0>(count);
  const uint16_t* source = static_cast<const uint16_t*>(args.x);
  for (int64_t i = 0; i < count; ++i) wide[i] = bfloat16_to_float(source[i]);
  return wide;
}

const float* pack_tiles(const Kernels& kernels, const LinearArgs& args, bool in_parallel) {
  float* tiles = scratch<float, 7>(args.num_rows * args.num_in);
  const uint8_t* x = static_cast<const uint8_t*>(args.x);
  const int64_t row_bytes = args.num_in * (args.x_is_bfloat16 ? 2 : 4), height = kernels.panel_rows;
  each((args.num_rows + height - 1) / height, in_parallel, [&](int64_t tile) {
    const int64_t row = tile * height, count = std::min(height, args.num_rows - row);
    kernels.pack_tile(x + row * row_bytes, args.x_is_bfloat16, args.num_in, count,
                      tiles + row * args.num_in);
  });
  return tiles;
}

const uint16_t* pack_row_tiles(const Kernels& kernels, const LinearArgs& args, bool in_parallel) {
  const int64_t width = (args.num_in + kTileInputs - 1) / kTileInputs * kTileInputs;
  uint16_t* tiles = scratch<uint16_t, 9>(args.num_rows * width);
  const uint16_t* x = static_cast<const uint16_t*>(args.x);
  const int64_t count = (args.num_rows + kTileRows - 1) / kTileRows;
  each(count, in_parallel && count > 1, [&](int64_t tile) {
    const int64_t row = tile * kTileRows, num_rows = std::min(kTileRows, args.num_rows - row);
    kernels.pack_row_tile(x + row * args.num_in, args.num_in, num_rows, tiles + row * width);
  });
  return tiles;
}

std::atomic<const Kernels*> chosen{nullptr};

}  // namespace

void linear(const Kernels& kernels, const LinearArgs& args) {
  LinearJob job{};
  job.kind = args.kind, job.weights = args.weights;
  job.num_rows = args.num_rows, job.num_in = args.num_in, job.num_out = args.num_out;
  job.out = args.out, job.out_is_bfloat16 = args.out_is_bfloat16;
  const bool in_parallel = args.num_rows * args.num_in * args.num_out >= kSmallWork;
  // Whether tiles are used never depends on the number of rows: they sum in another order.
  if (kernels.tile_blocks != nullptr && args.kind == kBfloat16 && args.x_is_bfloat16) {
    job.row_tiles = pack_row_tiles(kernels, args, in_parallel);
  } else if (!is_integer(args.kind) && args.num_rows >= kernels.many_rows) {
    job.tiles = pack_tiles(kernels, args, in_parallel);
  } else if (!is_integer(args.kind)) {
    job.x = as_floats(args);
  } else {
    const float* x = as_floats(args);
    const int64_t groups = num_groups(args.num_in);
    int8_t* codes = scratch<int8_t, 1>(args.num_rows * groups * kGroup);
    int16_t* wide_codes = scratch<int16_t, 5>(args.num_rows * groups * kGroup);
    float* scales = scratch<float, 2>(args.num_rows * groups);
    int32_t* sums = scratch<int32_t, 3>(args.num_rows * groups);
    float* scaled_sums = scratch<float, 6>(args.num_rows * groups);
    each(args.num_rows, in_parallel && args.num_rows >= 8, [&](int64_t row) {
      kernels.quantize_row(x + row * args.num_in, args.num_in, codes + row * groups * kGroup,
                           scales + row * groups, sums + row * groups);
      const int64_t start = row * groups * kGroup;
      if (args.kind != kQ4)
        for (int64_t i = start; i < start + groups * kGroup; ++i) wide_codes[i] = codes[i];
      for (int64_t g = row * groups; g < (row + 1) * groups; ++g)
        scaled_sums[g] = scales[g] * static_cast<float>(sums[g]);
    });
    job.codes = codes, job.wide_codes = wide_codes;
    job.scales = scales, job.sums = sums, job.scaled_sums = scaled_sums;
  }
  const int64_t blocks = num_blocks(args.kind, args.num_out);
  const int64_t per_piece = std::max<int64_t>(1, blocks / (kPiecesPerThread * get_num_threads()));
  each((blocks + per_piece - 1) / per_piece, in_parallel, [&](int64_t piece) {
    const int64_t end = std::min(blocks, (piece + 1) * per_piece);
    if (job.row_tiles != nullptr) return kernels.tile_blocks(job, piece * per_piece, end);
    float* panel = job.tiles == nullptr ? nullptr : scratch<float, 8>(panel_floats(args.num_in));
    for (int64_t block = piece * per_piece; block < end; ++block)
      kernels.linear_block(job, block, panel);
  });
}

void gate(const Kernels& kernels, const GateJob& job, int64_t num_rows) {
  each(num_rows, num_rows * job.width >= kSmallWork, [&](int64_t row) { kernels.gate_row(job, row); });
}

void find_peaks(const Kernels& kernels, const float* x, int64_t num_rows, int64_t count,
                int32_t* indices, int32_t* are_finite) {
  each(num_rows, num_rows * count >= kSmallWork, [&](int64_t row) {
    are_finite[row] = kernels.find_peak(x + row * count, count, indices + row);
  });
}

void attention(const Kernels& kernels, const AttentionJob& job, const AttentionItems& decodes,
               const AttentionItems& tiles) {
  const int64_t heads = job.num_kv_heads, items = decodes.count + tiles.count;
  const int64_t group = job.num_heads / heads;
  // A head's items follow one another, so that one finds in the cache what the one before read.
  each(items * heads, items > 1, [&](int64_t piece) {
    const int64_t item = piece % items;
    const AttentionItems& view = item < decodes.count ? decodes : tiles;
    const int64_t at = item < decodes.count ? item : item - decodes.count;
    const int64_t num_rows = view.num_rows == nullptr ? 1 : view.num_rows[at];
    if (num_rows <= 0) return;
    float* memory = scratch<float, 4>(attention_scratch_floats(num_rows * group, job.head_dim));
    kernels.attend(job, view.starts[at], num_rows, piece / items, memory);
  });
}

const Kernels& chosen_kernels() {
  const Kernels* kernels = chosen.load();
  return kernels == nullptr ? *available_kernels()[0] : *kernels;
}

bool choose_kernels(const char* name) {
  for (const Kernels* const* kernels = available_kernels(); *kernels != nullptr; ++kernels) {
    if (std::strcmp((*kernels)->name, name) == 0) {
      chosen.store(*kernels);
      return true;
    }
  }
  return false;
}

}  // namespace jaxserve
