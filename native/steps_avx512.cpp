#define ELASTIQ_TARGET steps_avx512
#include "steps.inl"
