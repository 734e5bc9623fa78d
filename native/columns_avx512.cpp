#define ELASTIQ_TARGET avx512
#include "columns.inl"
