#include "rms_norm.h"

namespace fmrec {
namespace {

const float EPS = 1e-8f;

template <bool TANGENT>
void forward_row(const RmsNorm* n, int64_t row) {
    const int64_t channels = n->channels, at = row * channels;
    const float *x = n->x + at, *weight = n->weight, *dx = TANGENT ? n->dx + at : nullptr;
    float xx = 0.0f, xd = 0.0f;
#pragma omp simd reduction(+ : xx, xd)
    for (int64_t j = 0; j < channels; ++j) {
        xx += x[j] * x[j];
        if (TANGENT) xd += x[j] * dx[j];
    }
    const float share = 1.0f / (float)channels, s = 1.0f / __builtin_sqrtf(xx * share + EPS);
    const float back = s * s * s * xd * share;
    float *out = n->out + at, *d_out = TANGENT ? n->d_out + at : nullptr;
#pragma omp simd
    for (int64_t j = 0; j < channels; ++j) {
        out[j] = x[j] * s * weight[j];
        if (TANGENT) d_out[j] = (dx[j] * s - x[j] * back) * weight[j];
    }
}

// With a = g w, b = d_g w and the sums A = a x, B = b dx, C = b x, D the channels, q = mean(x dx),
// the loss is s A + s B - s^3 q C, whose gradients these are; ds/dx = -s^3 x / D.
template <bool TANGENT>
void backward_row(const RmsNorm* n, int64_t row, float* g_weight) {
    const int64_t channels = n->channels, at = row * channels;
    const float *x = n->x + at, *weight = n->weight, *dx = TANGENT ? n->dx + at : nullptr;
    const float *grad = n->grad + at, *d_grad = TANGENT ? n->d_grad + at : nullptr;
    float xx = 0.0f, xd = 0.0f, ax = 0.0f, bd = 0.0f, bx = 0.0f;
#pragma omp simd reduction(+ : xx, xd, ax, bd, bx)
    for (int64_t j = 0; j < channels; ++j) {
        xx += x[j] * x[j];
        ax += grad[j] * weight[j] * x[j];
        if (TANGENT) {
            const float b = d_grad[j] * weight[j];
            xd += x[j] * dx[j];
            bd += b * dx[j];
            bx += b * x[j];
        }
    }
    const float share = 1.0f / (float)channels, s = 1.0f / __builtin_sqrtf(xx * share + EPS);
    const float cube = s * s * s, of_b = cube * xd * share, of_d = cube * bx * share;
    const float of_x = cube * share * (ax + bd - 3.0f * s * s * xd * share * bx);
    float *out = n->out + at, *d_out = TANGENT ? n->d_out + at : nullptr;
#pragma omp simd
    for (int64_t j = 0; j < channels; ++j) {
        float g = grad[j] * weight[j] * s - x[j] * of_x, of_weight = grad[j] * x[j] * s;
        if (TANGENT) {
            const float b = d_grad[j] * weight[j];
            g -= b * of_b + dx[j] * of_d;
            of_weight += d_grad[j] * (dx[j] * s - x[j] * of_b);
            d_out[j] = b * s - x[j] * of_d;
        }
        out[j] = g;
        g_weight[j] += of_weight;
    }
}

template <bool TANGENT>
void backward_part(const RmsNorm* n, int64_t part) {
    const int64_t channels = n->channels;
    float *sums = n->partial + 2 * part * channels, *chunk = sums + channels;
    const int64_t last = n->rows * (part + 1) / RMS_PARTS;
    for (int64_t row = n->rows * part / RMS_PARTS; row < last;) {
        const int64_t end = row + RMS_CHUNK < last ? row + RMS_CHUNK : last;
        for (; row < end; ++row) backward_row<TANGENT>(n, row, chunk);
        for (int64_t j = 0; j < channels; ++j) {
            sums[j] += chunk[j];
            chunk[j] = 0.0f;
        }
    }
}

void forward(const RmsNorm* n, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
        n->dx ? forward_row<true>(n, row) : forward_row<false>(n, row);
    }
}

void backward(const RmsNorm* n, int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
        n->dx ? backward_part<true>(n, part) : backward_part<false>(n, part);
    }
}

}  // namespace

namespace FMREC_ISA {
extern const RmsNormKernels rms_norm = {forward, backward};
}

}  // namespace fmrec
