// Python binding: plain integers are the data pointers of contiguous tensors that the caller has checked.
#include <nanobind/stl/vector.h>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <cmath>
#include <stdexcept>
#include <string>
#include <vector>

#include "binding.hpp"
#include "columns.hpp"

using namespace elastiq;

namespace elastiq {

const MatmulFunctions& matmul_functions(const std::string& path) {
#if defined(__x86_64__)
  if (path == "amx" || path == "avx512_gfni") return matmul_gfni;
  if (path == "avx512_vnni") return matmul_vnni;
  if (path == "avx512" || path == "avx2") return matmul_avx2;
#endif
  if (path == "portable") return matmul_portable;
  throw std::invalid_argument("unknown path " + path);
}

const StepFunctions& step_functions(const std::string& path) {
#if defined(__x86_64__)
  if (path.rfind("avx512", 0) == 0 || path == "amx") return steps_avx512;
  if (path == "avx2") return steps_avx2;
#endif
  if (path == "portable") return steps_portable;
  throw std::invalid_argument("unknown path " + path);
}

Weight weight_of(nb::handle description) {
  const nb::tuple fields = nb::cast<nb::tuple>(description);
  const nb::tuple planes = nb::cast<nb::tuple>(fields[0]);
  Weight w{};
  w.bits = int(planes.size());
  if (w.bits < 1 || w.bits > kMaxBits) throw std::invalid_argument("between 1 and 8 planes are needed");
  for (int p = 0; p < w.bits; ++p) {
    const uintptr_t address = nb::cast<uintptr_t>(planes[p]);
    if (address % kTileBytes) throw std::invalid_argument("planes must begin at a multiple of 64 bytes");
    w.plane[p] = pointer<const uint8_t>(address);
  }
  w.scale = pointer<const uint16_t>(nb::cast<uintptr_t>(fields[1]));
  w.zero = pointer<const uint16_t>(nb::cast<uintptr_t>(fields[2]));
  const int level = nb::cast<int>(fields[3]);
  w.out_features = nb::cast<int>(fields[4]);
  w.in_features = nb::cast<int>(fields[5]);
  w.group_size = nb::cast<int>(fields[6]);
  if (level < 1 || level > kMaxBits || w.out_features < 1 || w.in_features < 1 || w.group_size < 1)
    throw std::invalid_argument("a level from 1 to 8, features and a group size are needed");
  w.factor = std::ldexp(1.0f, level - w.bits);
  w.zero_factor = std::ldexp(1.0f, w.bits - level);
  w.zero_shift = 0.5f * w.zero_factor - 0.5f;
  w.middle = float((1 << level) - 1) * 0.5f * w.zero_factor + w.zero_shift;
  w.blocks = (w.out_features + kTileRows - 1) / kTileRows;
  w.tiles = (w.in_features + kTileInputs - 1) / kTileInputs;
  w.groups = (w.in_features - 1) / w.group_size + 1;
  return w;
}

Rotation rotation_of(nb::handle description) {
  const nb::tuple fields = nb::cast<nb::tuple>(description);
  return {pointer<const float>(nb::cast<uintptr_t>(fields[0])), pointer<const float>(nb::cast<uintptr_t>(fields[1])),
          nb::cast<int>(fields[2])};
}

}  // namespace elastiq

namespace {

#if defined(__x86_64__) && defined(__linux__)
// Whether the processor has tile registers for bfloat16 and bytes, and the kernel lets this process use them.
bool has_amx() {
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d >> 22 & 1) || !(d >> 24 & 1) || !(d >> 25 & 1)) return false;
  if (!__get_cpuid_count(7, 1, &a, &b, &c, &d) || !(a >> 5 & 1)) return false;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#elif defined(__x86_64__)
bool has_amx() { return false; }
#endif

// Each path includes those after it; `amx` and the two with VNNI concern products only.
std::vector<std::string> paths() {
  std::vector<std::string> found;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  const bool vnni = avx512 && __builtin_cpu_supports("avx512vnni");
  const bool gfni = vnni && __builtin_cpu_supports("gfni");
  if (gfni && has_amx()) found.push_back("amx");
  if (gfni) found.push_back("avx512_gfni");
  if (vnni) found.push_back("avx512_vnni");
  if (avx512) found.push_back("avx512");
  if (avx2) found.push_back("avx2");
#endif
  found.push_back("portable");
  return found;
}

