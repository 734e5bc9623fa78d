#include "decoder.hpp"

#include <algorithm>
#include <cstring>
#include <initializer_list>
#include <stdexcept>

namespace elastiq {
namespace {

constexpr int64_t kSerialWork = 1 << 15;  // multiplications below which a second thread costs more than it saves

void add(float* x, const float* y, int n) {
  for (int i = 0; i < n; ++i) x[i] += y[i];
}

void append(const float* x, const Heads& heads, const Past& past, float* into) {
  for (int h = 0; h < heads.kv_heads; ++h)
    std::memcpy(into + (h * past.capacity + past.length) * heads.size, x + h * heads.size, heads.size * sizeof(float));
}

void check(std::initializer_list<const Matrix*> matrices, int rows, int inputs) {
  for (const Matrix* matrix : matrices) {
    const Weight& w = matrix->weight;
    if (w.out_features != rows || w.in_features != inputs || (w.groups > 1 && w.group_size % kTileInputs))
      throw std::invalid_argument("a matrix has another shape than the decoder, or groups that are not whole tiles");
  }
}

bool same_groups(std::initializer_list<const Matrix*> matrices) {
  for (const Matrix* matrix : matrices)
    if (matrix->weight.group_size != (*matrices.begin())->weight.group_size) return false;
  return true;
}

}  // namespace

Decoder::Decoder(const Heads& heads, int hidden, int mlp, float eps, const float* norm, std::vector<Block> blocks)
    : heads_(heads), hidden_(hidden), mlp_(mlp), eps_(eps), norm_(norm), blocks_(std::move(blocks)) {
  if (heads.size < 16 || heads.size > kMaxHead || heads.size % 16 || heads.kv_heads < 1 || heads.heads < 1 ||
      heads.heads % heads.kv_heads || heads.rotary % 2 || heads.rotary < 0 || heads.rotary > heads.size)
    throw std::invalid_argument("heads must be multiples of 16 channels, query heads a multiple of the others");
  const int wide = heads.heads * heads.size, narrow = heads.kv_heads * heads.size;
  for (auto* buffer : {&x_, &normed_}) buffer->resize(hidden);
  for (auto* buffer : {&query_, &mixed_}) buffer->resize(std::max(wide, hidden));
  for (auto* buffer : {&key_, &value_}) buffer->resize(narrow);
  for (auto* buffer : {&gate_, &up_}) buffer->resize(mlp);
  turned_.resize(std::max({wide, hidden, mlp}));
  size_t inputs = 0, scales = 0, sums = 0;
  for (const Block& block : blocks_) {
    check({&block.query}, wide, hidden);
    check({&block.key, &block.value}, narrow, hidden);
    check({&block.out}, hidden, wide);
    check({&block.gate, &block.up}, mlp, hidden);
    check({&block.down}, hidden, mlp);
    for (const Rotation* map : {&block.before_attention, &block.before_mlp}) map->check(hidden);
    block.before_out.check(wide);
    block.before_down.check(mlp);
    if (!same_groups({&block.query, &block.key, &block.value}) || !same_groups({&block.gate, &block.up}))
      throw std::invalid_argument("matrices that share their inputs need the same groups");
    for (const Matrix* matrix : {&block.query, &block.out, &block.gate, &block.down}) {
      const Weight& weight = matrix->weight;
      inputs = std::max(inputs, size_t(weight.tiles) * kTileInputs);
      sums = std::max(sums, size_t(weight.groups));
      scales = std::max(scales, size_t(weight.groups) * weight.pieces());
    }
  }
  bytes_.resize(2 * inputs);
  floats_.resize(inputs);
  scale_.resize(scales);
  sum_.resize(sums);
}

void Decoder::products(const StepFunctions& steps, const MatmulFunctions& matmul, int digits, const Rotation& before,
                       const Matrix* const* matrices, float* const* outputs, int count, const float* input, int threads) {
  if (before.factors) {
    steps.mix(input, before, matrices[0]->weight.in_features, turned_.data());
    input = turned_.data();
  }
  Weight weights[3];
  Output results[3];
  for (int i = 0; i < count; ++i) {
    weights[i] = matrices[i]->weight;
    results[i] = {outputs[i], matrices[i]->bias};
  }
  matmul.product(weights, results, count, {input, kFloat32, 1},
                 {digits, bytes_.data(), floats_.data(), scale_.data(), sum_.data()}, threads);
}

void Decoder::attention(const StepFunctions& steps, const Block& block, Past past, const float* cosine,
                        const float* sine, int threads) {
  if (block.query_norm) steps.norm(query_.data(), block.query_norm, eps_, heads_.heads, heads_.size, query_.data());
  if (block.key_norm) steps.norm(key_.data(), block.key_norm, eps_, heads_.kv_heads, heads_.size, key_.data());
  steps.rotate(query_.data(), heads_.heads, heads_, cosine, sine);
  steps.rotate(key_.data(), heads_.kv_heads, heads_, cosine, sine);
  append(key_.data(), heads_, past, past.keys);
  append(value_.data(), heads_, past, past.values);
  ++past.length;
  if (past.length * heads_.heads * heads_.size < kSerialWork) threads = 1;
  scores_.resize(std::max(scores_.size(), size_t(threads * past.length)));
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int part = 0; part < threads; ++part)
    steps.attend(query_.data(), heads_, past, heads_.heads * part / threads, heads_.heads * (part + 1) / threads,
                 scores_.data() + part * past.length, mixed_.data());
}

void Decoder::step(const StepFunctions& steps, const MatmulFunctions& matmul, int digits, const Past* past,
                   const float* cosine, const float* sine, const float* x, float* out, int threads) {
  const std::lock_guard<std::mutex> lock(busy_);
  std::memcpy(x_.data(), x, hidden_ * sizeof(float));
  for (const Block& block : blocks_) {
    const Matrix* attention_in[] = {&block.query, &block.key, &block.value};
    float* attention_outputs[] = {query_.data(), key_.data(), value_.data()};
    const Matrix *attention_out = &block.out, *mlp_in[] = {&block.gate, &block.up}, *mlp_out = &block.down;
    float *mlp_outputs[] = {gate_.data(), up_.data()}, *change = query_.data();

    steps.norm(x_.data(), block.attention_norm, eps_, 1, hidden_, normed_.data());
    products(steps, matmul, digits, block.before_attention, attention_in, attention_outputs, 3, normed_.data(), threads);
    attention(steps, block, *past++, cosine, sine, threads);
    products(steps, matmul, digits, block.before_out, &attention_out, &change, 1, mixed_.data(), threads);
    add(x_.data(), change, hidden_);
    steps.norm(x_.data(), block.mlp_norm, eps_, 1, hidden_, normed_.data());
    products(steps, matmul, digits, block.before_mlp, mlp_in, mlp_outputs, 2, normed_.data(), threads);
    steps.gate(gate_.data(), up_.data(), mlp_, gate_.data());
    products(steps, matmul, digits, block.before_down, &mlp_out, &change, 1, gate_.data(), threads);
    add(x_.data(), change, hidden_);
  }
  steps.norm(x_.data(), norm_, eps_, 1, hidden_, out);
}

}  // namespace elastiq
