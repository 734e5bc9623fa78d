#define ELASTIQ_TARGET matmul_gfni
#include "matmul.inl"
