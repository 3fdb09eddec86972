// product:  y[M, N] = x[M, K] w[N, K]^T + bias[N]
// rms_norm: y[M, K] = x / sqrt(mean(x^2) + eps) * (weight + offset)
//
// Row by row in memory, for few rows M. One row is multiplied as a sum along w's rows, which are read in the order of memory. Several stand side by side in
// a vector, of which each weight, read once, is multiplied with all lanes: nothing is added up across lanes.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

template <int lanes>
struct Vector {
  typedef float Type __attribute__((vector_size(4 * lanes)));
};

template <int lanes>
static typename Vector<lanes>::Type load(const float* from) {
  typename Vector<lanes>::Type found;
  std::memcpy(&found, from, sizeof found);
  return found;
}

#ifdef __AVX512F__
constexpr int WIDE = 16;
#else
constexpr int WIDE = 8;
#endif
constexpr int TOGETHER = 8;   // rows of w, as many sums as there are registers for
constexpr int LINE = 16;      // floats of a cache line
constexpr int AHEAD = 4096;   // floats that are asked for before they are read
constexpr int PARTIAL = 64;   // summands added up before they join the sum: less is lost by rounding

static float dot(const float* x, const float* w, long K) {
  typename Vector<WIDE>::Type sums[4] = {};
  long k = 0;
  for (; k + 4 * WIDE <= K; k += 4 * WIDE)
    for (int i = 0; i < 4; i++) {
      __builtin_prefetch(w + k + i * WIDE + AHEAD);
      sums[i] += load<WIDE>(x + k + i * WIDE) * load<WIDE>(w + k + i * WIDE);
    }
  for (; k + WIDE <= K; k += WIDE) sums[0] += load<WIDE>(x + k) * load<WIDE>(w + k);
  auto whole = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  float sum = 0;
  for (int i = 0; i < WIDE; i++) sum += whole[i];
  for (; k < K; k++) sum += x[k] * w[k];
  return sum;
}

// sides[K][lanes]: rows of x side by side. n_rows: those of the lanes that are rows.
template <int lanes, int n_columns>
static void columns(const float* sides, const float* w, const float* bias, float* y, long n_rows, long N, long K) {
  typename Vector<lanes>::Type sums[n_columns] = {};
  for (long first = 0; first < K; first += PARTIAL) {
    typename Vector<lanes>::Type parts[n_columns] = {};
    for (long line = first; line < std::min(first + PARTIAL, K); line += LINE) {
      for (int n = 0; n < n_columns; n++) __builtin_prefetch(w + (n_columns + n) * K + line, 0, 2);
      for (long k = line; k < std::min(line + LINE, K); k++) {
        auto side = load<lanes>(sides + k * lanes);
        for (int n = 0; n < n_columns; n++) parts[n] += side * w[n * K + k];
      }
    }
    for (int n = 0; n < n_columns; n++) sums[n] += parts[n];
  }
  for (int n = 0; n < n_columns; n++)
    for (long m = 0; m < n_rows; m++) y[m * N + n] = sums[n][m] + (bias ? bias[n] : 0.0f);
}

template <int lanes>
static void rows(const float* sides, const float* w, const float* bias, float* y, long n_rows, long N, long K, long begin, long end) {
  long n = begin;
  for (; n + TOGETHER <= end; n += TOGETHER)
    columns<lanes, TOGETHER>(sides, w + n * K, bias ? bias + n : nullptr, y + n, n_rows, N, K);
  for (; n < end; n++) columns<lanes, 1>(sides, w + n * K, bias ? bias + n : nullptr, y + n, n_rows, N, K);
}

extern "C" void rms_norm(const float* x, const float* weight, float* y, long M, long K, float eps, float offset) {
  for (long m = 0; m < M; m++, x += K, y += K) {
    const float scale = 1.0f / std::sqrt(dot(x, x, K) / K + eps);
    for (long k = 0; k < K; k++) y[k] = x[k] * scale * (weight[k] + offset);
  }
}

extern "C" void product(const float* x, const float* w, const float* bias, float* y, long M, long N, long K, int n_threads) {
  static thread_local std::vector<float> held;
  const long padded = M == 1 ? 0 : (M + 7) / 8 * 8;
  held.resize(padded * K);
  float* sides = held.data();
  const auto width = [padded](long m) { return padded - m >= WIDE ? long(WIDE) : 8L; };
  for (long m = 0; m < padded; m += width(m))
    for (long i = 0; i < width(m); i++)
      for (long k = 0; k < K; k++) sides[m * K + k * width(m) + i] = m + i < M ? x[(m + i) * K + k] : 0.0f;
  const long block = 4 * TOGETHER;  // of w's rows, which stay in the cache for all of x's
#pragma omp parallel for num_threads(n_threads) schedule(static) if (n_threads > 1)
  for (long begin = 0; begin < N; begin += block) {
    const long end = std::min(begin + block, N);
    if (M == 1)
      for (long n = begin; n < end; n++) y[n] = dot(x, w + n * K, K) + (bias ? bias[n] : 0.0f);
    for (long m = 0; m < padded; m += width(m)) {
      const long n_rows = std::min(M - m, width(m));
      const auto part = width(m) == WIDE ? rows<WIDE> : rows<8>;
      part(sides + m * K, w, bias, y + m * N, n_rows, N, K, begin, end);
    }
  }
}
