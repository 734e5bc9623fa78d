// Tokens times values in bfloat16, or both sides as sums of two bfloat16 numbers. Included by matmul_amx.cpp.
namespace elastiq {
namespace {

ELASTIQ_INLINE vf to_high(vi rounded) { return from_bits(rounded & int32_t(0xFFFF0000)); }
ELASTIQ_INLINE vi round_up(vf x) { return bits_of(x) + 0x8000; }  // its upper half is x as bfloat16

// Upper halves of two vectors as pairs.
ELASTIQ_INLINE __m512i pairs(vi first, vi second) {
  return _mm512_mask_blend_epi16(0xAAAAAAAA, _mm512_srli_epi32((__m512i)first, 16), (__m512i)second);
}

// One token as a row of its registers, one register of 16 tokens by 32 inputs for each tile and part: x rounded, and
// what the rounding left.
template <int Parts>
void pack(const Weight& w, const Input& x, int token, int row, const Batch& batch) {
  uint16_t* to = batch.packed + size_t(row / kTokens) * w.tiles * Parts * kRegister + row % kTokens * 32;
  for (int tile = 0; tile < w.tiles; ++tile, to += Parts * kRegister) {
    const int at = tile * kTileInputs, left = w.in_features - at, n = left < kTileInputs ? left : kTileInputs;
    vf v[2] = {};
    if (token < x.tokens) {
      const size_t from = size_t(token) * w.in_features + at;
      v[0] = load_some(x.values, x.dtype, from, n < kLanes ? n : kLanes);
      if (n > kLanes) v[1] = load_some(x.values, x.dtype, from + kLanes, n - kLanes);
    }
    const __m512i high = (__m512i)_mm512_cvtne2ps_pbh((__m512)v[1], (__m512)v[0]);
    _mm512_storeu_si512(to, high);
    if (Parts == 2) {
      const __m512i first = _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(high)), 16);
      const __m512i second = _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(high, 1)), 16);
      const vf rest[2] = {v[0] - (vf)first, v[1] - (vf)second};
      _mm512_storeu_si512(to + kRegister, (__m512i)_mm512_cvtne2ps_pbh((__m512)rest[1], (__m512)rest[0]));
    }
  }
}

// Values of one tile of weights, a register for each part.
template <int R, int Parts>
ELASTIQ_INLINE void values(const uint8_t* const* plane, size_t at, vf scale, vf shift, uint16_t* to) {
  V c[8];
  codes<R>(plane, at, c);
  ELASTIQ_UNROLL
  for (int j = 0; j < 8; ++j) {
    // A code in bits 15 to 22 below the exponent of 256 is the float 256 + code.
    const vi code = (vi)c[j];
    const vi shifted[4] = {code << 15, code << 7, code >> 1, code >> 9};
    vf value[4];
    ELASTIQ_UNROLL
    for (int i = 0; i < 4; ++i) value[i] = from_bits((shifted[i] & 0x007F8000) | 0x43800000) * scale + shift;
    ELASTIQ_UNROLL
    for (int half = 0; half < 2; ++half) {
      const vi first = round_up(value[2 * half]), second = round_up(value[2 * half + 1]);
      _mm512_store_si512(to + (2 * j + half) * 32, pairs(first, second));
      if (Parts == 2) {
        const vf low = value[2 * half] - to_high(first), high = value[2 * half + 1] - to_high(second);
        _mm512_store_si512(to + kRegister + (2 * j + half) * 32, pairs(round_up(low), round_up(high)));
      }
    }
  }
}

// Tiles `tile` to `tile_end` of a block, registers of two blocks in turns.
template <int R, int Parts>
void chunk_values(const Weight& w, int block, int tile, int tile_end, uint16_t* to) {
  const int group_tiles = w.group_tiles();
  const uint8_t* plane[R];
  lines<R>(w, block, plane);
  while (tile < tile_end) {
    const int group = tile / group_tiles, next = (group + 1) * group_tiles, end = next < tile_end ? next : tile_end;
    const size_t at = (size_t(block) * w.groups + group) * kTileRows;
    const vf step = load_half(w.scale + at) * w.factor, zero = load_zero(w, at);
    const vf scale = step * (1.0f / (1 << kSpare<R>));
    const vf shift = -zero * step - 256.0f * scale;
    for (; tile < end; ++tile, to += 2 * Parts * kRegister) values<R, Parts>(plane, size_t(tile) * kTileBytes, scale, shift, to);
  }
}

