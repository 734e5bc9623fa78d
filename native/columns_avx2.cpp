#define ELASTIQ_TARGET avx2
#include "columns.inl"
