// e^x for the softmax, in a form that compilers turn into vector instructions.
#pragma once

#include <cfloat>
#include <cstdint>
#include <cstring>

#include "vector.h"

namespace gmask {

constexpr int kMaxHead = 512;       // the largest head size
constexpr float kHidden = -FLT_MAX;  // the score of what is not to be seen

// x at most 0; 0 below -87; NaN stays NaN. Off by at most 2^-22 of the result: 2^n times a Taylor polynomial on |r| <= ln(2)/2.
GMASK_INLINE float exponential(float x) {
  const float from = x < -87.0f ? -87.0f : x;
  const float shifted = from * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the integer is now in the low bits
  const float n = shifted - 12582912.0f;
  const float r = (from - n * 0.693145752f) - n * 1.42860677e-6f;  // ln(2) in two parts
  float power = 1.0f / 5040;
  power = power * r + 1.0f / 720;
  power = power * r + 1.0f / 120;
  power = power * r + 1.0f / 24;
  power = power * r + 1.0f / 6;
  power = power * r + 0.5f;
  power = power * r + 1.0f;
  power = power * r + 1.0f;
  int32_t bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  const int32_t exponent = (bits - 0x4b400000 + 127) << 23;
  float scale;
  std::memcpy(&scale, &exponent, sizeof scale);
  return x < -87.0f ? 0.0f : power * scale;
}

}  // namespace gmask
