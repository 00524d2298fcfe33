// subspace_step on the CPU: one step of subspace iteration on a matrix in fp32, without temporaries of its size.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cmath>
#include <tuple>
#include <vector>

#include "narrow_product.h"

namespace compaware {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kWeak = 16;        // directions added for the singular triplets that converge last
constexpr double kOutside = 0.98;      // squared lengths below: the direction was rounding error
constexpr double kDependent = 1e-5;  // smallest diagonal entry of the Cholesky factor of unit columns

// Zeros [rows, width], aligned to vectors, that live as long as this does.
template <class A>
struct Block : Rows<A> {
  Tensor memory;
  Block(const Tensor& like, int64_t rows, int64_t columns)
      : memory(torch::stable::new_zeros(like, {rows, padded<A>(columns)},
                                        sizeof(A) == 4 ? ScalarType::Float : ScalarType::Double)) {
    this->data = memory.mutable_data_ptr<A>();
    this->stride = this->width = padded<A>(columns);
  }
};

// Columns of Y from `first` on.
template <class A>
Rows<A> columns(const Rows<A>& Y, int64_t first, int64_t count) {
  return {Y.data + first, Y.stride, padded<A>(count)};
}

std::vector<double> squared_lengths(const Rows<float>& Y, int64_t m) {
  std::vector<double> squares(Y.width);
  CK_OF_ISA(add_squares)(Y.data, Y.stride, m, Y.width, squares.data());
  return squares;
}

// Scales the columns of Y [m, .] to length 1, but none by more than 1e12.
void normalize_columns(const Rows<float>& Y, int64_t m) {
  std::vector<float> scale;
  for (double square : squared_lengths(Y, m)) scale.push_back(static_cast<float>(1 / std::max(std::sqrt(square), 1e-12)));
  CK_OF_ISA(scale_columns)(Y.data, Y.stride, m, Y.width, scale.data());
}

// Gram matrix [k, k] in fp64 of the first k columns of Y [m, .].
Block<double> gram(const Tensor& like, const Rows<float>& Y, int64_t m, int64_t k) {
  Block<double> G(like, k, k), copy(like, std::min<int64_t>(m, 128), k);
  CK_OF_ISA(gram)(Y.data, Y.stride, m, k, G.data, G.stride, copy.data);
  return G;
}

// The upper triangular S [k, wide] that makes columns with the Gram matrix G [k, wide] orthonormal, by Cholesky on
// columns of unit length; false if they are nearly dependent, or not finite.
bool orthonormalizer(const double* G, int64_t k, int64_t wide, double* S) {
  std::vector<double> scale(k), L(k * k);
  for (int64_t i = 0; i < k; ++i) {
    scale[i] = 1 / std::sqrt(G[i * wide + i]);
    for (int64_t j = 0; j <= i; ++j) {
      double sum = G[i * wide + j] * scale[i] * scale[j];
      for (int64_t l = 0; l < j; ++l) sum -= L[i * k + l] * L[j * k + l];
      L[i * k + j] = i == j ? std::sqrt(sum) : sum / L[j * k + j];
    }
    if (!(L[i * k + i] > kDependent)) return false;
  }
  for (int64_t j = 0; j < k; ++j)  // column j of L^-1, scaled, is row j of S
    for (int64_t i = j; i < k; ++i) {
      double sum = i == j ? 1 : 0;
      for (int64_t l = j; l < i; ++l) sum -= L[i * k + l] * S[j * wide + l];
      S[j * wide + i] = sum / L[i * k + i];
    }
  for (int64_t j = 0; j < k; ++j)
    for (int64_t i = j; i < k; ++i) S[j * wide + i] *= scale[j];
  return true;
}

// Makes the first k columns of Z [n, .] orthonormal in place; false if they are nearly dependent.
bool orthonormalize(const Tensor& like, const Rows<float>& Z, int64_t n, int64_t k) {
  Block<double> S(like, k, k), result(like, n, k);
  if (!orthonormalizer(gram(like, Z, n, k).data, k, S.stride, S.data)) return false;
  narrow_product<double>(Z.data, Z.stride, 1, S, n, k, result);
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < k; ++j) Z.data[i * Z.stride + j] = static_cast<float>(result.data[i * result.stride + j]);
  return true;
}

// Z [n, .] -= B (B^T Z) in fp64, for k orthonormal columns B [n, .].
void remove(const Tensor& like, const Rows<float>& B, int64_t k, const Rows<float>& Z, int64_t n) {
  Block<double> copy(like, n, Z.width), C(like, k, Z.width), inside(like, n, Z.width);
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < Z.width; ++j) copy.data[i * copy.stride + j] = Z.data[i * Z.stride + j];
  narrow_product<double>(B.data, 1, B.stride, copy, k, n, C);
  narrow_product<double>(B.data, B.stride, 1, C, n, k, inside);
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < Z.width; ++j)
      Z.data[i * Z.stride + j] = static_cast<float>(copy.data[i * copy.stride + j] - inside.data[i * copy.stride + j]);
}

