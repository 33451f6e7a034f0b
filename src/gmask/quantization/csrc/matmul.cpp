// y = x @ dequantized(W)^T + bias, over threads and activation rows; the C interface that ctypes calls.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <new>
#include <thread>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "blocks.h"

#ifdef _WIN32
#define GMASK_API extern "C" __declspec(dllexport)
#else
#define GMASK_API extern "C" __attribute__((visibility("default")))
#endif

namespace gmask {
namespace {

enum Type { kFloat32 = 0, kBfloat16 = 1 };

bool is_supported(int isa) {
  switch (isa) {
    case kPortable:
      return true;
#ifdef GMASK_ARM
    case kNeon:
      return true;
#endif
#ifdef GMASK_X86
    case kAvx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    case kAvx512:
    case kAvx512Bf16:
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
             (isa == kAvx512 ||
              (__builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni")));
#endif
    default:
      return false;
  }
}

const Kernels& kernels_of(int isa, [[maybe_unused]] bool bfloat16_activations) {
#ifdef GMASK_X86
  if (isa == kAvx512Bf16) return bfloat16_activations ? avx512_bf16_kernels() : avx512_kernels();
  if (isa == kAvx512) return avx512_kernels();
  if (isa == kAvx2) return avx2_kernels();
#endif
#ifdef GMASK_ARM
  if (isa == kNeon) return neon_kernels();
#endif
  return portable_kernels();
}

uint16_t float_to_bfloat16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  if ((bits & 0x7fffffff) > 0x7f800000) return uint16_t(bits >> 16 | 0x40);  // NaN stays NaN
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);                 // to nearest, ties to even
}

struct Problem {
  int bits, x_type;
  const uint8_t* data;
  const uint8_t* scale;
  bool half_scale;
  const void* x;      // [rows, columns]
  const float* bias;  // [outputs] or null
  void* y;            // [rows, outputs], of x's type
  int64_t rows, outputs, columns, group;

  int64_t padded_columns() const { return (columns + kColumnStep - 1) / kColumnStep * kColumnStep; }
  int64_t padded_group() const { return group == columns ? padded_columns() : group; }
  int64_t blocks() const { return (outputs + kRows - 1) / kRows; }
  int64_t block_bytes() const { return padded_columns() * kRows * bits / 8; }
};

// The activations in tiles of up to eight rows, in the format that the tile's kernel reads (blocks.h), with zeros up to
// the padded columns.
class Activations {
 public:
  Activations(const Problem& problem, const Tile* tiles) : problem_(problem), tiles_(tiles) {
    const int64_t padded = problem.padded_columns();
    row_units_ = padded + padded / kColumnStep;  // enough for every format
    units_.resize(size_t(problem.rows) * row_units_);
    scratch_.resize(padded);
    for (int64_t row = 0; row < problem.rows; row += kMaxTile) {
      const int64_t rows = std::min<int64_t>(kMaxTile, problem.rows - row);
      uint32_t* to = units_.data() + row * row_units_;
      for (int64_t m = 0; m < rows; ++m) fill(to + m, rows, row + m, tiles[rows - 1].format);
    }
  }

  // Calls `use(first row, rows, kernel, activations)` for every tile.
  template <class Use>
  void for_each_tile(const Use& use) const {
    for (int64_t row = 0; row < problem_.rows; row += kMaxTile) {
      const int64_t rows = std::min<int64_t>(kMaxTile, problem_.rows - row);
      use(row, rows, tiles_[rows - 1].function, units_.data() + row * row_units_);
    }
  }

 private:
  // A row, its units `step` apart.
  void fill(uint32_t* to, int64_t step, int64_t row, Format format) {
    const int64_t columns = problem_.columns;
    if (problem_.x_type == kFloat32) {
      const uint32_t* x = static_cast<const uint32_t*>(problem_.x) + row * columns;
      for (int64_t k = 0; k < columns; ++k) to[k * step] = x[k];
      return;
    }
    const uint16_t* x = static_cast<const uint16_t*>(problem_.x) + row * columns;
    if (format == kFloats) {  // the high half of a float32 is the bfloat16
      for (int64_t k = 0; k < columns; ++k) to[k * step] = uint32_t(x[k]) << 16;
    } else if (format == kPairs) {
      spread(x, columns, to, step);
    } else {
      const int64_t group = std::min<int64_t>(kFixedGroup, problem_.padded_group());
      for (int64_t start = 0; start < problem_.padded_columns(); start += group) {
        const int64_t stop = std::min(start + group, problem_.padded_columns());
        to = fill_fixed(x + start, std::min(stop, columns) - start, stop - start, to, step);
      }
    }
  }

  // Columns of bfloat16 or int16, two to a unit.
  static void spread(const uint16_t* x, int64_t columns, uint32_t* to, int64_t step) {
    for (int64_t k = 0; k + 1 < columns; k += 2) to[k / 2 * step] = x[k] | uint32_t(x[k + 1]) << 16;
    if (columns % 2) to[columns / 2 * step] = x[columns - 1];
  }

