// Loops over a row, in the best instructions that the compiler finds for the machine.
#pragma once

#include <cstdint>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define MOBA_VECTORISED __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define MOBA_VECTORISED
#endif

namespace moba::cpu {

// to = to * scale + from * factor
void scale_and_add(float* to, float scale, const float* from, float factor, int64_t count);
void scale_and_add(double* to, double scale, const double* from, double factor, int64_t count);
// A number that at least k of the values reach, close to the k-th largest; -inf where it finds none. NaN is skipped.
float kth_bound(const float* values, int64_t count, int64_t k);
double kth_bound(const double* values, int64_t count, int64_t k);
// The indices of the values that are not below `bound` (NaN is not), ascending; returns their number.
int64_t find_reaching(const float* values, int64_t count, float bound, int32_t* indices);
int64_t find_reaching(const double* values, int64_t count, double bound, int32_t* indices);

}  // namespace moba::cpu
