// What does an instruction set offer: a block of weight rows times a few rows of activations, and attention of a query?
//
// Layout of the packed weight of N rows and K columns (N padded to 32, K to 32, with zeros), block after block, in
// little-endian 32-bit words, one for each row:
//   int8  [N/32][K/4][32]      four signed bytes: columns 0 1 2 3
//   int4  [N/32][K/8][32]      eight nibbles, each the integer + 8: columns 0 1 2 3 in the low ones of the four bytes,
//                              4 5 6 7 in the high ones; masking then leaves four columns as the bytes of an integer
//                              dot product
//   bfloat16 [N/32][K/2][32]   two of them (dense.cpp packs a few rows at a time)
//   scale [N/32][groups][32]   float16 or float32
// So a thread reads one stream from start to end, a vector lane is a weight row, and nothing is summed across lanes.
#pragma once

#include <cstdint>
#include <cstring>

namespace gmask {

constexpr int kRows = 32;         // weight rows of a block
constexpr int kColumnStep = 32;   // padded columns and groups are multiples of it
constexpr int kMaxTile = 8;       // activation rows that one pass over a block serves
constexpr int kPrefetch = 3072;   // bytes read ahead; from 2 to 6 KB serve alike, more is too much for the cache

enum Isa {
  kPortable, kNeon, kAvx2, kAvx2Int8, kAvxVnni, kAvx512, kAvx512Vnni, kAvx512Bf16, kNeonDotprod, kNeonI8mm, kIsaCount
};
enum Type { kFloat32 = 0, kBfloat16 = 1, kInt8 = 2 };

constexpr int bytes_of(int type) { return type == kFloat32 ? 4 : type == kBfloat16 ? 2 : 1; }

struct Block {
  const uint8_t* data;
  const void* scale;
  bool half_scale;
  int64_t columns;  // padded
  int64_t group;    // columns that share a scale
};

// M is fixed by the function. activations: M rows as `Kernels::fill` lays them. out: [M][32].
using BlockFunction = void (*)(const Block& block, const uint32_t* activations, float* out);

// One row of activations.
struct Row {
  const void* x;
  Type type;
  int bits;  // of the weight
  int64_t columns, padded_columns;
  int64_t group;  // padded columns that share a scale of the weight
};

// Writes a row in units of four bytes, `step` apart: what M rows are read together for lies together (rows a power of
// two apart would fall into the same few cache lines).
using FillFunction = void (*)(const Row& row, int64_t step, uint32_t* to);

// The query of one head, and what it attends to. Keys and values that are int8 have their step, a float32, behind them.
struct Head {
  Type type, stored;                  // of the query and of what is written; of the keys and values
  const void *query, *keys, *values;  // [size], [length][size], [length][size]
  const uint8_t* visible;             // [length], 0 = hidden; or null
  int64_t key_step, value_step, visible_step, length, size;
  float scaling;
  float* weights;  // room for `length`
  void* out;       // [size]
};

constexpr int kHeadStep = 16;  // the head size is a multiple of it

using HeadFunction = void (*)(const Head& head);

constexpr int64_t kStepBytes = 4;  // behind the int8 numbers of a key or value

// Writes `size` numbers, at most kMaxHead, as int8 multiples of a 127th of the largest one, and this step behind them.
using RoundFunction = void (*)(Type type, const void* x, int64_t size, uint8_t* out);

// x * sigmoid(2 * sqrt(2 / pi) * (x + 0.044715 * x^3)), the tanh form of GELU, of bfloat16 numbers.
using GeluFunction = void (*)(const uint16_t* x, uint16_t* out, int64_t count);

// One head of one position: `groups` parts of 2 * half channels, whose pairs (i, i + half) turn by angles of their own.
struct Turn {
  Type type;
  const void* x;
  const float *cosines, *sines;  // [groups][2 * half]; the second half repeats the first
  int64_t groups, half;
  void* out;
};

using TurnFunction = void (*)(const Turn& turn);

// out = x + factor * y, of bfloat16 numbers.
using AddMultipleFunction = void (*)(const uint16_t* x, const uint16_t* y, float factor, uint16_t* out, int64_t count);

// Layer normalization of a row of bfloat16 numbers.
struct Norm {
  const uint16_t *weight, *bias;
  float epsilon;
  int64_t size;
};

using NormalizeFunction = void (*)(const Norm& norm, const uint16_t* x, uint16_t* out);

struct DenseRows {
  const void* weight;  // of the type that the function is for
  int64_t step;        // numbers from a row to the next
  int64_t columns;
};

// Adds to out[m * kRows + r] the product of row r of one or two rows of a weight with row m of M rows of activations,
// which lie `step` apart; for a bfloat16 weight as FillDenseFunction lays them: of every two vectors of columns the even
// ones, then the odd ones.
using DenseFunction = void (*)(const DenseRows& rows, const float* x, int64_t step, float* out);
// Rows of a bfloat16 weight, `step` apart, to a block; zeros for those beyond `count`.
using PackDenseFunction = void (*)(const uint16_t* from, int64_t step, int64_t count, int64_t columns, uint32_t* to);
using FillDenseFunction = void (*)(const uint16_t* row, int64_t columns, float* to);
// Writes to out[m * kRows + r] the product of row r of `count` rows of a weight, at most kRows, with row m of `rows` of
// activations, which lie tile after tile (Tiles) as [columns / 32][rows of the tile][32]: one stream for the cache.
using MultiplyRowsFunction = void (*)(const uint16_t* weight, int64_t count, const uint16_t* x, int64_t rows,
                                      int64_t columns, float* out);

// Rows of activations that are multiplied together, as even as may be.
struct Tiles {
  static constexpr int64_t kMost = 6;
  int64_t rows;
  int64_t count() const { return (rows + kMost - 1) / kMost; }
  int64_t first(int64_t tile) const { return tile * rows / count(); }
};

constexpr int kDenseStep = 32;  // columns are a multiple of it

constexpr int kind_of(int bits) { return bits == 4 ? 0 : bits == 8 ? 1 : 2; }

struct Kernels {
  FillFunction fill;
  int64_t units[2];                     // that it writes for kColumnStep columns, at most; [bits == 8]
  BlockFunction multiply[3][kMaxTile];  // [kind_of(bits)][M - 1]
  HeadFunction attend;
  GeluFunction gelu;
  TurnFunction turn;
  RoundFunction round;
  AddMultipleFunction add_multiple;
  NormalizeFunction normalize;
  FillDenseFunction fill_dense;
  PackDenseFunction pack_dense;
  DenseFunction dense[2][2][Tiles::kMost];  // [Type][rows of the weight - 1][M - 1]
  MultiplyRowsFunction multiply_rows = nullptr;  // where there are instructions for bfloat16
};

const Kernels& portable_kernels();
#if defined(__aarch64__) || defined(_M_ARM64)
#define GMASK_ARM 1
const Kernels& neon_kernels();
// Compilers that take such instructions in a function of their own.
#if (defined(__clang__) && __clang_major__ >= 16) || (defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 10)
#define GMASK_ARM_INTEGERS 1
const Kernels& neon_dotprod_kernels();
const Kernels& neon_i8mm_kernels();
#endif
#endif
#if defined(__GNUC__) && defined(__x86_64__)
#define GMASK_X86 1
const Kernels& avx2_kernels();
const Kernels& avx2_int8_kernels();
const Kernels& avx_vnni_kernels();
const Kernels& avx512_kernels();
const Kernels& avx512_vnni_kernels();
#if defined(__clang__) || __GNUC__ >= 10
#define GMASK_BF16 1
const Kernels& avx512_bf16_kernels();
#endif
#endif

// Those for activations of a type; null if this build or this machine lacks the instructions.
const Kernels* find_kernels(int isa, Type type);

// [columns][M] float32, with zeros up to the padded columns: what the float32 kernels read.
void fill_floats(const Row& row, int64_t step, uint32_t* to);

// The entries of `Kernels::multiply` from a template NAME<BITS, M>.
#define GMASK_TILES(NAME, BITS)                                                                             \
  {                                                                                                         \
    NAME<BITS, 1>, NAME<BITS, 2>, NAME<BITS, 3>, NAME<BITS, 4>, NAME<BITS, 5>, NAME<BITS, 6>, NAME<BITS, 7>, \
        NAME<BITS, 8>                                                                                       \
  }

// `Kernels::dense` from a template NAME<WEIGHT, R, M>.
#define GMASK_DENSE_ROWS(NAME, WEIGHT, R)                                                                   \
  {                                                                                                         \
    NAME<WEIGHT, R, 1>, NAME<WEIGHT, R, 2>, NAME<WEIGHT, R, 3>, NAME<WEIGHT, R, 4>, NAME<WEIGHT, R, 5>,     \
        NAME<WEIGHT, R, 6>                                                                                  \
  }
#define GMASK_DENSE(NAME)                                                        \
  {                                                                              \
    {GMASK_DENSE_ROWS(NAME, float, 1), GMASK_DENSE_ROWS(NAME, float, 2)}, {      \
      GMASK_DENSE_ROWS(NAME, uint16_t, 1), GMASK_DENSE_ROWS(NAME, uint16_t, 2)   \
    }                                                                            \
  }

// Reads memory into the cache in one run, which machines see coming; of several runs at once, or where each line is asked
// for by an instruction, they read half as much a second (Zen 4).
inline void touch(const void* from, int64_t bytes) {
  const volatile uint8_t* start = static_cast<const volatile uint8_t*>(from);
  for (int64_t at = 0; at < bytes; at += 64) (void)start[at];
}

inline float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline uint32_t to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float bfloat16_to_float(uint16_t value) { return from_bits(uint32_t(value) << 16); }

inline uint16_t float_to_bfloat16(float value) {
  const uint32_t bits = to_bits(value);
  const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;  // to nearest, ties to even
  return uint16_t((bits & 0x7fffffff) > 0x7f800000 ? bits >> 16 | 0x40 : rounded);  // NaN stays NaN
}

}  // namespace gmask
