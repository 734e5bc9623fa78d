#include "matmul.hpp"

namespace elastiq {

void tile_scale(const uint16_t* scale, int64_t rows, int64_t groups, uint16_t* tiled, int threads) {
  const int64_t blocks = (rows + kTileRows - 1) / kTileRows;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t block = 0; block < blocks; ++block)
    for (int64_t group = 0; group < groups; ++group)
      for (int64_t i = 0; i < kTileRows; ++i) {
        const int64_t row = block * kTileRows + i;
        tiled[(block * groups + group) * kTileRows + i] = row < rows ? scale[row * groups + group] : 0;
      }
}

}  // namespace elastiq
