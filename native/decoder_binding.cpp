// Python binding of the decoder: plain integers are the data pointers of contiguous tensors that the caller keeps.
#include <nanobind/stl/vector.h>

#include "binding.hpp"
#include "decoder.hpp"

namespace elastiq {
namespace {

Matrix matrix_of(nb::handle description) {
  const nb::tuple fields = nb::cast<nb::tuple>(description);
  return {nb::cast<const Weight&>(fields[0]), pointer<const float>(nb::cast<uintptr_t>(fields[1]))};
}

// ((norm, norm, query norm, key norm), (query, key, value, out, gate, up, down), rotations before query, out, gate and
// down), a matrix being (handle, bias) and a rotation (factors or 0, rest, size).
Block block_of(nb::handle description) {
  const nb::tuple fields = nb::cast<nb::tuple>(description), gains = nb::cast<nb::tuple>(fields[0]),
                  matrices = nb::cast<nb::tuple>(fields[1]), rotations = nb::cast<nb::tuple>(fields[2]);
  const float* gain[4];
  for (int i = 0; i < 4; ++i) gain[i] = pointer<const float>(nb::cast<uintptr_t>(gains[i]));
  return {gain[0], gain[1], gain[2], gain[3], matrix_of(matrices[0]), matrix_of(matrices[1]), matrix_of(matrices[2]),
          matrix_of(matrices[3]), matrix_of(matrices[4]), matrix_of(matrices[5]), matrix_of(matrices[6]),
          rotation_of(rotations[0]), rotation_of(rotations[1]), rotation_of(rotations[2]), rotation_of(rotations[3])};
}

void create(Decoder* self, const std::vector<int>& heads, float scale, int hidden, int mlp, float eps, uintptr_t norm,
            const nb::list& descriptions) {
  if (heads.size() != 4) throw std::invalid_argument("heads are query heads, key heads, channels and turning channels");
  std::vector<Block> blocks;
  for (nb::handle description : descriptions) blocks.push_back(block_of(description));
  new (self) Decoder({heads[0], heads[1], heads[2], heads[3], scale}, hidden, mlp, eps, pointer<const float>(norm),
                     std::move(blocks));
}

void step(Decoder& self, const std::string& path, int digits, const std::vector<uintptr_t>& buffers,
          const std::vector<int64_t>& capacities, int64_t length, uintptr_t cosine, uintptr_t sine, uintptr_t x,
          uintptr_t out, int threads) {
  if (capacities.size() != self.num_blocks() || buffers.size() != 2 * capacities.size())
    throw std::invalid_argument("a cache needs keys and values of every block");
  std::vector<Past> past;
  for (size_t i = 0; i < capacities.size(); ++i) {
    if (length < 0 || length >= capacities[i]) throw std::invalid_argument("the cache has no room for a token");
    past.push_back({pointer<float>(buffers[2 * i]), pointer<float>(buffers[2 * i + 1]), capacities[i], length});
  }
  if (digits < 0 || digits > 2 || threads < 1) throw std::invalid_argument("a step needs a mode and threads");
  const StepFunctions& steps = step_functions(path);
  const MatmulFunctions& matmul = matmul_functions(path);
  nb::gil_scoped_release release;
  self.step(steps, matmul, digits, past.data(), pointer<const float>(cosine), pointer<const float>(sine),
            pointer<const float>(x), pointer<float>(out), threads);
}

}  // namespace

void bind_decoder(nb::module_& m) {
  nb::class_<Decoder>(m, "Decoder").def("__init__", &create).def("step", &step);
}

}  // namespace elastiq
