#define ELASTIQ_TARGET matmul_avx2
#include "matmul.inl"
