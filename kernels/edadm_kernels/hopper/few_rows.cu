// Products of at most eight rows of int8 codes: one product, or a stack of products with separate weights. Their speed
// is bound by how fast the weights arrive.
//
// A warp computes EACH outputs of all ROWS rows. It reads 512 bytes of each of its rows of weights at a time, 16 per
// lane, and multiplies them by the codes in shared memory, four products per instruction. The first weights are
// requested before the previous kernel has ended.
//
// These macros are defined: ROWS (1, 2, 4 or 8; the problem may have fewer rows), WARPS, EACH, and FLOATS or BFLOATS
// (float32 or bfloat16 is written instead of float16).

struct Problem {
    const unsigned char* x;       // [stack, rows, products]
    const unsigned char* weight;  // [stack, outputs, products]
    const float* scale;           // [stack, outputs]
    const int* correction;        // [stack, outputs]
    const float* bias;            // [stack, outputs] or null
    void* out;                    // [stack, rows, outputs]
    int rows, outputs, products;
};

__device__ __forceinline__ uint4 load_weights(const unsigned char* from) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(from));
    return v;
}

__device__ __forceinline__ int dot(uint4 a, uint4 b, int sum) {
    sum = __dp4a(static_cast<int>(a.x), static_cast<int>(b.x), sum);
    sum = __dp4a(static_cast<int>(a.y), static_cast<int>(b.y), sum);
    sum = __dp4a(static_cast<int>(a.z), static_cast<int>(b.z), sum);
    return __dp4a(static_cast<int>(a.w), static_cast<int>(b.w), sum);
}

extern "C" __global__ void __launch_bounds__(WARPS * 32) few_rows(const __grid_constant__ Problem p) {
    extern __shared__ uint4 codes[];  // [rows, products / 16]
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, vectors = p.products / 16;
    const int blocks = (p.outputs + WARPS * EACH - 1) / (WARPS * EACH), stack = blockIdx.x / blocks;
    const int first = (blockIdx.x - stack * blocks) * (WARPS * EACH) + warp * EACH;
    const unsigned char* rows[EACH];
    uint4 ahead[EACH];
#pragma unroll
    for (int e = 0; e < EACH; ++e) {  // outputs past the end repeat the last one
        const size_t output = static_cast<size_t>(stack) * p.outputs + min(first + e, p.outputs - 1);
        rows[e] = p.weight + output * p.products + lane * 16;
        ahead[e] = lane < vectors ? load_weights(rows[e]) : make_uint4(0, 0, 0, 0);
    }
    await_previous();
    const uint4* const x = reinterpret_cast<const uint4*>(p.x) + static_cast<size_t>(stack) * p.rows * vectors;
    for (int i = threadIdx.x; i < p.rows * vectors; i += WARPS * 32) codes[i] = x[i];
    __syncthreads();

    int sums[EACH][ROWS] = {};
#pragma unroll 2
    for (int at = lane; at < vectors; at += 32) {
        uint4 now[EACH];
#pragma unroll
        for (int e = 0; e < EACH; ++e) {
            now[e] = ahead[e];
            rows[e] += 512;
            if (at + 32 < vectors) ahead[e] = load_weights(rows[e]);
        }
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            const uint4 row = codes[min(r, p.rows - 1) * vectors + at];
#pragma unroll
            for (int e = 0; e < EACH; ++e) sums[e][r] = dot(now[e], row, sums[e][r]);
        }
    }
#pragma unroll
    for (int e = 0; e < EACH; ++e)
#pragma unroll
        for (int r = 0; r < ROWS; ++r) sums[e][r] = __reduce_add_sync(0xffffffff, sums[e][r]);

    // Lane e finishes output e.
#pragma unroll
    for (int e = 0; e < EACH; ++e) {
        if (lane != e || first + e >= p.outputs) continue;
        const size_t output = static_cast<size_t>(stack) * p.outputs + first + e;
        const int correction = p.correction[output];
        const float scale = p.scale[output], bias = p.bias ? p.bias[output] : 0.0f;
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            if (r >= p.rows) continue;
            float y = __fmul_rn(__int2float_rn(sums[e][r] - correction), scale);
            if (p.bias) y = __fadd_rn(y, bias);
            const size_t to = (static_cast<size_t>(stack) * p.rows + r) * p.outputs + first + e;
#if FLOATS
            static_cast<float*>(p.out)[to] = y;
#elif BFLOATS
            static_cast<u16*>(p.out)[to] = static_cast<u16>(bfloat_pair(y, y));
#else
            static_cast<u16*>(p.out)[to] = static_cast<u16>(half_pair(y, y));
#endif
        }
    }
}
