// Activations to fixed point, as products on codes read them. Included once per translation unit.
#include <cmath>
#include <cstring>

#include "planes.inl"

namespace elastiq {
namespace {

// Inputs of one group of one token to fixed point, piece after piece.
void quantize(const Weight& w, const Input& x, const Activations& a, int token, int group) {
  const int per_group = w.pieces();
  const size_t inputs = size_t(w.tiles) * kTileInputs;
  const int tile_end = group + 1 == w.groups ? w.tiles : (group + 1) * w.group_tiles();
  const float steps = a.digits == 2 ? 32639.0f : 127.0f;  // 127 * 256 + 127: both bytes stay within -128..127
  float total = 0.0f;
  int tile = group * w.group_tiles();
  for (int piece = 0; tile < tile_end; ++piece) {
    const int first = tile * kTileInputs;
    tile = tile + kPieceTiles < tile_end ? tile + kPieceTiles : tile_end;
    const int vectors = (tile * kTileInputs - first) / kLanes;
    vf value[2 * kPieceTiles], largest = splat(0.0f), strange = largest;
    for (int i = 0; i < vectors; ++i) {
      const int at = first + i * kLanes, left = w.in_features - at;
      value[i] = left <= 0 ? splat(0.0f)
                           : load_some(x.values, x.dtype, size_t(token) * w.in_features + at, left < kLanes ? left : kLanes);
      largest = maximum(largest, maximum(value[i], -value[i]));
      strange += value[i] * 0.0f;
    }
    float most = 0.0f, finite = 0.0f;
    for (int i = 0; i < kLanes; ++i) {
      most = largest[i] > most ? largest[i] : most;
      finite += strange[i];
    }
    // A piece whose largest value would overflow the division counts as zeros.
    const bool usable = most > 1e-30f && finite == 0.0f;
    const float inverse = usable ? steps / most : 0.0f;
    vi sum = splat(0);
    for (int i = 0; i < vectors; ++i) {
      const vi fixed = usable ? to_int(nearest(value[i] * inverse)) : splat(0);
      sum += fixed;
      int8_t* to = a.bytes + size_t(token) * a.digits * inputs + first + i * kLanes;
      if (a.digits == 2) {
        const vi low = (fixed << 24) >> 24;
        store_bytes(to, (fixed - low) >> 8);
        store_bytes(to + inputs, low);
      } else {
        store_bytes(to, fixed);
      }
    }
    float step = usable ? most / steps : 0.0f;
    if (finite != 0.0f) step = NAN;
    int32_t exact = 0;
    for (int i = 0; i < kLanes; ++i) exact += sum[i];
    total += step * float(exact);
    a.scale[(size_t(token) * w.groups + group) * per_group + piece] = step;
  }
  a.sum[size_t(token) * w.groups + group] = total;
}

}  // namespace
}  // namespace elastiq
