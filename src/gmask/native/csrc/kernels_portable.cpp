// The kernels for any CPU, four floats at a time, and for ARM, where the four are a NEON register.
#include <cmath>

#include "exponential.h"
#include "integers.h"
#include "kernels.h"
#include "vector.h"

#ifdef GMASK_ARM
#include <arm_neon.h>
#endif

namespace gmask {
namespace {

#if defined(__GNUC__) && __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
#define GMASK_GNU_VECTORS 1
typedef float Four __attribute__((vector_size(16)));
typedef uint32_t FourWords __attribute__((vector_size(16)));
typedef int32_t FourIntegers __attribute__((vector_size(16)));
typedef int8_t FourBytes __attribute__((vector_size(4)));
#else
struct Four {
  float v[4];
};
inline Four operator+(Four a, Four b) {
  return {{a.v[0] + b.v[0], a.v[1] + b.v[1], a.v[2] + b.v[2], a.v[3] + b.v[3]}};
}
inline Four operator*(Four a, Four b) {
  return {{a.v[0] * b.v[0], a.v[1] * b.v[1], a.v[2] * b.v[2], a.v[3] * b.v[3]}};
}
#endif

struct FourFloats {
  static constexpr int lanes = 4;
  using type = Four;
  static constexpr int64_t square = 4;  // rows and words of `transpose`

  // to[word * kRows + row], for rows of bfloat16 numbers that lie `step` apart.
  static void transpose(const uint16_t* from, int64_t step, uint32_t* to) {
    for (int64_t row = 0; row < square; ++row)
      for (int64_t word = 0; word < square; ++word)
        std::memcpy(to + word * kRows + row, from + row * step + 2 * word, 4);
  }

  GMASK_INLINE type zero() { return Four{0, 0, 0, 0}; }
  GMASK_INLINE type broadcast(const float* x) { return Four{*x, *x, *x, *x}; }
  GMASK_INLINE type load(const float* x) { return Four{x[0], x[1], x[2], x[3]}; }
  GMASK_INLINE type load_half(const uint16_t* x) {
    return Four{half_to_float(x[0]), half_to_float(x[1]), half_to_float(x[2]), half_to_float(x[3])};
  }
  GMASK_INLINE void store(float* out, type a) { std::memcpy(out, &a, sizeof a); }
  GMASK_INLINE type load_bfloat16(const uint16_t* x) {
    return Four{bfloat16_to_float(x[0]), bfloat16_to_float(x[1]), bfloat16_to_float(x[2]), bfloat16_to_float(x[3])};
  }
  GMASK_INLINE type load_int8(const int8_t* x) {
    return Four{float(x[0]), float(x[1]), float(x[2]), float(x[3])};
  }
  GMASK_INLINE type add(type a, type b) { return a + b; }
  GMASK_INLINE float sum(type a) {
    float x[4];
    store(x, a);
    return (x[0] + x[1]) + (x[2] + x[3]);
  }
  GMASK_INLINE void sums(const type (&a)[4], float* out) {
    for (int i = 0; i < 4; ++i) out[i] = sum(a[i]);
  }
  GMASK_INLINE type multiply_add(type a, type b, type c) { return a * b + c; }
#ifdef GMASK_GNU_VECTORS
  using words = FourWords;

  GMASK_INLINE words load_words(const uint8_t* data) {
    words pairs;
    std::memcpy(&pairs, data, sizeof pairs);
    return pairs;
  }
  GMASK_INLINE type every_other(words pairs, int first) { return (Four)(first ? pairs & 0xffff0000 : pairs << 16); }
  GMASK_INLINE type from_int8(const uint8_t* data, int byte) {
    FourWords words;
    std::memcpy(&words, data, sizeof words);
    return __builtin_convertvector((FourIntegers)(words << (24 - 8 * byte)) >> 24, Four);
  }
  GMASK_INLINE type from_int4(const uint8_t* data, int nibble) {
    FourWords words;
    std::memcpy(&words, data, sizeof words);
    return __builtin_convertvector((FourIntegers)(words >> (4 * nibble) & 15) - 8, Four);
  }
#else
  struct words {
    uint16_t numbers[8];
  };

  GMASK_INLINE words load_words(const uint8_t* data) {
    words pairs;
    std::memcpy(&pairs, data, sizeof pairs);
    return pairs;
  }
  GMASK_INLINE type every_other(words pairs, int first) {
    const uint16_t* x = pairs.numbers + first;
    return Four{bfloat16_to_float(x[0]), bfloat16_to_float(x[2]), bfloat16_to_float(x[4]), bfloat16_to_float(x[6])};
  }
  GMASK_INLINE type from_int8(const uint8_t* data, int byte) {  // little-endian words, whatever the machine
    const uint8_t* x = data + byte;
    return Four{float(int8_t(x[0])), float(int8_t(x[4])), float(int8_t(x[8])), float(int8_t(x[12]))};
  }
  GMASK_INLINE type from_int4(const uint8_t* data, int nibble) {
    const uint8_t* byte = data + nibble / 2;
    const int down = nibble % 2 * 4;
    return Four{float((byte[0] >> down & 15) - 8), float((byte[4] >> down & 15) - 8),
                float((byte[8] >> down & 15) - 8), float((byte[12] >> down & 15) - 8)};
  }
#endif

