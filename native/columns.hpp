// The inner loops of the solvers: a group's columns for blocks of 16 rows.
//
// Arrays keep the rows last, so that one vector holds one column of 16 rows; `rows` is a multiple of 16.
// Rows never meet, so the result does not depend on the number of threads.
#pragma once
#include <cstdint>

namespace elastiq {

constexpr int kMaxLevels = 8;
constexpr int kMaxBeam = 16;

struct Nest {
  int num_levels;
  int bits[kMaxLevels];      // ascending widths; a code has bits[num_levels - 1] bits
  float lambda[kMaxLevels];  // weight of each level in the choice of a code
  int beam;                  // candidates kept from one level to the next
  int keep;                  // top bits of a code that must stay as they are
};

struct Columns {
  int columns;              // columns in this call
  int groups;               // groups that scale and zero cover
  int rows;
  const int32_t* group_of;  // [columns] group of each column
  const float* scale;       // [groups, levels, rows]
  const float* zero;        // [groups, levels, rows]
  int threads;
};

// The columns of one group.
struct Group {
  int columns;
  int rows;
  bool symmetric;  // zero points stay in the middle
  int threads;
};

// Each function fills what its Python twin in columns.py describes.
struct Functions {
  // weight [columns, levels, rows]; upper [columns, columns]; written: codes [columns, rows],
  // error [columns, levels, rows].
  void (*greedy)(const Nest&, const Columns&, const float* upper, const float* weight, uint8_t* codes, float* error);
  // gradient [columns, levels, rows]; hessian [columns, columns]; codes [columns, rows] are updated in place;
  // step [columns, levels, rows] is written: how far the values have moved.
  void (*descend)(const Nest&, const Columns&, const float* hessian, const float* gradient, uint8_t* codes, float* step);
  // metric [columns, columns], ones [columns] the sums of its columns; codes [columns, rows]; scale and zero [levels, rows] are updated in place. Either weight
  // [columns, levels, rows] is given, or its place is null and gradient is, which is updated, and step is written.
  void (*refit)(const Nest&, const Group&, const float* metric, const float* ones, const uint8_t* codes,
                const float* weight, float* gradient, float* scale, float* zero, float* step);
  // weight [columns, levels, rows], importance [columns], shrink [num_shrink];
  // scale and zero [levels, rows] are written.
  void (*fit)(const Nest&, int columns, int rows, const float* importance, const float* weight, const float* shrink,
              int num_shrink, bool symmetric, float* scale, float* zero, int threads);
};

extern const Functions portable, avx2, avx512;

}  // namespace elastiq
