// Products of int8 and int4 weights with bfloat16 activations, which are rounded to int8 on the way, for ARM: by the
// instruction that sums four products of bytes (dotprod), and by that which multiplies two rows of eight bytes by two
// others (i8mm), from four rows of activations on.
//
// The activations lie as in kernels_integers.cpp. Both operands are signed: int8 weights stay as they are, and int4 ones,
// which lie moved up by 8 (kernels.h), have that in their correction.
#include "integers.h"
#include "kernels.h"
#include "vector.h"

#ifdef GMASK_ARM_INTEGERS
#include <arm_neon.h>

#if defined(__ARM_FEATURE_DOTPROD)  // the compiler was told of such a machine, which may have more
#define TARGET_DOTPROD
#define TARGET_I8MM __attribute__((target("+i8mm")))
#else
#define TARGET_DOTPROD __attribute__((target("arch=armv8.2-a+dotprod")))
#define TARGET_I8MM __attribute__((target("arch=armv8.2-a+dotprod+i8mm")))
#endif

namespace gmask {
namespace {

constexpr int kLanes = 4;
using Sum = int32x4_t;

// Vectors of weight rows whose sums with so many rows of activations fit half of the registers.
constexpr int vectors_of(int rows) { return rows <= 2 ? 8 : rows <= 4 ? 4 : 2; }

TARGET_DOTPROD GMASK_INLINE float32x4_t load_bfloat16(const uint16_t* x, int64_t present) {
  uint16_t some[4] = {};
  if (present < 4) {
    for (int64_t k = 0; k < present; ++k) some[k] = x[k];
    x = some;
  }
  return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(x), 16));
}

// A group of a row. OFFSET: of the weight.
template <int OFFSET>
TARGET_DOTPROD uint32_t* fill_group(const uint16_t* x, int64_t columns, int64_t padded, int64_t step, uint32_t* to) {
  float32x4_t number[kLongest / 4];
  float32x4_t largest = vdupq_n_f32(0);
  for (int64_t k = 0; k < padded; k += 4) {
    number[k / 4] = load_bfloat16(x + k, columns - k);
    largest = vmaxq_f32(largest, vabsq_f32(number[k / 4]));  // a NaN stays
  }
  const float extent = vmaxvq_f32(largest);
  const Step multiple(extent, extent < from_bits(0x7f800000), 127);
  int32x4_t sum = vdupq_n_s32(0);
  uint32_t* words = to + 2 * step;
  for (int64_t k = 0; k < padded; k += 4, words += step) {
    const int32x4_t integers = vcvtnq_s32_f32(vmulq_n_f32(number[k / 4], multiple.up));  // of a NaN 0
    sum = vaddq_s32(sum, integers);
    const int16x4_t halves = vmovn_s32(integers);
    *words = vget_lane_u32(vreinterpret_u32_s8(vmovn_s16(vcombine_s16(halves, halves))), 0);
  }
  const int32_t correction = -OFFSET * vaddvq_s32(sum);
  std::memcpy(to, &multiple.size, sizeof multiple.size);
  std::memcpy(to + step, &correction, sizeof correction);
  return words;
}

TARGET_DOTPROD GMASK_INLINE float32x4_t load_scale(const Block& block, int64_t at) {
  if (!block.half_scale) return vld1q_f32(static_cast<const float*>(block.scale) + at);
  return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(static_cast<const uint16_t*>(block.scale) + at)));
}

TARGET_DOTPROD GMASK_INLINE void store(float* to, float32x4_t scale) { vst1q_f32(to, scale); }

TARGET_DOTPROD GMASK_INLINE int32x4_t broadcast(const uint32_t* from) {
  return vreinterpretq_s32_u32(vld1q_dup_u32(from));
}

// Adds sums of four rows, times their scales and a step of the activations.
TARGET_DOTPROD GMASK_INLINE void add_scaled(int32x4_t sum, const float* scale, int32x4_t step, float* to) {
  const float32x4_t unit = vmulq_f32(vld1q_f32(scale), vreinterpretq_f32_s32(step));
  vst1q_f32(to, vfmaq_f32(vld1q_f32(to), vcvtq_f32_s32(sum), unit));
}

// Columns 4 * part to 4 * part + 3 of eight, of four rows of the weight.
template <int BITS>
TARGET_DOTPROD GMASK_INLINE int8x16_t four_columns(const uint8_t* data, int part) {
  if (BITS == 8) return vreinterpretq_s8_u8(vld1q_u8(data + 4 * kRows * part));
  const uint8x16_t words = vld1q_u8(data);
  return vreinterpretq_s8_u8(part ? vshrq_n_u8(words, 4) : vandq_u8(words, vdupq_n_u8(15)));
}

// Each `add` adds the products of `columns` columns of 4 * H rows of the weight with R of M rows of activations.
struct DotprodIntegers {
  static constexpr bool is_wide(int) { return false; }
  static constexpr int64_t longest(int bits) { return bits == 4 ? kLongest : kLongest / 2; }
  static constexpr int rows_together(int m) { return m; }

