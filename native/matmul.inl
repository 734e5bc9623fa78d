// Included once per instruction set; ELASTIQ_TARGET names the table of functions it defines.
#include <cstring>
#include <omp.h>

#include "activations.inl"

namespace elastiq {
namespace {

constexpr int kBatch = 4;     // tokens that share one unpacking of the bits
constexpr int kAhead = 2048;  // bytes that the software prefetch runs ahead in every plane

// ---- activations

// Inputs of one group of one token as floats.
void widen(const Weight& w, const Input& x, const Activations& a, int token, int group) {
  const int begin = group * w.group_tiles() * kTileInputs;
  const int end = (group + 1 == w.groups ? w.tiles : (group + 1) * w.group_tiles()) * kTileInputs;
  vf total = splat(0.0f);
  for (int at = begin; at < end; at += kLanes) {
    const int left = w.in_features - at;
    const vf v = left <= 0 ? splat(0.0f)
                           : load_some(x.values, x.dtype, size_t(token) * w.in_features + at, left < kLanes ? left : kLanes);
    store(a.floats + size_t(token) * w.tiles * kTileInputs + at, v);
    total += v;
  }
  float sum = 0.0f;
  for (int i = 0; i < kLanes; ++i) sum += total[i];
  a.sum[size_t(token) * w.groups + group] = sum;
}

// ---- products of blocks of 16 rows

// Sums of one group: H digits of T tokens over B blocks.
template <int R, int T, int H, int B>
ELASTIQ_INLINE void group_sums(const Weight& w, const uint8_t* const (*plane)[R], const int8_t* const* x, const float* scale,
                       size_t scales, int tile, int tile_end, vf (*f)[T]) {
  constexpr int N = kSlices == 1 && T * H * B < 4 ? 2 : 1;
  const size_t inputs = size_t(w.tiles) * kTileInputs;
  ELASTIQ_UNROLL
  for (int b = 0; b < B; ++b)
    ELASTIQ_UNROLL
    for (int t = 0; t < T; ++t) f[b][t] = splat(0.0f);
  for (int piece = 0; tile < tile_end; ++piece) {
    const int piece_end = tile + kPieceTiles < tile_end ? tile + kPieceTiles : tile_end;
    VI sum[B][T][H][kSlices][N] = {};
    for (; tile < piece_end; ++tile) {
      ELASTIQ_UNROLL
      for (int b = 0; b < B; ++b) {
        ELASTIQ_UNROLL
        for (int p = 0; p < R; ++p) __builtin_prefetch(plane[b][p] + size_t(tile) * kTileBytes + kAhead);
        ELASTIQ_UNROLL
        for (int s = 0; s < kSlices; ++s) {
          V c[8];
          codes<R>(plane[b], size_t(tile) * kTileBytes + s * kSlice, c);
          ELASTIQ_UNROLL
          for (int t = 0; t < T; ++t)
            ELASTIQ_UNROLL
            for (int h = 0; h < H; ++h) dot<R, N>(sum[b][t][h][s], c, x[t] + h * inputs + tile * kTileInputs);
        }
      }
    }
    ELASTIQ_UNROLL
    for (int b = 0; b < B; ++b) {
      ELASTIQ_UNROLL
      for (int t = 0; t < T; ++t) {
        VI slices[kSlices];
        ELASTIQ_UNROLL
        for (int s = 0; s < kSlices; ++s) {
          VI digit[H];
          ELASTIQ_UNROLL
          for (int h = 0; h < H; ++h) digit[h] = N == 2 ? sum[b][t][h][s][0] + sum[b][t][h][s][N - 1] : sum[b][t][h][s][0];
          slices[s] = H == 2 ? (digit[0] << 8) + digit[H - 1] : digit[0];
        }
        const vi total = load(reinterpret_cast<const int32_t*>(slices));
        f[b][t] += to_float(total) * (scale[t * scales + piece] * (1.0f / (1 << kSpare<R>)));
      }
    }
  }
}

// The same with floats, for H = 0.
template <int R, int T>
ELASTIQ_INLINE void group_floats(const uint8_t* const* plane, const float* const* x, int tile, int tile_end, vf* f) {
  VF sum[T][kSlices] = {};
  for (; tile < tile_end; ++tile) {
    ELASTIQ_UNROLL
    for (int p = 0; p < R; ++p) __builtin_prefetch(plane[p] + size_t(tile) * kTileBytes + kAhead);
    ELASTIQ_UNROLL
    for (int s = 0; s < kSlices; ++s) {
      V c[8];
      codes<R>(plane, size_t(tile) * kTileBytes + s * kSlice, c);
      ELASTIQ_UNROLL
      for (int j = 0; j < 8; ++j)
        ELASTIQ_UNROLL
        for (int i = 0; i < 4; ++i) {
          const VF value = __builtin_convertvector(((VI)c[j] >> (8 * i)) & 255, VF);
          ELASTIQ_UNROLL
          for (int t = 0; t < T; ++t) sum[t][s] += value * x[t][tile * kTileInputs + 4 * j + i];
        }
    }
  }
  ELASTIQ_UNROLL
  for (int t = 0; t < T; ++t) {
    f[t] = load(reinterpret_cast<const float*>(sum[t])) * (1.0f / (1 << kSpare<R>));
  }
}

template <int R, int T, int H, int B>
void blocks(const Weight& w, const Output& out, const Input& x, const Activations& a, int token, const int* block) {
  const size_t inputs = size_t(w.tiles) * kTileInputs, scales = size_t(w.groups) * w.pieces();
  const uint8_t* plane[B][R];
  ELASTIQ_UNROLL
  for (int b = 0; b < B; ++b)
    ELASTIQ_UNROLL
    for (int p = 0; p < R; ++p) plane[b][p] = w.plane[p] + size_t(block[b]) * w.tiles * kTileBytes;
  const int8_t* bytes[T];
  const float* floats[T];
  ELASTIQ_UNROLL
  for (int t = 0; t < T; ++t) {
    if (H > 0) bytes[t] = a.bytes + size_t(token + t) * H * inputs;
    if (H == 0) floats[t] = a.floats + size_t(token + t) * inputs;
  }
  vf y[B][T];
  ELASTIQ_UNROLL
  for (int b = 0; b < B; ++b)
    ELASTIQ_UNROLL
    for (int t = 0; t < T; ++t) y[b][t] = splat(0.0f);
  for (int group = 0; group < w.groups; ++group) {
    const int tile = group * w.group_tiles();
    const int tile_end = group + 1 == w.groups ? w.tiles : tile + w.group_tiles();
    vf f[B][T];
    if constexpr (H == 0)
      group_floats<R, T>(plane[0], floats, tile, tile_end, f[0]);
    else
      group_sums<R, T, H, B>(w, plane, bytes, a.scale + token * scales + size_t(group) * w.pieces(), scales, tile, tile_end, f);
    ELASTIQ_UNROLL
    for (int b = 0; b < B; ++b) {
      const size_t at = (size_t(block[b]) * w.groups + group) * kTileRows;
      const vf scale = load_half(w.scale + at), zero = load_zero(w, at);
      ELASTIQ_UNROLL
      for (int t = 0; t < T; ++t) y[b][t] += scale * (f[b][t] - zero * a.sum[size_t(token + t) * w.groups + group]);
    }
  }
  ELASTIQ_UNROLL
  for (int b = 0; b < B; ++b) {
    const int row = block[b] * kTileRows, left = w.out_features - row, n = left < kTileRows ? left : kTileRows;
    const vf bias = out.bias ? load_some(out.bias, x.dtype, row, n) : splat(0.0f);
    ELASTIQ_UNROLL
    for (int t = 0; t < T; ++t)
      store_some(out.values, x.dtype, size_t(token + t) * w.out_features + row, n, y[b][t] * w.factor + bias);
  }
}

template <int R, int H>
void some_blocks(const Weight& w, const Output& out, const Input& x, const Activations& a, int begin, int end) {
  // Two blocks half the range apart: with few planes one stream of memory is not enough.
  constexpr int B = R <= 2 && H > 0 && kSlices == 1 ? 2 : 1;
  if (B == 2 && x.tokens == 1) {
    const int half = (end - begin) / 2;
    for (int i = 0; i < half; ++i) {
      const int pair[2] = {begin + i, begin + half + i};
      blocks<R, 1, H, B>(w, out, x, a, 0, pair);
    }
    begin += 2 * half;
  }
  for (int block = begin; block < end; ++block) {
    int token = 0;
    for (; token + kBatch <= x.tokens; token += kBatch) blocks<R, kBatch, H, 1>(w, out, x, a, token, &block);
    if constexpr (H > 0 && kSlices == 1) {
      for (; token + 2 <= x.tokens; token += 2) blocks<R, 2, H, 1>(w, out, x, a, token, &block);
    }
    for (; token < x.tokens; ++token) blocks<R, 1, H, 1>(w, out, x, a, token, &block);
  }
}

template <int R>
void some_blocks(const Weight& w, const Output& out, const Input& x, const Activations& a, int begin, int end) {
  if (a.digits == 2) return some_blocks<R, 2>(w, out, x, a, begin, end);
  if (a.digits == 1) return some_blocks<R, 1>(w, out, x, a, begin, end);
  some_blocks<R, 0>(w, out, x, a, begin, end);
}

typedef void (*SomeBlocks)(const Weight&, const Output&, const Input&, const Activations&, int, int);
constexpr SomeBlocks kSomeBlocks[] = {some_blocks<1>, some_blocks<2>, some_blocks<3>, some_blocks<4>,
                                      some_blocks<5>, some_blocks<6>, some_blocks<7>, some_blocks<8>};

void product(const Weight* weight, const Output* output, int count, const Input& x, const Activations& a, int threads) {
#pragma omp parallel num_threads(threads)
  {
    const int thread = omp_get_thread_num(), team = omp_get_num_threads();
    const Weight& first = weight[0];
    const int64_t parts = int64_t(x.tokens) * first.groups;
    for (int64_t i = parts * thread / team; i < parts * (thread + 1) / team; ++i)
      (a.digits ? quantize : widen)(first, x, a, int(i / first.groups), int(i % first.groups));
#pragma omp barrier
    for (int m = 0; m < count; ++m) {
      const int64_t n = weight[m].blocks;
      kSomeBlocks[weight[m].bits - 1](weight[m], output[m], x, a, int(n * thread / team), int(n * (thread + 1) / team));
    }
  }
}

// ---- values

// Codes of one tile, as bytes [row][input].
template <int R>
void tile_codes(const Weight& w, int block, int tile, uint8_t (*code)[kTileInputs]) {
  const size_t at = (size_t(block) * w.tiles + tile) * kTileBytes;
  ELASTIQ_UNROLL
  for (int s = 0; s < kSlices; ++s) {
    V c[8];
    codes<R>(w.plane, at + s * kSlice, c);
    uint32_t four[8][kSlice / 4];
    std::memcpy(four, c, sizeof four);
    for (int row = 0; row < kSlice / 4; ++row)
      ELASTIQ_UNROLL
      for (int j = 0; j < 8; ++j) std::memcpy(code[s * kSlice / 4 + row] + 4 * j, &four[j][row], 4);
  }
}

typedef void (*TileCodes)(const Weight&, int, int, uint8_t (*)[kTileInputs]);
constexpr TileCodes kTileCodes[] = {tile_codes<1>, tile_codes<2>, tile_codes<3>, tile_codes<4>,
                                    tile_codes<5>, tile_codes<6>, tile_codes<7>, tile_codes<8>};
constexpr int kSpares[] = {kSpare<1>, kSpare<2>, kSpare<3>, kSpare<4>, kSpare<5>, kSpare<6>, kSpare<7>, kSpare<8>};

// Values of rows `first` to `first + n` of a block, to consecutive rows of the result.
void decode_rows(const Weight& w, int block, int first, int n, void* values, Dtype dtype, size_t to) {
  const int spare = kSpares[w.bits - 1];
  const bool whole = w.group_size >= w.in_features || w.group_size % kTileInputs == 0;
  for (int tile = 0; tile < w.tiles; ++tile) {
    uint8_t code[kTileRows][kTileInputs];
    kTileCodes[w.bits - 1](w, block, tile, code);
    const int begin = tile * kTileInputs;
    const int width = w.in_features - begin < kTileInputs ? w.in_features - begin : kTileInputs;
    for (int i = 0; i < width; i += kLanes) {
      const int some = width - i < kLanes ? width - i : kLanes;
      vf scales[kLanes], zeros[kLanes];
      for (int k = 0; k < (whole ? 1 : some); ++k) {
        const size_t at = (size_t(block) * w.groups + (begin + i + k) / w.group_size) * kTileRows;
        scales[k] = load_half(w.scale + at) * w.factor;
        zeros[k] = load_zero(w, at);
      }
      for (int row = first; row < first + n; ++row) {
        const vi number = load_bytes(code[row] + i) >> spare;
        vf scale = splat(scales[0][row]), zero = splat(zeros[0][row]);
        if (!whole) {
          float each[2][kLanes] = {};
          for (int k = 0; k < some; ++k) each[0][k] = scales[k][row], each[1][k] = zeros[k][row];
          scale = load(each[0]), zero = load(each[1]);
        }
        store_some(values, dtype, to + size_t(row - first) * w.in_features + begin + i, some, (to_float(number) - zero) * scale);
      }
    }
  }
}

void decode(const Weight& w, const int64_t* rows, int64_t count, void* values, Dtype dtype, int threads) {
  if (rows) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t i = 0; i < count; ++i)
      decode_rows(w, int(rows[i] / kTileRows), int(rows[i] % kTileRows), 1, values, dtype, size_t(i) * w.in_features);
    return;
  }
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int block = 0; block < w.blocks; ++block) {
    const int first = block * kTileRows, left = w.out_features - first;
    decode_rows(w, block, 0, left < kTileRows ? left : kTileRows, values, dtype, size_t(first) * w.in_features);
  }
}

