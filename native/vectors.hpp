// Sixteen 32-bit lanes as one value, in whatever registers the translation unit may use.
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

#if defined(__AVX2__) && !defined(__AVX512F__)
// A value wider than a register would live in memory, so here it is two that are not.
template <class Half>
struct Pair {
  typedef __typeof__(Half{}[0] + 0) Element;
  Half low, high;
  Element operator[](int i) const { return i < kLanes / 2 ? low[i] : high[i - kLanes / 2]; }
};
typedef float half_vf __attribute__((vector_size(2 * kLanes)));
typedef int32_t half_vi __attribute__((vector_size(2 * kLanes)));
typedef Pair<half_vf> vf;
typedef Pair<half_vi> vi;

#define ELASTIQ_OPERATOR(op)                                                                     \
  template <class H>                                                                             \
  ELASTIQ_INLINE auto operator op(Pair<H> a, Pair<H> b) {                                        \
    return Pair<decltype(a.low op b.low)>{a.low op b.low, a.high op b.high};                     \
  }                                                                                              \
  template <class H>                                                                             \
  ELASTIQ_INLINE auto operator op(Pair<H> a, typename Pair<H>::Element b) {                      \
    return Pair<decltype(a.low op b)>{a.low op b, a.high op b};                                  \
  }                                                                                              \
  template <class H>                                                                             \
  ELASTIQ_INLINE auto operator op(typename Pair<H>::Element a, Pair<H> b) {                      \
    return Pair<decltype(a op b.low)>{a op b.low, a op b.high};                                  \
  }
#define ELASTIQ_ARITHMETIC(op)                                                                   \
  ELASTIQ_OPERATOR(op)                                                                           \
  template <class H, class B>                                                                    \
  ELASTIQ_INLINE Pair<H>& operator op##=(Pair<H>& a, B b) {                                      \
    return a = a op b;                                                                           \
  }
ELASTIQ_ARITHMETIC(+)
ELASTIQ_ARITHMETIC(-)
ELASTIQ_ARITHMETIC(*)
ELASTIQ_ARITHMETIC(/)
ELASTIQ_ARITHMETIC(&)
ELASTIQ_ARITHMETIC(|)
ELASTIQ_ARITHMETIC(^)
ELASTIQ_ARITHMETIC(<<)
ELASTIQ_ARITHMETIC(>>)
ELASTIQ_OPERATOR(<)
ELASTIQ_OPERATOR(>)
ELASTIQ_OPERATOR(>=)
ELASTIQ_OPERATOR(==)
ELASTIQ_OPERATOR(!=)
template <class H>
ELASTIQ_INLINE Pair<H> operator-(Pair<H> a) {
  return {-a.low, -a.high};
}

template <class H>
ELASTIQ_INLINE Pair<H> select(vi mask, Pair<H> a, Pair<H> b) {
  return {mask.low ? a.low : b.low, mask.high ? a.high : b.high};
}
ELASTIQ_INLINE vf splat(float x) { return {half_vf{} + x, half_vf{} + x}; }
ELASTIQ_INLINE vi splat(int32_t x) { return {half_vi{} + x, half_vi{} + x}; }
ELASTIQ_INLINE vf to_float(vi x) {
  return {__builtin_convertvector(x.low, half_vf), __builtin_convertvector(x.high, half_vf)};
}
ELASTIQ_INLINE vi to_int(vf x) {
  return {__builtin_convertvector(x.low, half_vi), __builtin_convertvector(x.high, half_vi)};
}
ELASTIQ_INLINE vi bits_of(vf x) { return {reinterpret_cast<half_vi>(x.low), reinterpret_cast<half_vi>(x.high)}; }
ELASTIQ_INLINE vf from_bits(vi x) { return {reinterpret_cast<half_vf>(x.low), reinterpret_cast<half_vf>(x.high)}; }

