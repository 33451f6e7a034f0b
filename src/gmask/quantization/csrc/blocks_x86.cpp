// The AVX2, AVX-512 and AVX-512 BF16 kernels, each built for its instructions by attribute: one file serves every x86.
#include "blocks.h"
#include "vector.h"

#ifdef GMASK_X86
#if !defined(__clang__)  // GCC 12 warns of its own header
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>

#define TARGET_AVX2 __attribute__((target("avx2,fma,f16c")))
#define TARGET_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")))
#define TARGET_BF16 __attribute__((target("avx512bf16,avx512vnni,avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")))

namespace gmask {
namespace {

struct Avx2 {
  static constexpr int lanes = 8;
  using type = __m256;

  TARGET_AVX2 GMASK_INLINE type zero() { return _mm256_setzero_ps(); }
  TARGET_AVX2 GMASK_INLINE type broadcast(const float* x) { return _mm256_broadcast_ss(x); }
  TARGET_AVX2 GMASK_INLINE type load(const float* x) { return _mm256_loadu_ps(x); }
  TARGET_AVX2 GMASK_INLINE type load_half(const uint16_t* x) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
  }
  TARGET_AVX2 GMASK_INLINE void store(float* out, type a) { _mm256_storeu_ps(out, a); }
  TARGET_AVX2 GMASK_INLINE type add(type a, type b) { return _mm256_add_ps(a, b); }
  TARGET_AVX2 GMASK_INLINE type multiply_add(type a, type b, type c) { return _mm256_fmadd_ps(a, b, c); }
  TARGET_AVX2 GMASK_INLINE type from_int8(const uint8_t* data) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(data))));
  }
  TARGET_AVX2 GMASK_INLINE type from_int4(const uint8_t* data, int nibble) {
    const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(data));
    const __m256i low = _mm256_and_si256(_mm256_srli_epi32(words, 4 * nibble), _mm256_set1_epi32(15));
    return _mm256_cvtepi32_ps(_mm256_sub_epi32(low, _mm256_set1_epi32(8)));
  }
};

struct Avx512 {
  static constexpr int lanes = 16;
  using type = __m512;

  TARGET_AVX512 GMASK_INLINE type zero() { return _mm512_setzero_ps(); }
  TARGET_AVX512 GMASK_INLINE type broadcast(const float* x) { return _mm512_set1_ps(*x); }
  TARGET_AVX512 GMASK_INLINE type load(const float* x) { return _mm512_loadu_ps(x); }
  TARGET_AVX512 GMASK_INLINE type load_half(const uint16_t* x) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
  }
  TARGET_AVX512 GMASK_INLINE void store(float* out, type a) { _mm512_storeu_ps(out, a); }
  TARGET_AVX512 GMASK_INLINE type add(type a, type b) { return _mm512_add_ps(a, b); }
  TARGET_AVX512 GMASK_INLINE type multiply_add(type a, type b, type c) { return _mm512_fmadd_ps(a, b, c); }
  TARGET_AVX512 GMASK_INLINE type from_int8(const uint8_t* data) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(data))));
  }
  TARGET_AVX512 GMASK_INLINE type from_int4(const uint8_t* data, int nibble) {  // a table, of which an index is 4 bits
    const __m512 values = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
    return _mm512_permutexvar_ps(_mm512_srli_epi32(_mm512_loadu_si512(data), 4 * nibble), values);
  }
};

#define GMASK_NAME avx2
#define GMASK_TARGET TARGET_AVX2
#define GMASK_VECTOR Avx2
#define GMASK_SUMS 8
#include "blocks_float32.inc"

#define GMASK_NAME avx512
#define GMASK_TARGET TARGET_AVX512
#define GMASK_VECTOR Avx512
#define GMASK_SUMS 16
#include "blocks_float32.inc"

