// The AVX2 and AVX-512 kernels, each built for its instructions by attribute: one file serves every x86.
#include <cmath>

#include "exponential.h"
#include "integers.h"
#include "kernels.h"
#include "vector.h"

#ifdef GMASK_X86
#if !defined(__clang__)  // GCC 12 warns of its own header
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>

#define TARGET_AVX2 __attribute__((target("avx2,fma,f16c")))
#define TARGET_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")))

namespace gmask {
namespace {

struct Avx2 {
  static constexpr int lanes = 8;
  using type = __m256;
  using words = __m256i;
  static constexpr int64_t square = 8;  // rows and words of `transpose`

  // to[word * kRows + row], for rows of bfloat16 numbers that lie `step` apart.
  TARGET_AVX2 GMASK_INLINE void transpose(const uint16_t* from, int64_t step, uint32_t* to) {
    __m256i row[8], pair[8], four[8];
    GMASK_UNROLL for (int r = 0; r < 8; ++r)
      row[r] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + r * step));
    GMASK_UNROLL for (int r = 0; r < 8; r += 2) {
      pair[r] = _mm256_unpacklo_epi32(row[r], row[r + 1]);
      pair[r + 1] = _mm256_unpackhi_epi32(row[r], row[r + 1]);
    }
    GMASK_UNROLL for (int r = 0; r < 8; r += 4)
      GMASK_UNROLL for (int i = 0; i < 2; ++i) {
        four[r + 2 * i] = _mm256_unpacklo_epi64(pair[r + i], pair[r + 2 + i]);
        four[r + 2 * i + 1] = _mm256_unpackhi_epi64(pair[r + i], pair[r + 2 + i]);
      }
    GMASK_UNROLL for (int i = 0; i < 4; ++i) {
      __m256i* at = reinterpret_cast<__m256i*>(to + i * kRows);
      _mm256_storeu_si256(at, _mm256_permute2x128_si256(four[i], four[4 + i], 0x20));
      at = reinterpret_cast<__m256i*>(to + (4 + i) * kRows);
      _mm256_storeu_si256(at, _mm256_permute2x128_si256(four[i], four[4 + i], 0x31));
    }
  }