typedef void (*ChunkValues)(const Weight&, int, int, int, uint16_t*);
template <int Parts>
constexpr ChunkValues kChunkValues[] = {chunk_values<1, Parts>, chunk_values<2, Parts>, chunk_values<3, Parts>,
                                        chunk_values<4, Parts>, chunk_values<5, Parts>, chunk_values<6, Parts>,
                                        chunk_values<7, Parts>, chunk_values<8, Parts>};

// Sums [A][2] registers += A registers of tokens times two of outputs, over `tiles` tiles of inputs.
template <int A, int Parts>
ELASTIQ_INLINE void multiply(const uint16_t* tokens, size_t next, const uint16_t* weights, int tiles, bool first,
                             const Ahead& ahead, float* sums) {
  if (first) {
    _tile_zero(0);
    _tile_zero(1);
    if (A == 2) _tile_zero(2);
    if (A == 2) _tile_zero(3);
  } else {
    _tile_loadd(0, sums, 64);
    _tile_loadd(1, sums + kFloats, 64);
    if (A == 2) _tile_loadd(2, sums + 2 * kFloats, 64);
    if (A == 2) _tile_loadd(3, sums + 3 * kFloats, 64);
  }
  for (int tile = 0; tile < tiles; ++tile, tokens += Parts * kRegister, weights += 2 * Parts * kRegister) {
    ahead.fetch(tile);
    _tile_loadd(4, tokens, 64);
    if (A == 2) _tile_loadd(5, tokens + next, 64);
    if (Parts == 2) {
      _tile_loadd(6, weights + kRegister, 64);
      _tile_dpbf16ps(0, 4, 6);
      if (A == 2) _tile_dpbf16ps(2, 5, 6);
      _tile_loadd(7, weights + 3 * kRegister, 64);
      _tile_dpbf16ps(1, 4, 7);
      if (A == 2) _tile_dpbf16ps(3, 5, 7);
    }
    _tile_loadd(6, weights, 64);
    _tile_dpbf16ps(0, 4, 6);
    if (A == 2) _tile_dpbf16ps(2, 5, 6);
    _tile_loadd(7, weights + Parts * kRegister, 64);
    _tile_dpbf16ps(1, 4, 7);
    if (A == 2) _tile_dpbf16ps(3, 5, 7);
    if (Parts == 2) {
      _tile_loadd(4, tokens + kRegister, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      if (A == 2) {
        _tile_loadd(5, tokens + next + kRegister, 64);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
    }
  }
  _tile_stored(0, sums, 64);
  _tile_stored(1, sums + kFloats, 64);
  if (A == 2) _tile_stored(2, sums + 2 * kFloats, 64);
  if (A == 2) _tile_stored(3, sums + 3 * kFloats, 64);
  settle();
}

// Sums [pairs of blocks][registers of tokens][2][16][16] of blocks `block` to `block_end`.
template <int Parts>
void values_product(const Weight& w, const Batch& batch, int registers, int block, int block_end, float* sums) {
  constexpr int kTiles = kChunk / Parts;
  alignas(64) static thread_local uint16_t weights[kChunk * 2 * kRegister];
  const size_t next = size_t(w.tiles) * Parts * kRegister;
  for (int tile = 0; tile < w.tiles; tile += kTiles) {
    const int tiles = w.tiles - tile < kTiles ? w.tiles - tile : kTiles;
    for (int b = block; b < block_end; b += 2) {
      // The two blocks of a pair alternate, part by part.
      for (int k = 0; k < 2; ++k) {
        uint16_t* to = weights + k * Parts * kRegister;
        if (b + k < w.blocks)
          kChunkValues<Parts>[w.bits - 1](w, b + k, tile, tile + tiles, to);
        else
          for (int i = 0; i < tiles; ++i) std::memset(to + i * 2 * Parts * kRegister, 0, Parts * kRegister * sizeof *to);
      }
      settle();
      float* pair = sums + size_t(b - block) * registers * kFloats;
      Ahead ahead(w, block, b + 2, block_end, tile, tile + kTiles);
      for (int r = 0; r < registers; r += 2) {
        ahead.share(r / 2, (registers + 1) / 2);
        const uint16_t* tokens = batch.packed + (size_t(r) * w.tiles + tile) * Parts * kRegister;
        if (r + 1 < registers)
          multiply<2, Parts>(tokens, next, weights, tiles, tile == 0, ahead, pair + r * 2 * kFloats);
        else
          multiply<1, Parts>(tokens, next, weights, tiles, tile == 0, ahead, pair + r * 2 * kFloats);
      }
    }
  }
}

}  // namespace
}  // namespace elastiq
