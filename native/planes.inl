// Bits of a tile to codes, and codes times activations: the part of the kernels that knows the instruction set.
// Included by activations.inl, once per translation unit.
#include "matmul.hpp"
#include "vectors.hpp"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace elastiq {
namespace {

// One register of a plane's line; kSlices of them make a tile of 16 rows.
#if defined(__AVX512VNNI__)
constexpr int kSlice = 64;
#elif defined(__AVX2__)
constexpr int kSlice = 32;
#else
constexpr int kSlice = 16;
#endif
constexpr int kSlices = kTileBytes / kSlice;
typedef uint64_t V __attribute__((vector_size(kSlice)));
typedef int32_t VI __attribute__((vector_size(kSlice)));
typedef float VF __attribute__((vector_size(kSlice)));

ELASTIQ_INLINE V repeat(uint8_t byte) { return V{} + 0x0101010101010101u * byte; }

ELASTIQ_INLINE V load_line(const uint8_t* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

// Bits of `a` where the mask is set, bits of `b` elsewhere.
ELASTIQ_INLINE V select(V mask, V a, V b) {
#if defined(__AVX512VNNI__)
  return (V)_mm512_ternarylogic_epi64((__m512i)mask, (__m512i)a, (__m512i)b, 0xCA);
#else
  return (a & mask) | (b & ~mask);
#endif
}

// (byte >> shift) & (2^width - 1) of every byte.
template <int shift, int width>
ELASTIQ_INLINE V field(V v) {
#if defined(__AVX512VNNI__) && defined(__GFNI__)
  if constexpr (shift > 0) {
    uint64_t matrix = 0;  // byte 7 - i picks the bit that becomes bit i
    for (int i = 0; i < width; ++i) matrix |= uint64_t(1 << (shift + i)) << (8 * (7 - i));
    return (V)_mm512_gf2p8affine_epi64_epi8((__m512i)v, _mm512_set1_epi64(matrix), 0);
  }
#endif
  return (v >> shift) & repeat((1 << width) - 1);
}

// Bits that a register of fields spends on a code of R <= 4 bits; also the number of such registers.
template <int R>
constexpr int kField = R == 1 ? 1 : R == 2 ? 2 : 4;

// Joins the lines of R <= 4 planes: byte field m of register i is the code of position j = i + kField * m.
template <int R>
ELASTIQ_INLINE void join(const V* line, V* f) {
  if constexpr (R == 1) {
    f[0] = line[0];
  } else {
    const V odd = repeat(0xAA), pair = repeat(0xCC);
    const V none{};
    V even2[2], odd2[2];
    ELASTIQ_UNROLL
    for (int p = 0; p < (R + 1) / 2; ++p) {
      const V a = line[2 * p], b = 2 * p + 1 < R ? line[2 * p + 1] : none;
      even2[p] = select(odd, a << 1, b);
      odd2[p] = select(odd, a, b >> 1);
    }
    if constexpr (R == 2) {
      f[0] = even2[0];
      f[1] = odd2[0];
    } else {
      f[0] = select(pair, even2[0] << 2, even2[1]);
      f[1] = select(pair, odd2[0] << 2, odd2[1]);
      f[2] = select(pair, even2[0], even2[1] >> 2);
      f[3] = select(pair, odd2[0], odd2[1] >> 2);
    }
  }
}

template <int F, int j = 0>
ELASTIQ_INLINE void split(const V* f, V* c) {
  if constexpr (j < 8) {
    c[j] = field<F*(j / F), F>(f[j % F]);
    split<F, j + 1>(f, c);
  }
}

// Codes of one slice of a tile: bytes of c[j] are inputs 4 * j to 4 * j + 3 of each row, worth code << kSpare<R>.
template <int R>
constexpr int kSpare = R <= 2 ? 0 : R <= 4 ? 4 - R : 8 - R;

template <int R>
ELASTIQ_INLINE void codes(const uint8_t* const* plane, size_t at, V* c) {
  V line[R], high[4];
  ELASTIQ_UNROLL
  for (int p = 0; p < R; ++p) line[p] = load_line(plane[p] + at);
  if constexpr (R <= 4) {
    join<R>(line, high);
    split<kField<R>>(high, c);
  } else {
    V low[4];
    join<4>(line, high);
    // Absent planes are zeros: the low nibble is filled from above.
    V rest[4] = {};
    ELASTIQ_UNROLL
    for (int p = 4; p < R; ++p) rest[p - 4] = line[p];
    join<4>(rest, low);
    const V top = repeat(0xF0);
    ELASTIQ_UNROLL
    for (int j = 0; j < 4; ++j) {
      c[j] = select(top, high[j] << 4, low[j]);
      c[j + 4] = select(top, high[j], low[j] >> 4);
    }
  }
}

// Sums of codes times bytes, a 32-bit lane per row; N chains hide the latency of the additions.
#if defined(__AVX512VNNI__)
template <int R, int N>
ELASTIQ_INLINE void dot(VI* sum, const V* c, const int8_t* x) {
  ELASTIQ_UNROLL
  for (int j = 0; j < 8; ++j) {
    int32_t four;
    std::memcpy(&four, x + 4 * j, sizeof four);
    sum[j % N] = (VI)_mm512_dpbusd_epi32((__m512i)sum[j % N], (__m512i)c[j], _mm512_set1_epi32(four));
  }
}
#elif defined(__AVX2__)
template <int R, int N>
ELASTIQ_INLINE void dot(VI* sum, const V* c, const int8_t* x) {
  // Nibbles, because sums of two products of full bytes would saturate 16 bits: 15 * 128 * 16 = 30720 does not.
  const __m256i ones = _mm256_set1_epi16(1), nibble = _mm256_set1_epi8(0x0F);
  __m256i low = _mm256_setzero_si256(), high = low;
  ELASTIQ_UNROLL
  for (int j = 0; j < 8; ++j) {
    int32_t four;
    std::memcpy(&four, x + 4 * j, sizeof four);
    const __m256i v = _mm256_set1_epi32(four), code = (__m256i)c[j];
    if constexpr (R <= 4) {
      low = _mm256_add_epi16(low, _mm256_maddubs_epi16(code, v));
    } else {
      low = _mm256_add_epi16(low, _mm256_maddubs_epi16(_mm256_and_si256(code, nibble), v));
      high = _mm256_add_epi16(high, _mm256_maddubs_epi16(_mm256_and_si256(_mm256_srli_epi16(code, 4), nibble), v));
    }
  }
  VI total = (VI)_mm256_madd_epi16(low, ones);
  if constexpr (R > 4) total += (VI)_mm256_madd_epi16(high, ones) * 16;
  sum[0] += total;
}
#else
template <int R, int N>
ELASTIQ_INLINE void dot(VI* sum, const V* c, const int8_t* x) {
  ELASTIQ_UNROLL
  for (int j = 0; j < 8; ++j) {
    uint8_t code[kSlice];
    std::memcpy(code, &c[j], sizeof code);
    for (int row = 0; row < kSlice / 4; ++row)
      for (int i = 0; i < 4; ++i) sum[0][row] += code[4 * row + i] * x[4 * j + i];
  }
}
#endif

// Sixteen half-precision numbers.
ELASTIQ_INLINE vf load_half(const uint16_t* p) {
#if defined(__AVX512F__)
  return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__F16C__)
  return {register_f(_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p))),
          register_f(_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p + 1)))};
