// What the ops of every dispatch key ask of tensors, beside torch's stable ABI.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <sstream>
#include <string>
#include <utility>

namespace compaware {

using torch::headeronly::IntHeaderOnlyArrayRef;
using torch::stable::Tensor;

inline std::string text(IntHeaderOnlyArrayRef sizes) {
  std::ostringstream out;
  out << '[';
  for (size_t i = 0; i < sizes.size(); ++i) out << (i ? ", " : "") << sizes[i];
  out << ']';
  return out.str();
}

using Extent = std::pair<const char*, const char*>;  // the bytes from the first element to behind the last one

inline Extent extent(const Tensor& A) {
  int64_t last = 0;
  for (int64_t axis = 0; axis < A.dim(); ++axis) last += (A.size(axis) - 1) * A.stride(axis);
  const auto first = static_cast<const char*>(A.const_data_ptr());
  return {first, A.numel() ? first + (last + 1) * A.element_size() : first};
}

inline bool overlap(const Extent& a, const Extent& b) {
  return std::max(a.first, b.first) < std::min(a.second, b.second);
}

}  // namespace compaware
