#define ELASTIQ_TARGET steps_portable
#include "steps.inl"
