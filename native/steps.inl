// Included once per instruction set; ELASTIQ_TARGET names the table of functions it defines.
#include <cmath>
#include <initializer_list>

#include "steps.hpp"
#include "vectors.hpp"

namespace elastiq {
namespace {

inline float sum(vf v) {
  typedef float v8 __attribute__((vector_size(32)));
  typedef float v4 __attribute__((vector_size(16)));
  v8 halves[2];
  store(reinterpret_cast<float*>(halves), v);
  const v8 eight = halves[0] + halves[1];
  v4 quarters[2];
  std::memcpy(quarters, &eight, sizeof eight);
  const v4 four = quarters[0] + quarters[1];
  return (four[0] + four[2]) + (four[1] + four[3]);
}

// e^x to about 2 units in the last place for x of -87 to 88, taken at these ends beyond.
inline vf exponential(vf x) {
  x = minimum(splat(88.0f), maximum(splat(-87.0f), x));  // in this order a NaN stays
  const vf n = (x * 1.44269504f + 12582912.0f) - 12582912.0f;
  const vf r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  vf p = splat(1.9875691500e-4f);
  for (const float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
    p = p * r + c;
  const vf y = p * r * r + r + 1.0f;
  return y * from_bits((to_int(n) + 127) << 23);
}

void norm(const float* x, const float* gain, float eps, int rows, int n, float* out) {
  for (int row = 0; row < rows; ++row, x += n, out += n) {
    vf squares[2] = {};
    int i = 0;
    for (; i + kLanes <= n; i += kLanes) squares[i / kLanes & 1] += load(x + i) * load(x + i);
    float total = sum(squares[0] + squares[1]);
    for (int j = i; j < n; ++j) total += x[j] * x[j];
    const float factor = 1.0f / std::sqrt(total / float(n) + eps);
    for (i = 0; i + kLanes <= n; i += kLanes) store(out + i, load(gain + i) * (load(x + i) * factor));
    for (; i < n; ++i) out[i] = gain[i] * (x[i] * factor);
  }
}

void rotate(float* x, int heads, const Heads& shape, const float* cosine, const float* sine) {
  const int half = shape.rotary / 2;
  for (int h = 0; h < heads; ++h, x += shape.size)
    for (int i = 0; i < half; ++i) {
      const float a = x[i], b = x[i + half];
      x[i] = a * cosine[i] - b * sine[i];
      x[i + half] = b * cosine[i + half] + a * sine[i + half];
    }
}

// R times each of B neighbouring parts of x, side by side, since the sums of one part wait for each other. What is
// stored beyond a part is what the next one overwrites; only `end` is a bound.
template <int B>
ELASTIQ_INLINE void turn(const float* x, const float* factors, const Rotation& map, float* out, const float* end) {
  const int size = map.size, stride = (size + kLanes - 1) / kLanes * kLanes;
  for (int j = stride - kLanes; j >= 0; j -= kLanes) {
    vf total[B] = {};
    for (int k = 0; k < size; ++k) {
      const vf column = load(map.rest + k * stride + j);
      ELASTIQ_UNROLL
      for (int b = 0; b < B; ++b) total[b] += column * (factors[b * size + k] * x[b * size + k]);
    }
    ELASTIQ_UNROLL
    for (int b = 0; b < B; ++b) {
      float* to = out + b * size + j;
      if (end - to >= kLanes) {
        store(to, total[b]);
      } else {
        float last[kLanes];
        store(last, total[b]);
        std::memcpy(to, last, (end - to) * sizeof(float));
      }
    }
  }
}

void mix(const float* x, const Rotation& map, int n, float* out) {
  const int size = map.size, parts = n / size, together = parts < 4 ? 1 : 4;  // parts: a power of two
  for (int first = 0; first < n; first += together * size)
    (together == 4 ? turn<4> : turn<1>)(x + first, map.factors + first, map, out + first, out + n);
  for (int distance = size; distance < n; distance *= 2)
    for (int first = 0; first < n; first += 2 * distance) {
      float *a = out + first, *b = a + distance;
      int i = 0;
      for (; i + kLanes <= distance; i += kLanes) {
        const vf u = load(a + i), v = load(b + i);
        store(a + i, u + v);
        store(b + i, u - v);
      }
      for (; i < distance; ++i) {
        const float u = a[i], v = b[i];
        a[i] = u + v;
        b[i] = u - v;
      }
    }
}

void gate(const float* g, const float* up, int n, float* out) {
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const vf x = load(g + i);
    store(out + i, x / (1.0f + exponential(-x)) * load(up + i));
  }
  for (; i < n; ++i) out[i] = g[i] / (1.0f + std::exp(-g[i])) * up[i];
}

void attend(const float* q, const Heads& shape, const Past& past, int begin, int end, float* scores, float* out) {
  const int vectors = shape.size / kLanes;
  for (int h = begin; h < end; ++h) {
    const int64_t kv = h / (shape.heads / shape.kv_heads) * past.capacity * shape.size;
    const float *keys = past.keys + kv, *values = past.values + kv;
    vf query[kMaxHead / kLanes];
    for (int i = 0; i < vectors; ++i) query[i] = load(q + h * shape.size + i * kLanes) * shape.scale;
    float top = -INFINITY;
    for (int64_t t = 0; t < past.length; ++t) {
      vf dot = {};
      for (int i = 0; i < vectors; ++i) dot += query[i] * load(keys + t * shape.size + i * kLanes);
      scores[t] = sum(dot);
      top = scores[t] < top ? top : scores[t];
    }
    float total = 0.0f;
    int64_t t = 0;
    vf totals = {};
    for (; t + kLanes <= past.length; t += kLanes) {
      const vf p = exponential(load(scores + t) - top);
      store(scores + t, p);
      totals += p;
    }
    for (; t < past.length; ++t) total += scores[t] = std::exp(scores[t] - top);
    total += sum(totals);
    vf mean[kMaxHead / kLanes] = {};
    for (t = 0; t < past.length; ++t)
      for (int i = 0; i < vectors; ++i) mean[i] += scores[t] * load(values + t * shape.size + i * kLanes);
    for (int i = 0; i < vectors; ++i) store(out + h * shape.size + i * kLanes, mean[i] / total);
  }
}

}  // namespace

extern const StepFunctions ELASTIQ_TARGET{norm, rotate, mix, gate, attend};

}  // namespace elastiq