const Functions& functions(const std::string& path) {
#if defined(__x86_64__)
  if (path == "amx" || path.rfind("avx512", 0) == 0) return avx512;
  if (path == "avx2") return avx2;
#endif
  if (path == "portable") return portable;
  throw std::invalid_argument("unknown path " + path);
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

// Memory for activations, kept by each thread that calls; at least `size` numbers from a multiple of 64 bytes on.
template <typename T>
T* scratch(std::vector<T>& memory, size_t size) {
  if (memory.size() < size + 64) memory.resize(size + 64);
  const uintptr_t address = reinterpret_cast<uintptr_t>(memory.data());
  return pointer<T>((address + 63) / 64 * 64);
}

void product(const Weight& w, const std::string& path, uintptr_t x, int dtype, int64_t tokens, uintptr_t y, uintptr_t bias,
             int digits, int threads) {
  if (w.groups > 1 && w.group_size % kTileInputs) throw std::invalid_argument("groups must be multiples of 32 inputs");
  if (tokens < 0 || tokens > INT32_MAX || digits < 0 || digits > 2 || dtype < kFloat32 || dtype > kFloat16 || threads < 1)
    throw std::invalid_argument("a product needs tokens, a mode, a type and threads");
  if (tokens == 0) return;
  const Input input{pointer<const void>(x), Dtype(dtype), int(tokens)};
  const Output output{pointer<void>(y), pointer<const void>(bias)};
#if defined(__x86_64__)
  const int parts = batch_parts(w, Dtype(dtype), digits);
  // More tokens than these are worth a decoding of the weights for tile registers.
  if (path == "amx" && digits && tokens > (parts == 2 ? 16 : 8)) {
    thread_local std::vector<uint16_t> packed;
    thread_local std::vector<float> sums, scale, sum;
    const size_t columns = parts == 0 ? size_t(w.groups) * kPanel : 0;
    const Batch batch{parts, scratch(packed, batch_packed(w, int(tokens), parts)), scratch(sums, batch_sums(threads)),
                      scratch(scale, columns * w.pieces()), scratch(sum, columns)};
    nb::gil_scoped_release release;
    batch_product(w, output, input, batch, threads);
    return;
  }
#endif
  thread_local std::vector<int8_t> bytes;
  thread_local std::vector<float> floats, scale, sum;
  const size_t inputs = size_t(w.tiles) * kTileInputs;
  const Activations activations{digits, scratch(bytes, digits * tokens * inputs), scratch(floats, digits ? 0 : tokens * inputs),
                                scratch(scale, size_t(tokens) * w.groups * w.pieces()), scratch(sum, size_t(tokens) * w.groups)};
  const MatmulFunctions& f = matmul_functions(path);
  nb::gil_scoped_release release;
  f.product(&w, &output, 1, input, activations, threads);
}

void decode(const std::string& path, const Weight& w, uintptr_t rows, int64_t count, uintptr_t values, int dtype, int threads) {
  const int64_t* index = pointer<const int64_t>(rows);
  if (dtype < kFloat32 || dtype > kFloat16 || threads < 1) throw std::invalid_argument("a type and threads are needed");
  for (int64_t i = 0; index && i < count; ++i)
    if (index[i] < 0 || index[i] >= w.out_features) throw std::out_of_range("row " + std::to_string(index[i]) + " is not in the matrix");
  const MatmulFunctions& f = matmul_functions(path);
  nb::gil_scoped_release release;
  f.decode(w, index, count, pointer<void>(values), Dtype(dtype), threads);
}

constexpr int64_t kSerialRotation = 1 << 16;  // numbers up to which a second thread costs more than it saves

void mix(const std::string& path, nb::handle description, uintptr_t x, int64_t rows, int n, uintptr_t out, int threads) {
  const Rotation rotation = rotation_of(description);
  if (!rotation.factors || rows < 0 || threads < 1) throw std::invalid_argument("a rotation, rows and threads are needed");
  rotation.check(n);
  const StepFunctions& f = step_functions(path);
  nb::gil_scoped_release release;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && rows * n > kSerialRotation)
  for (int64_t row = 0; row < rows; ++row)
    f.mix(pointer<const float>(x) + row * n, rotation, n, pointer<float>(out) + row * n);
}

}  // namespace

