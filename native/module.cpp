// Python binding: plain integers are the data pointers of contiguous tensors that the caller has checked.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "columns.hpp"

namespace nb = nanobind;
using namespace elastiq;

namespace {

std::vector<std::string> paths() {
  std::vector<std::string> found;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq"))
    found.push_back("avx512");
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found.push_back("avx2");
#endif
  found.push_back("portable");
  return found;
}

const Functions& functions(const std::string& path) {
#if defined(__x86_64__)
  if (path == "avx512") return avx512;
  if (path == "avx2") return avx2;
#endif
  if (path == "portable") return portable;
  throw std::invalid_argument("unknown path " + path);
}

template <typename T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

Nest nest_of(const std::vector<int>& bits, const std::vector<float>& lambda, int beam, int keep) {
  if (keep < 0 || bits.empty() || bits.size() > kMaxLevels || lambda.size() != bits.size() || beam < 1 || beam > kMaxBeam)
    throw std::invalid_argument("between 1 and 8 levels, one lambda each, and a beam of 1 to 16 are needed");
  Nest nest;
  nest.num_levels = int(bits.size());
  nest.beam = beam;
  int previous = nest.keep = keep;
  for (size_t i = 0; i < bits.size(); ++i) {
    if (bits[i] <= previous || bits[i] > 8) throw std::invalid_argument("levels must ascend from keep + 1 to 8");
    previous = nest.bits[i] = bits[i];
    nest.lambda[i] = lambda[i];
  }
  return nest;
}

}  // namespace

NB_MODULE(_native, m) {
  m.def("paths", &paths, "Instruction sets this processor runs, the best first.");
  m.def("greedy", [](const std::string& path, const std::vector<int>& bits, const std::vector<float>& lambda, int beam,
                     int keep, int columns, int groups, int rows, uintptr_t group_of, uintptr_t scale, uintptr_t zero, int threads,
                     uintptr_t upper, uintptr_t weight, uintptr_t codes, uintptr_t error) {
    const Columns c{columns, groups, rows, pointer<const int32_t>(group_of), pointer<const float>(scale),
                    pointer<const float>(zero), threads};
    const Nest nest = nest_of(bits, lambda, beam, keep);
    const Functions& f = functions(path);
    nb::gil_scoped_release release;
    f.greedy(nest, c, pointer<const float>(upper), pointer<float>(weight), pointer<uint8_t>(codes), pointer<float>(error));
  });
  m.def("descend", [](const std::string& path, const std::vector<int>& bits, const std::vector<float>& lambda, int beam,
                      int keep, int columns, int groups, int rows, uintptr_t group_of, uintptr_t scale, uintptr_t zero, int threads,
                      uintptr_t hessian, uintptr_t gradient, uintptr_t codes) {
    const Columns c{columns, groups, rows, pointer<const int32_t>(group_of), pointer<const float>(scale),
                    pointer<const float>(zero), threads};
    const Nest nest = nest_of(bits, lambda, beam, keep);
    const Functions& f = functions(path);
    nb::gil_scoped_release release;
    f.descend(nest, c, pointer<const float>(hessian), pointer<float>(gradient), pointer<uint8_t>(codes));
  });
  m.def("fit", [](const std::string& path, const std::vector<int>& bits, int columns, int rows, uintptr_t importance,
                  uintptr_t weight, uintptr_t shrink, int num_shrink, bool symmetric, uintptr_t scale, uintptr_t zero,
                  int threads) {
    const Nest nest = nest_of(bits, std::vector<float>(bits.size(), 1.0f), 1, 0);
    const Functions& f = functions(path);
    nb::gil_scoped_release release;
    f.fit(nest, columns, rows, pointer<const float>(importance), pointer<const float>(weight), pointer<const float>(shrink),
          num_shrink, symmetric, pointer<float>(scale), pointer<float>(zero), threads);
  });
}
