// y = x @ dequantized(W)^T + bias, over threads and activation rows.
#include <memory>
#include <new>

#include "api.h"
#include "kernels.h"
#include "threads.h"

namespace gmask {
namespace {

struct Problem {
  const Kernels* kernels;
  int bits;
  Type type;
  const uint8_t* data;
  const uint8_t* scale;
  bool half_scale;
  const void* x;     // [rows, columns]
  const void* bias;  // [outputs] or null
  Type bias_type;
  void* y;  // [rows, outputs], of x's type
  int64_t rows, outputs, columns, group;

  int64_t padded_columns() const { return (columns + kColumnStep - 1) / kColumnStep * kColumnStep; }
  int64_t padded_group() const { return group == columns ? padded_columns() : group; }
  int64_t blocks() const { return (outputs + kRows - 1) / kRows; }
  int64_t tiles() const { return (rows + kMaxTile - 1) / kMaxTile; }
  int64_t block_bytes() const { return padded_columns() * kRows * bits / 8; }
};

// The activations in tiles of up to eight rows, as the kernels read them.
class Activations {
 public:
  Activations(const Problem& problem, int threads)
      : row_units_(problem.padded_columns() / kColumnStep * problem.kernels->units),
        rows_(problem.rows),
        units_(new uint32_t[size_t(rows_) * row_units_]) {
    const int64_t row_bytes = problem.columns * (problem.type == kBfloat16 ? 2 : 4);
    share(problem.tiles(), 1, threads, [&](int64_t tile, int64_t) {
      for (int64_t m = 0; m < rows_of(tile); ++m) {
        const void* x = static_cast<const uint8_t*>(problem.x) + (tile * kMaxTile + m) * row_bytes;
        const Row row = {x, problem.type, problem.bits, problem.columns, problem.padded_columns(),
                         problem.padded_group()};
        problem.kernels->fill(row, rows_of(tile), units_.get() + unit_of(tile) + m);
      }
    });
  }

  int64_t rows_of(int64_t tile) const { return std::min<int64_t>(kMaxTile, rows_ - tile * kMaxTile); }
  const uint32_t* operator[](int64_t tile) const { return units_.get() + unit_of(tile); }

 private:
  int64_t unit_of(int64_t tile) const { return tile * kMaxTile * row_units_; }

  const int64_t row_units_, rows_;
  const std::unique_ptr<uint32_t[]> units_;
};

void store(const Problem& problem, int64_t block, int64_t row, int64_t rows, const float* out) {
  const int64_t first = block * kRows, count = std::min<int64_t>(kRows, problem.outputs - first);
  float bias[kRows] = {};
  for (int64_t r = 0; problem.bias != nullptr && r < count; ++r)
    bias[r] = problem.bias_type == kBfloat16
                  ? bfloat16_to_float(static_cast<const uint16_t*>(problem.bias)[first + r])
                  : static_cast<const float*>(problem.bias)[first + r];
  for (int64_t m = 0; m < rows; ++m) {
    const int64_t start = (row + m) * problem.outputs + first;
    for (int64_t r = 0; r < count; ++r) {
      const float value = out[m * kRows + r] + bias[r];
      if (problem.type == kBfloat16)
        static_cast<uint16_t*>(problem.y)[start + r] = float_to_bfloat16(value);
      else
        static_cast<float*>(problem.y)[start + r] = value;
    }
  }
}

void multiply_block(const Problem& problem, const Activations& activations, int64_t index) {
  const int64_t scales = problem.columns / problem.group;
  const Block block = {problem.data + index * problem.block_bytes(),
                       problem.scale + index * scales * kRows * (problem.half_scale ? 2 : 4), problem.half_scale,
                       problem.padded_columns(), problem.padded_group()};
  for (int64_t tile = 0; tile < problem.tiles(); ++tile) {
    const int64_t rows = activations.rows_of(tile);
    float out[kMaxTile * kRows];
    problem.kernels->multiply[problem.bits == 8][rows - 1](block, activations[tile], out);
    store(problem, index, tile * kMaxTile, rows, out);
  }
}

void run(const Problem& problem, int threads) {
  const Activations activations(problem, threads);
  const int64_t worth_a_thread = std::max<int64_t>(1, (int64_t(128) << 10) / problem.block_bytes());
  // Long pieces, so that memory is read in long runs.
  const int64_t step = std::max(worth_a_thread, problem.blocks() / (8 * std::max(threads, 1)));
  share(problem.blocks(), step, threads, [&](int64_t first, int64_t last) {
    for (int64_t index = first; index < last; ++index) multiply_block(problem, activations, index);
  });
}

}  // namespace
}  // namespace gmask

GMASK_API int gmask_matmul(int isa, int bits, int x_type, int half_scale, const void* data, const void* scale,
                           const void* x, const void* bias, int bias_type, void* y, int64_t rows, int64_t outputs,
                           int64_t columns, int64_t group, int threads) {
  using namespace gmask;
  const bool whole_rows = group == columns;
  if ((bits != 4 && bits != 8) || (x_type != kFloat32 && x_type != kBfloat16) ||
      (bias_type != kFloat32 && bias_type != kBfloat16) || rows < 0 || outputs < 0 ||
      columns < 1 || group < 1 || columns % group != 0 || (!whole_rows && group % kColumnStep != 0))
    return 1;
  const Kernels* kernels = find_kernels(isa, Type(x_type));
  if (kernels == nullptr) return 1;
  if (rows == 0 || outputs == 0) return 0;
  try {
    run({kernels, bits, Type(x_type), static_cast<const uint8_t*>(data), static_cast<const uint8_t*>(scale),
         half_scale != 0, x, bias, Type(bias_type), y, rows, outputs, columns, group},
        threads);
  } catch (const std::bad_alloc&) {
    return 2;
  }
  return 0;
}
