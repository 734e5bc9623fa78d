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

#if defined(__AVX512F__)
constexpr int kRegisterBytes = 64;
#elif defined(__AVX2__)
constexpr int kRegisterBytes = 32;
#else
constexpr int kRegisterBytes = 16;
#endif
typedef float register_f __attribute__((vector_size(kRegisterBytes)));
typedef int32_t register_i __attribute__((vector_size(kRegisterBytes)));

ELASTIQ_INLINE register_f select(register_i mask, register_f a, register_f b) { return mask ? a : b; }
ELASTIQ_INLINE register_i select(register_i mask, register_i a, register_i b) { return mask ? a : b; }
ELASTIQ_INLINE register_f to_float(register_i x) { return __builtin_convertvector(x, register_f); }
ELASTIQ_INLINE register_i to_int(register_f x) { return __builtin_convertvector(x, register_i); }
ELASTIQ_INLINE register_i bits_of(register_f x) { return reinterpret_cast<register_i>(x); }
ELASTIQ_INLINE register_f from_bits(register_i x) { return reinterpret_cast<register_f>(x); }

#if defined(__AVX512F__)
typedef register_f vf;
typedef register_i vi;
#else
// gcc keeps a vector wider than a register in memory; its halves, or their halves, stay out of it.
template <class Half>
struct Pair {
  typedef __typeof__(Half{}[0] + 0) Element;
  Half low, high;
  Element operator[](int i) const { return i < kHalf ? low[i] : high[i - kHalf]; }
  static constexpr int kHalf = sizeof(Half) / sizeof(Element);
};

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
#define ELASTIQ_CONVERSION(f)                                                                    \
  template <class H>                                                                             \
  ELASTIQ_INLINE auto f(Pair<H> x) {                                                             \
    return Pair<decltype(f(x.low))>{f(x.low), f(x.high)};                                        \
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
ELASTIQ_CONVERSION(to_float)
ELASTIQ_CONVERSION(to_int)
ELASTIQ_CONVERSION(bits_of)
ELASTIQ_CONVERSION(from_bits)
template <class H>
ELASTIQ_INLINE Pair<H> operator-(Pair<H> a) {
  return {-a.low, -a.high};
}
template <class M, class H>
ELASTIQ_INLINE Pair<H> select(Pair<M> mask, Pair<H> a, Pair<H> b) {
  return {select(mask.low, a.low, b.low), select(mask.high, a.high, b.high)};
}

#if defined(__AVX2__)
typedef Pair<register_f> vf;
typedef Pair<register_i> vi;
#else
typedef Pair<Pair<register_f>> vf;
typedef Pair<Pair<register_i>> vi;
#endif
#endif

// Register after register: a copy of the whole would go through memory.
template <class V, class Number>
ELASTIQ_INLINE V splat_as(Number x) {
  if constexpr (sizeof(V) == kRegisterBytes)
    return V{} + x;
  else
    return {splat_as<decltype(V::low)>(x), splat_as<decltype(V::low)>(x)};
}
template <class V, class Number>
ELASTIQ_INLINE V load_as(const Number* p) {
  if constexpr (sizeof(V) == kRegisterBytes) {
    V v;
    std::memcpy(&v, p, sizeof v);
    return v;
  } else {
    return {load_as<decltype(V::low)>(p), load_as<decltype(V::low)>(p + V::kHalf)};
  }
}
template <class V, class Byte>
ELASTIQ_INLINE V load_bytes_as(const Byte* p) {
  if constexpr (sizeof(V) == kRegisterBytes) {
    typedef Byte bytes __attribute__((vector_size(kRegisterBytes / 4)));
    bytes b;
    std::memcpy(&b, p, sizeof b);
    return __builtin_convertvector(b, V);
  } else {
    return {load_bytes_as<decltype(V::low)>(p), load_bytes_as<decltype(V::low)>(p + V::kHalf)};
  }
}
template <class Number, class V>
ELASTIQ_INLINE void store(Number* p, V v) {
  if constexpr (sizeof(V) == kRegisterBytes) {
    std::memcpy(p, &v, sizeof v);
  } else {
    store(p, v.low);
    store(p + V::kHalf, v.high);
  }
}
template <class Byte, class V>
ELASTIQ_INLINE void store_bytes(Byte* p, V v) {
  if constexpr (sizeof(V) == kRegisterBytes) {
    typedef Byte bytes __attribute__((vector_size(kRegisterBytes / 4)));
    const bytes b = __builtin_convertvector(v, bytes);
    std::memcpy(p, &b, sizeof b);
  } else {
    store_bytes(p, v.low);
    store_bytes(p + V::kHalf, v.high);
  }
}

ELASTIQ_INLINE vf splat(float x) { return splat_as<vf>(x); }
ELASTIQ_INLINE vi splat(int32_t x) { return splat_as<vi>(x); }
ELASTIQ_INLINE vf load(const float* p) { return load_as<vf>(p); }
ELASTIQ_INLINE vi load(const int32_t* p) { return load_as<vi>(p); }
ELASTIQ_INLINE vi load_bytes(const uint8_t* p) { return load_bytes_as<vi>(p); }
ELASTIQ_INLINE vf minimum(vf a, vf b) { return select(a < b, a, b); }
ELASTIQ_INLINE vf maximum(vf a, vf b) { return select(a > b, a, b); }

// Nearest integer, ties to even, for |x| < 2^22.
ELASTIQ_INLINE vf nearest(vf x) { return (x + 12582912.0f) - 12582912.0f; }

}  // namespace
}  // namespace elastiq
