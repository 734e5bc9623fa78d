// What a decoder does to one token outside its matrices, in float32.
#pragma once
#include <cstdint>
#include <stdexcept>

namespace elastiq {

constexpr int kMaxHead = 512;

struct Heads {
  int heads;     // query heads, a multiple of kv_heads
  int kv_heads;
  int size;      // channels of a head, a multiple of 16 up to kMaxHead
  int rotary;    // leading channels that turn, even
  float scale;   // of the scores
};

// One layer's keys and values [kv_heads, capacity, size] with `length` positions filled.
struct Past {
  float* keys;
  float* values;
  int64_t capacity;
  int64_t length;
};

// A map of a vector of n: x -> (H ⊗ rest) (factors * x), H the Walsh-Hadamard matrix of n / size, a power of two.
struct Rotation {
  const float* factors;  // [n], or null for no map at all
  const float* rest;     // symmetric [size, size], its rows filled up to multiples of kLanes
  int size;

  // Throws std::invalid_argument unless this can be done to `n` channels.
  void check(int n) const {
    if (factors && (size < 1 || n < 1 || n % size || (n / size & (n / size - 1)) || !rest))
      throw std::invalid_argument("a rotation is a Walsh-Hadamard matrix of a power of two times a matrix of the rest");
  }
};

struct StepFunctions {
  // out = gain * x / sqrt(mean(x^2) + eps) for each of `rows` rows of n; out may be x.
  void (*norm)(const float* x, const float* gain, float eps, int rows, int n, float* out);
  // Rotary embedding in place of `count` heads; channel i turns with i + rotary / 2; cosine and sine [rotary].
  void (*rotate)(float* x, int count, const Heads&, const float* cosine, const float* sine);
  // out = the map of x [n]; not in place.
  void (*mix)(const float* x, const Rotation&, int n, float* out);
  // out = silu(gate) * up; out may be one of them.
  void (*gate)(const float* gate, const float* up, int n, float* out);
  // Attention of one token over the filled positions, query heads begin to end; `scores` has room for them.
  void (*attend)(const float* query, const Heads&, const Past&, int begin, int end, float* scores, float* out);
};

extern const StepFunctions steps_portable, steps_avx2, steps_avx512;

}  // namespace elastiq
