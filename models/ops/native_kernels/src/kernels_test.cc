// The kernels' own test, without XLA: every instruction set that this machine has against sums in
// double, and the same bits whatever rows stand beside a row and however many threads there are.
// Built by `make native-sanitize` with ASan and UBSan.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "layout.h"
#include "operations.h"
#include "pool.h"

namespace {

using namespace jaxserve;

#define CHECK(condition, ...)                                      \
  do {                                                             \
    if (!(condition)) {                                            \
      std::printf("%s:%d: %s: ", __FILE__, __LINE__, #condition);  \
      std::printf(__VA_ARGS__);                                    \
      std::printf("\n");                                           \
      std::exit(1);                                                \
    }                                                              \
  } while (0)

std::mt19937 random_source(7);

float uniform() { return std::uniform_real_distribution<float>(-1.0f, 1.0f)(random_source); }

// Random packed weights of a kind, and what each stands for.
struct Weights {
  int64_t kind, num_in, num_out;
  std::vector<uint8_t> bytes;
  std::vector<double> values;  // [in][out]

  Weights(int64_t kind, int64_t num_in, int64_t num_out)
      : kind(kind), num_in(num_in), num_out(num_out),
        bytes(num_blocks(kind, num_out) * block_bytes(kind, num_in)),
        values(num_in * num_out) {
    for (int64_t k = 0; k < num_in; ++k)
      for (int64_t n = 0; n < num_out; ++n) values[k * num_out + n] = place(k, n);
  }

 private:
  // float16 bits of 1 (scale) or -8 (minimum): exact, so that the oracle needs no conversion.
  static constexpr uint16_t kOne = 0x3c00, kMinusEight = 0xc800;

  void put16(int64_t at, uint16_t bits) { std::memcpy(bytes.data() + at, &bits, 2); }

  double place(int64_t k, int64_t n) {
    const int64_t width = block_columns(kind), column = n % width;
    const int64_t block = n / width * block_bytes(kind, num_in);
    const int64_t g = k / kGroup, i = k % kGroup;
    if (kind == kFloat32) {
      const float value = uniform();
      std::memcpy(bytes.data() + block + (k * width + column) * 4, &value, 4);
      return value;
    }
    if (kind == kBfloat16) {
      const uint16_t bits = float_to_bfloat16(uniform());
      put16(block + ((k / 2 * width + column) * 2 + k % 2) * 2, bits);
      return bfloat16_to_float(bits);
    }
    if (kind == kQ4) {
      const int64_t group = block + g * kQ4GroupBytes;
      const int code = static_cast<int>(random_source() % 16);
      uint8_t& byte = bytes[group + (i / 8 * 16 + column) * 4 + i % 4];
      byte = static_cast<uint8_t>(i % 8 < 4 ? (byte & 0xf0) | code : (byte & 0x0f) | code << 4);
      put16(group + 256 + 2 * column, kOne);
      put16(group + 288 + 2 * column, kMinusEight);
      return code - 8;
    }
    const int64_t group = block + g * (kind == kQ8 ? kQ8GroupBytes : kInt8GroupBytes);
    const int code = static_cast<int>(random_source() % 256) - 128;
    bytes[group + (i / 4 * 16 + column) * 4 + i % 4] = static_cast<uint8_t>(code + 128);
    if (kind == kQ8) put16(group + 512 + 2 * column, kOne);
    if (kind == kInt8) {
      const float one = 1.0f;
      std::memcpy(bytes.data() + block + num_groups(num_in) * kInt8GroupBytes + 4 * column, &one, 4);
    }
    return code;
  }
};

std::vector<float> multiply(const Kernels& kernels, const Weights& weights, const float* x,
                            int64_t rows) {
  std::vector<float> out(rows * weights.num_out);
  linear(kernels, {weights.kind, rows, weights.num_in, weights.num_out, x, false,
                   weights.bytes.data(), out.data(), false});
  return out;
}

void test_linear(const Kernels& kernels, int64_t kind, int64_t num_in, int64_t num_out) {
  const int64_t most_rows = 53;
  const Weights weights(kind, num_in, num_out);
  std::vector<float> x(most_rows * num_in);
  for (float& value : x) value = uniform();
  set_num_threads(1);
  const std::vector<float> all = multiply(kernels, weights, x.data(), most_rows);
  for (int64_t row = 0; row < most_rows; ++row) {
    for (int64_t n = 0; n < num_out; ++n) {
      double sum = 0, rounding = 1e-30, size = 0;
      for (int64_t k = 0; k < num_in; ++k) {
        const double weight = weights.values[k * num_out + n];
        sum += x[row * num_in + k] * weight;
        size += std::abs(x[row * num_in + k] * weight);
        rounding += std::abs(weight) / 254;  // half a step of codes whose largest is at most 1
      }
      const double allowed = (is_integer(kind) ? rounding : 0) + 1e-6 * size + 1e-6;
      CHECK(std::abs(all[row * num_out + n] - sum) <= allowed, "%s kind %d: %g, not %g",
            kernels.name, static_cast<int>(kind), all[row * num_out + n], sum);
    }
  }
  for (int64_t threads = 1; threads <= 3; ++threads) {
    set_num_threads(threads);
    for (int64_t first = 0; first < most_rows; first += 5) {
      for (int64_t rows : {int64_t{1}, int64_t{2}, int64_t{13}, int64_t{50}}) {
        if (first + rows > most_rows) continue;
        const std::vector<float> some = multiply(kernels, weights, x.data() + first * num_in, rows);
        CHECK(std::memcmp(some.data(), all.data() + first * num_out, some.size() * 4) == 0,
              "%s kind %d: rows %d + %d, %d threads", kernels.name, static_cast<int>(kind),
              static_cast<int>(first), static_cast<int>(rows), static_cast<int>(threads));
      }
    }
  }
}

std::vector<float> multiply_halves(const Kernels& kernels, const Weights& weights, const uint16_t* x,
                                   int64_t rows) {
  std::vector<float> out(rows * weights.num_out);
  linear(kernels, {weights.kind, rows, weights.num_in, weights.num_out, x, true,
                   weights.bytes.data(), out.data(), false});
  return out;
}

// Tiles sum in another order than vectors do, the same one for any number of rows and threads.
void test_tiles(const Kernels& kernels, int64_t num_in, int64_t num_out) {
  const int64_t most_rows = 83;
  const Weights weights(kBfloat16, num_in, num_out);
  std::vector<uint16_t> x(most_rows * num_in);
  for (uint16_t& value : x) value = float_to_bfloat16(uniform());
  set_num_threads(1);
  const std::vector<float> all = multiply_halves(kernels, weights, x.data(), most_rows);
  for (int64_t i = 0; i < most_rows * num_out; ++i) {
    double sum = 0, size = 0;
    for (int64_t k = 0; k < num_in; ++k) {
      const double product = double(bfloat16_to_float(x[i / num_out * num_in + k])) *
                             weights.values[k * num_out + i % num_out];
      sum += product, size += std::abs(product);
    }
    CHECK(std::abs(all[i] - sum) <= 1e-6 * size + 1e-30, "%s: %g, not %g", kernels.name, all[i], sum);
  }
  for (int64_t rows : {0, 1, 2, 15, 16, 17, 31, 32, 33, 49, 64, 80}) {
    set_num_threads(rows % 3 + 1);
    for (int64_t first : {int64_t{0}, most_rows - rows}) {
      const std::vector<float> some = multiply_halves(kernels, weights, x.data() + first * num_in, rows);
      CHECK(some.empty() ||
                std::memcmp(some.data(), all.data() + first * num_out, some.size() * 4) == 0,
            "%s: rows %d + %d", kernels.name, static_cast<int>(first), static_cast<int>(rows));
    }
  }
}

// Rows of bfloat16 give what the same values give as float32, rounded once; NaN stays NaN.
void test_bfloat16_rows(const Kernels& kernels, int64_t kind, int64_t num_in, int64_t num_out) {
  const Weights weights(kind, num_in, num_out);
  for (int64_t rows : {1, 7, 12, 61}) {
    std::vector<uint16_t> halves(rows * num_in), out(rows * num_out);
    std::vector<float> floats(rows * num_in);
    for (size_t i = 0; i < halves.size(); ++i) halves[i] = float_to_bfloat16(uniform());
    halves[num_in - 1] = float_to_bfloat16(NAN);
    for (size_t i = 0; i < halves.size(); ++i) floats[i] = bfloat16_to_float(halves[i]);
    const bool is_tiled = kernels.tile_blocks != nullptr && kind == kBfloat16;
    const std::vector<float> wanted = is_tiled
                                          ? multiply_halves(kernels, weights, halves.data(), rows)
                                          : multiply(kernels, weights, floats.data(), rows);
    linear(kernels, {kind, rows, num_in, num_out, halves.data(), true, weights.bytes.data(),
                     out.data(), true});
    for (size_t i = 0; i < out.size(); ++i)
      CHECK(out[i] == float_to_bfloat16(wanted[i]), "%s kind %d: %d rows, value %d", kernels.name,
            static_cast<int>(kind), static_cast<int>(rows), static_cast<int>(i));
    for (int64_t n = 0; n < num_out; ++n)
      CHECK(std::isnan(bfloat16_to_float(out[n])), "%s kind %d", kernels.name, static_cast<int>(kind));
  }
}

// The same codes give the same integers everywhere, so exact inputs give equal results.
void test_integers_agree(const Kernels& kernels, int64_t kind) {
  const Weights weights(kind, 64, 33);
  std::vector<float> x(3 * 64);
  for (float& value : x) value = static_cast<float>(static_cast<int>(random_source() % 255) - 127);
  for (int row = 0; row < 3; ++row) x[row * 64] = 127.0f, x[row * 64 + 32] = -127.0f;
  const std::vector<float> got = multiply(kernels, weights, x.data(), 3);
  const std::vector<float> want = multiply(kPlain, weights, x.data(), 3);
  CHECK(got == want, "%s kind %d", kernels.name, static_cast<int>(kind));
}

void test_attention(const Kernels& kernels, int64_t dim, int64_t window) {
  const int64_t heads = 4, kv_heads = 2, page_size = 16, length = 150, pages = 12;
  std::vector<float> pool(pages * page_size * 2 * kv_heads * dim, NAN);
  std::vector<int32_t> table(pages), slots(length, 0), positions(length);
  for (int64_t p = 0; p < pages; ++p) table[p] = static_cast<int32_t>((p * 5 + 3) % pages);
  std::vector<float> q(length * heads * dim), out(q.size());
  for (float& value : q) value = 3 * uniform();
  const auto at = [&](int64_t position, int64_t half, int64_t head) {
    return ((table[position / page_size] * page_size + position % page_size) * 2 + half) *
               kv_heads * dim + head * dim;
  };
  for (int64_t t = 0; t < length; ++t) {
    positions[t] = static_cast<int32_t>(t);
    for (int64_t i = 0; i < 2 * kv_heads * dim; ++i) pool[at(t, 0, 0) + i] = uniform();
  }
  AttentionJob job{};
  job.num_heads = heads, job.num_kv_heads = kv_heads, job.head_dim = dim;
  job.page_size = page_size, job.table_width = pages;
  job.q = q.data(), job.out = out.data(), job.pages = pool.data();
  job.page_table = table.data(), job.row_slots = slots.data(), job.row_positions = positions.data();
  job.window = window;
  std::vector<int32_t> starts, counts, each(length);
  for (int64_t t = 0; t < length; t += 13) {
    starts.push_back(static_cast<int32_t>(t));
    counts.push_back(static_cast<int32_t>(std::min<int64_t>(13, length - t)));
  }
  for (int64_t t = 0; t < length; ++t) each[t] = static_cast<int32_t>(t);
  set_num_threads(2);
  const AttentionItems none{nullptr, nullptr, 0};
  attention(kernels, job, none, {starts.data(), counts.data(), static_cast<int64_t>(starts.size())});
  const std::vector<float> by_tiles = out;
  attention(kernels, job, {each.data(), nullptr, length}, none);
  CHECK(std::memcmp(by_tiles.data(), out.data(), out.size() * 4) == 0, "%s: tiles", kernels.name);
  for (int64_t t = 0; t < length; ++t) {
    for (int64_t h = 0; h < heads; ++h) {
      const int64_t kv = h / (heads / kv_heads), first = std::max<int64_t>(0, t - window + 1);
      std::vector<double> weights;
      double total = 0;
      for (int64_t s = first; s <= t; ++s) {
        double score = 0;
        for (int64_t d = 0; d < dim; ++d)
          score += double(q[(t * heads + h) * dim + d]) * pool[at(s, 0, kv) + d];
        weights.push_back(std::exp(score / std::sqrt(double(dim))));
        total += weights.back();
      }
      for (int64_t d = 0; d < dim; ++d) {
        double sum = 0;
        for (int64_t s = first; s <= t; ++s) sum += weights[s - first] * pool[at(s, 1, kv) + d];
        const double got = out[(t * heads + h) * dim + d];
        CHECK(std::abs(got - sum / total) < 3e-6, "%s row %d: %g, not %g", kernels.name,
              static_cast<int>(t), got, sum / total);
      }
    }
  }
}

// Queries and pages of bfloat16, which a matrix unit takes by tiles.
void test_bfloat16_attention(const Kernels& kernels, int64_t dim, int64_t window) {
  const int64_t heads = 6, kv_heads = 2, page_size = 16, length = 150, pages = 12, odd = 70;
  const uint16_t nan = float_to_bfloat16(NAN);
  std::vector<uint16_t> pool(pages * page_size * 2 * kv_heads * dim, nan);
  std::vector<int32_t> table(pages), slots(length, 0), positions(length), each(length);
  for (int64_t p = 0; p < pages; ++p) table[p] = static_cast<int32_t>((p * 5 + 3) % pages);
  std::vector<uint16_t> q(length * heads * dim), out(q.size());
  for (uint16_t& value : q) value = float_to_bfloat16(3 * uniform());
  const auto at = [&](int64_t position, int64_t half, int64_t head) {
    return ((table[position / page_size] * page_size + position % page_size) * 2 + half) *
               kv_heads * dim + head * dim;
  };
  for (int64_t t = 0; t < length; ++t) {
    positions[t] = each[t] = static_cast<int32_t>(t);
    for (int64_t i = 0; i < 2 * kv_heads * dim; ++i)
      pool[at(t, 0, 0) + i] = float_to_bfloat16(uniform());
  }
  AttentionJob job{};
  job.num_heads = heads, job.num_kv_heads = kv_heads, job.head_dim = dim;
  job.page_size = page_size, job.table_width = pages, job.window = window;
  job.rows_are_bfloat16 = job.pages_are_bfloat16 = true;
  job.q = q.data(), job.out = out.data(), job.pages = pool.data();
  job.page_table = table.data(), job.row_slots = slots.data(), job.row_positions = positions.data();
  const AttentionItems none{nullptr, nullptr, 0};
  set_num_threads(2);
  const auto by_tiles = [&](int64_t rows) {
    std::vector<int32_t> starts, counts;
    for (int64_t t = 0; t < length; t += rows) {
      starts.push_back(static_cast<int32_t>(t));
      counts.push_back(static_cast<int32_t>(std::min(rows, length - t)));
    }
    attention(kernels, job, none, {starts.data(), counts.data(), static_cast<int64_t>(starts.size())});
    return out;
  };
  attention(kernels, job, {each.data(), nullptr, length}, none);
  const std::vector<uint16_t> alone = out;
  for (int64_t rows : {7, 13, 128})
    CHECK(by_tiles(rows) == alone, "%s: tiles of %d", kernels.name, static_cast<int>(rows));
  for (int64_t i = 0; i < length * heads; ++i) {
    const int64_t t = i / heads, kv = i % heads / (heads / kv_heads);
    std::vector<double> weights, sums(dim, 0.0);
    double total = 0;
    for (int64_t s = std::max<int64_t>(0, t - window + 1); s <= t; ++s) {
      double score = 0;
      for (int64_t d = 0; d < dim; ++d)
        score += double(bfloat16_to_float(q[i * dim + d])) * bfloat16_to_float(pool[at(s, 0, kv) + d]);
      const double weight = std::exp(score / std::sqrt(double(dim)));
      total += weight;
      for (int64_t d = 0; d < dim; ++d) sums[d] += weight * bfloat16_to_float(pool[at(s, 1, kv) + d]);
    }
    for (int64_t d = 0; d < dim; ++d)  // weights and outputs are rounded to 8 bits
      CHECK(std::abs(bfloat16_to_float(alone[i * dim + d]) - sums[d] / total) < 5e-3,
            "%s row %d: %g, not %g", kernels.name, static_cast<int>(t),
            bfloat16_to_float(alone[i * dim + d]), sums[d] / total);
  }
  // What is no number reaches the rows that see it, and only them.
  pool[at(odd, 1, 1)] = nan;
  for (int64_t rows : {1, 13, 128}) {
    const std::vector<uint16_t> got = by_tiles(rows);
    for (int64_t t = 0; t < length; ++t)
      for (int64_t i = 0; i < heads * dim; ++i) {
        const bool is_hit = t >= odd && t - odd < window && i >= heads / kv_heads * dim && i % dim == 0;
        const uint16_t value = got[t * heads * dim + i];
        CHECK(is_hit ? std::isnan(bfloat16_to_float(value)) : value == alone[t * heads * dim + i],
              "%s: row %d, value %d", kernels.name, static_cast<int>(t), static_cast<int>(i));
      }
  }
}

void test_gate(const Kernels& kernels, int64_t width, bool is_gelu) {
  const int64_t rows = 9;
  std::vector<float> x(rows * 2 * width), out(rows * width), alone(width);
  for (float& value : x) value = 20 * uniform();
  set_num_threads(2);
  gate(kernels, {width, x.data(), out.data(), false, is_gelu}, rows);
  for (int64_t i = 0; i < rows * width; ++i) {
    const float* at = x.data() + i / width * 2 * width + i % width;
    const double value = at[0], up = at[width], cubed = value * value * value;
    const double argument = is_gelu ? 1.5957691216057308 * (value + 0.044715 * cubed) : value;
    const double wanted = value / (1 + std::exp(-argument)) * up;
    CHECK(std::abs(out[i] - wanted) <= 2e-6 * std::abs(wanted) + 1e-6, "%s: %g, not %g",
          kernels.name, out[i], wanted);
  }
  gate(kernels, {width, x.data() + 8 * width, alone.data(), false, is_gelu}, 1);
  CHECK(std::memcmp(alone.data(), out.data() + 4 * width, 4 * width) == 0, "%s", kernels.name);
}

void test_peaks(const Kernels& kernels, int64_t count) {
  const int64_t rows = 5;
  std::vector<float> x(rows * count);
  for (float& value : x) value = static_cast<float>(random_source() % 7);
  x[count / 2] = NAN;
  std::vector<int32_t> indices(rows), are_finite(rows);
  find_peaks(kernels, x.data(), rows, count, indices.data(), are_finite.data());
  CHECK(are_finite[0] == 0, "%s", kernels.name);
  for (int64_t row = 1; row < rows; ++row) {
    const float* first = x.data() + row * count;
    CHECK(are_finite[row] == 1, "%s", kernels.name);
    CHECK(indices[row] == std::max_element(first, first + count) - first, "%s", kernels.name);
  }
}

}  // namespace

int main() {
  for (const Kernels* const* at = available_kernels(); *at != nullptr; ++at) {
    for (int64_t kind = kFloat32; kind <= kQ4; ++kind) {
      test_linear(**at, kind, 64, 64);
      test_linear(**at, kind, 71, 37);
      test_linear(**at, kind, 1, 1);
      test_linear(**at, kind, 33, 130);
      test_bfloat16_rows(**at, kind, 65, 70);
      if (is_integer(kind)) test_integers_agree(**at, kind);
    }
    if ((*at)->tile_blocks != nullptr) {
      test_tiles(**at, 1, 1);
      test_tiles(**at, 64, 64);
      test_tiles(**at, 71, 37);
      test_tiles(**at, 33, 130);
    }
    for (int64_t dim : {8, 64, 80})
      for (int64_t window : {1, 50, 1 << 30}) {
        test_attention(**at, dim, window);
        test_bfloat16_attention(**at, dim, window);
      }
    for (int64_t width : {1, 16, 71, 600})
      for (bool is_gelu : {false, true}) test_gate(**at, width, is_gelu);
    for (int64_t count : {1, 15, 16, 1000, 40001}) test_peaks(**at, count);
    std::printf("%s: passed\n", (*at)->name);
  }
  return 0;
}
