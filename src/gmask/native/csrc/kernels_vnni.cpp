// Products of int8 and int4 weights with bfloat16 activations, which are rounded to int8 on the way: four columns at a
// time, twice the rate of bfloat16 products (AVX-512 VNNI).
//
// For every `group_of` columns (or as many as share a scale of the weight) the M rows lie as: M float32 steps, M int32
// corrections, then [columns / 4][M][4] int8 multiples of the step. The instruction takes one operand unsigned, so a
// weight is moved up by `offset_of`, and the correction is what that adds to the sum, with the sign turned.
// An activation is off by at most half a step, 1/254 of the largest of its group: for random numbers a hundredth of
// what rounding to int4 does to the weights, and as much as rounding to bfloat16 does in a few operations.
#include "kernels.h"
#include "vector.h"

#ifdef GMASK_X86
#if !defined(__clang__)  // GCC 12 warns of its own header
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>

#define TARGET_VNNI __attribute__((target("avx512vnni,avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")))

namespace gmask {
namespace {

constexpr int64_t kLongest = 128;

// Columns of a group; shorter ones cost time and, where a few activations stand out, spare the others beside them.
constexpr int64_t group_of(int bits) { return bits == 4 ? kLongest : 64; }

constexpr int offset_of(int bits) { return bits == 4 ? 8 : 128; }

TARGET_VNNI GMASK_INLINE __m512 load_bfloat16(const uint16_t* x, __mmask16 present) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(present, x)), 16));
}

// A group of a row; what is not finite makes its step, and so every output of the row, NaN.
template <int BITS>
TARGET_VNNI uint32_t* fill_group(const uint16_t* x, int64_t columns, int64_t padded, int64_t step, uint32_t* to) {
  __m512 number[kLongest / 16];
  __m512 largest = _mm512_setzero_ps();
  bool finite = true;
  for (int64_t k = 0; k < padded; k += 16) {
    const int64_t left = columns - k;
    const __mmask16 present = left >= 16 ? 0xffff : left <= 0 ? 0 : __mmask16((1 << left) - 1);
    number[k / 16] = load_bfloat16(x + k, present);
    finite &= _mm512_fpclass_ps_mask(number[k / 16], 0x99) == 0;  // NaN, infinity
    largest = _mm512_max_ps(largest, _mm512_abs_ps(number[k / 16]));
  }
  const float extent = _mm512_reduce_max_ps(largest);
  const bool vanishes = !finite || extent < 0x1p-100f;
  const float size = finite ? (vanishes ? 0 : extent / 127) : from_bits(0x7fc00000);
  const __m512 up = _mm512_set1_ps(vanishes ? 0 : 127 / extent);
  __m512i sum = _mm512_setzero_si512();
  for (int64_t k = 0; k < padded; k += 16) {
    const __m512i integers = finite ? _mm512_cvtps_epi32(_mm512_mul_ps(number[k / 16], up)) : _mm512_setzero_si512();
    sum = _mm512_add_epi32(sum, integers);
    uint32_t words[4];
    _mm_storeu_si128(reinterpret_cast<__m128i*>(words), _mm512_cvtepi32_epi8(integers));
    for (int i = 0; i < 4; ++i) to[(2 + k / 4 + i) * step] = words[i];
  }
  const int32_t correction = -offset_of(BITS) * _mm512_reduce_add_epi32(sum);
  std::memcpy(to, &size, sizeof size);
  std::memcpy(to + step, &correction, sizeof correction);
  return to + (2 + padded / 4) * step;
}

TARGET_VNNI void fill(const Row& row, int64_t step, uint32_t* to) {
  const uint16_t* x = static_cast<const uint16_t*>(row.x);
  const int64_t group = row.group < group_of(row.bits) ? row.group : group_of(row.bits);
  for (int64_t start = 0; start < row.padded_columns; start += group) {
    const int64_t left = row.padded_columns - start, padded = left < group ? left : group;
    const int64_t columns = row.columns - start < padded ? row.columns - start : padded;
    to = row.bits == 4 ? fill_group<4>(x + start, columns, padded, step, to)
                       : fill_group<8>(x + start, columns, padded, step, to);
  }
}

