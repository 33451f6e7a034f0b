// What a product is written to.
#pragma once

#include "kernels.h"

namespace gmask {

struct Output {
  Type type;
  void* y;           // [rows, outputs]
  const void* bias;  // [outputs] or null
  Type bias_type;
  int64_t outputs;

  // Writes `rows` rows of at most COUNT outputs, which lie `COUNT` apart.
  template <int64_t COUNT>
  void store(int64_t row, int64_t rows, int64_t first, const float* values) const {
    const int64_t count = outputs - first < COUNT ? outputs - first : COUNT;
    float added[COUNT] = {};
    for (int64_t r = 0; bias != nullptr && r < count; ++r)
      added[r] = bias_type == kBfloat16 ? bfloat16_to_float(static_cast<const uint16_t*>(bias)[first + r])
                                        : static_cast<const float*>(bias)[first + r];
    for (int64_t m = 0; m < rows; ++m) {
      const int64_t start = (row + m) * outputs + first;
      for (int64_t r = 0; r < count; ++r) {
        const float value = values[m * COUNT + r] + added[r];
        if (type == kBfloat16)
          static_cast<uint16_t*>(y)[start + r] = float_to_bfloat16(value);
        else
          static_cast<float*>(y)[start + r] = value;
      }
    }
  }
};

}  // namespace gmask
