// Products with many tokens on the tile registers: planes become right-hand tiles once per panel of tokens, either of
// codes, which meet activations in fixed point of 16 bits (amx_codes.inl), or of values in bfloat16 (amx_values.inl).
//
// A tile register holds 16 rows of 64 bytes. Codes c[j] of planes.inl are inputs 4j..4j+3 of 16 output rows: row j of a
// right-hand tile of bytes as they come; and the bfloat16 pairs (4j, 4j+1) and (4j+2, 4j+3) are rows 2j and 2j+1.
#include <cstring>
#include <omp.h>
#include <vector>

#include "activations.inl"

namespace elastiq {
namespace {

constexpr int kTokens = 16;              // of a tile register
constexpr int kRegister = 16 * 32;       // bfloat16 numbers of a tile register
constexpr int kFloats = 16 * 16;         // sums of a tile register
constexpr int kLeastTiles = 4;           // of a group whose steps and scales are worth the time of adding its sums up
constexpr int kChunk = 8;                // tiles of inputs whose right-hand sides stay in the first-level cache
constexpr int kPartialBytes = 1 << 19;   // sums of one thread between chunks, within the second-level cache

// gcc 12 does not know that tile instructions read and write memory (of a configuration it knows eight bytes): stores
// before one and loads behind it stay on their sides of this.
ELASTIQ_INLINE void settle() { asm volatile("" ::: "memory"); }

// Sums in registers 0 to 3, left-hand sides of `inputs` bytes a row in 4 and 5, right-hand sides in 6 and 7.
void configure(int inputs) {
  alignas(64) uint8_t config[64] = {};
  config[0] = 1;
  for (int t = 0; t < 8; ++t) {
    config[16 + 2 * t] = uint8_t(t == 4 || t == 5 ? inputs : 64);
    config[48 + t] = uint8_t(t == 6 || t == 7 ? inputs / 4 : 16);
  }
  settle();
  _tile_loadconfig(config);
}

// Lines of planes that the next decoding reads, brought near while the tile registers multiply.
struct Ahead {
  const uint8_t* line[2 * kMaxBits];
  int count, begin, end;

  // The pair of blocks that comes next in these tiles, or the first one in the tiles that follow.
  Ahead(const Weight& w, int block, int next, int block_end, int tile, int tile_end) {
    const bool last = next >= block_end;
    const int at = last ? block : next;
    count = at + 1 < w.blocks ? 2 * w.bits : w.bits;
    for (int p = 0; p < count; ++p)
      line[p] = w.plane[p % w.bits] + (size_t(at + p / w.bits) * w.tiles + (last ? tile_end : tile)) * kTileBytes;
  }

  // Those that one of `passes` over the tokens brings.
  void share(int pass, int passes) {
    begin = count * pass / passes;
    end = count * (pass + 1) / passes;
  }
  ELASTIQ_INLINE void fetch(int tile) const {
    for (int p = begin; p < end; ++p) _mm_prefetch(line[p] + tile * kTileBytes, _MM_HINT_T1);
  }
};

template <int R>
ELASTIQ_INLINE void lines(const Weight& w, int block, const uint8_t** plane) {
  ELASTIQ_UNROLL
  for (int p = 0; p < R; ++p) plane[p] = w.plane[p] + size_t(block) * w.tiles * kTileBytes;
}

// Tiles of inputs that one tile register of bytes holds: none crosses a group.
int register_tiles(const Weight& w) { return w.tiles % 2 || w.group_tiles() % 2 ? 1 : 2; }

}  // namespace
}  // namespace elastiq

#include "amx_codes.inl"
#include "amx_values.inl"

namespace elastiq {
namespace {

void write(const Weight& w, const Output& out, const Input& x, int first, int registers, int block, int block_end,
           const float* sums) {
  // Both blocks of a pair together: in bfloat16 they are one line of memory.
  for (int b = block; b < block_end; b += 2) {
    const int row = b * kTileRows, left = w.out_features - row;
    const int n = left < kTileRows ? left : kTileRows, more = left - n < kTileRows ? left - n : kTileRows;
    const vf bias = out.bias ? load_some(out.bias, x.dtype, row, n) : splat(0.0f);
    const vf more_bias = out.bias && more ? load_some(out.bias, x.dtype, row + n, more) : splat(0.0f);
    const float* pair = sums + size_t(b - block) * registers * kFloats;
    for (int t = 0; t < registers * kTokens && first + t < x.tokens; ++t) {
      const float* from = pair + t / kTokens * 2 * kFloats + t % kTokens * kLanes;
      const size_t to = size_t(first + t) * w.out_features + row;
      store_some(out.values, x.dtype, to, n, load(from) + bias);
      if (more) store_some(out.values, x.dtype, to + n, more, load(from + kFloats) + more_bias);
    }
  }
}

}  // namespace

size_t batch_sums(int threads) { return size_t(threads) * (kPartialBytes / sizeof(float)); }

int batch_parts(const Weight& w, Dtype dtype, int digits) {
  if (digits == 1 || dtype == kBfloat16) return 1;
  return w.group_tiles() >= kLeastTiles ? 0 : 2;
}

size_t batch_packed(const Weight& w, int tokens, int parts) {
  const int panel = tokens < kPanel ? tokens : kPanel;
  return size_t((panel + kTokens - 1) / kTokens) * w.tiles * (parts == 2 ? 2 : 1) * kRegister;
}

void batch_product(const Weight& w, const Output& out, const Input& x, const Batch& batch, int threads) {
#pragma omp parallel num_threads(threads)
  {
    const int thread = omp_get_thread_num(), team = omp_get_num_threads();
    configure(batch.parts == 0 ? register_tiles(w) * kTileInputs : 64);
    for (int first = 0; first < x.tokens; first += kPanel) {
      const int left = x.tokens - first, registers = ((left < kPanel ? left : kPanel) + kTokens - 1) / kTokens;
      const int rows = registers * kTokens;
      for (int t = rows * thread / team; t < rows * (thread + 1) / team; ++t)
        (batch.parts == 0 ? pack_fixed : batch.parts == 1 ? pack<1> : pack<2>)(w, x, first + t, t, batch);
#pragma omp barrier
      float* sums = batch.sums + size_t(thread) * (kPartialBytes / sizeof(float));
      const int step = 2 * int(kPartialBytes / sizeof(float) / (size_t(registers) * 2 * kFloats));
      const int64_t pairs = (w.blocks + 1) / 2;
      const int begin = 2 * int(pairs * thread / team), end = 2 * int(pairs * (thread + 1) / team);
      for (int b = begin; b < end; b += step) {
        const int some = b + step < end ? b + step : end;
        (batch.parts == 0 ? codes_product : batch.parts == 1 ? values_product<1> : values_product<2>)(w, batch, registers, b, some, sums);
        write(w, out, x, first, registers, b, some, sums);
      }
#pragma omp barrier
    }
    _tile_release();
  }
}

}  // namespace elastiq
