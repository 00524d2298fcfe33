// lowrank_conv2d and lowrank_linear on the CPU in fp32: tile by tile of pixels, both products of a tile at once, in one
// parallel region. Other dtypes, and second factors larger than 1 x 1, fall back to lowrank_two_step.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <initializer_list>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "../core/tensor.h"

#define CK_KERNEL "lowrank_kernel.h"
#include "each_isa.h"
#include "isa.h"

namespace compaware {
namespace {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using MaybeTensor = std::optional<Tensor>;
using Sizes = std::vector<int64_t>;

constexpr int64_t kSamples = 32;  // entries of a factor that are compared with the packed ones
constexpr int64_t kTile = 96;     // pixels at most: an intermediate of rank 128 takes 48 KiB

struct Kernels {
  void (*tile)(const LowRankConv&, int64_t, int64_t, const float*, const float**, float*);
  void (*pack)(const Factor&, float*);
  bool (*is_packed)(const Factor&, const float*, int64_t);
};

Kernels kernels() { return {CK_OF_ISA(lowrank_tile), CK_OF_ISA(pack), CK_OF_ISA(is_packed)}; }

// --- calls of other ops ---------------------------------------------------------------------------------------------

template <class Result, class... Args>
Result call(const char* op, const Args&... args) {
  std::array<StableIValue, sizeof...(Args)> stack{torch::stable::detail::from(args)...};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(op, "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Result>(stack[0]);
}

// Version counter of a tensor; -1 for an inference tensor, which has none.
int64_t version(const Tensor& W) {
  return call<bool>("aten::is_inference", W) ? -1 : call<int64_t>("aten::_version", W);
}

// --- packed factors -------------------------------------------------------------------------------------------------

// Group g of V [G r, C/G, kh, kw] or [r, C], or of U [O, r, 1, 1] or [O, r].
Factor factor(const Tensor& W, int64_t groups, int64_t g) {
  const bool conv = W.dim() == 4;
  const int64_t columns = W.size(0) / groups;
  return {W.const_data_ptr<float>() + g * columns * W.stride(0), columns, W.size(1), conv ? W.size(2) : 1,
          conv ? W.size(3) : 1, W.stride(0), W.stride(1), conv ? W.stride(2) : 0, conv ? W.stride(3) : 0};
}

// Header of packed factors: addresses and versions of the tensors that were packed.
struct Stamp {
  const void *V, *U;
  int64_t V_version, U_version;

  Stamp(const Tensor& V, const Tensor& U)
      : V(V.const_data_ptr()), U(U.const_data_ptr()), V_version(version(V)), U_version(version(U)) {}
};
static_assert(sizeof(Stamp) <= kPackHeader * sizeof(float));

bool is_single(const Tensor& A) { return A.scalar_type() == ScalarType::Float; }

bool packs(const Tensor& V, const Tensor& U) {
  return is_single(V) && is_single(U) && (U.dim() == 2 || (U.size(2) == 1 && U.size(3) == 1));
}

template <class Each>  // calls each(factor, its offset in the packed floats) for V and U of every group
void each_factor(const Tensor& V, const Tensor& U, int64_t groups, Each each) {
  int64_t at = kPackHeader;
  for (int64_t g = 0; g < groups; ++g)
    for (const Tensor* W : {&V, &U}) {
      const Factor f = factor(*W, groups, g);
      each(f, at);
      at += f.depth() * padded(f.columns);
    }
}

Tensor lowrank_pack(const Tensor& V, const Tensor& U, int64_t groups) {
  STD_TORCH_CHECK(V.dim() == U.dim() && (V.dim() == 2 || V.dim() == 4),
                  "lowrank_pack: wanted V and U of 2 or 4 axes; got ", V.dim(), " and ", U.dim());
  STD_TORCH_CHECK(groups >= 1 && V.size(0) % groups == 0 && U.size(0) % groups == 0,
                  "lowrank_pack: wanted groups that divide ", V.size(0), " and ", U.size(0), "; got ", groups);
  int64_t size = 0;
  if (packs(V, U))
    each_factor(V, U, groups, [&](const Factor& f, int64_t at) { size = at + f.depth() * padded(f.columns); });
  Tensor packed = torch::stable::new_empty(V, {size}, ScalarType::Float);
  if (size) {
    float* out = packed.mutable_data_ptr<float>();
    const Stamp stamp(V, U);
    std::fill(out, out + kPackHeader, 0.0f);
    std::memcpy(out, &stamp, sizeof(Stamp));
    each_factor(V, U, groups, [&](const Factor& f, int64_t at) { kernels().pack(f, out + at); });
  }
  return packed;
}

// `packed` if it still matches the factors, else the factors packed for this call.
Tensor fresh(const MaybeTensor& packed, const Tensor& V, const Tensor& U, int64_t groups) {
  bool good = packed && packed->numel() >= kPackHeader && is_single(*packed) && packed->is_contiguous();
  if (good) {
    const float* data = packed->const_data_ptr<float>();
    const Stamp stamp(V, U);
    good = std::memcmp(data, &stamp, sizeof(Stamp)) == 0;
    each_factor(V, U, groups, [&](const Factor& f, int64_t at) {
      good = good && at + f.depth() * padded(f.columns) <= packed->numel() &&
             kernels().is_packed(f, data + at, kSamples);
    });
  }
  return good ? *packed : lowrank_pack(V, U, groups);
}

// --- arguments ------------------------------------------------------------------------------------------------------

// Operands of y = act(U (V * x) + bias + residual); packed: from lowrank_pack, or none.
struct Operands {
  const Tensor &x, &V, &U;
  const MaybeTensor &bias, &residual, &packed;
};

// Geometry of a convolution; [height, width] each.
struct Geometry {
  const Sizes &stride, &padding, &dilation;
  int64_t groups;
};

Sizes sizes_of(const Tensor& A) { return Sizes(A.sizes().begin(), A.sizes().end()); }

void one_of(const char* op, const char* name, const std::string& value, std::initializer_list<const char*> known) {
  std::string all;
  for (const char* word : known) all += std::string(all.empty() ? "" : ", ") + word;
  STD_TORCH_CHECK(std::find(known.begin(), known.end(), value) != known.end(), op, ": wanted ", name,
                  " to be one of ", all, "; got '", value, "'");
}

void want(const char* op, const char* name, const Tensor& A, const Sizes& sizes) {
  STD_TORCH_CHECK(sizes_of(A) == sizes, op, ": wanted ", name, " of shape ", text(sizes), "; got ", text(sizes_of(A)));
}

// Shapes and dtypes that both ops require, where x has C channels and y the shape `y`.
void check(const char* op, const Operands& t, int64_t C, int64_t groups, const Sizes& y,
           const std::string& activation) {
  one_of(op, "activation", activation, {"none", "relu", "relu6", "silu", "gelu"});
  const int64_t O = t.U.size(0), ranks = t.V.size(0);
  STD_TORCH_CHECK(groups >= 1 && C % groups == 0 && O % groups == 0 && ranks % groups == 0, op,
                  ": wanted groups that divide the channels; got ", groups, " for ", C, " -> ", ranks, " -> ", O);
  for (const Tensor* A : {&t.V, &t.U, t.bias ? &*t.bias : &t.V, t.residual ? &*t.residual : &t.V})
    STD_TORCH_CHECK(A->scalar_type() == t.x.scalar_type(), op, ": wanted all in the dtype of x, ", t.x.scalar_type(),
                    "; got ", A->scalar_type());
  for (const Tensor* A : {&t.x, &t.V, &t.U, t.bias ? &*t.bias : &t.V, t.residual ? &*t.residual : &t.V})
    STD_TORCH_CHECK(A->numel() == 0 || A->const_data_ptr(), op,
                    ": wanted tensors with values; got one whose memory was freed");
  Sizes first = sizes_of(t.V), second = sizes_of(t.U);
  first[1] = C / groups;
  second[1] = ranks / groups;
  want(op, "V", t.V, first);
  want(op, "U", t.U, second);
  if (t.bias) want(op, "bias", *t.bias, {O});
  if (t.residual) want(op, "residual", *t.residual, y);
}

// Checks the arguments; returns the shape of y.
Sizes check_conv2d(const Operands& t, const Geometry& g, const std::string& fold, const std::string& activation) {
  const char* op = "lowrank_conv2d";
  const auto& [x, V, U, bias, residual, packed] = t;
  const auto& [stride, padding, dilation, groups] = g;
  one_of(op, "fold", fold, {"paper", "spatial", "input"});
  STD_TORCH_CHECK(x.dim() == 4 && V.dim() == 4 && U.dim() == 4, op, ": wanted x, V and U of 4 axes; got ", x.dim(),
                  ", ", V.dim(), " and ", U.dim());
  STD_TORCH_CHECK(stride.size() == 2 && padding.size() == 2 && dilation.size() == 2, op,
                  ": wanted two numbers each as stride, padding and dilation");
  STD_TORCH_CHECK(std::min(stride[0], stride[1]) > 0 && std::min(dilation[0], dilation[1]) > 0 &&
                  std::min(padding[0], padding[1]) >= 0, op, ": wanted stride and dilation > 0 and padding >= 0; got ",
                  text(stride), ", ", text(dilation), " and ", text(padding));
  Sizes y{x.size(0), U.size(0)}, kernel;
  bool fits = true;
  for (int i : {0, 1}) {
    kernel.push_back(V.size(2 + i) * U.size(2 + i));  // one of the two is 1
    const int64_t room = x.size(2 + i) + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1;
    fits = fits && kernel[i] > 0 && room >= 0;
    y.push_back(room / stride[i] + 1);
  }
  const int second = fold == "paper" ? 0 : fold == "spatial" ? 1 : 2;  // kernel axes that belong to U
  for (int i : {0, 1}) {
    const Tensor& other = i < second ? V : U;
    Sizes wanted = sizes_of(other);
    wanted[2 + i] = 1;
    want(op, i < second ? "V" : "U", other, wanted);
  }
  STD_TORCH_CHECK(fits, op, ": a kernel of ", kernel[0], " x ", kernel[1], ", dilation ", text(dilation),
                  ", does not fit an input of ", x.size(2), " x ", x.size(3), ", padding ", text(padding));
  check(op, t, x.size(1), groups, y, activation);
  return y;
}

// --- the fused kernel -----------------------------------------------------------------------------------------------

struct Scratch {  // a thread's buffer, kept for the next call
  std::unique_ptr<char[]> memory;
  size_t size = 0;

  char* aligned(size_t bytes) {
    if (size < bytes + 64) memory.reset(new char[size = bytes + 64]);
    return memory.get() + (64 - reinterpret_cast<uintptr_t>(memory.get()) % 64) % 64;
  }
};

// Pixels per tile, such that tiles are of equal size and their number is a multiple of the threads.
int64_t tile_of(int64_t pixels) {
  const int64_t threads = torch::stable::get_num_threads(), tiles = (pixels + kTile - 1) / kTile;
  const int64_t even = (tiles + threads - 1) / threads * threads;
  return (pixels + even - 1) / even;
}

void run(const LowRankConv& conv) {
  const int64_t pixels = conv.pixels(), P = tile_of(pixels), tiles = (pixels + P - 1) / P;
  const Kernels k = kernels();
  torch::stable::parallel_for(0, tiles, 1, [&](int64_t begin, int64_t end) {
    static thread_local Scratch scratch;
    const int64_t sums = P * padded(conv.r), zeros = padded(conv.C), pointers = (conv.taps() + 1) * P;
    char* memory = scratch.aligned((sums + zeros) * sizeof(float) + pointers * sizeof(float*));
    float *T = reinterpret_cast<float*>(memory), *zero = T + sums;
    std::fill(zero, zero + zeros, 0.0f);
    for (int64_t t = begin; t < end; ++t)
      k.tile(conv, t * P, std::min(P, pixels - t * P), zero, reinterpret_cast<const float**>(zero + zeros), T);
  });
}

const float* data_of(const MaybeTensor& A) { return A ? A->const_data_ptr<float>() : nullptr; }

using Layout = std::optional<MemoryFormat>;

Tensor dense(const Tensor& A, Layout layout) {
  return layout ? torch::stable::contiguous(A, *layout) : torch::stable::contiguous(A);
}

MaybeTensor dense(const MaybeTensor& A, Layout layout) { return A ? MaybeTensor(dense(*A, layout)) : std::nullopt; }

// Computes y, which may share memory with the residual but with no other operand. `conv` has the geometry already.
// `layout`: the memory format of x, y and residual; none: contiguous.
void compute(LowRankConv& conv, Tensor& y, const Operands& t, Layout layout, const std::string& activation) {
  const Tensor x = dense(t.x, layout), packed = fresh(t.packed, t.V, t.U, conv.G);
  const MaybeTensor bias = dense(t.bias, std::nullopt), residual = dense(t.residual, layout);
  conv.x = x.const_data_ptr<float>();
  conv.packed = packed.const_data_ptr<float>() + kPackHeader;
  conv.bias = data_of(bias);
  conv.residual = data_of(residual);
  conv.y = y.mutable_data_ptr<float>();
  conv.low = activation.starts_with("relu") ? 0.0f : -INFINITY;
  conv.high = activation == "relu6" ? 6.0f : INFINITY;
  run(conv);
  if (activation == "silu") call<Tensor>("aten::silu_", y);
  if (activation == "gelu") call<Tensor>("aten::gelu_", y, std::string("none"));
}

// Whether torch would choose channels_last for a convolution: not if the strides fit NCHW as well.
bool is_channels_last(const Tensor& A) {
  int64_t least = 0;
  if (A.stride(1) == 0) return false;
  for (const int64_t axis : {1, 3, 2, 0}) {
    if (A.size(axis) == 0 || A.stride(axis) < least || (axis == 0 && least == A.stride(1))) return false;
    least = A.stride(axis) * (A.size(axis) > 1 ? A.size(axis) : 1);
  }
  return true;
}

// Whether the fused kernel can run: fp32, U of 1 x 1, nothing empty.
bool takes(const Operands& t) { return packs(t.V, t.U) && t.x.numel() && t.V.numel() && t.U.numel(); }

constexpr MemoryFormat kLast = MemoryFormat::ChannelsLast;

// Whether it is contiguous in channels_last.
bool is_dense(const Tensor& A) {
  int64_t next = 1;
  for (const int64_t axis : {1, 3, 2, 0}) {
    if (A.size(axis) != 1 && A.stride(axis) != next) return false;
    next *= A.size(axis);
  }
  return true;
}

// Into y, dense in channels_last.
void conv2d_into(Tensor& y, const Operands& t, const Geometry& g, const std::string& activation) {
  LowRankConv conv{};
  conv.N = t.x.size(0), conv.C = t.x.size(1), conv.O = y.size(1), conv.G = g.groups, conv.r = t.V.size(0) / g.groups;
  for (int i : {0, 1})
    (i == 0 ? conv.h : conv.w) = {t.x.size(2 + i), y.size(2 + i), t.V.size(2 + i), g.stride[i], g.padding[i],
                                  g.dilation[i]};
  compute(conv, y, t, kLast, activation);
}

Tensor conv2d(const Operands& t, const Geometry& g, const std::string& fold, const std::string& activation) {
  const Sizes shape = check_conv2d(t, g, fold, activation);
  if (fold != "paper" || !takes(t))
    return call<Tensor>("compaware::lowrank_two_step", t.x, t.V, t.U, t.bias, t.residual, g.stride, g.padding,
                        g.dilation, g.groups, fold, activation);
  Tensor y = torch::stable::empty(shape, ScalarType::Float, std::nullopt, t.x.device(), std::nullopt, kLast);
  conv2d_into(y, t, g, activation);
  return is_channels_last(t.x) || is_channels_last(t.V) ? y : torch::stable::contiguous(y);
}

// y is the residual.
void conv2d_(Tensor& y, const Operands& t, const Geometry& g, const std::string& fold, const std::string& activation) {
  check_conv2d(t, g, fold, activation);
  for (int64_t axis = 0; axis < y.dim(); ++axis)
    STD_TORCH_CHECK(y.size(axis) < 2 || y.stride(axis) > 0,
                    "lowrank_conv2d_: wanted a residual with memory of its own for every number; "
                    "got stride 0 along axis ", axis);
  const auto apart = [&](const MaybeTensor& A) { return !A || !overlap(extent(y), extent(*A)); };
  const bool alone = apart(t.x) && apart(t.V) && apart(t.U) && apart(t.bias) && apart(t.packed);
  if (fold == "paper" && takes(t) && is_dense(y) && alone)
    conv2d_into(y, t, g, activation);
  else
    torch::stable::copy_(y, conv2d(t, g, fold, activation));
}

Tensor linear(const Operands& t, const std::string& activation) {
  const char* op = "lowrank_linear";
  STD_TORCH_CHECK(t.x.dim() >= 1 && t.V.dim() == 2 && t.U.dim() == 2, op,
                  ": wanted x [..., C], V [r, C] and U [O, r]; got axes ", t.x.dim(), ", ", t.V.dim(), " and ",
                  t.U.dim());
  Sizes shape = sizes_of(t.x);
  shape.back() = t.U.size(0);
  check(op, t, t.x.size(-1), 1, shape, activation);
  if (!takes(t))
    return call<Tensor>("compaware::lowrank_linear_two_step", t.x, t.V, t.U, t.bias, t.residual, activation);
  LowRankConv conv{};
  conv.N = conv.G = 1, conv.C = t.x.size(-1), conv.O = t.U.size(0), conv.r = t.V.size(0);
  conv.w.in = conv.w.out = t.x.numel() / conv.C;
  Tensor y = torch::stable::new_empty(t.x, shape);
  compute(conv, y, t, std::nullopt, activation);
  return y;
}

// --- the ops, with the signatures of their schemas ------------------------------------------------------------------

Tensor lowrank_conv2d(const Tensor& x, const Tensor& V, const Tensor& U, const MaybeTensor& bias,
                      const MaybeTensor& residual, const MaybeTensor& packed, const Sizes& stride, const Sizes& padding,
                      const Sizes& dilation, int64_t groups, const std::string& fold, const std::string& activation) {
  return conv2d({x, V, U, bias, residual, packed}, {stride, padding, dilation, groups}, fold, activation);
}

void lowrank_conv2d_(const Tensor& x, const Tensor& V, const Tensor& U, const MaybeTensor& bias, Tensor residual,
                     const MaybeTensor& packed, const Sizes& stride, const Sizes& padding, const Sizes& dilation,
                     int64_t groups, const std::string& fold, const std::string& activation) {
  conv2d_(residual, {x, V, U, bias, residual, packed}, {stride, padding, dilation, groups}, fold, activation);
}

Tensor lowrank_linear(const Tensor& x, const Tensor& V, const Tensor& U, const MaybeTensor& bias,
                      const MaybeTensor& residual, const MaybeTensor& packed, const std::string& activation) {
  return linear({x, V, U, bias, residual, packed}, activation);
}

}  // namespace
}  // namespace compaware

STABLE_TORCH_LIBRARY_IMPL(compaware, CPU, m) {
  m.impl("lowrank_pack", TORCH_BOX(&compaware::lowrank_pack));
  m.impl("lowrank_conv2d", TORCH_BOX(&compaware::lowrank_conv2d));
  m.impl("lowrank_conv2d_", TORCH_BOX(&compaware::lowrank_conv2d_));
  m.impl("lowrank_linear", TORCH_BOX(&compaware::lowrank_linear));
}
