// y = x @ dequantized(W)^T + bias, over threads and activation rows.
#include <new>

#include "activations.h"
#include "api.h"
#include "kernels.h"
#include "output.h"
#include "threads.h"

namespace gmask {
namespace {

struct Problem {
  const Kernels* kernels;
  int bits;
  const uint8_t* data;
  const uint8_t* scale;
  bool half_scale;
  const void* x;  // [rows, columns]
  Output output;  // of x's type
  int64_t rows, columns, group;

  int64_t padded_columns() const { return (columns + kColumnStep - 1) / kColumnStep * kColumnStep; }
  int64_t padded_group() const { return group == columns ? padded_columns() : group; }
  int64_t blocks() const { return (output.outputs + kRows - 1) / kRows; }
  int64_t block_bytes() const { return padded_columns() * kRows * bits / 8; }
};

void multiply_block(const Problem& problem, const Activations& activations, int64_t index) {
  const int64_t scales = problem.columns / problem.group;
  const Block block = {problem.data + index * problem.block_bytes(),
                       problem.scale + index * scales * kRows * (problem.half_scale ? 2 : 4), problem.half_scale,
                       problem.padded_columns(), problem.padded_group()};
  for (int64_t tile = 0; tile < activations.tiles(); ++tile) {
    const int64_t rows = activations.rows_of(tile);
    float out[kMaxTile * kRows];
    problem.kernels->multiply[kind_of(problem.bits)][rows - 1](block, activations[tile], out);
    problem.output.store<kRows>(tile * kMaxTile, rows, index * kRows, out);
  }
}

void run(const Problem& problem, int threads) {
  const Row row = {problem.x, problem.output.type, problem.bits, problem.columns, problem.padded_columns(),
                   problem.padded_group()};
  const Activations activations(problem.kernels->fill, problem.kernels->units[problem.bits == 8], row, problem.rows,
                                threads);
  const int64_t worth = std::max<int64_t>(1, kWorthAThread / problem.block_bytes());
  share(problem.blocks(), worth, threads, [&](int64_t first, int64_t last) {
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
    run({kernels, bits, static_cast<const uint8_t*>(data), static_cast<const uint8_t*>(scale),
         half_scale != 0, x, {Type(x_type), y, bias, Type(bias_type), outputs}, rows, columns, group},
        threads);
  } catch (const std::bad_alloc&) {
    return 2;
  }
  return 0;
}
