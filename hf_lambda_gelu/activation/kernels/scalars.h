// fp32 and bf16 numbers of the C++ kernels: their bits, how they are read and written.
#pragma once

#include <cstdint>
#include <cstring>

namespace {

inline uint32_t to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// where fma is a library call, two operations are faster
inline float fma(float a, float b, float c) {
#if defined(__FP_FAST_FMAF) || defined(__FMA__) || defined(__aarch64__)
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}

struct BFloat16 {
  uint16_t bits;
};

inline float load(const float* from) { return *from; }
inline void store(float* to, float value) { *to = value; }
inline float load(const BFloat16* from) { return from_bits(static_cast<uint32_t>(from->bits) << 16); }
// to nearest even; a NaN stays one, where rounding the fp32 NaN of a λ could carry it over into 0 or into −0
inline void store(BFloat16* to, float value) {
  const uint32_t bits = to_bits(value), rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  to->bits = static_cast<uint16_t>(value == value ? rounded : 0x7fc0u);
}

}  // namespace
