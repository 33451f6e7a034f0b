// Do the NEON kernels compute what the portable ones do? Built for aarch64 by test_native_neon.py, which runs it under qemu.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "api.h"
#include "kernels.h"

using namespace gmask;

static std::mt19937 generator(0);
static int compared = 0;

static std::vector<uint16_t> halves(size_t count) {
  std::normal_distribution<float> normal;
  std::vector<uint16_t> made(count);
  for (uint16_t& one : made) one = float_to_bfloat16(normal(generator));
  return made;
}

static std::vector<float> floats(size_t count) {
  std::normal_distribution<float> normal;
  std::vector<float> made(count);
  for (float& one : made) one = normal(generator);
  return made;
}

// Both are sums of `terms` products of about 1 in float32, in another order, and may be rounded to bfloat16 once.
static void compare(const char* what, const std::vector<float>& ours, const std::vector<float>& plain, double terms,
                    bool half) {
  for (size_t i = 0; i < plain.size(); ++i) {
    const double most = 1e-5 * terms + (half ? 0.01 : 1e-5) * std::fabs(plain[i]);
    if (!(std::fabs(double(ours[i]) - plain[i]) <= most)) {
      std::printf("%s: %g instead of %g at %zu\n", what, ours[i], plain[i], i);
      std::exit(1);
    }
  }
  ++compared;
}

static std::vector<float> widen(const std::vector<uint16_t>& numbers) {
  std::vector<float> wide(numbers.size());
  for (size_t i = 0; i < wide.size(); ++i) wide[i] = bfloat16_to_float(numbers[i]);
  return wide;
}

template <class Call>
static void both(const char* what, size_t count, double terms, Call call) {
  std::vector<uint16_t> ours(count), plain(count);
  if (call(kNeon, ours.data()) != 0 || call(kPortable, plain.data()) != 0) {
    std::printf("%s: refused\n", what);
    std::exit(1);
  }
  compare(what, widen(ours), widen(plain), terms, true);
}

int main() {
  if (!(gmask_instruction_sets() >> kNeon & 1)) return std::puts("no NEON"), 1;
  for (int64_t rows : {1, 2, 3, 7, 8, 9, 17})
    for (int64_t outputs : {1, 32, 45})
      for (int64_t columns : {32, 96, 320}) {
        const auto x = halves(rows * columns), bias = halves(outputs), weight = halves(outputs * columns);
        for (int bits : {4, 8}) {
          const int64_t blocks = (outputs + kRows - 1) / kRows;
          std::vector<uint8_t> data(blocks * kRows * columns * bits / 8);
          for (uint8_t& byte : data) byte = uint8_t(generator());
          const auto scale = floats(blocks * kRows);
          both("matmul", rows * outputs, 128.0 * columns, [&](int isa, void* y) {
            return gmask_matmul(isa, bits, kBfloat16, 0, data.data(), scale.data(), x.data(), bias.data(), kBfloat16, y,
                                rows, outputs, columns, columns, 1);
          });
        }
        both("dense", rows * outputs, columns, [&](int isa, void* y) {
          return gmask_dense(isa, weight.data(), x.data(), bias.data(), kBfloat16, y, rows, outputs, columns, 1);
        });
      }
  for (int64_t size : {16, 64, 112, 128})
    for (int64_t length : {1, 5, 33}) {
      const auto query = halves(2 * 3 * size), key = halves(2 * 3 * length * size), value = halves(2 * 3 * length * size);
      std::vector<uint8_t> visible(2 * length, 1);
      visible[length / 2] = length == 1;
      const int64_t steps[] = {3 * size,          size, 3 * length * size, length * size, size,
                               3 * length * size, length * size, size, length, 1};
      both("attention", 2 * 3 * size, length, [&](int isa, void* out) {
        return gmask_attention(isa, kBfloat16, query.data(), key.data(), value.data(), visible.data(), out, steps, 2, 3,
                               length, size, 0.1f, 1);
      });
      const auto angles = floats(length * size);
      std::vector<float> cosines(length * size), sines(length * size);
      for (int64_t i = 0; i < length * size; ++i) {
        const int64_t place = i / size * size + i % (size / 2);
        cosines[i] = std::cos(angles[place]), sines[i] = std::sin(angles[place]);
      }
      const int64_t strides[] = {3 * length * size, length * size, size, 0, size};
      both("rotate", 2 * 3 * length * size, 2, [&](int isa, void* out) {
        return gmask_rotate(isa, kBfloat16, key.data(), cosines.data(), sines.data(), out, strides, 2, 3, length, 1,
                            size / 2, 1);
      });
    }
  const auto x = halves(1003);
  both("gelu", x.size(), 1, [&](int isa, void* out) { return gmask_gelu(isa, x.data(), out, x.size(), 1); });
  std::printf("%d products, attentions, rotations and GELUs agree\n", compared);
}