  static float half_to_float(uint16_t half) {
    const uint32_t exponent = half >> 10 & 31, fraction = half & 1023, sign = uint32_t(half & 0x8000) << 16;
    float value = float(fraction) * 0x1p-24f;  // a subnormal number
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    if (exponent != 0) bits = (exponent == 31 ? 255 : exponent + 112) << 23 | fraction << 13;
    bits |= sign;
    std::memcpy(&value, &bits, sizeof value);
    return value;
  }
};

#define GMASK_NAME portable
#define GMASK_TARGET
#define GMASK_VECTOR FourFloats
#define GMASK_SUMS 8
#include "blocks_float32.inc"
#include "attention.inc"
#include "dense.inc"
#include "elementwise.inc"
#include "undefine.h"

#ifdef GMASK_ARM
struct Neon {
  static constexpr int lanes = 4;
  using type = float32x4_t;
  using words = uint32x4_t;
  static constexpr int64_t square = FourFloats::square;

  static void transpose(const uint16_t* from, int64_t step, uint32_t* to) { FourFloats::transpose(from, step, to); }

  GMASK_INLINE type zero() { return vdupq_n_f32(0); }
  GMASK_INLINE type broadcast(const float* x) { return vld1q_dup_f32(x); }
  GMASK_INLINE type load(const float* x) { return vld1q_f32(x); }
  GMASK_INLINE type load_half(const uint16_t* x) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(x))); }
  GMASK_INLINE void store(float* out, type a) { vst1q_f32(out, a); }
  GMASK_INLINE type load_bfloat16(const uint16_t* x) {
    return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(x), 16));
  }
  GMASK_INLINE type load_int8(const int8_t* x) {
    uint32_t word;
    std::memcpy(&word, x, sizeof word);
    return vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(vcreate_s8(word)))));
  }
  GMASK_INLINE words load_words(const uint8_t* data) { return vreinterpretq_u32_u8(vld1q_u8(data)); }
  GMASK_INLINE type every_other(words pairs, int first) {
    return vreinterpretq_f32_u32(first ? vandq_u32(pairs, vdupq_n_u32(0xffff0000)) : vshlq_n_u32(pairs, 16));
  }
  GMASK_INLINE type add(type a, type b) { return vaddq_f32(a, b); }
  GMASK_INLINE float sum(type a) { return vaddvq_f32(a); }
  GMASK_INLINE void sums(const type (&a)[4], float* out) {
    vst1q_f32(out, vpaddq_f32(vpaddq_f32(a[0], a[1]), vpaddq_f32(a[2], a[3])));
  }
  GMASK_INLINE type multiply_add(type a, type b, type c) { return vfmaq_f32(c, a, b); }
  GMASK_INLINE type from_int8(const uint8_t* data, int byte) {
    const uint32x4_t words = vshlq_u32(vreinterpretq_u32_u8(vld1q_u8(data)), vdupq_n_s32(24 - 8 * byte));
    return vcvtq_f32_s32(vshrq_n_s32(vreinterpretq_s32_u32(words), 24));
  }
  GMASK_INLINE type from_int4(const uint8_t* data, int nibble) {
    const uint32x4_t words = vreinterpretq_u32_u8(vld1q_u8(data));
    const uint32x4_t low = vandq_u32(vshlq_u32(words, vdupq_n_s32(-4 * nibble)), vdupq_n_u32(15));
    return vcvtq_f32_s32(vsubq_s32(vreinterpretq_s32_u32(low), vdupq_n_s32(8)));
  }
};

#define GMASK_NAME neon
#define GMASK_TARGET
#define GMASK_VECTOR Neon
#define GMASK_SUMS 16
#include "blocks_float32.inc"
#include "attention.inc"
#include "dense.inc"
#include "elementwise.inc"
#include "undefine.h"
#endif

}  // namespace

void fill_floats(const Row& row, int64_t step, uint32_t* to) {
  if (row.type == kFloat32) {
    const uint32_t* x = static_cast<const uint32_t*>(row.x);
    for (int64_t k = 0; k < row.columns; ++k) to[k * step] = x[k];
  } else {  // the high half of a float32 is the bfloat16
    const uint16_t* x = static_cast<const uint16_t*>(row.x);
    for (int64_t k = 0; k < row.columns; ++k) to[k * step] = uint32_t(x[k]) << 16;
  }
  for (int64_t k = row.columns; k < row.padded_columns; ++k) to[k * step] = 0;
}

const Kernels& portable_kernels() {
  static const Kernels kernels = {fill_floats,
                                  {kColumnStep, kColumnStep},
                                  {GMASK_TILES(portable, 4), GMASK_TILES(portable, 8), GMASK_TILES(portable, 16)},
                                  portable_attend,
                                  portable_gelu,
                                  portable_turn,
                                  portable_round,
                                  portable_add_multiple,
                                  portable_normalize,
                                  portable_fill_dense,
                                  portable_pack_dense,
                                  GMASK_DENSE(portable_dense)};
  return kernels;
}

#ifdef GMASK_ARM
const Kernels& neon_kernels() {
  static const Kernels kernels = {fill_floats,
                                  {kColumnStep, kColumnStep},
                                  {GMASK_TILES(neon, 4), GMASK_TILES(neon, 8), GMASK_TILES(neon, 16)},
                                  neon_attend,
                                  neon_gelu,
                                  neon_turn,
                                  neon_round,
                                  neon_add_multiple,
                                  neon_normalize,
                                  neon_fill_dense,
                                  neon_pack_dense,
                                  GMASK_DENSE(neon_dense)};
  return kernels;
}
#endif

}  // namespace gmask
