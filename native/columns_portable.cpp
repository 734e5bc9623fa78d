#define ELASTIQ_TARGET portable
#include "columns.inl"
