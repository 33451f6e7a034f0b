// Products of a bfloat16 weight with some rows of bfloat16 activations, by the instruction that multiplies pairs of
// them and adds up in float32 (AVX-512 BF16).
//
// A register holds 32 columns of a row. Four rows of the weight and up to six of the activations make 24 sums, which
// leaves room for the operands: ten vectors are read for 24 products. The weight lies as it was loaded, so nothing is
// laid out anew, which is what takes oneDNN longest with a few rows.
#include <algorithm>

#include "kernels.h"
#include "vector.h"

#ifdef GMASK_BF16
#if !defined(__clang__)  // GCC 12 warns of its own header
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>

#define TARGET_BF16 __attribute__((target("avx512bf16,avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")))

namespace gmask {
namespace {

constexpr int kWide = 4;  // rows of the weight

TARGET_BF16 GMASK_INLINE __m512bh load(const uint16_t* from) { return (__m512bh)_mm512_loadu_si512(from); }

// The sums over the lanes of four vectors.
TARGET_BF16 GMASK_INLINE __m128 add_lanes(__m512 a, __m512 b, __m512 c, __m512 d) {
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  const __m512 all = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
  return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

// out[m * kRows + r]: the product of row r of four of the weight with row m of M of x.
template <int M>
TARGET_BF16 void multiply_tile(const uint16_t* const* weight, const uint16_t* x, int64_t columns, float* out) {
  __m512 sum[M][kWide];
  GMASK_UNROLL for (int m = 0; m < M; ++m)
    GMASK_UNROLL for (int r = 0; r < kWide; ++r) sum[m][r] = _mm512_setzero_ps();
  for (int64_t k = 0; k < columns; k += 32) {
    __m512bh row[kWide];
    GMASK_UNROLL for (int r = 0; r < kWide; ++r) {
      row[r] = load(weight[r] + k);
      GMASK_PREFETCH(weight[r] + kWide * columns + k);
    }
    GMASK_UNROLL for (int m = 0; m < M; ++m) {
      const __m512bh activation = load(x + k * M + m * 32);
      GMASK_UNROLL for (int r = 0; r < kWide; ++r) sum[m][r] = _mm512_dpbf16_ps(sum[m][r], activation, row[r]);
    }
  }
  GMASK_UNROLL for (int m = 0; m < M; ++m)
    _mm_storeu_ps(out + m * kRows, add_lanes(sum[m][0], sum[m][1], sum[m][2], sum[m][3]));
}

void multiply_rows(const uint16_t* weight, int64_t count, const uint16_t* x, int64_t rows, int64_t columns, float* out) {
  static constexpr decltype(&multiply_tile<1>) kFunctions[Tiles::kMost] = {
      multiply_tile<1>, multiply_tile<2>, multiply_tile<3>, multiply_tile<4>, multiply_tile<5>, multiply_tile<6>};
  const Tiles tiles = {rows};
  for (int64_t r = 0; r < count; r += kWide) {
    const uint16_t* wide[kWide];  // the last rows take the place of those beyond the weight
    for (int64_t i = 0; i < kWide; ++i) wide[i] = weight + std::min(r + i, count - 1) * columns;
    for (int64_t tile = 0; tile < tiles.count(); ++tile) {
      const int64_t first = tiles.first(tile), taken = tiles.first(tile + 1) - first;
      kFunctions[taken - 1](wide, x + first * columns, columns, out + first * kRows + r);
    }
  }
}

}  // namespace

const Kernels& avx512_bf16_kernels() {
  static const Kernels kernels = [] {
    Kernels made = avx512_vnni_kernels();
    made.multiply_rows = multiply_rows;
    return made;
  }();
  return kernels;
}

}  // namespace gmask
#endif
