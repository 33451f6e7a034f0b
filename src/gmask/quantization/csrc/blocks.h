// How is one block of 32 weight rows multiplied by a few rows of activations?
//
// Layout of the packed weight of N rows and K columns (N padded to 32, K to 32, with zeros), block after block:
//   int8  [N/32][K][32]        signed bytes
//   int4  [N/32][K/8][32]      little-endian 32-bit words of 8 nibbles, each the integer + 8, the lowest first:
//                              columns 0 2 4 6 (low half), 1 3 5 7 (high half); a shift by 4j then leaves the pair
//                              of columns 2j, 2j+1 at the bottom of both halves, as a bfloat16 dot product wants it
//   scale [N/32][groups][32]   float16 or float32
// So a thread reads one stream from start to end, a vector lane is a weight row, and nothing is summed across lanes.
#pragma once

#include <cstdint>

namespace gmask {

constexpr int kRows = 32;         // weight rows of a block
constexpr int kColumnStep = 32;   // padded columns and groups are multiples of it
constexpr int kMaxTile = 8;       // activation rows that one pass over a block serves
constexpr int kPrefetch = 3072;   // bytes read ahead; from 2 to 6 KB serve alike, more is too much for the cache

enum Isa { kPortable = 0, kNeon = 1, kAvx2 = 2, kAvx512 = 3, kAvx512Bf16 = 4, kIsaCount = 5 };

struct Block {
  const uint8_t* data;
  const void* scale;
  bool half_scale;
  int64_t columns;  // padded
  int64_t group;    // columns that share a scale
};

// How the activations of M rows lie: what is read together lies together (rows a power of two apart would fall into the
// same few cache lines). A unit is four bytes.
enum Format {
  kFloats,  // [columns][M] float32
  kPairs,   // [columns/2][M][2] bfloat16
  kFixed,   // for every kFixedGroup columns, or fewer where a scale's group or the row ends: [M] float32 steps, powers of
            // two, then [columns/2][M][2] int16 multiples of the step. A bfloat16 is one exactly if the largest of the
            // group is less than 128 times as large; else it is off by at most 2^-15 of the largest, ten times less
            // than what rounding the weights to int8 does to that largest one.
};

constexpr int kFixedGroup = 128;  // 128 * 128 * 32767 fits 32 bits

// M is fixed by the function. out: [M][32].
using BlockFunction = void (*)(const Block& block, const void* x, float* out);

struct Tile {
  BlockFunction function;
  Format format;  // of x
};

// The kernels of an instruction set: [bits == 8][M - 1].
struct Kernels {
  Tile tiles[2][kMaxTile];
};

const Kernels& portable_kernels();
#if defined(__aarch64__) || defined(_M_ARM64)
#define GMASK_ARM 1
const Kernels& neon_kernels();
#endif
#if defined(__GNUC__) && defined(__x86_64__)
#define GMASK_X86 1
const Kernels& avx2_kernels();
const Kernels& avx512_kernels();
const Kernels& avx512_bf16_kernels();
#endif

// The table of a set of kernels `NAME<BITS, M>`.
#define GMASK_ROW(NAME, BITS, FORMAT)                                                                         \
  {                                                                                                           \
    {NAME<BITS, 1>, FORMAT}, {NAME<BITS, 2>, FORMAT}, {NAME<BITS, 3>, FORMAT}, {NAME<BITS, 4>, FORMAT},       \
        {NAME<BITS, 5>, FORMAT}, {NAME<BITS, 6>, FORMAT}, {NAME<BITS, 7>, FORMAT}, {NAME<BITS, 8>, FORMAT}    \
  }

}  // namespace gmask
