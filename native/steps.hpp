// What a decoder does to one token outside its matrices, in float32.
#pragma once
#include <cstdint>

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

struct StepFunctions {
  // out = gain * x / sqrt(mean(x^2) + eps) for each of `rows` rows of n; out may be x.
  void (*norm)(const float* x, const float* gain, float eps, int rows, int n, float* out);
  // Rotary embedding in place of `count` heads; channel i turns with i + rotary / 2; cosine and sine [rotary].
  void (*rotate)(float* x, int count, const Heads&, const float* cosine, const float* sine);
  // out = silu(gate) * up; out may be one of them.
  void (*gate)(const float* gate, const float* up, int n, float* out);
  // Attention of one token over the filled positions, query heads begin to end; `scores` has room for them.
  void (*attend)(const float* query, const Heads&, const Past&, int begin, int end, float* scores, float* out);
};

extern const StepFunctions steps_portable, steps_avx2, steps_avx512;

}  // namespace elastiq
