// Microseconds of ggml's products of one token with a [rows, inputs] matrix, per type, in its fastest buffer.
// c++ ggml_matmul.cpp -lggml -lggml-base -lggml-cpu; arguments: rows inputs threads. Prints one JSON object.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <vector>

#include "ggml-alloc.h"
#include "ggml-backend.h"
#include "ggml-cpu.h"
#include "ggml.h"

int main(int argc, char** argv) {
  if (argc != 4) return 1;
  ggml_log_set([](ggml_log_level, const char*, void*) {}, nullptr);
  const int64_t rows = std::atol(argv[1]), inputs = std::atol(argv[2]);
  const int threads = std::atoi(argv[3]);
  ggml_backend_t backend = ggml_backend_cpu_init();
  ggml_backend_cpu_set_n_threads(backend, threads);
  ggml_backend_dev_t device = ggml_backend_get_device(backend);
  std::vector<ggml_backend_buffer_type_t> buffers{ggml_backend_cpu_buffer_type()};
  auto extra = (ggml_backend_dev_get_extra_bufts_t)ggml_backend_reg_get_proc_address(ggml_backend_dev_backend_reg(device),
                                                                                     "ggml_backend_dev_get_extra_bufts");
  if (extra)
    for (ggml_backend_buffer_type_t* type = extra(device); type && *type; ++type) buffers.push_back(*type);
  std::mt19937 generator(0);
  std::normal_distribution<float> normal;
  std::vector<float> weight(rows * inputs), x(inputs);
  for (auto& w : weight) w = normal(generator);
  for (auto& v : x) v = normal(generator);
  double expected = 0, norm = 0;
  for (int64_t i = 0; i < inputs; ++i) expected += double(weight[i]) * x[i];
  for (int64_t i = 0; i < inputs; ++i) norm += double(x[i]) * x[i];

  const ggml_type types[] = {GGML_TYPE_Q2_K, GGML_TYPE_Q3_K, GGML_TYPE_Q4_0, GGML_TYPE_Q4_K, GGML_TYPE_Q6_K, GGML_TYPE_Q8_0};
  const char* separator = "{";
  for (ggml_type type : types) {
    std::vector<char> data(ggml_row_size(type, inputs) * rows);
    ggml_quantize_chunk(type, weight.data(), data.data(), 0, rows, inputs, nullptr);
    double best = INFINITY;
    for (auto buffer_type : buffers) {
      const int copies = std::max<int64_t>(2, 1100000000 / int64_t(data.size()));
      std::vector<ggml_cgraph*> graphs;
      std::vector<ggml_context*> contexts;
      std::vector<ggml_backend_buffer_t> held;
      ggml_init_params params{ggml_tensor_overhead() * 8 + ggml_graph_overhead() * 2, nullptr, true};
      ggml_context* shared = ggml_init(params);
      ggml_tensor* activation = ggml_new_tensor_2d(shared, GGML_TYPE_F32, inputs, 1);
      held.push_back(ggml_backend_alloc_ctx_tensors_from_buft(shared, ggml_backend_cpu_buffer_type()));
      ggml_backend_tensor_set(activation, x.data(), 0, x.size() * sizeof(float));
      std::vector<ggml_tensor*> results;
      bool supported = true;
      for (int c = 0; c < copies && supported; ++c) {
        ggml_context* of_weight = ggml_init(params);
        ggml_context* of_result = ggml_init(params);
        ggml_tensor* matrix = ggml_new_tensor_2d(of_weight, type, inputs, rows);
        ggml_backend_buffer_t buffer = ggml_backend_alloc_ctx_tensors_from_buft(of_weight, buffer_type);
        ggml_tensor* result = ggml_mul_mat(of_result, matrix, activation);
        contexts.push_back(of_weight);
        contexts.push_back(of_result);
        if (!buffer) supported = false;
        if (!supported) break;
        held.push_back(buffer);
        if (!ggml_backend_dev_supports_op(device, result)) supported = false;
        if (!supported) break;
        ggml_backend_tensor_set(matrix, data.data(), 0, data.size());
        held.push_back(ggml_backend_alloc_ctx_tensors_from_buft(of_result, ggml_backend_cpu_buffer_type()));
        ggml_cgraph* graph = ggml_new_graph(of_result);
        ggml_build_forward_expand(graph, result);
        graphs.push_back(graph);
        results.push_back(result);
      }
      if (supported) {
        std::vector<double> times;
        const auto begin = std::chrono::steady_clock::now();
        for (int turn = 0; turn < 20 || std::chrono::steady_clock::now() - begin < std::chrono::milliseconds(700); ++turn) {
          const auto start = std::chrono::steady_clock::now();
          ggml_backend_graph_compute(backend, graphs[turn % graphs.size()]);
          times.push_back(std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now() - start).count());
        }
        float first;
        ggml_backend_tensor_get(results[0], &first, 0, sizeof first);
        const double tolerance = type == GGML_TYPE_Q2_K ? 1.2 : type == GGML_TYPE_Q3_K ? 0.7 : 0.4;  // of a row's deviation
        if (std::fabs(first - expected) < tolerance * std::sqrt(norm)) {
          std::nth_element(times.begin(), times.begin() + times.size() / 2, times.end());
          best = std::min(best, times[times.size() / 2]);
        } else {
          std::fprintf(stderr, "%s in %s: wrong result %g, not %g\n", ggml_type_name(type), ggml_backend_buft_name(buffer_type), first, expected);
        }
      }
      for (auto buffer : held) ggml_backend_buffer_free(buffer);
      for (auto context : contexts) ggml_free(context);
      ggml_free(shared);
    }
    if (std::isfinite(best)) {
      std::printf("%s\"ggml %s\": %.1f", separator, ggml_type_name(type), best);
      separator = ", ";
    }
  }
  std::puts("}");
}
