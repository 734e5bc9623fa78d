// Sixteen 32-bit lanes as one value; the compiler maps them to whatever the translation unit may use.
#pragma once
#include <cstdint>
#include <cstring>

// Loops of constant length and small functions whose arrays must become registers; not worth the code where there
// are no wide ones.
#if defined(__AVX2__)
#define ELASTIQ_UNROLL _Pragma("GCC unroll 16")
#define ELASTIQ_INLINE inline __attribute__((always_inline))
#else
#define ELASTIQ_UNROLL
#define ELASTIQ_INLINE inline
#endif

namespace elastiq {
namespace {

constexpr int kLanes = 16;
typedef float vf __attribute__((vector_size(4 * kLanes)));
typedef int32_t vi __attribute__((vector_size(4 * kLanes)));

ELASTIQ_INLINE vf load(const float* p) {
  vf v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
ELASTIQ_INLINE void store(float* p, vf v) { std::memcpy(p, &v, sizeof v); }
ELASTIQ_INLINE vf splat(float x) { return vf{} + x; }
ELASTIQ_INLINE vi splat(int32_t x) { return vi{} + x; }
ELASTIQ_INLINE vf minimum(vf a, vf b) { return a < b ? a : b; }
ELASTIQ_INLINE vf maximum(vf a, vf b) { return a > b ? a : b; }
ELASTIQ_INLINE vf to_float(vi x) { return __builtin_convertvector(x, vf); }
ELASTIQ_INLINE vi to_int(vf x) { return __builtin_convertvector(x, vi); }
ELASTIQ_INLINE vi bits_of(vf x) { return reinterpret_cast<vi>(x); }
ELASTIQ_INLINE vf from_bits(vi x) { return reinterpret_cast<vf>(x); }

// Nearest integer, ties to even, for |x| < 2^22.
ELASTIQ_INLINE vf nearest(vf x) { return (x + 12582912.0f) - 12582912.0f; }

}  // namespace
}  // namespace elastiq