template <class Byte>
ELASTIQ_INLINE vi load_bytes(const Byte* p) {
  typedef Byte bytes __attribute__((vector_size(kLanes / 2)));
  bytes b[2];
  std::memcpy(b, p, sizeof b);
  return {__builtin_convertvector(b[0], half_vi), __builtin_convertvector(b[1], half_vi)};
}
template <class Byte>
ELASTIQ_INLINE void store_bytes(Byte* p, vi v) {
  typedef Byte bytes __attribute__((vector_size(kLanes / 2)));
  const bytes b[] = {__builtin_convertvector(v.low, bytes), __builtin_convertvector(v.high, bytes)};
  std::memcpy(p, b, sizeof b);
}

// Half after half: a copy of the whole would go through memory.
template <class V>
ELASTIQ_INLINE V load_halves(const void* p) {
  V v;
  std::memcpy(&v.low, p, sizeof v.low);
  std::memcpy(&v.high, static_cast<const char*>(p) + sizeof v.low, sizeof v.high);
  return v;
}
template <class V>
ELASTIQ_INLINE void store_halves(void* p, V v) {
  std::memcpy(p, &v.low, sizeof v.low);
  std::memcpy(static_cast<char*>(p) + sizeof v.low, &v.high, sizeof v.high);
}
ELASTIQ_INLINE vf load(const float* p) { return load_halves<vf>(p); }
ELASTIQ_INLINE vi load(const int32_t* p) { return load_halves<vi>(p); }
ELASTIQ_INLINE void store(float* p, vf v) { store_halves(p, v); }
ELASTIQ_INLINE void store(int32_t* p, vi v) { store_halves(p, v); }
#else
typedef float vf __attribute__((vector_size(4 * kLanes)));
typedef int32_t vi __attribute__((vector_size(4 * kLanes)));

ELASTIQ_INLINE vf select(vi mask, vf a, vf b) { return mask ? a : b; }
ELASTIQ_INLINE vi select(vi mask, vi a, vi b) { return mask ? a : b; }
ELASTIQ_INLINE vf splat(float x) { return vf{} + x; }
ELASTIQ_INLINE vi splat(int32_t x) { return vi{} + x; }
ELASTIQ_INLINE vf to_float(vi x) { return __builtin_convertvector(x, vf); }
ELASTIQ_INLINE vi to_int(vf x) { return __builtin_convertvector(x, vi); }
ELASTIQ_INLINE vi bits_of(vf x) { return reinterpret_cast<vi>(x); }
ELASTIQ_INLINE vf from_bits(vi x) { return reinterpret_cast<vf>(x); }

template <class Byte>
ELASTIQ_INLINE vi load_bytes(const Byte* p) {
  typedef Byte bytes __attribute__((vector_size(kLanes)));
  bytes b;
  std::memcpy(&b, p, sizeof b);
  return __builtin_convertvector(b, vi);
}
template <class Byte>
ELASTIQ_INLINE void store_bytes(Byte* p, vi v) {
  typedef Byte bytes __attribute__((vector_size(kLanes)));
  const bytes b = __builtin_convertvector(v, bytes);
  std::memcpy(p, &b, sizeof b);
}

ELASTIQ_INLINE vf load(const float* p) {
  vf v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
ELASTIQ_INLINE vi load(const int32_t* p) {
  vi v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
ELASTIQ_INLINE void store(float* p, vf v) { std::memcpy(p, &v, sizeof v); }
ELASTIQ_INLINE void store(int32_t* p, vi v) { std::memcpy(p, &v, sizeof v); }
#endif

ELASTIQ_INLINE vf minimum(vf a, vf b) { return select(a < b, a, b); }
ELASTIQ_INLINE vf maximum(vf a, vf b) { return select(a > b, a, b); }

// Nearest integer, ties to even, for |x| < 2^22.
ELASTIQ_INLINE vf nearest(vf x) { return (x + 12582912.0f) - 12582912.0f; }

}  // namespace
}  // namespace elastiq
