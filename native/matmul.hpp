// Products with nested matrices, straight from their bit planes.
//
// A tile is 16 output rows by 32 inputs of one plane: 64 bytes. Byte 4 * row + i, bit j is the bit of input 4 * j + i,
// so a 32-bit lane is a row, and the same bit position of all bytes is four neighbouring inputs of every row. A plane
// is [blocks, tiles, 64]: 16 rows after 16 rows, each 32 inputs after 32 inputs, padded with zeros at both ends.
// Scales and zero points are half precision [blocks, groups, 16].
#pragma once
#include <cstddef>
#include <cstdint>

namespace elastiq {

constexpr int kTileRows = 16;
constexpr int kTileInputs = 32;
constexpr int kTileBytes = 64;
constexpr int kMaxBits = 8;
constexpr int kPieceTiles = 8;  // 256 inputs: 255 * 32639 * 256 still fits 32 bits

enum Dtype { kFloat32, kBfloat16, kFloat16 };

// value = scale * factor * (code - (zero * zero_factor + zero_shift)), code = the top `bits` bits.
struct Weight {
  const uint8_t* plane[kMaxBits];
  int bits;
  const uint16_t* scale;
  const uint16_t* zero;  // null: the zero point is `middle` everywhere
  float middle, factor, zero_factor, zero_shift;
  int out_features, in_features, group_size;
  int blocks, tiles, groups;

  int group_tiles() const { return group_size >= in_features ? tiles : group_size / kTileInputs; }
  int pieces() const { return (group_tiles() + kPieceTiles - 1) / kPieceTiles; }  // per group
};

struct Input {
  const void* values;  // [tokens, in_features]
  Dtype dtype;
  int tokens;
};

struct Output {
  void* values;  // [tokens, out_features], in the dtype of the input
  const void* bias;  // [out_features] in that dtype, or null
};

// Activations as the products read them, made from an Input; all with the inputs padded to whole tiles.
struct Activations {
  int digits;     // 2: fixed point of 16 bits per piece, as two bytes; 1: of 8 bits; 0: floats
  int8_t* bytes;  // [tokens, digits, inputs]
  float* floats;  // [tokens, inputs], of digits 0
  float* scale;   // [tokens, groups, pieces] of one step of the fixed point, NaN where an input is not finite
  float* sum;     // [tokens, groups] of the inputs as represented
};

struct MatmulFunctions {
  // y = x Wᵀ + bias for each of `count` matrices that read the same inputs and have the same groups.
  void (*product)(const Weight* weight, const Output* output, int count, const Input&, const Activations&, int threads);
  // Values [count, in_features] of `dtype` of some rows, or of all where `rows` is null; any group size.
  void (*decode)(const Weight&, const int64_t* rows, int64_t count, void* values, Dtype dtype, int threads);
  // Plane [rows, row_bytes], bit k of byte j being input 8 * j + k, to tile order.
  void (*tile)(const uint8_t* plane, int64_t rows, int64_t row_bytes, uint8_t* tiles, int threads);
};

extern const MatmulFunctions matmul_portable, matmul_avx2, matmul_vnni, matmul_gfni;

// Many tokens on tile registers (AMX).
constexpr int kPanel = 512;  // tokens that share one decoding of the weights
struct Batch {
  int parts;         // 0: inputs in fixed point of 16 bits per piece, weights as codes; 1: both rounded to bfloat16;
                     // 2: both as sums of two bfloat16 numbers, error about 1e-5
  uint16_t* packed;  // batch_packed numbers, 64-byte aligned
  float* sums;       // batch_sums numbers, 64-byte aligned
  float* scale;      // [kPanel / 16, groups, pieces, 16] of 0 parts
  float* sum;        // [kPanel / 16, groups, 16] of 0 parts
};
int batch_parts(const Weight& weight, Dtype dtype, int digits);
size_t batch_packed(const Weight& weight, int tokens, int parts);
size_t batch_sums(int threads);
void batch_product(const Weight&, const Output&, const Input&, const Batch&, int threads);

// Scales [rows, groups] to [blocks, groups, 16].
void tile_scale(const uint16_t* scale, int64_t rows, int64_t groups, uint16_t* tiled, int threads);

}  // namespace elastiq
