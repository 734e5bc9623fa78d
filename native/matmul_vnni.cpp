#define ELASTIQ_TARGET matmul_vnni
#include "matmul.inl"