// Those of the first k columns of Y [m, .] that are longer than a threshold, at most kWeak, the shortest ones; scaled to
// length 1. Returns their number.
int64_t weak_columns(const Rows<float>& Y, int64_t m, int64_t k, double threshold, const Rows<float>& out) {
  const std::vector<double> squares = squared_lengths(Y, m);
  std::vector<int64_t> weak;
  for (int64_t j = 0; j < k; ++j)
    if (squares[j] > threshold * threshold) weak.push_back(j);
  std::stable_sort(weak.begin(), weak.end(), [&](int64_t i, int64_t j) { return squares[i] < squares[j]; });
  weak.resize(std::min<int64_t>(weak.size(), kWeak));
  for (size_t j = 0; j < weak.size(); ++j) {
    const float scale = static_cast<float>(1 / std::sqrt(squares[weak[j]]));
    for (int64_t i = 0; i < m; ++i) out.data[i * out.stride + j] = Y.data[i * Y.stride + weak[j]] * scale;
  }
  return weak.size();
}

template <class A>
Tensor corner(Block<A>& block, int64_t rows, int64_t columns) {
  Tensor part = torch::stable::narrow(block.memory, 0, 0, rows);
  return torch::stable::contiguous(torch::stable::narrow(part, 1, 0, columns));
}

// X [m, n], V [n, k] in fp32 -> B [n, c], near orthonormal: the columns of X^T X V, and what X^T X adds to those of them
// that it lengthens least above the threshold; Y = X B [m, c]; and in fp64 the Gram matrices of B and Y. No columns if
// those of X^T X V are nearly dependent.
std::tuple<Tensor, Tensor, Tensor, Tensor> subspace_step(const Tensor& X, const Tensor& V, double threshold) {
  STD_TORCH_CHECK(X.dim() == 2 && V.dim() == 2 && X.size(1) == V.size(0) && X.scalar_type() == ScalarType::Float &&
                      V.scalar_type() == ScalarType::Float,
                  "subspace_step: wanted X [m, n] and V [n, k] in fp32");
  const int64_t m = X.size(0), n = X.size(1), k = V.size(1);
  const float* x = X.const_data_ptr<float>();
  const auto times = [&](const Rows<float>& A, const Rows<float>& out) {
    narrow_product(x, X.stride(0), X.stride(1), A, m, n, out);
  };
  const auto transposed_times = [&](const Rows<float>& A, const Rows<float>& out) {
    narrow_product(x, X.stride(1), X.stride(0), A, n, m, out);
  };
  // k may not fill whole vectors: what is added starts at the next one, and moves to column k at the end
  const int64_t start = padded<float>(k);
  Block<float> B(V, n, start + kWeak), Y(V, m, start + kWeak), from(V, n, k), left(V, m, k), weak(V, m, kWeak);
  const Rows<float> B1 = columns(B, 0, k), B2 = columns(B, start, kWeak), Y1 = columns(Y, 0, k);
  copy_padded<float>(V, from.data, from.width);
  times(from, left);
  normalize_columns(left, m);
  transposed_times(left, B1);
  const bool found = orthonormalize(V, B1, n, k);
  times(B1, Y1);

  int64_t more = found ? weak_columns(Y1, m, k, threshold, weak) : 0;
  transposed_times(weak, B2);
  remove(V, B1, k, B2, n);
  if (!orthonormalize(V, B2, n, more)) more = 0;
  remove(V, B1, k, B2, n);
  const std::vector<double> squares = squared_lengths(B2, n);
  if (std::any_of(squares.begin(), squares.begin() + more, [](double square) { return !(square > kOutside); })) more = 0;
  times(B2, columns(Y, start, kWeak));
  for (Block<float>* each : {&B, &Y})
    for (int64_t i = 0; i < each->memory.size(0) && start != k; ++i)
      std::copy_n(each->data + i * each->stride + start, more, each->data + i * each->stride + k);

  const int64_t c = found ? k + more : 0;
  Block<double> BtB = gram(V, B, n, c), YtY = gram(V, Y, m, c);
  return {corner(B, n, c), corner(Y, m, c), corner(BtB, c, c), corner(YtY, c, c)};
}

}  // namespace
}  // namespace compaware

STABLE_TORCH_LIBRARY_IMPL(compaware, CPU, m) { m.impl("subspace_step", TORCH_BOX(&compaware::subspace_step)); }
