// What is lost when a result is rounded to the dtype of the weight.
#pragma once

#include "portable.h"
#include "step.h"

namespace compaware {

struct Storage {
  double relative, absolute, largest;  // unit roundoff; spacing of subnormal numbers; largest number

  // Error bound of a stored result of `size` numbers from the other errors: absolute rounding of subnormal numbers comes
  // on top. No number of the result exceeds the norm of W; where that exceeds the range of the dtype, one may be Inf.
  CK_DEVICE double bound(double error, double norm, int64_t size) const {
    return norm > largest ? INFINITY : error + sqrt(double(size)) * absolute;
  }
};

CK_DEVICE Storage storage_of(int64_t dtype) {
  switch (static_cast<DType>(dtype)) {
    case DType::f64: return {0x1p-53, 0x1p-1074, 0x1.fffffffffffffp1023};
    case DType::f32: return {0x1p-24, 0x1p-149, 0x1.fffffep127};
    case DType::f16: return {0x1p-11, 0x1p-24, 65504};
    default: return {0x1p-8, 0x1p-133, 0x1.fep127};
  }
}

}  // namespace compaware
