// Included once per instruction set; ELASTIQ_TARGET names the table of functions it defines.
#include <cmath>
#include <cstring>

#include "columns.hpp"
#include "vectors.hpp"

namespace elastiq {
namespace {

inline vf nearest_code(vf x, int bits) { return nearest(minimum(maximum(x, splat(0.0f)), splat(float((1 << bits) - 1)))); }

// float -> half -> float for finite values, round to nearest even, saturating; subnormals kept.
inline vf to_half(vf x) {
  x = minimum(maximum(x, splat(-65504.0f)), splat(65504.0f));
  vf magnitude = x < 0.0f ? -x : x;
  // Below 2^-14 the spacing is 2^-24: adding and taking away 0.5 rounds to it.
  vf subnormal = (magnitude + 0.5f) - 0.5f;
  vi bits;
  std::memcpy(&bits, &magnitude, sizeof bits);
  bits = (bits + 0x0FFF + ((bits >> 13) & 1)) & ~0x1FFF;
  vf normal;
  std::memcpy(&normal, &bits, sizeof normal);
  vf rounded = magnitude < 6.103515625e-05f ? subnormal : normal;
  return x < 0.0f ? -rounded : rounded;
}

struct Beam {
  vf cost[kMaxBeam];
  vi code[kMaxBeam];
  int size;
};

inline void insert(Beam& beam, int limit, vf cost, vi code) {
  if (beam.size < limit) {
    beam.cost[beam.size] = splat(INFINITY);
    beam.code[beam.size++] = splat(int32_t(0));
  }
  for (int p = 0; p < beam.size; ++p) {
    vi better = cost < beam.cost[p];
    vf other_cost = beam.cost[p];
    vi other_code = beam.code[p];
    beam.cost[p] = better ? cost : other_cost;
    beam.code[p] = better ? code : other_code;
    cost = better ? other_cost : cost;
    code = better ? other_code : code;
  }
}

// The code that minimises sum over levels of lambda * (target - value)^2, by a beam down the tree of prefixes that
// begins at the top `keep` bits of `old`.
inline vi choose(const Nest& nest, const vf* target, const vf* scale, const vf* zero, vi old) {
  const int last = nest.num_levels - 1;
  if (last == 0 && nest.keep == 0) return to_int(nearest_code(target[0] / scale[0] + zero[0], nest.bits[0]));
  Beam beam;
  beam.size = 1;
  beam.cost[0] = splat(0.0f);
  beam.code[0] = old >> (nest.bits[last] - nest.keep);
  int previous = nest.keep;
  for (int l = 0; l <= last; ++l) {
    const int shift = nest.bits[l] - previous;
    const int children = 1 << shift;
    const int limit = l == last ? 1 : nest.beam;
    const vf lambda = splat(nest.lambda[l]);
    previous = nest.bits[l];
    Beam next;
    next.size = 0;
    for (int k = 0; k < beam.size; ++k) {
      const vi first = beam.code[k] << shift;
      const vf base = target[l] - scale[l] * (to_float(first) - zero[l]);
      for (int m = 0; m < children; ++m) {
        const vf distance = base - float(m) * scale[l];
        insert(next, limit, beam.cost[k] + lambda * distance * distance, first + m);
      }
    }
    beam = next;
  }
  return beam.code[0];
}

inline vf value(const Nest& nest, int l, vi code, vf scale, vf zero) {
  return scale * (to_float(code >> (nest.bits[nest.num_levels - 1] - nest.bits[l])) - zero);
}

inline vi load_codes(const uint8_t* p) {
  vi v;
  for (int i = 0; i < kLanes; ++i) v[i] = p[i];
  return v;
}
inline void store_codes(uint8_t* p, vi v) {
  for (int i = 0; i < kLanes; ++i) p[i] = uint8_t(v[i]);
}

inline void load_grid(const Nest& nest, const Columns& c, int column, int row, vf* scale, vf* zero) {
  for (int l = 0; l < nest.num_levels; ++l) {
    const size_t at = (size_t(c.group_of[column]) * nest.num_levels + l) * c.rows + row;
    scale[l] = load(c.scale + at);
    zero[l] = load(c.zero + at);
  }
}

void greedy(const Nest& nest, const Columns& c, const float* upper, float* weight, uint8_t* codes, float* error) {
  const int L = nest.num_levels, n = c.columns;
#pragma omp parallel for schedule(static) num_threads(c.threads)
  for (int row = 0; row < c.rows; row += kLanes) {
    for (int i = 0; i < n; ++i) {
      vf scale[kMaxLevels], zero[kMaxLevels], target[kMaxLevels];
      load_grid(nest, c, i, row, scale, zero);
      for (int l = 0; l < L; ++l) target[l] = load(weight + (size_t(i) * L + l) * c.rows + row);
      const vi code = choose(nest, target, scale, zero, splat(int32_t(0)));
      store_codes(codes + size_t(i) * c.rows + row, code);
      const float inverse = 1.0f / upper[size_t(i) * n + i];
      for (int l = 0; l < L; ++l) {
        const vf e = (target[l] - value(nest, l, code, scale[l], zero[l])) * inverse;
        store(error + (size_t(i) * L + l) * c.rows + row, e);
        for (int j = i + 1; j < n; ++j) {
          float* w = weight + (size_t(j) * L + l) * c.rows + row;
          store(w, load(w) - e * upper[size_t(i) * n + j]);
        }
      }
    }
  }
}

void descend(const Nest& nest, const Columns& c, const float* hessian, float* gradient, uint8_t* codes) {
  const int L = nest.num_levels, n = c.columns;
#pragma omp parallel for schedule(static) num_threads(c.threads)
  for (int row = 0; row < c.rows; row += kLanes) {
    for (int i = 0; i < n; ++i) {
      vf scale[kMaxLevels], zero[kMaxLevels], target[kMaxLevels], now[kMaxLevels];
      load_grid(nest, c, i, row, scale, zero);
      const vi old = load_codes(codes + size_t(i) * c.rows + row);
      const float inverse = 1.0f / hessian[size_t(i) * n + i];
      for (int l = 0; l < L; ++l) {
        now[l] = value(nest, l, old, scale[l], zero[l]);
        target[l] = now[l] + load(gradient + (size_t(i) * L + l) * c.rows + row) * inverse;
      }
      const vi code = choose(nest, target, scale, zero, old);
      // The beam may miss a code; what is there stays unless the new one is better.
      vf gain = splat(0.0f);
      for (int l = 0; l < L; ++l) {
        const vf before = target[l] - now[l];
        const vf after = target[l] - value(nest, l, code, scale[l], zero[l]);
        gain += nest.lambda[l] * (before * before - after * after);
      }
      const vi chosen = gain > 0.0f ? code : old;
      const vi changed = chosen != old;
      bool any = false;
      for (int lane = 0; lane < kLanes; ++lane) any |= changed[lane] != 0;
      if (!any) continue;
      store_codes(codes + size_t(i) * c.rows + row, chosen);
      for (int l = 0; l < L; ++l) {
        const vf step = value(nest, l, chosen, scale[l], zero[l]) - now[l];
        for (int j = 0; j < n; ++j) {
          float* g = gradient + (size_t(j) * L + l) * c.rows + row;
          store(g, load(g) - step * hessian[size_t(i) * n + j]);
        }
      }
    }
  }
}

void fit(const Nest& nest, int columns, int rows, const float* importance, const float* weight, const float* shrink,
         int num_shrink, bool symmetric, float* scale, float* zero, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int row = 0; row < rows; row += kLanes) {
    for (int l = 0; l < nest.num_levels; ++l) {
      const size_t stride = size_t(nest.num_levels) * rows;
      const float* w = weight + size_t(l) * rows + row;
      const float steps = float((1 << nest.bits[l]) - 1);
      vf low = load(w), high = low;
      for (int j = 1; j < columns; ++j) {
        const vf x = load(w + j * stride);
        low = minimum(low, x);
        high = maximum(high, x);
      }
      if (symmetric) {
        high = maximum(high, -low);
        low = -high;
      }
      const vf middle = 0.5f * (low + high), half = 0.5f * (high - low);
      // A group far from zero for its width: the zero point must stay within half precision.
      const vf floor = maximum(maximum(middle, -middle) * (1.0f / 30000.0f), splat(5.9604644775390625e-08f));
      vf best = splat(INFINITY), best_scale = splat(0.0f), best_zero = best_scale;
      for (int k = 0; k < num_shrink; ++k) {
        const vf s = to_half(maximum(shrink[k] * half * (2.0f / steps), floor));
        const vf z = symmetric ? splat(0.5f * steps) : to_half(0.5f * steps - middle / s);
        vf loss = splat(0.0f);
        for (int j = 0; j < columns; ++j) {
          const vf x = load(w + j * stride);
          const vf d = x - s * (nearest_code(x / s + z, nest.bits[l]) - z);
          loss += importance[j] * d * d;
        }
        const vi better = loss < best;
        best = better ? loss : best;
        best_scale = better ? s : best_scale;
        best_zero = better ? z : best_zero;
      }
      store(scale + size_t(l) * rows + row, best_scale);
      store(zero + size_t(l) * rows + row, best_zero);
    }
  }
}

}  // namespace

extern const Functions ELASTIQ_TARGET{greedy, descend, fit};

}  // namespace elastiq
