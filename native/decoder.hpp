// A whole decoder for one token: norms, attention over a cache, gated mlp, from the bit planes of its matrices.
#pragma once
#include <mutex>
#include <vector>

#include "matmul.hpp"
#include "steps.hpp"

namespace elastiq {

struct Matrix {
  Weight weight;
  const float* bias;  // [out_features] or null
};

struct Block {
  const float *attention_norm, *mlp_norm;  // gains [hidden]
  const float *query_norm, *key_norm;      // gains [size] of each head, or null
  Matrix query, key, value, out, gate, up, down;
  Rotation before_attention, before_out, before_mlp, before_down;  // of what these matrices are given
};

// x + attention(norm(x)), then x + mlp(norm(x)), for each block; a norm at the end.
class Decoder {
 public:
  // Throws std::invalid_argument unless all matrices have the shapes that follow from heads, hidden and mlp.
  Decoder(const Heads& heads, int hidden, int mlp, float eps, const float* norm, std::vector<Block> blocks);

  // x [hidden] -> out [hidden]; the token's keys and values go behind each layer's filled positions, where there must
  // be room for them; cosine and sine [rotary] are those of its position. digits: as in Activations.
  void step(const StepFunctions&, const MatmulFunctions&, int digits, const Past* past, const float* cosine,
            const float* sine, const float* x, float* out, int threads);

  size_t num_blocks() const { return blocks_.size(); }

 private:
  void attention(const StepFunctions&, const Block&, Past, const float* cosine, const float* sine, int threads);
  void products(const StepFunctions&, const MatmulFunctions&, int digits, const Rotation&, const Matrix* const* matrices,
                float* const* outputs, int count, const float* input, int threads);

  std::mutex busy_;  // one step at a time: the buffers below are shared
  Heads heads_;
  int hidden_, mlp_;
  float eps_;
  const float* norm_;
  std::vector<Block> blocks_;
  std::vector<float> x_, normed_, query_, key_, value_, mixed_, gate_, up_, turned_, scores_, floats_, scale_, sum_;
  std::vector<int8_t> bytes_;
};

}  // namespace elastiq