  // A group of kFixed; what is not finite makes its step, and so every output of the row, NaN.
  uint32_t* fill_fixed(const uint16_t* x, int64_t columns, int64_t padded, uint32_t* to, int64_t step) {
    int16_t largest = 0;
    for (int64_t k = 0; k < columns; ++k) largest = std::max<int16_t>(largest, int16_t(x[k] & 0x7fff));
    // 2^(e-127) <= largest < 2^(e-126), so multiples of 2^(e-141) stay below 2^15; e from 15 on keeps both normal.
    const uint32_t exponent = std::min<uint32_t>(std::max<uint32_t>(uint32_t(largest) >> 7, 15), 254);
    const bool finite = largest < 0x7f80;
    *to = finite ? (exponent - 14) << 23 : 0x7fc00000;
    to += step;
    if (finite) {
      const float up = to_float((268 - exponent) << 23);
      for (int64_t k = 0; k < columns; ++k) {
        const float multiple = to_float(uint32_t(x[k]) << 16) * up;
        scratch_[k] = uint16_t(int16_t(int32_t(multiple + (multiple < 0 ? -0.5f : 0.5f))));
      }
      spread(scratch_.data(), columns, to, step);
    }
    return to + padded / 2 * step;
  }

  static float to_float(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
  }

  const Problem& problem_;
  const Tile* tiles_;
  int64_t row_units_;
  std::vector<uint32_t> units_;
  std::vector<uint16_t> scratch_;
};

void store(const Problem& problem, int64_t block, int64_t row, int64_t rows, const float* out) {
  const int64_t first = block * kRows, count = std::min<int64_t>(kRows, problem.outputs - first);
  for (int64_t m = 0; m < rows; ++m) {
    const int64_t start = (row + m) * problem.outputs + first;
    for (int64_t r = 0; r < count; ++r) {
      const float value = out[m * kRows + r] + (problem.bias ? problem.bias[first + r] : 0.0f);
      if (problem.x_type == kBfloat16)
        static_cast<uint16_t*>(problem.y)[start + r] = float_to_bfloat16(value);
      else
        static_cast<float*>(problem.y)[start + r] = value;
    }
  }
}

void multiply_block(const Problem& problem, const Activations& activations, int64_t index) {
  const int64_t scales = problem.columns / problem.group;
  const Block block = {problem.data + index * problem.block_bytes(),
                       problem.scale + index * scales * kRows * (problem.half_scale ? 2 : 4), problem.half_scale,
                       problem.padded_columns(), problem.padded_group()};
  activations.for_each_tile([&](int64_t row, int64_t rows, BlockFunction multiply, const uint32_t* x) {
    float out[kMaxTile * kRows];
    multiply(block, x, out);
    store(problem, index, row, rows, out);
  });
}

// Blocks are handed out a few at a time, so that a thread which the machine holds up does less. Which thread computes
// a block changes nothing in it. With OpenMP the threads are those that PyTorch's own operations have just used.
void run(const Problem& problem, const Activations& activations, int threads) {
  const int64_t blocks = problem.blocks();
  const int64_t worth_a_thread = std::max<int64_t>(1, (int64_t(128) << 10) / problem.block_bytes());
  threads = int(std::max<int64_t>(1, std::min<int64_t>(threads, blocks / worth_a_thread)));
  const int64_t step = std::max<int64_t>(1, blocks / (8 * threads));  // long, so that memory is read in long runs
  std::atomic<int64_t> next{0};
  const auto work = [&] {
    for (int64_t first; (first = next.fetch_add(step)) < blocks;)
      for (int64_t index = first; index < std::min(first + step, blocks); ++index)
        multiply_block(problem, activations, index);
  };
  if (threads <= 1) return work();
#ifdef _OPENMP
#pragma omp parallel num_threads(threads)
  work();
#else
  std::vector<std::thread> others;
  for (int i = 1; i < threads; ++i) others.emplace_back(work);
  work();
  for (std::thread& other : others) other.join();
#endif
}

}  // namespace
}  // namespace gmask

// A bit for each instruction set (blocks.h: Isa) that this build holds and this machine runs.
GMASK_API int gmask_instruction_sets(void) {
  int sets = 0;
  for (int isa = 0; isa < gmask::kIsaCount; ++isa) sets |= gmask::is_supported(isa) << isa;
  return sets;
}

// 0, or 1 for arguments that fit no kernel, 2 for too little memory. group: columns of a scale, `columns` for one a row.
GMASK_API int gmask_matmul(int isa, int bits, int x_type, int half_scale, const void* data, const void* scale,
                           const void* x, const void* bias, void* y, int64_t rows, int64_t outputs, int64_t columns,
                           int64_t group, int threads) {
  using namespace gmask;
  const bool whole_rows = group == columns;
  if (!is_supported(isa) || (bits != 4 && bits != 8) || (x_type != kFloat32 && x_type != kBfloat16) || rows < 0 ||
      outputs < 0 || columns < 1 || group < 1 || columns % group != 0 || (!whole_rows && group % kColumnStep != 0))
    return 1;
  if (rows == 0 || outputs == 0) return 0;
  try {
    const Problem problem = {bits, x_type, static_cast<const uint8_t*>(data), static_cast<const uint8_t*>(scale),
                             half_scale != 0, x, static_cast<const float*>(bias), y, rows, outputs, columns, group};
    const Tile* tiles = kernels_of(isa, x_type == kBfloat16).tiles[bits == 8];
    run(problem, Activations(problem, tiles), threads);
  } catch (const std::bad_alloc&) {
    return 2;
  }
  return 0;
}
