// Included once per instruction set; ELASTIQ_TARGET names the table of functions it defines.
#include <cmath>
#include <cstring>
#include <new>

#include "columns.hpp"
#include "vectors.hpp"

namespace elastiq {
namespace {

inline vf nearest_code(vf x, int bits) { return nearest(minimum(maximum(x, splat(0.0f)), splat(float((1 << bits) - 1)))); }

// float -> half -> float for finite values, round to nearest even, saturating; subnormals kept.
inline vf to_half(vf x) {
  x = minimum(maximum(x, splat(-65504.0f)), splat(65504.0f));
  const vi negative = x < 0.0f;
  vf magnitude = select(negative, -x, x);
  // Below 2^-14 the spacing is 2^-24: adding and taking away 0.5 rounds to it.
  vf subnormal = (magnitude + 0.5f) - 0.5f;
  const vi bits = bits_of(magnitude);
  vf normal = from_bits((bits + 0x0FFF + ((bits >> 13) & 1)) & ~0x1FFF);
  vf rounded = select(magnitude < 6.103515625e-05f, subnormal, normal);
  return select(negative, -rounded, rounded);
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
    beam.cost[p] = select(better, cost, other_cost);
    beam.code[p] = select(better, code, other_code);
    cost = select(better, other_cost, cost);
    code = select(better, other_code, code);
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

inline void load_grid(const Nest& nest, const Columns& c, int column, int row, vf* scale, vf* zero) {
  for (int l = 0; l < nest.num_levels; ++l) {
    const size_t at = (size_t(c.group_of[column]) * nest.num_levels + l) * c.rows + row;
    scale[l] = load(c.scale + at);
    zero[l] = load(c.zero + at);
  }
}

// Vectors of one thread. Not std::vector: its code would be shared between instruction sets.
class Panel {
 public:
  explicit Panel(size_t size) : data_(static_cast<vf*>(operator new(size * sizeof(vf), std::align_val_t(64)))) {}
  ~Panel() { operator delete(data_, std::align_val_t(64)); }
  Panel(const Panel&) = delete;
  vf& operator[](size_t i) { return data_[i]; }

 private:
  vf* data_;
};

// [n, rows] at 16 of the rows, side by side: in the large array they lie so far apart that they crowd each other out
// of the cache.
inline void gather(const float* x, int n, int rows, int row, Panel& panel) {
  for (int j = 0; j < n; ++j) panel[j] = load(x + size_t(j) * rows + row);
}

void greedy(const Nest& nest, const Columns& c, const float* upper, const float* weight, uint8_t* codes, float* error) {
  const int L = nest.num_levels, n = c.columns;
#pragma omp parallel num_threads(c.threads)
  {
    Panel rest(size_t(n) * L);
#pragma omp for schedule(static)
    for (int row = 0; row < c.rows; row += kLanes) {
      gather(weight, n * L, c.rows, row, rest);
      for (int i = 0; i < n; ++i) {
        vf scale[kMaxLevels], zero[kMaxLevels], e[kMaxLevels];
        load_grid(nest, c, i, row, scale, zero);
        const vf* target = &rest[size_t(i) * L];
        const vi code = choose(nest, target, scale, zero, splat(int32_t(0)));
        store_bytes(codes + size_t(i) * c.rows + row, code);
        const float inverse = 1.0f / upper[size_t(i) * n + i];
        for (int l = 0; l < L; ++l) {
          e[l] = (target[l] - value(nest, l, code, scale[l], zero[l])) * inverse;
          store(error + (size_t(i) * L + l) * c.rows + row, e[l]);
        }
        for (int j = i + 1; j < n; ++j)
          for (int l = 0; l < L; ++l) rest[size_t(j) * L + l] -= e[l] * upper[size_t(i) * n + j];
      }
    }
  }
}

void descend(const Nest& nest, const Columns& c, const float* hessian, const float* gradient, uint8_t* codes,
             float* step) {
  const int L = nest.num_levels, n = c.columns;
#pragma omp parallel num_threads(c.threads)
  {
    Panel rest(size_t(n) * L);
#pragma omp for schedule(static)
    for (int row = 0; row < c.rows; row += kLanes) {
      gather(gradient, n * L, c.rows, row, rest);
      for (int i = 0; i < n; ++i) {
        vf scale[kMaxLevels], zero[kMaxLevels], target[kMaxLevels], now[kMaxLevels], moved[kMaxLevels];
        load_grid(nest, c, i, row, scale, zero);
        const vi old = load_bytes(codes + size_t(i) * c.rows + row);
        const float inverse = 1.0f / hessian[size_t(i) * n + i];
        for (int l = 0; l < L; ++l) {
          now[l] = value(nest, l, old, scale[l], zero[l]);
          target[l] = now[l] + rest[size_t(i) * L + l] * inverse;
        }
        const vi code = choose(nest, target, scale, zero, old);
        // The beam may miss a code; what is there stays unless the new one is better.
        vf gain = splat(0.0f);
        for (int l = 0; l < L; ++l) {
          const vf before = target[l] - now[l];
          const vf after = target[l] - value(nest, l, code, scale[l], zero[l]);
          gain += nest.lambda[l] * (before * before - after * after);
        }
        const vi chosen = select(gain > 0.0f, code, old);
        const vi changed = chosen != old;
        int any = 0;
        for (int lane = 0; lane < kLanes; ++lane) any |= changed[lane];
        for (int l = 0; l < L; ++l) {
          moved[l] = any ? value(nest, l, chosen, scale[l], zero[l]) - now[l] : splat(0.0f);
          store(step + (size_t(i) * L + l) * c.rows + row, moved[l]);
        }
        if (!any) continue;
        store_bytes(codes + size_t(i) * c.rows + row, chosen);
        for (int j = i + 1; j < n; ++j)
          for (int l = 0; l < L; ++l) rest[size_t(j) * L + l] -= moved[l] * hessian[size_t(i) * n + j];
      }
    }
  }
}

// out = matrix u for 16 rows; matrix [n, n] is symmetric.
inline void product(const float* matrix, Panel& u, int n, Panel& out) {
  constexpr int kBlock = 8;
  int i = 0;
  for (; i + kBlock <= n; i += kBlock) {
    vf sum[kBlock] = {};
    for (int j = 0; j < n; ++j)
      ELASTIQ_UNROLL
      for (int k = 0; k < kBlock; ++k) sum[k] += u[j] * matrix[size_t(j) * n + i + k];
    for (int k = 0; k < kBlock; ++k) out[i + k] = sum[k];
  }
  for (; i < n; ++i) {
    vf sum = {};
    for (int j = 0; j < n; ++j) sum += u[j] * matrix[size_t(j) * n + i];
    out[i] = sum;
  }
}

void refit(const Nest& nest, const Group& group, const float* metric, const float* ones, const uint8_t* codes,
           const float* weight, float* gradient, float* scale, float* zero, float* step) {
  const int L = nest.num_levels, n = group.columns, rows = group.rows;
  float n1 = 0.0f;
  for (int i = 0; i < n; ++i) n1 += ones[i];
#pragma omp parallel num_threads(group.threads)
  {
    Panel unit(n), moved(n);
#pragma omp for schedule(static)
    for (int row = 0; row < rows; row += kLanes)
      for (int l = 0; l < L; ++l) {
        const size_t at = size_t(l) * rows + row, stride = size_t(L) * rows;
        const vf s = load(scale + at), z = load(zero + at);
        const vf centre = group.symmetric ? z : splat(0.5f * float((1 << nest.bits[l]) - 1));
        const int shift = nest.bits[L - 1] - nest.bits[l];
        for (int j = 0; j < n; ++j) unit[j] = to_float(load_bytes(codes + size_t(j) * rows + row) >> shift) - centre;
        product(metric, unit, n, moved);
        const vf offset = s * (centre - z);
        vf cc = {}, c1 = {}, cg = {}, g1 = {};
        for (int j = 0; j < n; ++j) {
          cc += unit[j] * moved[j];
          c1 += unit[j] * ones[j];
          if (weight) {
            const vf rest = load(weight + at + j * stride) - (s * unit[j] + offset);
            cg += moved[j] * rest;
            g1 += ones[j] * rest;
          } else {
            const vf g = load(gradient + at + j * stride);
            cg += unit[j] * g;
            g1 += g;
          }
        }
        const vf smallest = splat(5.9604644775390625e-08f);
        vf new_scale, new_zero = z;
        vi sane;
        if (group.symmetric) {
          new_scale = to_half(s + cg / maximum(cc, splat(1e-30f)));
          sane = new_scale >= smallest;
        } else {
          const vf determinant = cc * n1 - c1 * c1;
          new_scale = to_half(s + (n1 * cg - c1 * g1) / maximum(determinant, splat(1e-30f)));
          sane = (new_scale >= smallest) & (determinant > 1e-6f * cc * n1);
          new_scale = select(sane, new_scale, s);
          // With the scale rounded, the best offset follows from the second equation alone.
          new_zero = to_half(centre - (offset + (g1 - c1 * (new_scale - s)) / n1) / new_scale);
        }
        vf ds = new_scale - s, db = new_scale * (centre - new_zero) - offset;
        const vf gain = 2.0f * (ds * cg + db * g1) - (ds * ds * cc + 2.0f * ds * db * c1 + db * db * n1);
        const vi better = sane & (gain > 0.0f);
        store(scale + at, select(better, new_scale, s));
        store(zero + at, select(better, new_zero, z));
        if (!step) continue;
        ds = select(better, ds, splat(0.0f));
        db = select(better, db, splat(0.0f));
        for (int j = 0; j < n; ++j) {
          store(step + at + j * stride, ds * unit[j] + db);
          store(gradient + at + j * stride, load(gradient + at + j * stride) - (ds * moved[j] + db * ones[j]));
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
        best = select(better, loss, best);
        best_scale = select(better, s, best_scale);
        best_zero = select(better, z, best_zero);
      }
      store(scale + size_t(l) * rows + row, best_scale);
      store(zero + size_t(l) * rows + row, best_zero);
    }
  }
}

}  // namespace

extern const Functions ELASTIQ_TARGET{greedy, descend, refit, fit};

}  // namespace elastiq
