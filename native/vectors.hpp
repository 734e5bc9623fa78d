// Sixteen 32-bit lanes as one value; the compiler maps them to whatever the translation unit may use.
#pragma once
#include <cstdint>
#include <cstring>

namespace elastiq {
namespace {

constexpr int kLanes = 16;
typedef float vf __attribute__((vector_size(4 * kLanes)));
typedef int32_t vi __attribute__((vector_size(4 * kLanes)));

inline vf load(const float* p) {
  vf v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline void store(float* p, vf v) { std::memcpy(p, &v, sizeof v); }
inline vf splat(float x) { return vf{} + x; }
inline vi splat(int32_t x) { return vi{} + x; }
inline vf minimum(vf a, vf b) { return a < b ? a : b; }
inline vf maximum(vf a, vf b) { return a > b ? a : b; }
inline vf to_float(vi x) { return __builtin_convertvector(x, vf); }
inline vi to_int(vf x) { return __builtin_convertvector(x, vi); }
inline vi bits_of(vf x) { return reinterpret_cast<vi>(x); }
inline vf from_bits(vi x) { return reinterpret_cast<vf>(x); }

// Nearest integer, ties to even, for |x| < 2^22.
inline vf nearest(vf x) { return (x + 12582912.0f) - 12582912.0f; }

}  // namespace
}  // namespace elastiq
