// Rows of activations in tiles of up to eight, as the kernels read them.
#pragma once

#include <memory>

#include "kernels.h"
#include "threads.h"

namespace gmask {

class Activations {
 public:
  // row: the first of `rows` rows, which lie one after the other; units: that `fill` writes for kColumnStep columns.
  Activations(FillFunction fill, int64_t units, const Row& row, int64_t rows, int threads)
      : row_units_(row.padded_columns / kColumnStep * units),
        rows_(rows),
        units_(new uint32_t[size_t(rows_) * size_t(row_units_)]) {
    const int64_t row_bytes = row.columns * (row.type == kBfloat16 ? 2 : 4);
    share_each(tiles(), threads, [&](int64_t tile) {
      for (int64_t m = 0; m < rows_of(tile); ++m) {
        Row one = row;
        one.x = static_cast<const uint8_t*>(row.x) + (tile * kMaxTile + m) * row_bytes;
        fill(one, rows_of(tile), units_.get() + unit_of(tile) + m);
      }
    });
  }

  int64_t tiles() const { return (rows_ + kMaxTile - 1) / kMaxTile; }
  int64_t rows_of(int64_t tile) const { return std::min<int64_t>(kMaxTile, rows_ - tile * kMaxTile); }
  const uint32_t* operator[](int64_t tile) const { return units_.get() + unit_of(tile); }

 private:
  int64_t unit_of(int64_t tile) const { return tile * kMaxTile * row_units_; }

  const int64_t row_units_, rows_;
  const std::unique_ptr<uint32_t[]> units_;
};

}  // namespace gmask
