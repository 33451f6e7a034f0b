// GELU and rotary places, over threads.
#include "api.h"
#include "kernels.h"
#include "threads.h"

GMASK_API int gmask_gelu(int isa, const void* x, void* out, int64_t count, int threads) {
  using namespace gmask;
  const Kernels* kernels = find_kernels(isa, kBfloat16);
  if (kernels == nullptr || count < 0) return 1;
  share(count, int64_t(4) << 10, threads, [&](int64_t first, int64_t last) {
    kernels->gelu(static_cast<const uint16_t*>(x) + first, static_cast<uint16_t*>(out) + first, last - first);
  });
  return 0;
}

GMASK_API int gmask_rotate(int isa, int type, const void* x, const void* cosines, const void* sines, void* out,
                           const int64_t* strides, int64_t batch, int64_t heads, int64_t length, int64_t groups,
                           int64_t half, int threads) {
  using namespace gmask;
  const Kernels* kernels = (type == kFloat32 || type == kBfloat16) ? find_kernels(isa, Type(type)) : nullptr;
  if (kernels == nullptr || batch < 0 || heads < 0 || length < 0 || groups < 1 || half < 1) return 1;
  const int64_t bytes = type == kBfloat16 ? 2 : 4, size = groups * 2 * half;
  const int64_t step = (int64_t(16) << 10) / size + 1;
  share(batch * heads * length, step, threads, [&](int64_t first, int64_t last) {
    for (int64_t index = first; index < last; ++index) {
      const int64_t row = index / (heads * length), head = index / length % heads, place = index % length;
      const int64_t angles = (row * strides[3] + place * strides[4]);
      kernels->turn({Type(type),
                     static_cast<const uint8_t*>(x) +
                         (row * strides[0] + head * strides[1] + place * strides[2]) * bytes,
                     static_cast<const float*>(cosines) + angles, static_cast<const float*>(sines) + angles, groups,
                     half, static_cast<uint8_t*>(out) + index * size * bytes});
    }
  });
  return 0;
}
