// Compressing a step's new tokens into their pages: units of work that any thread may take.
#pragma once
#include "carver.h"
#include "layer.h"

namespace vs {

// The scratch of one thread.
struct StoreScratch {
  double* vectors;
  float *turned, *rotated, *whitened, *flat_whitened;
  uint32_t* words;
  StoreScratch(const Layer& layer, Carver& carver);
};

// How many units the step has. Their order is of no account: each writes bytes of its own.
int64_t store_units(const Layer& layer, const StepCall& call);
void store_unit(const Layer& layer, const StepCall& call, int64_t unit, StoreScratch& scratch);

}  // namespace vs
