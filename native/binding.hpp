// What the files that bind to Python share.
#pragma once
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include <string>

#include "matmul.hpp"
#include "steps.hpp"

namespace elastiq {

namespace nb = nanobind;

template <typename T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// (planes, scale, zero or 0, level of the scale, out_features, in_features, group_size), as Python describes a matrix.
Weight weight_of(nb::handle description);

const MatmulFunctions& matmul_functions(const std::string& path);
const StepFunctions& step_functions(const std::string& path);

// (factors or 0 for none, rest, size), as Python describes a rotation.
Rotation rotation_of(nb::handle description);

void bind_decoder(nb::module_&);

}  // namespace elastiq
