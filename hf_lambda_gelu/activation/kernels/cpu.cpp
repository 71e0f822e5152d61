// λ-GELU on a CPU: one pass forward, one pass backward, nothing of x's size in between.
//
// With a = |x|, u = λa, tail(u) = 1 − gate(u) and slope(u) = gate'(u), all for u ≥ 0 since every gate is symmetric:
//   f      = relu(x) − a tail(u)
//   ∂f/∂x  = 1 − d for x ≥ 0, d for x < 0,  with d = tail(u) − u slope(u)
//   ∂f/∂λ  = a² slope(u)
// One exponential serves both tail and slope, which is what makes the backward pass cheaper than that of F.gelu, and the
// distance to ReLU is computed rather than 0.5 + 0.5 erf, which makes it more accurate. [derived]
//
// x is seen as (outer, channels, inner) with one λ per channel; (1, 1, n) is one λ for all. Sums over λ's gradient run in
// fp32 within a block and in double over the blocks, and blocks depend on the shape alone: the same bits with any number
// of threads. Plain C++ with a C interface, so that it needs neither torch's headers nor its ABI.

#include <algorithm>
#include <cstdint>
#include <limits>
#include <memory>
#include <vector>

#include "scalars.h"

namespace {

// 2^y for −127.5 < y ≤ 0; exactly 0 from y = −126.5 downwards. Minimax, relative error 9e-8: a sum with cancellation over
// 50 million elements would show that of a lower degree.
inline float exp2_negative(float y) {
  const float shifted = y + 12582912.0f;  // 1.5 · 2²³: the integer part lands in the low bits
  const float r = y - (shifted - 12582912.0f);
  float p = 0.0013264727150230633f;
  p = fma(p, r, 0.009671512642938916f);
  p = fma(p, r, 0.05550733743408121f);
  p = fma(p, r, 0.24022242085303325f);
  p = fma(p, r, 0.6931469775990537f);
  p = fma(p, r, 1.0f);
  return p * from_bits((to_bits(shifted) + 127u) << 23);
}

constexpr float LOG2_E = 1.44269504088896341f;

// Each gate: tail and slope for 0 ≤ u ≤ LIMIT; at LIMIT the exponential is 0, and so are both.

struct Erf {
  static constexpr float LIMIT = 13.28f;
  template <class T>
  static inline void gate(float u, float& tail, float& slope) {
    const float e = exp2_negative(u * u * (-0.5f * LOG2_E));
    // tail · exp(u²/2), Mills' ratio over √(2π), as a minimax polynomial in t: relative error 3e-8, and 9e-6 for bf16, whose
    // own rounding is 2e-3
    float t, w;
    if (sizeof(T) == 2) {
      t = 1.0f / fma(u, 0.46f, 1.0f);
      w = 0.07222806160736643f;
      w = fma(w, t, -0.2365446783032788f);
      w = fma(w, t, 0.17780117585032995f);
      w = fma(w, t, 0.11610667454147819f);
      w = fma(w, t, 0.18706671277799888f);
      w = fma(w, t, 0.18334633798926547f);
    } else {
      t = 1.0f / fma(u, 0.27f, 1.0f);
      w = 0.02896109810156472f;
      w = fma(w, t, -0.1264858464711555f);
      w = fma(w, t, 0.16978612222022715f);
      w = fma(w, t, -0.06921071728019693f);
      w = fma(w, t, 0.10782559220824826f);
      w = fma(w, t, 0.07204962797634863f);
      w = fma(w, t, 0.10181060372203841f);
      w = fma(w, t, 0.10754287472522422f);
      w = fma(w, t, 0.10772065668199807f);
    }
    tail = w * t * e;
    slope = 0.3989422804014327f * e;
  }
};

// sigmoid(p): tail = e / (1 + e), slope = p' e / (1 + e)², with e = exp(−p)
template <class T>
inline void sigmoid_gate(float p, float derivative, float& tail, float& slope) {
  const float e = exp2_negative(p * -LOG2_E);
  const float r = 1.0f / (1.0f + e);
  tail = e * r;
  slope = derivative * tail * r;
}

struct Tanh {
  static constexpr float LIMIT = 10.0385f;
  template <class T>
  static inline void gate(float u, float& tail, float& slope) {
    const float scale = 1.5957691216057308f, cubic = 0.044715f, u2 = u * u;
    sigmoid_gate<T>(u * fma(u2, scale * cubic, scale), fma(u2, 3.0f * scale * cubic, scale), tail, slope);
  }
};

struct Quick {
  static constexpr float LIMIT = 51.82f;
  template <class T>
  static inline void gate(float u, float& tail, float& slope) {
    sigmoid_gate<T>(u * 1.702f, 1.702f, tail, slope);
  }
};

struct Silu {
  static constexpr float LIMIT = 88.2f;
  template <class T>
  static inline void gate(float u, float& tail, float& slope) {
    sigmoid_gate<T>(u, 1.0f, tail, slope);
  }
};

// |x| and λ without infinities, as inf · 0 is no number, and λ|x| within the gate's range; all keep a NaN
template <class Gate>
inline void magnitudes(float x, float hardness, float& a, float& u) {
  constexpr float largest = std::numeric_limits<float>::max();
  a = __builtin_fabsf(x);
  a = a > largest ? largest : a;
  u = (hardness > largest ? largest : hardness) * a;
  u = u > Gate::LIMIT ? Gate::LIMIT : u;
}

template <class T, class Gate>
inline void value_at(const T* x, float hardness, T* out) {
  float a, u, tail, slope;
  const float v = load(x);
  magnitudes<Gate>(v, hardness, a, u);
  Gate::template gate<T>(u, tail, slope);
  const float gap = a * tail;
  store(out, v < 0.0f ? -gap : v - gap);
}

// writes ∂L/∂x, returns the element's share of ∂L/∂λ
template <class T, class Gate>
inline float gradients_at(const T* x, const T* grad, float hardness, T* grad_x) {
  float a, u, tail, slope;
  const float v = load(x), g = load(grad);
  magnitudes<Gate>(v, hardness, a, u);
  Gate::template gate<T>(u, tail, slope);
  const float d = tail - u * slope;
  store(grad_x, g * (v < 0.0f ? d : 1.0f - d));
  return g * (a * (a * slope));  // not a² · slope: where a² would overflow, slope is 0
}

constexpr int64_t BLOCK = 4096;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// rows of a block where λ changes along them: from the shape alone, few enough that their sums stay small
inline int64_t rows_of(int64_t rows) { return std::clamp<int64_t>(rows / 64, 8, 256); }

struct Shape {
  int64_t outer, channels, inner;
  bool along() const { return inner == 1 && channels > 1; }  // λ changes from element to element
  int64_t per_run() const { return ceil_div(inner, BLOCK); }
  int64_t blocks() const { return along() ? ceil_div(outer, rows_of(outer)) : outer * channels * per_run(); }
  int useful(int threads) const {  // a thread costs as much as some ten thousand elements
    return static_cast<int>(std::min<int64_t>(threads, ceil_div(outer * channels * inner, 16384)));
  }
};

template <class T, class Gate>
void forward(const T* x, const float* hardness, T* out, Shape shape, int threads) {
  const int64_t blocks = shape.blocks();
#pragma omp parallel for num_threads(shape.useful(threads)) schedule(static) if (shape.useful(threads) > 1)
  for (int64_t block = 0; block < blocks; ++block) {
    if (shape.along()) {
      const int64_t rows = rows_of(shape.outer), last = std::min(shape.outer, (block + 1) * rows);
      for (int64_t row = block * rows; row < last; ++row) {
        const int64_t at = row * shape.channels;
#pragma omp simd
        for (int64_t c = 0; c < shape.channels; ++c) value_at<T, Gate>(x + at + c, hardness[c], out + at + c);
      }
    } else {
      const int64_t run = block / shape.per_run(), start = block % shape.per_run() * BLOCK;
      const int64_t at = run * shape.inner + start, size = std::min(BLOCK, shape.inner - start);
      const float h = hardness[run % shape.channels];
#pragma omp simd
      for (int64_t i = 0; i < size; ++i) value_at<T, Gate>(x + at + i, h, out + at + i);
    }
  }
}

template <class T, class Gate>
void backward(const T* x, const T* grad, const float* hardness, T* grad_x, float* grad_hardness, Shape shape, int threads) {
  const int64_t blocks = shape.blocks();
  const int64_t size = shape.along() ? blocks * shape.channels : blocks;
  const std::unique_ptr<float[]> sums(new float[size]);
#pragma omp parallel for num_threads(shape.useful(threads)) schedule(static) if (shape.useful(threads) > 1)
  for (int64_t block = 0; block < blocks; ++block) {
    if (shape.along()) {
      const int64_t rows = rows_of(shape.outer), last = std::min(shape.outer, (block + 1) * rows);
      float* const sum = sums.get() + block * shape.channels;
      std::fill(sum, sum + shape.channels, 0.0f);
      for (int64_t row = block * rows; row < last; ++row) {
        const int64_t at = row * shape.channels;
#pragma omp simd
        for (int64_t c = 0; c < shape.channels; ++c)
          sum[c] += gradients_at<T, Gate>(x + at + c, grad + at + c, hardness[c], grad_x + at + c);
      }
    } else {
      const int64_t run = block / shape.per_run(), start = block % shape.per_run() * BLOCK;
      const int64_t at = run * shape.inner + start, size = std::min(BLOCK, shape.inner - start);
      const float h = hardness[run % shape.channels];
      float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
      for (int64_t i = 0; i < size; ++i) sum += gradients_at<T, Gate>(x + at + i, grad + at + i, h, grad_x + at + i);
      sums[block] = sum;
    }
  }
  std::vector<double> totals(shape.channels);
  const int64_t per_channel = shape.along() ? 1 : shape.per_run();
  for (int64_t i = 0; i < size;)
    for (int64_t c = 0; c < shape.channels; ++c)
      for (int64_t part = 0; part < per_channel; ++part) totals[c] += sums[i++];
  std::copy(totals.begin(), totals.end(), grad_hardness);
}

template <class T>
void forward(const void* x, const float* hardness, void* out, Shape shape, int base, int threads) {
  const auto run = base == 0 ? forward<T, Erf> : base == 1 ? forward<T, Tanh> : base == 2 ? forward<T, Quick> : forward<T, Silu>;
  run(static_cast<const T*>(x), hardness, static_cast<T*>(out), shape, threads);
}

template <class T>
void backward(const void* x, const void* grad, const float* hardness, void* grad_x, float* grad_hardness, Shape shape,
              int base, int threads) {
  const auto run = base == 0 ? backward<T, Erf> : base == 1 ? backward<T, Tanh> : base == 2 ? backward<T, Quick> : backward<T, Silu>;
  run(static_cast<const T*>(x), static_cast<const T*>(grad), hardness, static_cast<T*>(grad_x), grad_hardness, shape, threads);
}

}  // namespace

// base: 0 erf, 1 tanh, 2 quick, 3 silu; half: 1 for bfloat16, 0 for fp32
extern "C" {

void lambda_gelu_forward(const void* x, const float* hardness, void* out, int64_t outer, int64_t channels, int64_t inner,
                         int half, int base, int threads) {
  (half ? forward<BFloat16> : forward<float>)(x, hardness, out, Shape{outer, channels, inner}, base, threads);
}

void lambda_gelu_backward(const void* x, const void* grad, const float* hardness, void* grad_x, float* grad_hardness,
                          int64_t outer, int64_t channels, int64_t inner, int half, int base, int threads) {
  (half ? backward<BFloat16> : backward<float>)(x, grad, hardness, grad_x, grad_hardness, Shape{outer, channels, inner},
                                                 base, threads);
}
}