#else
  int32_t wide[kLanes];
  for (int i = 0; i < kLanes; ++i) wide[i] = p[i];
  const vi h = load(wide);
  const vf magnitude = from_bits((h & 0x7FFF) << 13) * 0x1p112f;  // also right for subnormals
  const vi special = bits_of(magnitude) | 0x7F800000;
  const vi value = select((h & 0x7C00) == 0x7C00, special, bits_of(magnitude));
  return from_bits(value | ((h & 0x8000) << 16));
#endif
}

// The same with rounding to nearest even; overflow becomes infinite.
ELASTIQ_INLINE void store_half(uint16_t* p, vf x) {
#if defined(__AVX512F__)
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)x.low, _MM_FROUND_TO_NEAREST_INT));
  _mm_storeu_si128((__m128i*)p + 1, _mm256_cvtps_ph((__m256)x.high, _MM_FROUND_TO_NEAREST_INT));
#else
  const vi bits = bits_of(x), magnitude = bits & 0x7FFFFFFF;
  const vf absolute = from_bits(magnitude);
  // Below 2^-14 the spacing is 2^-24: adding 0.5 leaves the rounded multiple in the last bits.
  const vi subnormal = bits_of(absolute + 0.5f) - 0x3F000000;
  const vi normal = (magnitude + 0x0FFF + ((magnitude >> 13) & 1) - 0x38000000) >> 13;
  vi half = select(magnitude < 0x38800000, subnormal, normal);
  half = select(magnitude >= 0x477FF000, splat(0x7C00), half);
  half = select(magnitude > 0x7F800000, splat(0x7E00), half);
  half |= (bits >> 16) & 0x8000;
  for (int i = 0; i < kLanes; ++i) p[i] = uint16_t(half[i]);
