// y = x @ W^T + bias with a bfloat16 weight, summed in float32. CPUs without instructions for bfloat16 multiply in float32.
#include <memory>
#include <new>

#include "activations.h"
#include "api.h"
#include "kernels.h"
#include "output.h"
#include "threads.h"

namespace gmask {
namespace {

struct Dense {
  const Kernels* kernels;
  const uint16_t* weight;  // [outputs, columns]
  const uint16_t* x;       // [rows, columns]
  Output output;           // bfloat16
  int64_t rows, columns;

  const uint16_t* row(int64_t index) const { return weight + index * columns; }
};

constexpr int64_t kCached = 4096;  // numbers

// A few rows: the weight is read once, row by row.
void multiply_few(const Dense& dense, int threads) {
  const int64_t step = dense.columns + 16;  // rows a power of two apart would share lines of the cache
  const std::unique_ptr<float[]> x(new float[size_t(dense.rows) * size_t(step)]);
  for (int64_t m = 0; m < dense.rows; ++m)
    dense.kernels->fill_dense(dense.x + m * dense.columns, dense.columns, x.get() + m * step);
  // So many columns that the activations stay in the first cache.
  const int64_t part = dense.rows == 1 ? dense.columns : kCached / dense.rows / kDenseStep * kDenseStep;
  const int64_t width = dense.rows == 1 ? 1 : 2;
  const int64_t ahead = 2 * dense.columns;
  const int64_t blocks = (dense.output.outputs + kRows - 1) / kRows;
  const int64_t worth = std::max<int64_t>(1, kWorthAThread / (2 * kRows * dense.columns));
  share(blocks, worth, threads, [&](int64_t first, int64_t last) {
    for (int64_t index = first; index < last; ++index) {
      const int64_t start = index * kRows, count = std::min<int64_t>(kRows, dense.output.outputs - start);
      float out[kDenseRows * kRows] = {};
      if (dense.rows > 1) touch(dense.row(start), 2 * count * dense.columns);
      for (int64_t k = 0; k < dense.columns; k += part)
        for (int64_t r = 0; r < count; r += width) {
          const DenseRows rows = {dense.row(start + r) + k, dense.columns, std::min(part, dense.columns - k), ahead};
          dense.kernels->dense[width == 2 && r + 1 < count][dense.rows - 1](rows, x.get() + k, step, out + r);
        }
      dense.output.store<kRows>(0, dense.rows, start, out);
    }
  });
}

constexpr int64_t kPart = 512;   // columns that are packed at a time: 32 KB
constexpr int64_t kBand = 128;   // rows of activations whose sums are kept

// A block of 32 rows of the weight times rows of activations from tile `tile` to before tile `end`.
void multiply_block(const Dense& dense, const Activations& activations, int64_t index, int64_t tile, int64_t end) {
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

void multiply_many(const Dense& dense, int threads) {
  for (int64_t row = 0; row < dense.rows; row += kMost) {
    Dense part = dense;
    part.rows = std::min(kMost, dense.rows - row);
    part.x = dense.x + row * dense.columns;
    part.output.y = static_cast<uint16_t*>(dense.output.y) + row * dense.output.outputs;
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
void multiply_in_bfloat16(const Dense& dense, int threads) {
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

}  // namespace
}  // namespace gmask

GMASK_API int gmask_dense(int isa, const void* weight, const void* x, const void* bias, int bias_type, void* y,
                          int64_t rows, int64_t outputs, int64_t columns, int threads) {
  using namespace gmask;
  if ((bias_type != kFloat32 && bias_type != kBfloat16) || rows < 0 || outputs < 0 || columns < 1 ||
      columns % kDenseStep != 0)
    return 1;
  const Kernels* kernels = find_kernels(isa, kBfloat16);
  if (kernels == nullptr) return 1;
  if (rows == 0 || outputs == 0) return 0;
  const Dense dense = {kernels, static_cast<const uint16_t*>(weight), static_cast<const uint16_t*>(x),
                       {kBfloat16, y, bias, Type(bias_type), outputs}, rows, columns};
  try {
    if (kernels->multiply_rows != nullptr)
      multiply_in_bfloat16(dense, threads);
    else
      rows <= kDenseRows ? multiply_few(dense, threads) : multiply_many(dense, threads);
  } catch (const std::bad_alloc&) {
    return 2;
  }
  return 0;
}
