// Do the NEON kernels compute what the portable ones do? Built for aarch64 by test_native_neon.py, which runs it under qemu.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <utility>
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

// Activations as float32 multiples of a 127th of the largest of their group.
static std::vector<float> rounded(const std::vector<uint16_t>& x, int64_t columns, int64_t scale_group, int64_t longest) {
  std::vector<float> made = widen(x);
  const int64_t length = std::min(scale_group, longest);
  for (size_t row = 0; row < made.size(); row += columns)
    for (int64_t group = 0; group < columns; group += scale_group)
      for (int64_t start = group; start < group + scale_group; start += length) {
        float* first = made.data() + row + start;
        float* last = first + std::min(length, group + scale_group - start);
        float most = 0;
        for (const float* one = first; one < last; ++one) most = std::max(most, std::fabs(*one));
        for (float* one = first; one < last; ++one)
          *one = most == 0 ? 0 : std::nearbyint(*one * (127 / most)) * (most / 127);
      }
  return made;
}

// The integer products equal the portable ones of activations that were rounded before.
static void check_integers(int isa) {
  for (int64_t rows : {1, 2, 3, 4, 5, 6, 7, 8, 9, 21})
    for (int64_t outputs : {1, 45})
      for (int64_t columns : {30, 32, 94, 192, 384})
        for (int64_t group : {32, 64, 128, 0})
          for (int bits : {4, 8})
            for (int half_scale : {0, 1}) {
              if (group == 0) group = columns;
              if (columns % group != 0) continue;
              const int64_t blocks = (outputs + kRows - 1) / kRows;
              std::vector<uint8_t> data(blocks * kRows * ((columns + 31) / 32 * 32) * bits / 8);
              for (uint8_t& byte : data) byte = uint8_t(generator());
              std::vector<float> scale = floats(blocks * kRows * (columns / group));
              std::vector<uint16_t> scale_halves(scale.size());
              for (size_t i = 0; i < scale.size(); ++i) {
                const __fp16 one = __fp16(scale[i]);
                std::memcpy(&scale_halves[i], &one, 2);
              }
              const void* scales = half_scale ? static_cast<const void*>(scale_halves.data()) : scale.data();
              std::vector<uint16_t> x = halves(rows * columns), ours(rows * outputs);
              std::fill_n(x.begin() + columns / 2, columns / 2, 0);  // whole groups of zeros, and parts
              const auto bias = halves(outputs);
              const auto plain_x = rounded(x, columns, group, bits == 4 ? 128 : 64);
              std::vector<float> plain(ours.size());
              const auto multiply = [&](int set, Type type, const void* from, void* y) {
                return gmask_matmul(set, bits, type, half_scale, data.data(), scales, from, bias.data(), kBfloat16, y,
                                    rows, outputs, columns, group, 1);
              };
              if (multiply(isa, kBfloat16, x.data(), ours.data()) != 0 ||
                  multiply(kPortable, kFloat32, plain_x.data(), plain.data()) != 0) {
                std::puts("integers: refused");
                std::exit(1);
              }
              compare("integers", widen(ours), plain, (bits == 4 ? 8.0 : 128.0) * columns, true);
              for (const uint16_t bad : {0x7f80, 0xff80, 0x7fc0}) {  // infinities, NaN
                std::vector<uint16_t> worse = x, spoilt(ours.size());
                worse[(rows / 2 + 1) * columns - 1] = bad;
                multiply(isa, kBfloat16, worse.data(), spoilt.data());
                for (int64_t i = 0; i < rows * outputs; ++i)
                  if (i / outputs == rows / 2 ? !std::isnan(bfloat16_to_float(spoilt[i])) : spoilt[i] != ours[i]) {
                    std::printf("integers: what is not finite became %g\n", bfloat16_to_float(spoilt[i]));
                    std::exit(1);
                  }
              }
            }
}

