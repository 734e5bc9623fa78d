#define ELASTIQ_TARGET matmul_portable
#include "matmul.inl"