  template <int BITS, int M, int R, int H>
  TARGET_DOTPROD GMASK_INLINE void add(const uint8_t* data, const uint32_t* x, int64_t columns,
                                       int32x4_t (&total)[R][H]) {
    for (int64_t c = 0; c < columns; c += 8, data += kRows * BITS, x += 2 * M)
      GMASK_UNROLL for (int part = 0; part < 2; ++part) {
        int8x16_t weight[H];
        GMASK_UNROLL for (int h = 0; h < H; ++h) weight[h] = four_columns<BITS>(data + 16 * h, part);
        GMASK_UNROLL for (int r = 0; r + 4 <= R; r += 4) {
          const int8x16_t activations = vreinterpretq_s8_u32(vld1q_u32(x + part * M + r));
          GMASK_UNROLL for (int h = 0; h < H; ++h) {
            total[r][h] = vdotq_laneq_s32(total[r][h], weight[h], activations, 0);
            total[r + 1][h] = vdotq_laneq_s32(total[r + 1][h], weight[h], activations, 1);
            total[r + 2][h] = vdotq_laneq_s32(total[r + 2][h], weight[h], activations, 2);
            total[r + 3][h] = vdotq_laneq_s32(total[r + 3][h], weight[h], activations, 3);
          }
        }
        GMASK_UNROLL for (int r = R / 4 * 4; r < R; ++r) {
          const int8x16_t activation = vreinterpretq_s8_s32(broadcast(x + part * M + r));
          GMASK_UNROLL for (int h = 0; h < H; ++h) total[r][h] = vdotq_s32(total[r][h], weight[h], activation);
        }
      }
  }
};

struct I8mmIntegers : DotprodIntegers {
  static constexpr int kFewest = 4;  // rows of activations; for fewer it would take as many instructions as the other
  static constexpr int rows_together(int m) { return m < kFewest ? m : m / 2 * 2; }

  template <int BITS, int M, int R, int H>
  TARGET_I8MM GMASK_INLINE void add(const uint8_t* data, const uint32_t* x, int64_t columns,
                                    int32x4_t (&total)[R][H]) {
    if constexpr (R < kFewest)
      DotprodIntegers::add<BITS, M>(data, x, columns, total);
    else
      add_pairs<BITS, M>(data, x, columns, total);
  }

  // A sum is of two rows of the weight by two of activations; eight columns of a row lie together.
  template <int BITS, int M, int R, int H>
  TARGET_I8MM GMASK_INLINE void add_pairs(const uint8_t* data, const uint32_t* x, int64_t columns,
                                          int32x4_t (&total)[R][H]) {
    int32x4_t sum[R / 2][H][2];
    GMASK_UNROLL for (int pair = 0; pair < R / 2; ++pair)
      GMASK_UNROLL for (int h = 0; h < H; ++h) sum[pair][h][0] = sum[pair][h][1] = vdupq_n_s32(0);
    for (int64_t c = 0; c < columns; c += 8, data += kRows * BITS, x += 2 * M) {
      int8x16_t weight[H][2];
      GMASK_UNROLL for (int h = 0; h < H; ++h) {
        const int32x4_t first = vreinterpretq_s32_s8(four_columns<BITS>(data + 16 * h, 0));
        const int32x4_t second = vreinterpretq_s32_s8(four_columns<BITS>(data + 16 * h, 1));
        weight[h][0] = vreinterpretq_s8_s32(vzip1q_s32(first, second));
        weight[h][1] = vreinterpretq_s8_s32(vzip2q_s32(first, second));
      }
      GMASK_UNROLL for (int pair = 0; pair < R / 2; ++pair) {
        const uint32x2_t none = vdup_n_u32(0);
        const uint32x4_t first = vcombine_u32(vld1_u32(x + 2 * pair), none);
        const uint32x4_t second = vcombine_u32(vld1_u32(x + M + 2 * pair), none);
        const int8x16_t activations = vreinterpretq_s8_u32(vzip1q_u32(first, second));
        GMASK_UNROLL for (int h = 0; h < H; ++h)
          GMASK_UNROLL for (int half = 0; half < 2; ++half)
            sum[pair][h][half] = vmmlaq_s32(sum[pair][h][half], weight[h][half], activations);
      }
    }
    GMASK_UNROLL for (int r = 0; r < R; ++r)
      GMASK_UNROLL for (int h = 0; h < H; ++h) {
        const int32x4_t* four = sum[r / 2][h];
        total[r][h] = vaddq_s32(total[r][h], r % 2 ? vuzp2q_s32(four[0], four[1]) : vuzp1q_s32(four[0], four[1]));
      }
  }
};

#define GMASK_NAME dotprod
#define GMASK_TARGET TARGET_DOTPROD
#define GMASK_INTEGERS DotprodIntegers
#include "blocks_integers.inc"
#include "undefine.h"

#define GMASK_NAME i8mm
#define GMASK_TARGET TARGET_I8MM
#define GMASK_INTEGERS I8mmIntegers
#include "blocks_integers.inc"
#include "undefine.h"

void fill(const Row& row, int64_t step, uint32_t* to) {
  if (row.bits == 4)
    fill_row<fill_group<8>>(row, DotprodIntegers::longest(4), step, to);
  else
    fill_row<fill_group<0>>(row, DotprodIntegers::longest(8), step, to);
}

Kernels make_kernels(const BlockFunction (&products)[2][kMaxTile]) {
  Kernels made = neon_kernels();
  made.fill = fill;
  made.units[0] = made.units[1] = 2 + kColumnStep / 4;
  std::memcpy(made.multiply, products, sizeof products);
  return made;
}

}  // namespace

const Kernels& neon_dotprod_kernels() {
  static const Kernels kernels = make_kernels({GMASK_TILES(dotprod, 4), GMASK_TILES(dotprod, 8)});
  return kernels;
}

const Kernels& neon_i8mm_kernels() {
  static const Kernels kernels = make_kernels({GMASK_TILES(i8mm, 4), GMASK_TILES(i8mm, 8)});
  return kernels;
}

}  // namespace gmask
#endif