#endif
}

ELASTIQ_INLINE vi to_bfloat(vf x) {
  const vi bits = bits_of(x);
  const vi rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
  return select((bits & 0x7FFFFFFF) > 0x7F800000, splat(0x7FC0), rounded & 0xFFFF);
}

#if defined(__AVX512BW__) && defined(__AVX512VL__)
// Elements `at` to `at + n` of an array, the rest zeros.
ELASTIQ_INLINE vf load_some(const void* values, Dtype dtype, size_t at, int n) {
  const __mmask16 some = __mmask16((1u << n) - 1);
  if (dtype == kFloat32) return (vf)_mm512_maskz_loadu_ps(some, (const float*)values + at);
  const __m256i v = _mm256_maskz_loadu_epi16(some, (const uint16_t*)values + at);
  if (dtype == kFloat16) return (vf)_mm512_cvtph_ps(v);
  return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16);
}

ELASTIQ_INLINE void store_some(void* values, Dtype dtype, size_t at, int n, vf x) {
  const __mmask16 some = __mmask16((1u << n) - 1);
  if (dtype == kFloat32) return _mm512_mask_storeu_ps((float*)values + at, some, (__m512)x);
  const __m256i v = dtype == kFloat16 ? _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT)
                                      : _mm512_cvtepi32_epi16((__m512i)to_bfloat(x));
  _mm256_mask_storeu_epi16((uint16_t*)values + at, some, v);
}
#else
// Elements `at` to `at + n` of an array, the rest zeros.
ELASTIQ_INLINE vf load_some(const void* values, Dtype dtype, size_t at, int n) {
  if (dtype == kFloat32) {
    if (n == kLanes) return load((const float*)values + at);
    float v[kLanes] = {};
    std::memcpy(v, (const float*)values + at, n * sizeof(float));
    return load(v);
  }
  uint16_t v[kLanes] = {};
  std::memcpy(v, (const uint16_t*)values + at, n * sizeof(uint16_t));
  if (dtype == kFloat16) return load_half(v);
  int32_t wide[kLanes];
  for (int i = 0; i < kLanes; ++i) wide[i] = v[i];
  return from_bits(load(wide) << 16);
}

ELASTIQ_INLINE void store_some(void* values, Dtype dtype, size_t at, int n, vf x) {
  if (dtype == kFloat32) {
    float* to = (float*)values + at;
    if (n == kLanes) return store(to, x);
    float v[kLanes];
    store(v, x);
    std::memcpy(to, v, n * sizeof(float));
    return;
  }
  uint16_t v[kLanes];
  if (dtype == kFloat16) {
    store_half(v, x);
  } else {
    const vi b = to_bfloat(x);
    for (int i = 0; i < kLanes; ++i) v[i] = uint16_t(b[i]);
  }
  std::memcpy((uint16_t*)values + at, v, n * sizeof(uint16_t));
}
#endif

ELASTIQ_INLINE vf load_zero(const Weight& w, size_t at) {
  return w.zero ? load_half(w.zero + at) * w.zero_factor + w.zero_shift : splat(w.middle);
}

}  // namespace
}  // namespace elastiq