int main() {
  const int sets = gmask_instruction_sets();
  if (!(sets >> kNeon & 1)) return std::puts("no NEON"), 1;
  std::printf("neon%s%s: ", sets >> kNeonDotprod & 1 ? " dotprod" : "", sets >> kNeonI8mm & 1 ? " i8mm" : "");
  for (int isa : {kNeonDotprod, kNeonI8mm}) {
    float out = 0, x[kColumnStep] = {}, scale[kRows] = {};
    const uint8_t data[kRows * kColumnStep] = {};
    const int refused = gmask_matmul(isa, 8, kFloat32, 0, data, scale, x, nullptr, kFloat32, &out, 1, 1, kColumnStep,
                                     kColumnStep, 1);
    if (refused == (sets >> isa & 1)) return std::puts("what the machine has is refused, or what it lacks is not"), 1;
    if (sets >> isa & 1) check_integers(isa);
  }
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
          return gmask_dense(isa, kBfloat16, weight.data(), x.data(), bias.data(), kBfloat16, y, rows, outputs, columns,
                             1);
        });
        const auto wide_x = floats(rows * columns), wide_weight = floats(outputs * columns);
        std::vector<float> ours(rows * outputs), plain(rows * outputs);
        for (auto [isa, y] : {std::pair{kNeon, &ours}, {kPortable, &plain}})
          if (gmask_dense(isa, kFloat32, wide_weight.data(), wide_x.data(), bias.data(), kBfloat16, y->data(), rows,
                          outputs, columns, 1) != 0) {
            std::puts("dense in float32: refused");
            return 1;
          }
        compare("dense in float32", ours, plain, columns, false);
      }
  for (int64_t size : {16, 64, 112, 128})
    for (int64_t length : {1, 5, 33}) {
      const auto query = halves(2 * 3 * size), key = halves(2 * 3 * length * size), value = halves(2 * 3 * length * size);
      std::vector<uint8_t> visible(2 * length, 1);
      visible[length / 2] = length == 1;
      const int64_t steps[] = {3 * size,          size, 3 * length * size, length * size, size,
                               3 * length * size, length * size, size, length, 1};
      both("attention", 2 * 3 * size, length, [&](int isa, void* out) {
        return gmask_attention(isa, kBfloat16, kBfloat16, query.data(), key.data(), value.data(), visible.data(), out,
                               steps, 2, 3, length, size, 0.1f, 1);
      });
      // In int8: the same bytes by both, and the same attention to them.
      const int64_t entry = size + kStepBytes, dense[] = {3 * length * size, length * size, size};
      std::vector<uint8_t> keys(2 * 3 * length * entry), values(keys.size()), plain(keys.size());
      if (gmask_round(kNeon, kBfloat16, key.data(), keys.data(), dense, 2, 3, length, size, 1) != 0 ||
          gmask_round(kNeon, kBfloat16, value.data(), values.data(), dense, 2, 3, length, size, 1) != 0 ||
          gmask_round(kPortable, kBfloat16, key.data(), plain.data(), dense, 2, 3, length, size, 1) != 0)
        return 1;
      for (size_t i = 0; i < keys.size(); ++i)  // a product of two numbers may be rounded before it is an integer
        if (std::abs(int8_t(keys[i]) - int8_t(plain[i])) > (int64_t(i) % entry < size ? 1 : 0)) {
          std::printf("round: %d instead of %d at %zu\n", int8_t(keys[i]), int8_t(plain[i]), i);
          return 1;
        }
      ++compared;
      const int64_t rounded[] = {3 * size,           size, 3 * length * entry, length * entry, entry,
                                 3 * length * entry, length * entry, entry, length, 1};
      both("attention to int8", 2 * 3 * size, length, [&](int isa, void* out) {
        return gmask_attention(isa, kBfloat16, kInt8, query.data(), keys.data(), values.data(), visible.data(), out,
                               rounded, 2, 3, length, size, 0.1f, 1);
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
