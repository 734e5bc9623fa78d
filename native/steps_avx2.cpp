#define ELASTIQ_TARGET steps_avx2
#include "steps.inl"
