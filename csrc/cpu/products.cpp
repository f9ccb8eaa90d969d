// The products of the machine: AVX-512 kernels of our own where they run, else the BLAS that libtorch is built on and
// exports.
#include "products.h"

#include "avx512.h"

extern "C" {
void sgemm_(const char* transa, const char* transb, const int* m, const int* n, const int* k, const float* alpha,
            const float* a, const int* lda, const float* b, const int* ldb, const float* beta, float* c,
            const int* ldc);
void dgemm_(const char* transa, const char* transb, const int* m, const int* n, const int* k, const double* alpha,
            const double* a, const int* lda, const double* b, const int* ldb, const double* beta, double* c,
            const int* ldc);
}

namespace moba::cpu {
namespace {

// BLAS is column-major: c^T = b^T a^T.
template <typename A, typename Gemm>
void multiply_by_blas(const Gemm& gemm, int64_t m, int64_t n, int64_t k, A alpha, Left<A> a, Right<A> b, Into into,
                      Matrix<A> c) {
  if (m == 0 || n == 0) return;
  // Leading dimensions of matrices with a single row must still be large enough.
  const auto leading = [](int64_t stride, int64_t width) { return static_cast<int>(std::max(stride, width)); };
  const bool by_rows = a.term_stride == 1;
  const int rows = static_cast<int>(n), columns = static_cast<int>(m), inner = static_cast<int>(k);
  const int ldb = leading(b.stride, n), ldc = leading(c.stride, n);
  const int lda = by_rows ? leading(a.row_stride, k) : leading(a.term_stride, m);
  const A beta = into == Into::kSum ? 1 : 0;
  gemm("N", by_rows ? "N" : "T", &rows, &columns, &inner, &alpha, b.data, &ldb, a.data, &lda, &beta, c.data, &ldc);
}

}  // namespace

void multiply(int64_t m, int64_t n, int64_t k, double alpha, Left<double> a, Right<double> b, Into into,
              Matrix<double> c) {
  multiply_by_blas(dgemm_, m, n, k, alpha, a, b, into, c);
}

void multiply(int64_t m, int64_t n, int64_t k, float alpha, Left<float> a, Right<float> b, Into into, Matrix<float> c) {
  if (avx512::available()) return avx512::multiply(m, n, k, alpha, a, b, into, c);
  multiply_by_blas(sgemm_, m, n, k, alpha, a, b, into, c);
}

void multiply(int64_t m, int64_t n, int64_t k, float alpha, Left<Pair> a, Right<Pair> b, Into into, Matrix<float> c) {
  avx512::multiply(m, n, k, alpha, a, b, into, c);
}

bool multiplies_pairs() { return avx512::available(); }

}  // namespace moba::cpu
