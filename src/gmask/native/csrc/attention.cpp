// Attention of one query a head, and the rounding of what it attends to, over rows and heads and threads.
#include <new>
#include <vector>

#include "api.h"
#include "exponential.h"
#include "kernels.h"
#include "threads.h"

GMASK_API int gmask_attention(int isa, int type, int stored, const void* query, const void* keys, const void* values,
                              const void* visible, void* out, const int64_t* strides, int64_t batch, int64_t heads,
                              int64_t length, int64_t size, float scaling, int threads) {
  using namespace gmask;
  if ((type != kFloat32 && type != kBfloat16) || (stored != type && stored != kInt8) || batch < 0 || heads < 0 || length < 0 || size < kHeadStep ||
      size > kMaxHead || size % kHeadStep != 0)
    return 1;
  const Kernels* kernels = find_kernels(isa, Type(type));
  if (kernels == nullptr) return 1;
  const int64_t bytes = bytes_of(stored), count = batch * heads;
  const int64_t step = std::max<int64_t>(1, std::max((int64_t(64) << 10) / (2 * length * size * bytes + 1),
                                                     count / (8 * std::max(threads, 1))));
  const auto at = [](const void* start, int64_t elements, int of) {
    return static_cast<const uint8_t*>(start) + elements * bytes_of(of);
  };
  try {
    const int64_t pieces = (count + step - 1) / step;
    std::vector<float> weights(size_t(pieces) * length);
    share(count, step, threads, [&](int64_t first, int64_t last) {
      for (int64_t index = first; index < last; ++index) {
        const int64_t row = index / heads, head = index % heads;
        kernels->attend({Type(type), Type(stored), at(query, row * strides[0] + head * strides[1], type),
                         at(keys, row * strides[2] + head * strides[3], stored),
                         at(values, row * strides[5] + head * strides[6], stored),
                         visible == nullptr ? nullptr : static_cast<const uint8_t*>(visible) + row * strides[8],
                         strides[4], strides[7], strides[9], length, size, scaling,
                         weights.data() + first / step * length, static_cast<uint8_t*>(out) + index * size * bytes_of(type)});
      }
    });
  } catch (const std::bad_alloc&) {
    return 2;
  }
  return 0;
}

GMASK_API int gmask_round(int isa, int type, const void* x, void* out, const int64_t* strides, int64_t batch,
                          int64_t heads, int64_t length, int64_t size, int threads) {
  using namespace gmask;
  const Kernels* kernels = (type == kFloat32 || type == kBfloat16) ? find_kernels(isa, Type(type)) : nullptr;
  if (kernels == nullptr || batch < 0 || heads < 0 || length < 0 || size < 1 || size > kMaxHead) return 1;
  const int64_t step = (int64_t(16) << 10) / size + 1;
  share(batch * heads * length, step, threads, [&](int64_t first, int64_t last) {
    for (int64_t index = first; index < last; ++index) {
      const int64_t row = index / (heads * length), head = index / length % heads, place = index % length;
      const int64_t from = row * strides[0] + head * strides[1] + place * strides[2];
      kernels->round(Type(type), static_cast<const uint8_t*>(x) + from * bytes_of(type), size,
                     static_cast<uint8_t*>(out) + index * (size + kStepBytes));
    }
  });
  return 0;
}
