// The second half of a transformer block: residual, normalization, two products with GELU between them, residual.
//
// Each is short beside what calling it from Python takes when one token is decoded, since the weights, which are read in
// between, have pushed Python's own code and data out of the caches.
#include "api.h"
#include "kernels.h"
#include "threads.h"

namespace gmask {
namespace {

int multiply(int isa, const GmaskLinear& linear, const uint16_t* x, uint16_t* y, int64_t rows, int threads) {
  return gmask_matmul(isa, linear.bits, kBfloat16, linear.half_scale, linear.data, linear.scale, x, linear.bias,
                      linear.bias_type, y, rows, linear.outputs, linear.columns, linear.group, threads);
}

}  // namespace
}  // namespace gmask

GMASK_API int gmask_feed_forward(int isa, const GmaskLinear* up, const GmaskLinear* down, const void* norm_weight,
                                 const void* norm_bias, float epsilon, float alpha, const void* x,
                                 const void* residual, void* room, void* y, int64_t rows, int threads) {
  using namespace gmask;
  const Kernels* kernels = find_kernels(isa, kBfloat16);
  const int64_t size = up->columns, inner = up->outputs;
  if (kernels == nullptr || rows < 0 || size < 1 || down->columns != inner || down->outputs != size) return 1;
  uint16_t* const sum = static_cast<uint16_t*>(room);
  uint16_t *const normed = sum + rows * size, *const wide = normed + rows * size, *const active = wide + rows * inner;
  const Norm norm = {static_cast<const uint16_t*>(norm_weight), static_cast<const uint16_t*>(norm_bias), epsilon, size};
  const float factor = bfloat16_to_float(float_to_bfloat16(alpha));  // as torch's sum of bfloat16 tensors rounds it
  const int64_t step = kWorthAThread / size + 1;
  share(rows, step, threads, [&](int64_t first, int64_t last) {
    const int64_t from = first * size;
    kernels->add_multiple(static_cast<const uint16_t*>(x) + from, static_cast<const uint16_t*>(residual) + from, factor,
                          sum + from, (last - first) * size);
    for (int64_t row = first; row < last; ++row) kernels->normalize(norm, sum + row * size, normed + row * size);
  });
  if (const int failed = multiply(isa, *up, normed, wide, rows, threads)) return failed;
  if (const int failed = gmask_gelu(isa, wide, active, rows * inner, threads)) return failed;
  if (const int failed = multiply(isa, *down, active, sum, rows, threads)) return failed;
  share(rows, step, threads, [&](int64_t first, int64_t last) {
    const int64_t from = first * size;
    kernels->add_multiple(sum + from, normed + from, factor, static_cast<uint16_t*>(y) + from, (last - first) * size);
  });
  return 0;
}