NB_MODULE(_native, m) {
  nb::class_<Weight>(m, "Matrix")
      .def("__init__", [](Weight* self, nb::handle description) { new (self) Weight(weight_of(description)); })
      .def("product", &product);
  bind_decoder(m);
  m.def("decode", &decode);
  m.def("mix", &mix);
  m.def("tile", [](const std::string& path, uintptr_t plane, int64_t rows, int64_t row_bytes, uintptr_t tiles, int threads) {
    if (rows < 0 || row_bytes < 0 || threads < 1) throw std::invalid_argument("rows, bytes and threads are needed");
    const MatmulFunctions& f = matmul_functions(path);
    nb::gil_scoped_release release;
    f.tile(pointer<const uint8_t>(plane), rows, row_bytes, pointer<uint8_t>(tiles), threads);
  });
  m.def("tile_scale", [](uintptr_t scale, int64_t rows, int64_t groups, uintptr_t tiled, int threads) {
    if (rows < 0 || groups < 0 || threads < 1) throw std::invalid_argument("rows, groups and threads are needed");
    nb::gil_scoped_release release;
    tile_scale(pointer<const uint16_t>(scale), rows, groups, pointer<uint16_t>(tiled), threads);
  });
  m.def("paths", &paths, "Instruction sets this processor runs, the best first.");
  m.def("greedy", [](const std::string& path, const std::vector<int>& bits, const std::vector<float>& lambda, int beam,
                     int keep, int columns, int groups, int rows, uintptr_t group_of, uintptr_t scale, uintptr_t zero, int threads,
                     uintptr_t upper, uintptr_t weight, uintptr_t codes, uintptr_t error) {
    const Columns c{columns, groups, rows, pointer<const int32_t>(group_of), pointer<const float>(scale),
                    pointer<const float>(zero), threads};
    const Nest nest = nest_of(bits, lambda, beam, keep);
    const Functions& f = functions(path);
    nb::gil_scoped_release release;
    f.greedy(nest, c, pointer<const float>(upper), pointer<const float>(weight), pointer<uint8_t>(codes), pointer<float>(error));
  });
  m.def("descend", [](const std::string& path, const std::vector<int>& bits, const std::vector<float>& lambda, int beam,
                      int keep, int columns, int groups, int rows, uintptr_t group_of, uintptr_t scale, uintptr_t zero, int threads,
                      uintptr_t hessian, uintptr_t gradient, uintptr_t codes, uintptr_t step) {
    const Columns c{columns, groups, rows, pointer<const int32_t>(group_of), pointer<const float>(scale),
                    pointer<const float>(zero), threads};
    const Nest nest = nest_of(bits, lambda, beam, keep);
    const Functions& f = functions(path);
    nb::gil_scoped_release release;
    f.descend(nest, c, pointer<const float>(hessian), pointer<const float>(gradient), pointer<uint8_t>(codes), pointer<float>(step));
  });
  m.def("refit", [](const std::string& path, const std::vector<int>& bits, int columns, int rows, bool symmetric, int threads,
                    uintptr_t metric, uintptr_t ones, uintptr_t codes, uintptr_t weight, uintptr_t gradient, uintptr_t scale, uintptr_t zero,
                    uintptr_t step) {
    if (!weight == !(gradient && step)) throw std::invalid_argument("either weights or a gradient with its step are needed");
    const Nest nest = nest_of(bits, std::vector<float>(bits.size(), 1.0f), 1, 0);
    const Functions& f = functions(path);
    nb::gil_scoped_release release;
    f.refit(nest, {columns, rows, symmetric, threads}, pointer<const float>(metric), pointer<const float>(ones), pointer<const uint8_t>(codes),
            pointer<const float>(weight), pointer<float>(gradient), pointer<float>(scale), pointer<float>(zero),
            pointer<float>(step));
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