// Columns 2j and 2j+1 of 8, rows 16h to 16h+15, as pairs of bfloat16; every int4 is one exactly.
TARGET_BF16 GMASK_INLINE __m512i int4_pairs(const uint8_t* data, int j, int h) {
  // -8..7, twice: the permutation looks at five bits of an index, of which the highest belongs to the next nibble.
  const __m512i values = _mm512_broadcast_i64x4(
      _mm256_setr_epi16(short(0xc100), short(0xc0e0), short(0xc0c0), short(0xc0a0), short(0xc080), short(0xc040),
                        short(0xc000), short(0xbf80), 0, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0));
  return _mm512_permutexvar_epi16(_mm512_srli_epi16(_mm512_loadu_si512(data + 64 * h), 4 * j), values);
}

// Int4 weights, bfloat16 activations, two columns at a time.
template <int BITS, int M>
TARGET_BF16 void avx512_bf16(const Block& block, const void* activations, float* out) {
  constexpr int WAYS = M == 1 ? 4 : M <= 3 ? 2 : 1;  // sums that need not wait for each other
  const int32_t* x = static_cast<const int32_t*>(activations);
  const uint8_t* data = block.data;
  __m512 total[M][2];
  GMASK_UNROLL for (int m = 0; m < M; ++m) total[m][0] = total[m][1] = _mm512_setzero_ps();
  int64_t scale_start = 0;
  for (int64_t start = 0; start < block.columns; start += block.group, scale_start += kRows) {
    __m512 sum[WAYS][M][2];
    GMASK_UNROLL for (int way = 0; way < WAYS; ++way)
      GMASK_UNROLL for (int m = 0; m < M; ++m) sum[way][m][0] = sum[way][m][1] = _mm512_setzero_ps();
    for (int64_t k = 0; k < block.group; k += 8, data += 4 * kRows, x += 4 * M) {
      GMASK_UNROLL for (int line = 0; line < 2; ++line) GMASK_PREFETCH(data + kPrefetch + 64 * line);
      GMASK_UNROLL for (int j = 0; j < 4; ++j) {
        const __m512i weight[2] = {int4_pairs(data, j, 0), int4_pairs(data, j, 1)};
        GMASK_UNROLL for (int m = 0; m < M; ++m) {
          const __m512bh activation = (__m512bh)_mm512_set1_epi32(x[j * M + m]);
          GMASK_UNROLL for (int h = 0; h < 2; ++h)
            sum[j % WAYS][m][h] = _mm512_dpbf16_ps(sum[j % WAYS][m][h], (__m512bh)weight[h], activation);
        }
      }
    }
    GMASK_UNROLL for (int h = 0; h < 2; ++h) {
      const int64_t at = scale_start + 16 * h;
      const __m512 scale = block.half_scale ? Avx512::load_half(static_cast<const uint16_t*>(block.scale) + at)
                                            : Avx512::load(static_cast<const float*>(block.scale) + at);
      GMASK_UNROLL for (int m = 0; m < M; ++m) {
        GMASK_UNROLL for (int way = 1; way < WAYS; ++way) sum[0][m][h] = _mm512_add_ps(sum[0][m][h], sum[way][m][h]);
        total[m][h] = _mm512_fmadd_ps(sum[0][m][h], scale, total[m][h]);
      }
    }
  }
  GMASK_UNROLL for (int m = 0; m < M; ++m)
    GMASK_UNROLL for (int h = 0; h < 2; ++h) _mm512_storeu_ps(out + m * kRows + 16 * h, total[m][h]);
}

