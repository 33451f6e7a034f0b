// Products of int8 and int4 weights with bfloat16 activations, which are rounded to integers on the way, with vectors
// of 256 bits: AVX2, and AVX-VNNI, whose instruction does what AVX2 takes three for (ARM: kernels_neon_integers.cpp).
//
// For every 128 columns (fewer if fewer share a scale of the weight) the M rows lie as: M float32 steps, M int32
// corrections, then for every four columns M words of four int8 multiples of the step, or M pairs of words of two int16
// multiples (columns 0 and 2, then 1 and 3).
//
// int8 activations: the instructions take one operand unsigned, so a weight is moved up by 8 (int4) or 128 (int8), and
// the correction is what that adds to the sum, with the sign turned. AVX2 sums two products in 16 bits, without an
// overflow only for int4: a pair is at most 2 * 15 * 127, and eight of them still fit.
// int16 activations: what AVX2 has for int8 weights, as fast as any exact way to multiply bytes. A sum over 128 columns
// is at most 128 * 128 * 32767.
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
#define TARGET_AVX_VNNI __attribute__((target("avxvnni,avx2,fma,f16c")))

namespace gmask {
namespace {

constexpr int64_t kStride = 32;  // columns whose sums are kept in 16 bits
constexpr int kLanes = 8;
using Sum = __m256i;

// Vectors of weight rows whose sums with so many rows of activations fit the registers.
constexpr int vectors_of(int rows) { return rows <= 2 ? 4 : 2; }

TARGET_AVX2 GMASK_INLINE __m256 load_bfloat16(const uint16_t* x, int64_t present) {
  uint16_t some[8] = {};
  if (present < 8) {
    for (int64_t k = 0; k < present; ++k) some[k] = x[k];
    x = some;
  }
  const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
}

// 32 integers, four words of eight, as int8, in order.
TARGET_AVX2 GMASK_INLINE __m256i to_bytes(const __m256i* integers) {
  const __m256i low = _mm256_packs_epi32(integers[0], integers[1]), high = _mm256_packs_epi32(integers[2], integers[3]);
  return _mm256_permutevar8x32_epi32(_mm256_packs_epi16(low, high), _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}

// Eight integers as int16: 0 2, 1 3, 4 6, 5 7, in the first half of each half.
TARGET_AVX2 GMASK_INLINE __m256i to_pairs(__m256i integers) {
  const __m256i high = _mm256_shuffle_epi32(_mm256_slli_epi32(integers, 16), 0xee);
  return _mm256_blend_epi16(integers, high, 0xaa);
}

// A group of a row. OFFSET: of the weight. WIDE: int16.
template <int OFFSET, bool WIDE>
TARGET_AVX2 uint32_t* fill_group(const uint16_t* x, int64_t columns, int64_t padded, int64_t step, uint32_t* to) {
  __m256 number[kLongest / 8];
  const __m256 sign = _mm256_set1_ps(-0.0f), infinity = _mm256_set1_ps(from_bits(0x7f800000));
  __m256 largest = _mm256_setzero_ps(), finite = _mm256_castsi256_ps(_mm256_set1_epi32(-1));
  for (int64_t k = 0; k < padded; k += 8) {
    number[k / 8] = load_bfloat16(x + k, columns - k);
    const __m256 size = _mm256_andnot_ps(sign, number[k / 8]);
    finite = _mm256_and_ps(finite, _mm256_cmp_ps(size, infinity, _CMP_LT_OQ));
    largest = _mm256_max_ps(largest, size);
  }
  alignas(32) float sizes[8];
  _mm256_store_ps(sizes, largest);
  float extent = 0;
  for (const float size : sizes) extent = size > extent ? size : extent;
  const Step multiple(extent, _mm256_movemask_ps(finite) == 0xff, WIDE ? 32767 : 127);
  const __m256 up = _mm256_set1_ps(multiple.up);
  __m256i sum = _mm256_setzero_si256();
  uint32_t* words = to + 2 * step;
  for (int64_t k = 0; k < padded; k += 32) {
    __m256i integers[4];
    GMASK_UNROLL for (int i = 0; i < 4; ++i) {
      integers[i] = multiple.vanishes ? _mm256_setzero_si256() : _mm256_cvtps_epi32(_mm256_mul_ps(number[k / 8 + i], up));
      sum = _mm256_add_epi32(sum, integers[i]);
    }
    alignas(32) uint32_t some[32];
    if (!WIDE && step == 1) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(words), to_bytes(integers));
      words += 8;
    } else if (WIDE) {
      GMASK_UNROLL for (int i = 0; i < 4; ++i)
        _mm256_store_si256(reinterpret_cast<__m256i*>(some + 8 * i), to_pairs(integers[i]));
      for (int i = 0; i < 8; ++i, words += 2 * step) words[0] = some[4 * i], words[step] = some[4 * i + 1];
    } else {
      _mm256_store_si256(reinterpret_cast<__m256i*>(some), to_bytes(integers));
      for (int i = 0; i < 8; ++i, words += step) *words = some[i];
    }
  }
  alignas(32) int32_t sums[8];
  _mm256_store_si256(reinterpret_cast<__m256i*>(sums), sum);
  int32_t correction = 0;
  for (const int32_t part : sums) correction -= OFFSET * part;
  std::memcpy(to, &multiple.size, sizeof multiple.size);
  std::memcpy(to + step, &correction, sizeof correction);
  return words;
}

TARGET_AVX2 GMASK_INLINE __m256 load_scale(const Block& block, int64_t at) {
  if (!block.half_scale) return _mm256_loadu_ps(static_cast<const float*>(block.scale) + at);
  const uint16_t* half = static_cast<const uint16_t*>(block.scale) + at;
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(half)));
}

