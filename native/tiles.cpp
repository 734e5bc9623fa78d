#include <cstring>

#include "matmul.hpp"

namespace elastiq {
namespace {

// Bits of even positions to the low half, of odd ones to the high half.
inline uint32_t unshuffle(uint32_t x) {
  uint32_t t = (x ^ (x >> 1)) & 0x22222222u;
  x ^= t ^ (t << 1);
  t = (x ^ (x >> 2)) & 0x0C0C0C0Cu;
  x ^= t ^ (t << 2);
  t = (x ^ (x >> 4)) & 0x00F000F0u;
  x ^= t ^ (t << 4);
  t = (x ^ (x >> 8)) & 0x0000FF00u;
  return x ^ t ^ (t << 8);
}

}  // namespace

void tile_plane(const uint8_t* plane, int64_t rows, int64_t row_bytes, uint8_t* tiles, int threads) {
  const int64_t blocks = (rows + kTileRows - 1) / kTileRows, words = (row_bytes + 3) / 4;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t block = 0; block < blocks; ++block) {
    for (int64_t word = 0; word < words; ++word) {
      uint32_t line[kTileRows] = {};
      const int64_t left = rows - block * kTileRows, n = left < kTileRows ? left : kTileRows;
      const size_t bytes = row_bytes - 4 * word < 4 ? row_bytes - 4 * word : 4;
      for (int64_t row = 0; row < n; ++row)
        std::memcpy(&line[row], plane + (block * kTileRows + row) * row_bytes + 4 * word, bytes);
      // Bit 4 * j + i becomes bit 8 * i + j: the index turns by two places.
      for (auto& x : line) x = unshuffle(unshuffle(x));
      std::memcpy(tiles + (block * words + word) * kTileBytes, line, kTileBytes);
    }
  }
}

}  // namespace elastiq