// Int8 weights, fixed-point activations (blocks.h: kFixed), two columns at a time: widening bytes to 16 bits costs half
// of what making floats of them does.
template <int BITS, int M>
TARGET_BF16 void avx512_fixed(const Block& block, const void* activations, float* out) {
  constexpr int WAYS = M == 1 ? 4 : M <= 3 ? 2 : 1;
  // Interleaving the words of two columns leaves rows 0-3 8-11 16-19 24-27 in one register and the others in the next.
  const __m512i order[2] = {_mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23),
                            _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31)};
  const int32_t* x = static_cast<const int32_t*>(activations);
  const uint8_t* data = block.data;
  __m512 total[M][2];
  GMASK_UNROLL for (int m = 0; m < M; ++m) total[m][0] = total[m][1] = _mm512_setzero_ps();
  int64_t scale_start = 0;
  for (int64_t start = 0; start < block.columns; start += block.group, scale_start += kRows) {
    __m512 sum[M][2];
    GMASK_UNROLL for (int m = 0; m < M; ++m) sum[m][0] = sum[m][1] = _mm512_setzero_ps();
    for (int64_t k = 0; k < block.group; k += kFixedGroup) {
      const int64_t stop = k + kFixedGroup < block.group ? k + kFixedGroup : block.group;
      const float* steps = reinterpret_cast<const float*>(x);
      x += M;
      __m512i part[WAYS][M][2];
      GMASK_UNROLL for (int way = 0; way < WAYS; ++way)
        GMASK_UNROLL for (int m = 0; m < M; ++m) part[way][m][0] = part[way][m][1] = _mm512_setzero_si512();
      for (int64_t c = k; c < stop; c += 8, data += 8 * kRows, x += 4 * M) {
        GMASK_UNROLL for (int line = 0; line < 4; ++line) GMASK_PREFETCH(data + kPrefetch + 64 * line);
        GMASK_UNROLL for (int j = 0; j < 4; ++j) {
          const __m256i* columns = reinterpret_cast<const __m256i*>(data + 2 * j * kRows);
          const __m512i even = _mm512_cvtepi8_epi16(_mm256_loadu_si256(columns));
          const __m512i odd = _mm512_cvtepi8_epi16(_mm256_loadu_si256(columns + 1));
          const __m512i weight[2] = {_mm512_unpacklo_epi16(even, odd), _mm512_unpackhi_epi16(even, odd)};
          GMASK_UNROLL for (int m = 0; m < M; ++m) {
            const __m512i activation = _mm512_set1_epi32(x[j * M + m]);
            GMASK_UNROLL for (int h = 0; h < 2; ++h)
              part[j % WAYS][m][h] = _mm512_dpwssd_epi32(part[j % WAYS][m][h], weight[h], activation);
          }
        }
      }
      GMASK_UNROLL for (int m = 0; m < M; ++m)
        GMASK_UNROLL for (int h = 0; h < 2; ++h) {
          GMASK_UNROLL for (int way = 1; way < WAYS; ++way)
            part[0][m][h] = _mm512_add_epi32(part[0][m][h], part[way][m][h]);
          sum[m][h] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(part[0][m][h]), _mm512_set1_ps(steps[m]), sum[m][h]);
        }
    }
    GMASK_UNROLL for (int h = 0; h < 2; ++h) {
      const int64_t at = scale_start + 16 * h;
      const __m512 scale = block.half_scale ? Avx512::load_half(static_cast<const uint16_t*>(block.scale) + at)
                                            : Avx512::load(static_cast<const float*>(block.scale) + at);
      GMASK_UNROLL for (int m = 0; m < M; ++m)
        total[m][h] = _mm512_fmadd_ps(_mm512_permutex2var_ps(sum[m][0], order[h], sum[m][1]), scale, total[m][h]);
    }
  }
  GMASK_UNROLL for (int m = 0; m < M; ++m)
    GMASK_UNROLL for (int h = 0; h < 2; ++h) _mm512_storeu_ps(out + m * kRows + 16 * h, total[m][h]);
}

}  // namespace

const Kernels& avx2_kernels() {
  static const Kernels kernels = {{GMASK_ROW(avx2, 4, kFloats), GMASK_ROW(avx2, 8, kFloats)}};
  return kernels;
}

const Kernels& avx512_kernels() {
  static const Kernels kernels = {{GMASK_ROW(avx512, 4, kFloats), GMASK_ROW(avx512, 8, kFloats)}};
  return kernels;
}

const Kernels& avx512_bf16_kernels() {
  static const Kernels kernels = {{GMASK_ROW(avx512_bf16, 4, kPairs), GMASK_ROW(avx512_fixed, 8, kFixed)}};
  return kernels;
}

}  // namespace gmask
#endif