TARGET_VNNI GMASK_INLINE __m512 load_scale(const Block& block, int64_t at) {
  if (!block.half_scale) return _mm512_loadu_ps(static_cast<const float*>(block.scale) + at);
  const uint16_t* half = static_cast<const uint16_t*>(block.scale) + at;
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(half)));
}

// Four columns `part` (0 or 1) of 8, of rows 16h to 16h+15, unsigned.
template <int BITS>
TARGET_VNNI GMASK_INLINE __m512i four_columns(const uint8_t* data, int part, int h) {
  if (BITS == 8)
    return _mm512_xor_si512(_mm512_loadu_si512(data + 4 * kRows * part + 64 * h), _mm512_set1_epi8(char(0x80)));
  const __m512i words = _mm512_loadu_si512(data + 64 * h);
  return _mm512_and_si512(part ? _mm512_srli_epi16(words, 4) : words, _mm512_set1_epi8(15));
}

template <int BITS, int M>
TARGET_VNNI void vnni(const Block& block, const uint32_t* activations, float* out) {
  constexpr int WAYS = M <= 4 ? 2 : 1;  // sums that need not wait for each other
  const uint32_t* x = activations;
  const uint8_t* data = block.data;
  const int64_t group = block.group < group_of(BITS) ? block.group : group_of(BITS);
  __m512 total[M][2];
  GMASK_UNROLL for (int m = 0; m < M; ++m) total[m][0] = total[m][1] = _mm512_setzero_ps();
  int64_t scale_start = 0;
  for (int64_t start = 0; start < block.columns; start += block.group, scale_start += kRows) {
    const __m512 scale[2] = {load_scale(block, scale_start), load_scale(block, scale_start + 16)};
    for (int64_t k = 0; k < block.group; k += group) {
      const int64_t columns = block.group - k < group ? block.group - k : group;
      const float* steps = reinterpret_cast<const float*>(x);
      __m512i sum[WAYS][M][2];
      GMASK_UNROLL for (int m = 0; m < M; ++m)
        GMASK_UNROLL for (int h = 0; h < 2; ++h) {
          sum[0][m][h] = _mm512_set1_epi32(int(x[M + m]));
          GMASK_UNROLL for (int way = 1; way < WAYS; ++way) sum[way][m][h] = _mm512_setzero_si512();
        }
      x += 2 * M;
      for (int64_t c = 0; c < columns; c += 8, data += kRows * BITS, x += 2 * M) {
        GMASK_UNROLL for (int line = 0; line < BITS / 2; ++line) GMASK_PREFETCH(data + kPrefetch + 64 * line);
        GMASK_UNROLL for (int part = 0; part < 2; ++part) {
          const __m512i weight[2] = {four_columns<BITS>(data, part, 0), four_columns<BITS>(data, part, 1)};
          GMASK_UNROLL for (int m = 0; m < M; ++m) {
            const __m512i activation = _mm512_set1_epi32(int(x[part * M + m]));
            GMASK_UNROLL for (int h = 0; h < 2; ++h)
              sum[part % WAYS][m][h] = _mm512_dpbusd_epi32(sum[part % WAYS][m][h], weight[h], activation);
          }
        }
      }
      GMASK_UNROLL for (int m = 0; m < M; ++m)
        GMASK_UNROLL for (int h = 0; h < 2; ++h) {
          GMASK_UNROLL for (int way = 1; way < WAYS; ++way)
            sum[0][m][h] = _mm512_add_epi32(sum[0][m][h], sum[way][m][h]);
          const __m512 unit = _mm512_mul_ps(scale[h], _mm512_set1_ps(steps[m]));
          total[m][h] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[0][m][h]), unit, total[m][h]);
        }
    }
  }
  GMASK_UNROLL for (int m = 0; m < M; ++m)
    GMASK_UNROLL for (int h = 0; h < 2; ++h) _mm512_storeu_ps(out + m * kRows + 16 * h, total[m][h]);
}

}  // namespace

const Kernels& avx512_vnni_kernels() {
  static const Kernels kernels = [] {
    Kernels made = avx512_kernels();
    made.fill = fill;
    made.units[0] = made.units[1] = 2 + kColumnStep / 4;
    const BlockFunction products[2][kMaxTile] = {GMASK_TILES(vnni, 4), GMASK_TILES(vnni, 8)};
    std::memcpy(made.multiply, products, sizeof products);
    return made;
  }();
  return kernels;
}

}  // namespace gmask
#endif