// ---- tile order

// Bits of even positions to the low half, of odd ones to the high half; the masks drop what the shifts bring in.
ELASTIQ_INLINE vi unshuffle(vi x) {
  vi t = (x ^ (x >> 1)) & 0x22222222;
  x ^= t ^ (t << 1);
  t = (x ^ (x >> 2)) & 0x0C0C0C0C;
  x ^= t ^ (t << 2);
  t = (x ^ (x >> 4)) & 0x00F000F0;
  x ^= t ^ (t << 4);
  t = (x ^ (x >> 8)) & 0x0000FF00;
  return x ^ t ^ (t << 8);
}

void tile(const uint8_t* plane, int64_t rows, int64_t row_bytes, uint8_t* tiles, int threads) {
  const int64_t blocks = (rows + kTileRows - 1) / kTileRows, words = (row_bytes + 3) / 4;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t block = 0; block < blocks; ++block) {
    const uint8_t* from = plane + block * kTileRows * row_bytes;
    const int64_t left = rows - block * kTileRows, n = left < kTileRows ? left : kTileRows;
    for (int64_t word = 0; word < words; ++word) {
      int32_t line[kTileRows] = {};
      if (n == kTileRows && word < row_bytes / 4) {
        ELASTIQ_UNROLL
        for (int row = 0; row < kTileRows; ++row) {
          int32_t four;
          std::memcpy(&four, from + row * row_bytes + 4 * word, sizeof four);
          line[row] = four;
        }
      } else {
        for (int64_t row = 0; row < n; ++row) {
          int32_t four = 0;
          std::memcpy(&four, from + row * row_bytes + 4 * word, row_bytes - 4 * word < 4 ? row_bytes - 4 * word : 4);
          line[row] = four;
        }
      }
      // Bit 4 * j + i becomes bit 8 * i + j: the index turns by two places.
      store(line, unshuffle(unshuffle(load(line))));
      std::memcpy(tiles + (block * words + word) * kTileBytes, line, kTileBytes);
    }
  }
}

}  // namespace

extern const MatmulFunctions ELASTIQ_TARGET{product, decode, tile};

}  // namespace elastiq