TARGET_AVX2 GMASK_INLINE void store(float* to, __m256 scale) { _mm256_store_ps(to, scale); }

TARGET_AVX2 GMASK_INLINE __m256i load(const uint8_t* from) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
}

TARGET_AVX2 GMASK_INLINE __m256i broadcast(const uint32_t* from) {
  return _mm256_set1_epi32(int(*from));
}

// Adds sums of eight rows, times their scales and a step of the activations.
TARGET_AVX2 GMASK_INLINE void add_scaled(__m256i sum, const float* scale, __m256i step, float* to) {
  const __m256 unit = _mm256_mul_ps(_mm256_loadu_ps(scale), _mm256_castsi256_ps(step));
  _mm256_storeu_ps(to, _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum), unit, _mm256_loadu_ps(to)));
}

// a += b.
#define GMASK_ADD(a, add, b) \
  do {                       \
    a = add(a, b);           \
    GMASK_KEEP(a);           \
  } while (false)

constexpr int kPrefetchAlone = 1024;  // bytes that one row is read ahead of

// Fetches the lines that H vectors will have. One row waits for memory; without this a sixth longer (Zen 3).
template <int M, int H>
GMASK_INLINE void prefetch(const uint8_t* data) {
  GMASK_UNROLL for (int line = 0; line < H / 2; ++line) {
    if (M == 1)
      GMASK_PREFETCH_ONCE(data + kPrefetchAlone + 64 * line);
    else
      GMASK_PREFETCH(data + kPrefetch + 64 * line);
  }
}

// Rows that are multiplied together, of M.
constexpr int half_of(int m) { return m <= 4 ? m : (m + 1) / 2; }

// Each `add` adds the products of `columns` columns of 8 * H rows of the weight with R of M rows of activations.
struct Avx2Integers {
  static constexpr bool is_wide(int bits) { return bits == 8; }
  static constexpr int64_t longest(int) { return kLongest; }
  static constexpr int rows_together(int m) { return half_of(m); }

  template <int BITS, int M, int R, int H>
  TARGET_AVX2 GMASK_INLINE void add(const uint8_t* data, const uint32_t* x, int64_t columns, __m256i (&total)[R][H]) {
    BITS == 4 ? add_int4<M>(data, x, columns, total) : add_int8<M>(data, x, columns, total);
  }

  template <int M, int R, int H>
  TARGET_AVX2 GMASK_INLINE void add_int4(const uint8_t* data, const uint32_t* x, int64_t columns,
                                         __m256i (&total)[R][H]) {
    const __m256i nibble = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
    for (int64_t c = 0; c < columns; c += kStride) {
      __m256i sum[R][H];
      GMASK_UNROLL for (int r = 0; r < R; ++r)
        GMASK_UNROLL for (int h = 0; h < H; ++h) sum[r][h] = _mm256_setzero_si256();
      GMASK_UNROLL for (int eight = 0; eight < kStride / 8; ++eight, data += 4 * kRows, x += 2 * M) {
        prefetch<M, H>(data);
        GMASK_UNROLL for (int part = 0; part < 2; ++part) {
          __m256i weight[H];
          GMASK_UNROLL for (int h = 0; h < H; ++h) {
            const __m256i words = load(data + 32 * h);
            weight[h] = _mm256_and_si256(part ? _mm256_srli_epi16(words, 4) : words, nibble);
          }
          GMASK_UNROLL for (int r = 0; r < R; ++r) {
            const __m256i activation = broadcast(x + part * M + r);
            GMASK_UNROLL for (int h = 0; h < H; ++h)
              GMASK_ADD(sum[r][h], _mm256_add_epi16, _mm256_maddubs_epi16(weight[h], activation));
          }
        }
      }
      GMASK_UNROLL for (int r = 0; r < R; ++r)
        GMASK_UNROLL for (int h = 0; h < H; ++h)
          total[r][h] = _mm256_add_epi32(total[r][h], _mm256_madd_epi16(sum[r][h], ones));
    }
  }