  TARGET_AVX2 GMASK_INLINE type zero() { return _mm256_setzero_ps(); }
  TARGET_AVX2 GMASK_INLINE type broadcast(const float* x) { return _mm256_broadcast_ss(x); }
  TARGET_AVX2 GMASK_INLINE type load(const float* x) { return _mm256_loadu_ps(x); }
  TARGET_AVX2 GMASK_INLINE type load_half(const uint16_t* x) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
  }
  TARGET_AVX2 GMASK_INLINE type load_bfloat16(const uint16_t* x) {
    const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
  }
  TARGET_AVX2 GMASK_INLINE type load_int8(const int8_t* x) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(x))));
  }
  TARGET_AVX2 GMASK_INLINE words load_words(const uint8_t* data) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(data));
  }
  TARGET_AVX2 GMASK_INLINE type every_other(words pairs, int first) {
    return _mm256_castsi256_ps(first ? _mm256_and_si256(pairs, _mm256_set1_epi32(int(0xffff0000)))
                                     : _mm256_slli_epi32(pairs, 16));
  }
  TARGET_AVX2 GMASK_INLINE void store(float* out, type a) { _mm256_storeu_ps(out, a); }
  TARGET_AVX2 GMASK_INLINE type add(type a, type b) { return _mm256_add_ps(a, b); }
  TARGET_AVX2 GMASK_INLINE float sum(type a) {
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
  }
  TARGET_AVX2 GMASK_INLINE void sums(const type (&a)[4], float* out) {
    const type pairs = _mm256_hadd_ps(_mm256_hadd_ps(a[0], a[1]), _mm256_hadd_ps(a[2], a[3]));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(pairs), _mm256_extractf128_ps(pairs, 1)));
  }
  TARGET_AVX2 GMASK_INLINE type multiply_add(type a, type b, type c) { return _mm256_fmadd_ps(a, b, c); }
  TARGET_AVX2 GMASK_INLINE type from_int8(const uint8_t* data, int byte) {
    const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(data));
    return _mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(words, 24 - 8 * byte), 24));
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
  using words = __m512i;
  static constexpr int64_t square = Avx2::square;

  TARGET_AVX512 GMASK_INLINE void transpose(const uint16_t* from, int64_t step, uint32_t* to) {
    Avx2::transpose(from, step, to);
  }

  TARGET_AVX512 GMASK_INLINE type zero() { return _mm512_setzero_ps(); }
  TARGET_AVX512 GMASK_INLINE type broadcast(const float* x) { return _mm512_set1_ps(*x); }
  TARGET_AVX512 GMASK_INLINE type load(const float* x) { return _mm512_loadu_ps(x); }
  TARGET_AVX512 GMASK_INLINE type load_half(const uint16_t* x) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
  }
  TARGET_AVX512 GMASK_INLINE type load_bfloat16(const uint16_t* x) {
    const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
  }
  TARGET_AVX512 GMASK_INLINE type load_int8(const int8_t* x) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x))));
  }
  TARGET_AVX512 GMASK_INLINE words load_words(const uint8_t* data) { return _mm512_loadu_si512(data); }
  TARGET_AVX512 GMASK_INLINE type every_other(words pairs, int first) {
    return _mm512_castsi512_ps(first ? _mm512_and_si512(pairs, _mm512_set1_epi32(int(0xffff0000)))
                                     : _mm512_slli_epi32(pairs, 16));
  }
  TARGET_AVX512 GMASK_INLINE void store(float* out, type a) { _mm512_storeu_ps(out, a); }
  TARGET_AVX512 GMASK_INLINE type add(type a, type b) { return _mm512_add_ps(a, b); }
  TARGET_AVX512 GMASK_INLINE float sum(type a) { return _mm512_reduce_add_ps(a); }
  TARGET_AVX512 GMASK_INLINE void sums(const type (&a)[4], float* out) {
    Avx2::type half[4];
    GMASK_UNROLL for (int i = 0; i < 4; ++i)
      half[i] = _mm256_add_ps(_mm512_castps512_ps256(a[i]), _mm512_extractf32x8_ps(a[i], 1));
    Avx2::sums(half, out);
  }
  TARGET_AVX512 GMASK_INLINE type multiply_add(type a, type b, type c) { return _mm512_fmadd_ps(a, b, c); }
  TARGET_AVX512 GMASK_INLINE type from_int8(const uint8_t* data, int byte) {
    const __m512i words = _mm512_slli_epi32(_mm512_loadu_si512(data), 24 - 8 * byte);
    return _mm512_cvtepi32_ps(_mm512_srai_epi32(words, 24));
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
#include "attention.inc"
#include "dense.inc"
#include "elementwise.inc"
#include "undefine.h"

#define GMASK_NAME avx512
#define GMASK_TARGET TARGET_AVX512
#define GMASK_VECTOR Avx512
#define GMASK_SUMS 16
#include "blocks_float32.inc"
#include "attention.inc"
#include "dense.inc"
#include "elementwise.inc"
#include "undefine.h"

}  // namespace

const Kernels& avx2_kernels() {
  static const Kernels kernels = {fill_floats,
                                  {kColumnStep, kColumnStep},
                                  {GMASK_TILES(avx2, 4), GMASK_TILES(avx2, 8), GMASK_TILES(avx2, 16)},
                                  avx2_attend,
                                  avx2_gelu,
                                  avx2_turn,
                                  avx2_round,
                                  avx2_add_multiple,
                                  avx2_normalize,
                                  avx2_fill_dense,
                                  avx2_pack_dense,
                                  GMASK_DENSE(avx2_dense)};
  return kernels;
}

const Kernels& avx512_kernels() {
  static const Kernels kernels = {fill_floats,
                                  {kColumnStep, kColumnStep},
                                  {GMASK_TILES(avx512, 4), GMASK_TILES(avx512, 8), GMASK_TILES(avx512, 16)},
                                  avx512_attend,
                                  avx512_gelu,
                                  avx512_turn,
                                  avx512_round,
                                  avx512_add_multiple,
                                  avx512_normalize,
                                  avx512_fill_dense,
                                  avx512_pack_dense,
                                  GMASK_DENSE(avx512_dense)};
  return kernels;
}

}  // namespace gmask
#endif
