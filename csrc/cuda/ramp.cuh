// What becomes of a singular value: max(min(slope (s - tau), s), 0). With slope 1 that is the soft threshold, with
// slope = gamma / (gamma - 1) the firm one (FirmThreshold of compaware_kernels/proximal/spectral_functions.py).
#pragma once

#include "portable.h"

namespace compaware {

struct Ramp {
  double tau, slope;  // slope >= 1: what is wrong with a matrix is wrong with its result by up to as much

  // Of s above tau; of NaN, NaN.
  CK_DEVICE double value(double s) const {
    const double risen = slope * (s - tau);
    return risen > s ? s : risen;
  }
  // value / s.
  CK_DEVICE double gain(double s) const {
    const double kept = slope * (1 - tau / s);
    return kept > 1 ? 1 : kept;
  }
};

}  // namespace compaware
