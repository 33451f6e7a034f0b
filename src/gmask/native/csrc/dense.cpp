// y = x @ W^T + bias with a float32 or bfloat16 weight, summed in float32. CPUs without instructions for bfloat16 multiply
// in float32.
#include <memory>
#include <new>

#include "activations.h"
#include "api.h"
#include "kernels.h"
#include "output.h"
#include "threads.h"

namespace gmask {
namespace {

template <class NUMBER>
struct Dense {
  const Kernels* kernels;
  const NUMBER* weight;  // [outputs, columns]
  const NUMBER* x;       // [rows, columns]
  Output output;         // of the same type
  int64_t rows, columns;

  const NUMBER* row(int64_t index) const { return weight + index * columns; }

  // `count` of the rows of x, and what is written to.
  Dense part(int64_t first, int64_t count) const {
    Dense some = *this;
    some.rows = count;
    some.x = x + first * columns;
    some.output.y = static_cast<NUMBER*>(output.y) + first * output.outputs;
    return some;
  }
};

void fill(const Dense<float>& dense, int64_t row, float* to) {
  std::memcpy(to, dense.x + row * dense.columns, size_t(dense.columns) * sizeof *to);
}

void fill(const Dense<uint16_t>& dense, int64_t row, float* to) {
  dense.kernels->fill_dense(dense.x + row * dense.columns, dense.columns, to);
}

constexpr int64_t kFewRows = 32;

// A few rows: the weight is read once, row by row.
template <class NUMBER>
void multiply_few(const Dense<NUMBER>& dense, int threads) {
  constexpr Type type = sizeof(NUMBER) == 4 ? kFloat32 : kBfloat16;
  constexpr int64_t cached = type == kFloat32 ? 8192 : 4096;  // activations: so many are read fastest again and again
  const int64_t step = dense.columns + 16;  // rows a power of two apart would share lines of the cache
  const std::unique_ptr<float[]> x(new float[size_t(dense.rows) * size_t(step)]);
  for (int64_t m = 0; m < dense.rows; ++m) fill(dense, m, x.get() + m * step);
  const bool is_one = dense.rows == 1;  // then the rows of the weight are one run by themselves
  const int64_t part = is_one ? dense.columns : cached / dense.rows / kDenseStep * kDenseStep;
  const int64_t width = is_one ? 1 : 2;
  const Tiles tiles = {dense.rows};
  const int64_t blocks = (dense.output.outputs + kRows - 1) / kRows;
  const int64_t worth = std::max<int64_t>(1, kWorthAThread / (2 * kRows * dense.columns));
  share(blocks, worth, threads, [&](int64_t first, int64_t last) {
    for (int64_t index = first; index < last; ++index) {
      const int64_t start = index * kRows, count = std::min<int64_t>(kRows, dense.output.outputs - start);
      float out[kFewRows * kRows];
      std::fill_n(out, dense.rows * kRows, 0.0f);
      if (!is_one) touch(dense.row(start), count * dense.columns * int64_t(sizeof(NUMBER)));
      for (int64_t k = 0; k < dense.columns; k += part)
        for (int64_t r = 0; r < count; r += width) {
          const DenseRows rows = {dense.row(start + r) + k, dense.columns, std::min(part, dense.columns - k)};
          const DenseFunction* functions = dense.kernels->dense[type][width == 2 && r + 1 < count];
          for (int64_t tile = 0; tile < tiles.count(); ++tile) {
            const int64_t m = tiles.first(tile), end = tiles.first(tile + 1);
            functions[end - m - 1](rows, x.get() + m * step + k, step, out + m * kRows + r);
          }
        }
      dense.output.template store<kRows>(0, dense.rows, start, out);
    }
  });
}

constexpr int64_t kPart = 512;   // columns that are packed at a time: 32 KB
constexpr int64_t kBand = 128;   // rows of activations whose sums are kept

// A block of 32 rows of the weight times rows of activations from tile `tile` to before tile `end`.
void multiply_block(const Dense<uint16_t>& dense, const Activations& activations, int64_t index, int64_t tile, int64_t end) {
  static constexpr float kOnes[kRows] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1,
                                         1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};
  alignas(64) uint32_t block[kPart / 2 * kRows];
  float sums[kBand * kRows] = {};
  for (int64_t k = 0; k < dense.columns; k += kPart) {
    const int64_t columns = std::min(kPart, dense.columns - k);
    const int64_t count = std::min<int64_t>(kRows, dense.output.outputs - index * kRows);
    dense.kernels->pack_dense(dense.row(index * kRows) + k, dense.columns, count, columns, block);
    const Block part = {reinterpret_cast<const uint8_t*>(block), kOnes, false, columns, columns};
    for (int64_t t = tile; t < end; ++t) {
      const int64_t rows = activations.rows_of(t);
      float out[kMaxTile * kRows];
      dense.kernels->multiply[kind_of(16)][rows - 1](part, activations[t] + k * rows, out);
      float* to = sums + (t - tile) * kMaxTile * kRows;
      for (int64_t i = 0; i < rows * kRows; ++i) to[i] += out[i];
    }
  }
  const int64_t first = tile * kMaxTile;
  dense.output.store<kRows>(first, std::min(dense.rows, end * kMaxTile) - first, index * kRows, sums);
}

// The activations are kept in float32, so not all at once.
constexpr int64_t kMost = 512;

void multiply_many(const Dense<uint16_t>& dense, int threads) {
  for (int64_t row = 0; row < dense.rows; row += kMost) {
    const Dense<uint16_t> part = dense.part(row, std::min(kMost, dense.rows - row));
    const Row first = {part.x, kBfloat16, 16, dense.columns, dense.columns, dense.columns};
    const Activations activations(fill_floats, kColumnStep, first, part.rows, threads);
    constexpr int64_t kTiles = kBand / kMaxTile;
    share_each((dense.output.outputs + kRows - 1) / kRows, threads, [&](int64_t index) {
      for (int64_t tile = 0; tile < activations.tiles(); tile += kTiles)
        multiply_block(part, activations, index, tile, std::min(tile + kTiles, activations.tiles()));
    });
  }
}

constexpr int64_t kTogether = 48;  // rows of activations

// By instructions for bfloat16.
void multiply_in_bfloat16(const Dense<uint16_t>& dense, int threads) {
  const std::unique_ptr<uint16_t[]> x(new uint16_t[size_t(dense.rows) * size_t(dense.columns)]);
  const auto rows_from = [&](int64_t row) { return Tiles{std::min(kTogether, dense.rows - row)}; };
  for (int64_t row = 0; row < dense.rows; row += kTogether) {
    const Tiles tiles = rows_from(row);
    uint16_t* to = x.get() + row * dense.columns;
    for (int64_t tile = 0; tile < tiles.count(); ++tile)
      for (int64_t k = 0; k < dense.columns; k += kDenseStep)
        for (int64_t m = tiles.first(tile); m < tiles.first(tile + 1); ++m, to += kDenseStep)
          std::memcpy(to, dense.x + (row + m) * dense.columns + k, 2 * kDenseStep);
  }
  share_each((dense.output.outputs + kRows - 1) / kRows, threads, [&](int64_t index) {
    const int64_t start = index * kRows, count = std::min<int64_t>(kRows, dense.output.outputs - start);
    for (int64_t row = 0; row < dense.rows; row += kTogether) {
      const int64_t rows = rows_from(row).rows;
      float out[kTogether * kRows];
      dense.kernels->multiply_rows(dense.row(start), count, x.get() + row * dense.columns, rows, dense.columns, out);
      dense.output.store<kRows>(row, rows, start, out);
    }
  });
}

void multiply(const Dense<float>& dense, int threads) {
  for (int64_t row = 0; row < dense.rows; row += kFewRows)
    multiply_few(dense.part(row, std::min(kFewRows, dense.rows - row)), threads);
}

constexpr int64_t kFewBfloat16 = 4;  // from more rows on, packing the weight pays

void multiply(const Dense<uint16_t>& dense, int threads) {
  if (dense.kernels->multiply_rows != nullptr) return multiply_in_bfloat16(dense, threads);
  dense.rows <= kFewBfloat16 ? multiply_few(dense, threads) : multiply_many(dense, threads);
}

template <class NUMBER>
int multiply_numbers(const Kernels* kernels, const void* weight, const void* x, const Output& output, int64_t rows,
                     int64_t columns, int threads) {
  try {
    multiply(Dense<NUMBER>{kernels, static_cast<const NUMBER*>(weight), static_cast<const NUMBER*>(x), output, rows,
                           columns},
             threads);
  } catch (const std::bad_alloc&) {
    return 2;
  }
  return 0;
}

}  // namespace
}  // namespace gmask

GMASK_API int gmask_dense(int isa, int type, const void* weight, const void* x, const void* bias, int bias_type, void* y,
                          int64_t rows, int64_t outputs, int64_t columns, int threads) {
  using namespace gmask;
  if ((type != kFloat32 && type != kBfloat16) || (bias_type != kFloat32 && bias_type != kBfloat16) || rows < 0 ||
      outputs < 0 || columns < 1 || columns % kDenseStep != 0)
    return 1;
  const Kernels* kernels = find_kernels(isa, Type(type));
  if (kernels == nullptr) return 1;
  if (rows == 0 || outputs == 0) return 0;
  const Output output = {Type(type), y, bias, Type(bias_type), outputs};
  return (type == kFloat32 ? multiply_numbers<float> : multiply_numbers<uint16_t>)(kernels, weight, x, output, rows,
                                                                                   columns, threads);
}
