// Activations that are rounded to integers, a group of columns at a time.
#pragma once

#include "kernels.h"

namespace gmask {

constexpr int64_t kLongest = 128;  // columns that share a step of the activations, at most

// The numbers of a group become multiples of `size`, up to `most` of them: products with `up`, rounded. What is not
// finite makes the step, and so every output of the row, NaN.
struct Step {
  Step(float extent, bool is_finite, float most)
      : vanishes(!is_finite || extent < 0x1p-100f),
        size(is_finite ? (vanishes ? 0 : extent / most) : from_bits(0x7fc00000)),
        up(vanishes ? 0 : most / extent) {}

  bool vanishes;
  float size, up;
};

// x: `columns` numbers, to be padded with zeros; returns the end of what was written from `to` on.
using FillGroupFunction = uint32_t* (*)(const uint16_t* x, int64_t columns, int64_t padded, int64_t step, uint32_t* to);

template <FillGroupFunction FILL_GROUP>
void fill_row(const Row& row, int64_t longest, int64_t step, uint32_t* to) {
  const uint16_t* x = static_cast<const uint16_t*>(row.x);
  const int64_t length = row.group < longest ? row.group : longest;
  for (int64_t group = 0; group < row.padded_columns; group += row.group)
    for (int64_t start = group; start < group + row.group; start += length) {
      const int64_t left = group + row.group - start, padded = left < length ? left : length;
      const int64_t columns = row.columns - start < padded ? row.columns - start : padded;
      to = FILL_GROUP(x + start, columns, padded, step, to);
    }
}

}  // namespace gmask
