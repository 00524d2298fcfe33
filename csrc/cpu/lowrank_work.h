// A low-rank convolution as the kernels see it, and how its factors are packed. Free of torch.
//
//   y = clamp(U (V * x) + bias + residual, low, high)
//
// V [G r, C/G, kh, kw] is the first convolution, U [O, r] the second, of 1 x 1. Pixels are contiguous: x [N, H, W, C],
// y and residual [N, OH, OW, O]. A linear layer is a convolution of one row of pixels, 1 x 1.
#pragma once

#include <cstdint>

namespace compaware {

struct LowRankWork {
  const float *x, *packed, *bias, *residual;  // bias and residual may be null, and residual may be y
  float *y;
  float low, high;
  int64_t N, H, W, C, OH, OW, O, G, r;
  int64_t kh, kw, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;

  int64_t taps() const { return kh * kw; }
  int64_t pixels() const { return N * OH * OW; }
};

// Columns are padded to a multiple of this, whatever the instruction set: the size of what is packed depends on shapes only.
constexpr int64_t kColumns = 16;

inline int64_t padded(int64_t columns) { return (columns + kColumns - 1) / kColumns * kColumns; }

// Floats of one group: V as [taps C/G, padded r], then U as [r, padded O/G], each in panels of columns.
inline int64_t packed_first(int64_t taps, int64_t C, int64_t r) { return taps * C * padded(r); }
inline int64_t packed_group(int64_t taps, int64_t C, int64_t r, int64_t O) {
  return packed_first(taps, C, r) + r * padded(O);
}

// A factor before it is packed: column j and row (tap, c) is at data[j * column + y * high + x * wide + c * channel].
struct Factor {
  const float* data;
  int64_t columns, channels, kh, kw;          // sizes
  int64_t column, channel, high, wide;        // strides

  int64_t depth() const { return kh * kw * channels; }
  float at(int64_t j, int64_t k) const {
    const int64_t tap = k / channels;
    return data[j * column + k % channels * channel + tap / kw * high + tap % kw * wide];
  }
};

}  // namespace compaware