  template <int M, int R, int H>
  TARGET_AVX2 GMASK_INLINE void add_int8(const uint8_t* data, const uint32_t* x, int64_t columns,
                                         __m256i (&total)[R][H]) {
    for (int64_t c = 0; c < columns; c += 4, data += 4 * kRows, x += 2 * M) {
      prefetch<M, H>(data);
      GMASK_UNROLL for (int part = 0; part < 2; ++part) {
        __m256i weight[H];
        GMASK_UNROLL for (int h = 0; h < H; ++h) {
          const __m256i words = load(data + 32 * h);
          weight[h] = _mm256_srai_epi16(part ? words : _mm256_slli_epi16(words, 8), 8);
        }
        GMASK_UNROLL for (int r = 0; r < R; ++r) {
          const __m256i activation = broadcast(x + part * M + r);
          GMASK_UNROLL for (int h = 0; h < H; ++h)
            GMASK_ADD(total[r][h], _mm256_add_epi32, _mm256_madd_epi16(weight[h], activation));
        }
      }
    }
  }
};

struct AvxVnniIntegers {
  static constexpr bool is_wide(int) { return false; }
  static constexpr int64_t longest(int bits) { return bits == 4 ? kLongest : kLongest / 2; }
  static constexpr int rows_together(int m) { return half_of(m); }

  template <int BITS, int M, int R, int H>
  TARGET_AVX_VNNI GMASK_INLINE void add(const uint8_t* data, const uint32_t* x, int64_t columns,
                                        __m256i (&total)[R][H]) {
    for (int64_t c = 0; c < columns; c += 8, data += kRows * BITS, x += 2 * M)
      GMASK_UNROLL for (int part = 0; part < 2; ++part) {
        // One row by these instructions is fastest without (`touch`).
        if (M > 1 && (BITS == 8 || part == 0)) prefetch<M, H>(data + (BITS == 8 ? 4 * kRows * part : 0));
        __m256i weight[H];
        GMASK_UNROLL for (int h = 0; h < H; ++h) {
          if (BITS == 8) {
            weight[h] = _mm256_xor_si256(load(data + 4 * kRows * part + 32 * h), _mm256_set1_epi8(char(0x80)));
          } else {
            const __m256i words = load(data + 32 * h);
            weight[h] = _mm256_and_si256(part ? _mm256_srli_epi16(words, 4) : words, _mm256_set1_epi8(15));
          }
        }
        GMASK_UNROLL for (int r = 0; r < R; ++r) {
          const __m256i activation = broadcast(x + part * M + r);
          GMASK_UNROLL for (int h = 0; h < H; ++h)
            total[r][h] = _mm256_dpbusd_avx_epi32(total[r][h], weight[h], activation);
        }
      }
  }
};

#define GMASK_NAME avx2_int8
#define GMASK_TARGET TARGET_AVX2
#define GMASK_INTEGERS Avx2Integers
#include "blocks_integers.inc"
#include "undefine.h"

#define GMASK_NAME avx_vnni
#define GMASK_TARGET TARGET_AVX_VNNI
#define GMASK_INTEGERS AvxVnniIntegers
#include "blocks_integers.inc"
#include "undefine.h"

template <class Integers>
void fill(const Row& row, int64_t step, uint32_t* to) {
  constexpr bool WIDE = Integers::is_wide(8);
  if (row.bits == 4)
    fill_row<fill_group<8, false>>(row, Integers::longest(4), step, to);
  else
    fill_row<fill_group<WIDE ? 0 : 128, WIDE>>(row, Integers::longest(8), step, to);
}

template <class Integers>
Kernels make_kernels(const BlockFunction (&products)[2][kMaxTile]) {
  Kernels made = avx2_kernels();
  made.fill = fill<Integers>;
  for (int bits = 4; bits <= 8; bits += 4) made.units[bits == 8] = 2 + kColumnStep / (Integers::is_wide(bits) ? 2 : 4);
  std::memcpy(made.multiply, products, sizeof products);
  return made;
}

}  // namespace

const Kernels& avx2_int8_kernels() {
  static const Kernels kernels =
      make_kernels<Avx2Integers>({GMASK_TILES(avx2_int8, 4), GMASK_TILES(avx2_int8, 8)});
  return kernels;
}

const Kernels& avx_vnni_kernels() {
  static const Kernels kernels =
      make_kernels<AvxVnniIntegers>({GMASK_TILES(avx_vnni, 4), GMASK_TILES(avx_vnni, 8)});
  return kernels;
}

}  // namespace gmask
#endif
