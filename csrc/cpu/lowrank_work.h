// A low-rank convolution as the kernels see it, and how its factors are packed. Free of torch.
//
//   y = clamp(U (V * x) + bias + residual, low, high)
//
// V [G r, C/G, kh, kw] is the first convolution, U [O, r] the second, of 1 x 1. Pixels are contiguous: x [N, H, W, C],
// y and residual [N, OH, OW, O]. A linear layer is a convolution of one row of pixels, 1 x 1.
#pragma once

#include "../core/constants.h"

namespace compaware {

// The geometry of a convolution along one axis.
struct Axis {
  int64_t in = 1, out = 1, kernel = 1, stride = 1, padding = 0, dilation = 1;
};

struct LowRankConv {
  const float *x, *packed, *bias, *residual;  // bias and residual may be null, and residual may be y
  float* y;
  float low, high;
  int64_t N, C, O, G, r;
  Axis h, w;

  int64_t taps() const { return h.kernel * w.kernel; }
  int64_t pixels() const { return N * h.out * w.out; }
};

// The size of a packed factor depends on its shape only, whatever the width of vectors.
inline int64_t padded(int64_t columns) { return (columns + kPackColumns - 1) / kPackColumns * kPackColumns; }

// Floats of one group: V as [taps C/G, padded r], then U as [r, padded O/G], each in panels of columns.
inline int64_t packed_first(int64_t taps, int64_t C, int64_t r) { return taps * C * padded(r); }
inline int64_t packed_group(int64_t taps, int64_t C, int64_t r, int64_t O) {
  return packed_first(taps, C, r) + r * padded(O);
}

// A factor before it is packed: element (row, column) of the matrix [depth, columns], with row = (tap, channel), is at
// data[column * column_stride + y * y_stride + x * x_stride + channel * channel_stride] for tap (y, x) of the kernel.
struct Factor {
  const float* data;
  int64_t columns, channels, kh, kw;
  int64_t column_stride, channel_stride, y_stride, x_stride;

  int64_t depth() const { return kh * kw * channels; }
  float at(int64_t column, int64_t row) const {
    const int64_t tap = row / channels;
    return data[column * column_stride + row % channels * channel_stride + tap / kw * y_stride + tap % kw * x_stride];
  }
};

}  // namespace compaware
