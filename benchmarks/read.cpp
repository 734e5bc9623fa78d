// A plain read of several arrays by several threads: what a product that reads the same bytes is measured against.
// Built by kernels.py: c++ -O3 -march=native -fopenmp -shared -fPIC.
#include <cstdint>
#include <omp.h>

typedef uint64_t line __attribute__((vector_size(64), aligned(1)));

extern "C" uint64_t read_streams(const char* const* stream, const int64_t* bytes, int count, int threads) {
  uint64_t total = 0;
#pragma omp parallel num_threads(threads) reduction(^ : total)
  {
    const int thread = omp_get_thread_num(), team = omp_get_num_threads();
    line seen{};
    // All streams advance together, as the planes of a matrix do.
    const int64_t chunk = 512;
    int64_t longest = 0;
    for (int s = 0; s < count; ++s) longest = bytes[s] > longest ? bytes[s] : longest;
    const int64_t steps = (longest + chunk - 1) / chunk;
    for (int64_t i = steps * thread / team; i < steps * (thread + 1) / team; ++i) {
      for (int s = 0; s < count; ++s) {
        // A shorter stream advances by its own share.
        const int64_t begin = bytes[s] * i / steps / 64 * 64, end = bytes[s] * (i + 1) / steps / 64 * 64;
        for (int64_t at = begin; at < end; at += 64) {
          __builtin_prefetch(stream[s] + at + 2048);
          seen ^= *reinterpret_cast<const line*>(stream[s] + at);
        }
      }
    }
    for (int k = 0; k < 8; ++k) total ^= seen[k];
  }
  return total;
}
