// Products of one row with a matrix of which only the rows are read that a ReLU lets through. [derived]
//
//   gathered:  y = b + Σ_{j: h_j ≠ 0} h_j W[j]      W (n, k): W₂ of a feed-forward block, kept transposed
//   chosen:    y_j = b_j + W[j] · x if g_j ≠ 0, else 0      W (n, d): W₃ of a gated block, g its gate's output
//
// The time is that of reading the rows from memory, so it goes with how many there are. Sums run in fp32, each in the same
// order with any number of threads. Plain C++ with a C interface, so that it needs neither torch's headers nor its ABI.

#include <algorithm>
#include <cstdint>
#include <vector>

#include "scalars.h"

namespace {

constexpr int64_t LINE = 16, TILE = 4096;  // floats in a line of the cache; accumulators of a thread, which stay in its cache

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

int useful(int64_t elements, int threads) {  // a thread costs as much as reading some ten thousand elements
  return static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(threads, elements / 16384)));
}

// the indices of what is not 0, a NaN among them; none if there are more than `most`
template <class T>
bool indices(const T* h, int64_t n, int64_t most, std::vector<int32_t>& found) {
  found.clear();
  for (int64_t j = 0; j < n; ++j)
    if (load(h + j) != 0.0f) {
      if (static_cast<int64_t>(found.size()) == most) return false;
      found.push_back(static_cast<int32_t>(j));
    }
  return true;
}

constexpr int TOGETHER = 8;  // rows that are read side by side, so that each accumulator is loaded and stored once for all

template <class T>
void gathered(const T* h, const T* w, const T* bias, T* y, int64_t k, const std::vector<int32_t>& rows, int threads) {
  const int64_t count = static_cast<int64_t>(rows.size());
  threads = useful(count * k, threads);
  const int64_t tile = std::min(TILE, ceil_div(ceil_div(k, threads), LINE) * LINE), tiles = ceil_div(k, tile);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t t = 0; t < tiles; ++t) {
    float sum[TILE];
    const int64_t start = t * tile, size = std::min(tile, k - start);
    for (int64_t c = 0; c < size; ++c) sum[c] = bias ? load(bias + start + c) : 0.0f;
    int64_t i = 0;
    for (; i + TOGETHER <= count; i += TOGETHER) {
      const T* row[TOGETHER];
      float factor[TOGETHER];
      for (int r = 0; r < TOGETHER; ++r) {
        row[r] = w + rows[i + r] * k + start;
        factor[r] = load(h + rows[i + r]);
      }
#pragma omp simd
      for (int64_t c = 0; c < size; ++c) {
        float s = sum[c];
        for (int r = 0; r < TOGETHER; ++r) s = fma(factor[r], load(row[r] + c), s);
        sum[c] = s;
      }
    }
    for (; i < count; ++i) {
      const T* row = w + rows[i] * k + start;
      const float factor = load(h + rows[i]);
#pragma omp simd
      for (int64_t c = 0; c < size; ++c) sum[c] = fma(factor, load(row + c), sum[c]);
    }
    for (int64_t c = 0; c < size; ++c) store(y + start + c, sum[c]);
  }
}

template <class T>
float dot(const T* a, const T* b, int64_t d) {
  float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
  for (int64_t c = 0; c < d; ++c) sum += load(a + c) * load(b + c);
  return sum;
}

template <class T>
void chosen(const T* x, const T* w, const T* bias, T* y, int64_t n, int64_t d, const std::vector<int32_t>& rows, int threads) {
  const int64_t count = static_cast<int64_t>(rows.size());
  threads = useful(count * d, threads);
  for (int64_t j = 0; j < n; ++j) store(y + j, 0.0f);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t i = 0; i < count; ++i) {
    const int64_t j = rows[i];
    store(y + j, dot(w + j * d, x, d) + (bias ? load(bias + j) : 0.0f));
  }
}

thread_local std::vector<int32_t> rows;

template <class T>
int run_gathered(const T* h, const T* w, const T* bias, T* y, int64_t n, int64_t k, int64_t most, int threads) {
  if (!indices(h, n, most, rows)) return 0;
  gathered(h, w, bias, y, k, rows, threads);
  return 1;
}

template <class T>
int run_chosen(const T* gate, const T* x, const T* w, const T* bias, T* y, int64_t n, int64_t d, int64_t most, int threads) {
  if (!indices(gate, n, most, rows)) return 0;
  chosen(x, w, bias, y, n, d, rows, threads);
  return 1;
}

}  // namespace

// half: 1 for bfloat16, 0 for fp32; bias may be null. They return 0, with y as it was, if more than `most` rows are needed.
extern "C" {

int sparse_gathered(const void* h, const void* w, const void* bias, void* y, int64_t n, int64_t k, int64_t most, int half,
                    int threads) {
  if (half)
    return run_gathered(static_cast<const BFloat16*>(h), static_cast<const BFloat16*>(w), static_cast<const BFloat16*>(bias),
                        static_cast<BFloat16*>(y), n, k, most, threads);
  return run_gathered(static_cast<const float*>(h), static_cast<const float*>(w), static_cast<const float*>(bias),
                      static_cast<float*>(y), n, k, most, threads);
}

int sparse_chosen(const void* gate, const void* x, const void* w, const void* bias, void* y, int64_t n, int64_t d,
                  int64_t most, int half, int threads) {
  if (half)
    return run_chosen(static_cast<const BFloat16*>(gate), static_cast<const BFloat16*>(x), static_cast<const BFloat16*>(w),
                      static_cast<const BFloat16*>(bias), static_cast<BFloat16*>(y), n, d, most, threads);
  return run_chosen(static_cast<const float*>(gate), static_cast<const float*>(x), static_cast<const float*>(w),
                    static_cast<const float*>(bias), static_cast<float*>(y), n, d, most, threads);
}
}
