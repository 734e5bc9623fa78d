// Tokens in fixed point of 16 bits times codes. Included by matmul_amx.cpp.
namespace elastiq {
namespace {

// One token as a row of its registers [tiles][2 digits]; its steps and sums a column of those of its register.
void pack_fixed(const Weight& w, const Input& x, int token, int row, const Batch& batch) {
  static thread_local std::vector<int8_t> bytes;
  static thread_local std::vector<float> scale, sum;
  const size_t inputs = size_t(w.tiles) * kTileInputs, scales = size_t(w.groups) * w.pieces();
  const int width = register_tiles(w) * kTileInputs;
  bytes.assign(2 * inputs, 0);
  scale.assign(scales, 0.0f);
  sum.assign(w.groups, 0.0f);
  const Activations a{2, bytes.data(), nullptr, scale.data(), sum.data()};
  if (token < x.tokens) {
    const size_t size = x.dtype == kFloat32 ? 4 : 2;
    const Input one{(const char*)x.values + size_t(token) * w.in_features * size, x.dtype, 1};
    for (int group = 0; group < w.groups; ++group) quantize(w, one, a, 0, group);
  }
  int8_t* to = (int8_t*)batch.packed + row / kTokens * kTokens * 2 * inputs + row % kTokens * width;
  for (size_t at = 0; at < inputs; at += width)
    for (int digit = 0; digit < 2; ++digit, to += kTokens * width) std::memcpy(to, &bytes[digit * inputs + at], width);
  const size_t before = row / kTokens, column = row % kTokens;
  for (size_t i = 0; i < scales; ++i) batch.scale[(before * scales + i) * kTokens + column] = scale[i];
  for (int i = 0; i < w.groups; ++i) batch.sum[(before * w.groups + i) * kTokens + column] = sum[i];
}

// Codes of tiles `tile` to `tile_end` of a block: registers of `together` tiles, two registers apart.
template <int R>
void chunk_codes(const Weight& w, int block, int tile, int tile_end, int together, uint8_t* to) {
  const uint8_t* plane[R];
  lines<R>(w, block, plane);
  for (; tile < tile_end; tile += together, to += together * 2 * 8 * kTileBytes)
    for (int i = 0; i < together; ++i) {
      V c[8];
      codes<R>(plane, size_t(tile + i) * kTileBytes, c);
      std::memcpy(to + i * sizeof c, c, sizeof c);
    }
}

typedef void (*ChunkCodes)(const Weight&, int, int, int, int, uint8_t*);
constexpr ChunkCodes kChunkCodes[] = {chunk_codes<1>, chunk_codes<2>, chunk_codes<3>, chunk_codes<4>,
                                      chunk_codes<5>, chunk_codes<6>, chunk_codes<7>, chunk_codes<8>};
constexpr int kSpares[] = {kSpare<1>, kSpare<2>, kSpare<3>, kSpare<4>, kSpare<5>, kSpare<6>, kSpare<7>, kSpare<8>};

// A run of tiles whose inputs share a step, within one group.
struct Piece {
  int group, index, end;  // index: among all pieces of a token; end: the tile behind it
  bool first;             // of its group
};

Piece piece_at(const Weight& w, int tile) {
  const int group_tiles = w.group_tiles(), group = tile / group_tiles, begin = group * group_tiles;
  const int piece = (tile - begin) / kPieceTiles, end = begin + (piece + 1) * kPieceTiles;
  const int group_end = begin + group_tiles < w.tiles ? begin + group_tiles : w.tiles;
  return {group, group * w.pieces() + piece, end < group_end ? end : group_end, piece == 0};
}

// Totals [2 blocks][2 digits][16][16] of a piece to their place among the sums [2 blocks][16][16].
ELASTIQ_INLINE void add_piece(const int32_t* totals, const vf* scale, const vf* shift, const float* step, const float* sum,
                              bool first, float* sums) {
  for (int t = 0; t < kTokens; ++t)
    ELASTIQ_UNROLL
    for (int k = 0; k < 2; ++k) {
      vi high, low;
      std::memcpy(&high, totals + 2 * k * kFloats + t * kLanes, sizeof high);
      std::memcpy(&low, totals + (2 * k + 1) * kFloats + t * kLanes, sizeof low);
      float* to = sums + k * kFloats + t * kLanes;
      const vf before = first ? splat(0.0f) : load(to);
      store(to, before + shift[k] * sum[t] + scale[k] * (to_float((high << 8) + low) * step[t]));
    }
}

// The same sums as those of values_product.
void codes_product(const Weight& w, const Batch& batch, int registers, int block, int block_end, float* sums) {
  alignas(64) static thread_local uint8_t weights[kPieceTiles * 2 * 8 * kTileBytes];
  alignas(64) static thread_local int32_t totals[2][4 * kFloats];
  const int together = register_tiles(w), width = together * kTileInputs;
  const size_t inputs = size_t(w.tiles) * kTileInputs, scales = size_t(w.groups) * w.pieces();
  for (int tile = 0; tile < w.tiles;) {
    const Piece piece = piece_at(w, tile);
    const int tiles = piece.end - tile;
    for (int b = block; b < block_end; b += 2) {
      vf scale[2], shift[2];
      for (int k = 0; k < 2; ++k) {
        uint8_t* to = weights + k * together * 8 * kTileBytes;
        const size_t at = (size_t(b + k) * w.groups + piece.group) * kTileRows;
        if (b + k < w.blocks) {
          kChunkCodes[w.bits - 1](w, b + k, tile, piece.end, together, to);
          const vf step = load_half(w.scale + at) * w.factor;
          scale[k] = step * (1.0f / (1 << kSpares[w.bits - 1]));
          shift[k] = piece.first ? -load_zero(w, at) * step : splat(0.0f);
        } else {
          for (int i = 0; i < tiles; i += together) std::memset(to + i * 2 * 8 * kTileBytes, 0, together * 8 * kTileBytes);
          scale[k] = shift[k] = splat(0.0f);
        }
      }
      float* pair = sums + size_t(b - block) * registers * kFloats;
      Ahead ahead(w, block, b + 2, block_end, tile, piece.end);
      settle();
      // One register of tokens is multiplied while the one before is added up.
      for (int r = 0; r <= registers; ++r) {
        if (r < registers) {
          const int8_t* tokens = (const int8_t*)batch.packed + (r * inputs + size_t(tile) * kTileInputs) * 2 * kTokens;
          const uint8_t* right = weights;
          ahead.share(r, registers);
          _tile_zero(0);
          _tile_zero(1);
          _tile_zero(2);
          _tile_zero(3);
          for (int i = 0; i < tiles; i += together, tokens += 2 * kTokens * width, right += together * 2 * 8 * kTileBytes) {
            for (int k = 0; k < together; ++k) ahead.fetch(i + k);
            _tile_loadd(4, tokens, width);
            _tile_loadd(5, tokens + kTokens * width, width);
            _tile_loadd(6, right, 64);
            _tile_dpbsud(0, 4, 6);
            _tile_dpbsud(1, 5, 6);
            _tile_loadd(7, right + together * 8 * kTileBytes, 64);
            _tile_dpbsud(2, 4, 7);
            _tile_dpbsud(3, 5, 7);
          }
          _tile_stored(0, totals[r % 2], 64);
          _tile_stored(1, totals[r % 2] + kFloats, 64);
          _tile_stored(2, totals[r % 2] + 2 * kFloats, 64);
          _tile_stored(3, totals[r % 2] + 3 * kFloats, 64);
          settle();
        }
        if (r > 0)
          add_piece(totals[(r - 1) % 2], scale, shift, batch.scale + (size_t(r - 1) * scales + piece.index) * kTokens,
                    batch.sum + (size_t(r - 1) * w.groups + piece.group) * kTokens, tile == 0, pair + (r - 1) * 2 * kFloats);
      }
    }
    tile = piece.end;
  }
}

}  // namespace
}  // namespace elastiq
