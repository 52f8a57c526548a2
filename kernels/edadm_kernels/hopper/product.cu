// Convolutions and matrix products of int8 codes on the tensor cores of compute capability 9.0.
//
// A block computes BM output pixels times BN output channels. A step of the sum is BK channels of one tap. One warp
// copies the operands of a step, by the tensor memory accelerator, into one of STAGES buffers: a box of the image
// shifted by the tap, with zeros for what is outside, and the weights of the tap. The copies also skip pixels for a
// stride. Where the image is first enlarged by a factor of two, the pixels of a block are grouped by the parity of
// their row and column: those of one parity read neighbours in the small image, so four boxes are enough. The other
// warps multiply one step after the copies, and the instructions of one step run while the next step is issued. A
// matrix product is a convolution of one tap over an image of one row.
//
// The SPLIT blocks of a cluster share a sum: each stores its part in its shared memory, and then each adds and finishes
// BM / SPLIT of the rows.
//
// These macros are defined: BM, BN, BK, STAGES, SPLIT, GEGLU (values and gates alternate, and the codes of gated values
// are written), GATES_LAST (they alternate in a tile, but in the weights and in their constants all values come before
// all gates), CODES (of the float16 that would be written), FLOATS or BFLOATS (float32 or bfloat16 is written and nothing
// is added to it), CONV (a convolution instead of a matrix product), UPSAMPLE, CONSUMERS (groups of four warps that
// multiply) and BLOCKS (per multiprocessor). Before this text is the function `multiply`, one wgmma instruction of BN
// columns.

constexpr int THREADS = CONSUMERS * 128;          // threads that multiply
constexpr int TILES = BM / (64 * CONSUMERS);      // instructions of 64 rows per group
constexpr int BOXES = UPSAMPLE ? 4 : 1;           // copies of pixels per step
constexpr int A_BYTES = BM * BK, B_BYTES = BN * BK;
constexpr int PITCH = BN + 8;                     // integers between rows of the sums in shared memory
constexpr u64 SWIZZLE = BK == 128 ? 1 : 2;        // code of a swizzle of 128 or 64 bytes
static_assert(BM % (64 * CONSUMERS) == 0 && BN % 16 == 0 && BM % SPLIT == 0, "tile");
static_assert(BM * PITCH * 4 <= STAGES * (A_BYTES + B_BYTES), "the sums replace the operands in shared memory");
static_assert(!GATES_LAST || (GEGLU && !CONV), "gates");

struct Problem {
    const float* scale;       // [outputs]
    const int* correction;    // [classes, outputs]
    const float* bias;        // [outputs] or null
    const u16* sample_bias;   // half [samples, outputs] or null
    const u16* residual;      // half [samples, height, width, outputs] or null
    const float* out_scale;   // of the codes that are written; its inverse if `out_zero_point` is null
    const int* out_zero_point;
    const float* out_shift;   // the zero-point of signed codes, if `out_zero_point` is null
    void* out;                // [pixels, outputs] float16, float32, bfloat16 or codes; gated, codes [pixels, outputs / 2]
    int samples, height, width, channels, outputs;  // height and width of the output
    int seen_height, seen_width;                    // of the input after it is enlarged
    int kernel_height, kernel_width, stride, top, left, bottom, right;
    int box_width_log2, box_height_log2;  // pixels per copy: 2^a columns, 2^b rows, the rest are samples
    float quant_max;
};

// The descriptor of an operand in shared memory: its address, the distance of the next 8 rows, and the swizzle.
__device__ __forceinline__ u64 operand(u32 address) {
    return static_cast<u64>((address & 0x3ffff) >> 4) | (1ull << 16) | (static_cast<u64>(8 * BK >> 4) << 32) |
           (SWIZZLE << 62);
}

__device__ __forceinline__ void copy_box(u32 target, const TensorMap* map, u32 barrier, int c, int w, int h, int n) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], "
        "[%2];" ::"r"(target),
        "l"(map), "r"(barrier), "r"(c), "r"(w), "r"(h), "r"(n)
        : "memory");
}

__device__ __forceinline__ void copy_weights(u32 target, const TensorMap* map, u32 barrier, int c, int tap, int n) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], "
        "[%2];" ::"r"(target),
        "l"(map), "r"(barrier), "r"(c), "r"(tap), "r"(n)
        : "memory");
}

__device__ __forceinline__ void prefetch_weights(const TensorMap* map, int c, int tap, int n) {
    asm volatile("cp.async.bulk.prefetch.tensor.3d.L2.global.tile [%0, {%1, %2, %3}];" ::"l"(map), "r"(c), "r"(tap),
                 "r"(n)
                 : "memory");
}

// Returns the class of an output along one axis by its taps outside the image; see `pack.border_classes`.
__device__ __forceinline__ int outside(int first, int size, int kernel, int after_most) {
    const int before = min(max(-first, 0), kernel), after = min(max(first + kernel - size, 0), kernel);
    return before * (after_most + 1) + after;
}

// Loads eight values of 4 bytes from an address divisible by 16.
template <typename T>
__device__ __forceinline__ void load_eight(T (&to)[8], const T* from) {
    *reinterpret_cast<uint4*>(to) = __ldg(reinterpret_cast<const uint4*>(from));
    *reinterpret_cast<uint4*>(to + 4) = __ldg(reinterpret_cast<const uint4*>(from) + 1);
}

// Loads the constants of eight columns, of which `column` is the first.
template <typename T>
__device__ __forceinline__ void load_columns(T (&to)[8], const T* from, int column, int outputs) {
#if GATES_LAST
    T values[4], gates[4];
    *reinterpret_cast<uint4*>(values) = __ldg(reinterpret_cast<const uint4*>(from + column / 2));
    *reinterpret_cast<uint4*>(gates) = __ldg(reinterpret_cast<const uint4*>(from + (outputs + column) / 2));
#pragma unroll
    for (int i = 0; i < 4; ++i) to[2 * i] = values[i], to[2 * i + 1] = gates[i];
#else
    load_eight(to, from + column);
#endif
}

__device__ __forceinline__ void add_halves(float (&y)[8], uint4 halves) {
    const u32 pairs[4] = {halves.x, halves.y, halves.z, halves.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        y[2 * i] = __fadd_rn(y[2 * i], low_half(pairs[i]));
        y[2 * i + 1] = __fadd_rn(y[2 * i + 1], high_half(pairs[i]));
    }
}

// The position of a tile; where the image is enlarged, the position in the small image.
struct Tile {
    int first_output, first_w, first_h, first_n;
    bool leads;  // whether it is the first tile with its weights

    __device__ __forceinline__ Tile(int tile, const Problem& p) {
        const int columns = (p.outputs + BN - 1) / BN, box = tile / columns;
        first_output = (tile - box * columns) * BN;
        leads = box == 0;
#if CONV
        const int width = p.width >> UPSAMPLE, height = p.height >> UPSAMPLE;
        const int across = (width + (1 << p.box_width_log2) - 1) >> p.box_width_log2;
        const int down = (height + (1 << p.box_height_log2) - 1) >> p.box_height_log2;
        first_w = (box % across) << p.box_width_log2, first_h = (box / across % down) << p.box_height_log2;
        first_n = box / (across * down) * (BM / BOXES >> (p.box_width_log2 + p.box_height_log2));
#else
        first_w = box * BM, first_h = first_n = 0;
#endif
    }
};

extern "C" __global__ void __launch_bounds__(THREADS + 32, BLOCKS)
    product(const __grid_constant__ TensorMap x_map, const __grid_constant__ TensorMap w_map,
            const __grid_constant__ Problem p) {
    extern __shared__ __align__(1024) unsigned char shared[];
    const u32 a_at = shared_address(shared), b_at = a_at + STAGES * A_BYTES;
    const u32 full = b_at + STAGES * B_BYTES, empty = full + 8 * STAGES;
    const int warp = threadIdx.x / 32;

    const Tile tile(blockIdx.x / SPLIT, p);
    const int part = SPLIT > 1 ? cluster_rank() : 0;
    const int taps = p.kernel_height * p.kernel_width;
    const int steps = taps * ((p.channels + BK - 1) / BK);
    const int begin = steps * part / SPLIT, end = steps * (part + 1) / SPLIT;

    if (threadIdx.x == 0) {
        for (int stage = 0; stage < STAGES; ++stage) {
            barrier_init(full + 8 * stage, 1);
            barrier_init(empty + 8 * stage, CONSUMERS * 4);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    }
    __syncthreads();

    if (warp == CONSUMERS * 4) {
        if (threadIdx.x % 32 == 0) {
            // Weights are fetched into the L2 while the previous kernel still runs; one block per weights is enough.
            for (int step = begin; tile.leads && step < min(begin + STAGES, end); ++step)
                prefetch_weights(&w_map, step / taps * BK, step % taps, tile.first_output >> GATES_LAST);
            await_previous();
            int stage = 0, phase = 1;
            for (int step = begin; step < end; ++step) {
                const int tap = step % taps, c = step / taps * BK;
                const int dh = tap / p.kernel_width, dw = tap % p.kernel_width;
                const u32 ready = full + 8 * stage;
                barrier_wait(empty + 8 * stage, phase);
                barrier_expect(ready, A_BYTES + B_BYTES);
                const u32 to = a_at + stage * A_BYTES;
#if UPSAMPLE
                for (int parity = 0; parity < 4; ++parity)
                    copy_box(to + parity * (A_BYTES / 4), &x_map, ready, c,
                             tile.first_w + ((parity % 2 + dw - p.left) >> 1),
                             tile.first_h + ((parity / 2 + dh - p.top) >> 1), tile.first_n);
#else
                copy_box(to, &x_map, ready, c, tile.first_w * p.stride + dw - p.left,
                         tile.first_h * p.stride + dh - p.top, tile.first_n);
#endif
                copy_weights(b_at + stage * B_BYTES, &w_map, ready, c, tap, tile.first_output >> GATES_LAST);
                if (++stage == STAGES) stage = 0, phase ^= 1;
            }
        }
        if (SPLIT > 1) {
            __syncwarp();
            cluster_sync();
            cluster_sync();
        }
        return;
    }

    await_previous();
    const int group = warp / 4, lane = threadIdx.x % 32;
    int stage = 0, phase = 0;
    int sums[TILES][BN / 2] = {};
    int before = 0;
    for (int step = begin; step < end; ++step) {
        barrier_wait(full + 8 * stage, phase);
        const u64 a = operand(a_at + stage * A_BYTES + group * TILES * 64 * BK);
        const u64 b = operand(b_at + stage * B_BYTES);
        asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
        for (int k = 0; k < BK / 32; ++k)
#pragma unroll
            for (int t = 0; t < TILES; ++t) multiply(sums[t], a + (t * 64 * BK + k * 32) / 16, b + k * 32 / 16);
        asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
        asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
        if (step > begin && lane == 0) barrier_arrive(empty + 8 * before);
        before = stage;
        if (++stage == STAGES) stage = 0, phase ^= 1;
    }
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#pragma unroll
    for (int t = 0; t < TILES; ++t)
#pragma unroll
        for (int i = 0; i < BN / 2; ++i) asm volatile("" : "+r"(sums[t][i])::"memory");

    // A thread finishes eight columns of some rows. What is added to them is loaded before it is needed.
    constexpr int CHUNKS = BN / 8, STRIDE = THREADS / CHUNKS, ROWS = BM / SPLIT;
    constexpr int TURNS = (ROWS + STRIDE - 1) / STRIDE;
    const int chunk = threadIdx.x % CHUNKS, output = tile.first_output + chunk * 8;
    const bool active = threadIdx.x < STRIDE * CHUNKS && output < p.outputs;
    const int first_row = part * ROWS + threadIdx.x / CHUNKS, end_row = (part + 1) * ROWS;
    const auto locate = [&](int row, int& w, int& h, int& n) {
#if CONV
        const int in_box = row % (BM / BOXES), parity = row / (BM / BOXES);
        w = tile.first_w + (in_box & ((1 << p.box_width_log2) - 1));
        h = tile.first_h + (in_box >> p.box_width_log2 & ((1 << p.box_height_log2) - 1));
        n = tile.first_n + (in_box >> (p.box_width_log2 + p.box_height_log2));
        if (UPSAMPLE) w = 2 * w + parity % 2, h = 2 * h + parity / 2;
        const bool inside = row < end_row && w < p.width && h < p.height && n < p.samples;
        return inside ? (n * p.height + h) * p.width + w : -1;
#else
        w = tile.first_w + row, h = n = 0;
        return row < end_row && w < p.width ? w : -1;
#endif
    };
    int correction[8];
    float scale[8], bias[8];
    uint4 residual[TURNS];
    const auto fetch = [&]() {
        if (!active) return;
        load_columns(correction, p.correction, output, p.outputs);
        load_columns(scale, p.scale, output, p.outputs);
        if (p.bias) load_columns(bias, p.bias, output, p.outputs);
        if (p.residual)
#pragma unroll
            for (int turn = 0; turn < TURNS; ++turn) {
                int w, h, n;
                const int pixel = locate(first_row + turn * STRIDE, w, h, n);
                if (pixel >= 0)
                    residual[turn] = *reinterpret_cast<const uint4*>(
                        p.residual + static_cast<size_t>(pixel) * p.outputs + output);
            }
    };
    // It is loaded while the sums are still in registers, if a thread has enough registers for both.
    constexpr int ROOM = 512 / ((BLOCKS * (CONSUMERS * 4 + 1) + 3) / 4) - 32;
    constexpr bool EARLY = TILES * BN / 2 + 24 + 4 * TURNS <= ROOM;
    if (EARLY) fetch();
    sync_threads(THREADS);  // no warp reads operands any more

    int* const staged = reinterpret_cast<int*>(shared);
#pragma unroll
    for (int t = 0; t < TILES; ++t) {
        const int row = (group * TILES + t) * 64 + (warp % 4) * 16 + lane / 4;
        int* const at = staged + row * PITCH + lane % 4 * 2;
#pragma unroll
        for (int j = 0; j < BN / 8; ++j) {
            *reinterpret_cast<int2*>(at + 8 * j) = make_int2(sums[t][4 * j], sums[t][4 * j + 1]);
            *reinterpret_cast<int2*>(at + 8 * j + 8 * PITCH) = make_int2(sums[t][4 * j + 2], sums[t][4 * j + 3]);
        }
    }
    if (!EARLY) fetch();
    if (SPLIT > 1)
        cluster_sync();
    else
        sync_threads(THREADS);

    if (active) {
#if GEGLU || CODES
        const Quantizer quantize = quantizer_of(p.out_scale, p.out_zero_point, p.out_shift, p.quant_max);
#endif
#pragma unroll
        for (int turn = 0; turn < TURNS; ++turn) {
            const int row = first_row + turn * STRIDE;
            int w, h, n;
            const int pixel = locate(row, w, h, n);
            if (pixel < 0) continue;
            const int place = row * PITCH + chunk * 8;
            int total[8];
            if (SPLIT == 1) {
                *reinterpret_cast<int4*>(total) = *reinterpret_cast<const int4*>(staged + place);
                *reinterpret_cast<int4*>(total + 4) = *reinterpret_cast<const int4*>(staged + place + 4);
            } else {
#pragma unroll
                for (int i = 0; i < 8; ++i) total[i] = 0;
#pragma unroll
                for (int other = 0; other < SPLIT; ++other) {
                    const u32 from = peer_address(a_at + place * 4, other);
                    const int4 left = load_peer(from), right = load_peer(from + 16);
                    total[0] += left.x, total[1] += left.y, total[2] += left.z, total[3] += left.w;
                    total[4] += right.x, total[5] += right.y, total[6] += right.z, total[7] += right.w;
                }
            }
#if CONV
            const int above = outside(h * p.stride - p.top, p.seen_height, p.kernel_height, p.bottom);
            const int border = above * ((p.left + 1) * (p.right + 1)) +
                               outside(w * p.stride - p.left, p.seen_width, p.kernel_width, p.right);
            int share[8];
#pragma unroll
            for (int i = 0; i < 8; ++i) share[i] = correction[i];
            if (border) load_eight(share, p.correction + border * p.outputs + output);
#else
            const int(&share)[8] = correction;
#endif
            float y[8];
#pragma unroll
            for (int i = 0; i < 8; ++i) y[i] = __fmul_rn(__int2float_rn(total[i] - share[i]), scale[i]);
            if (p.bias)
#pragma unroll
                for (int i = 0; i < 8; ++i) y[i] = __fadd_rn(y[i], bias[i]);
#if GEGLU
            u32 codes[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) codes[i] = quantize(y[2 * i] * gelu(y[2 * i + 1]));
            const size_t to = static_cast<size_t>(pixel) * (p.outputs / 2) + output / 2;
            *reinterpret_cast<u32*>(static_cast<unsigned char*>(p.out) + to) =
                four_bytes(codes[0], codes[1], codes[2], codes[3]);
#elif FLOATS
            float* const to = static_cast<float*>(p.out) + static_cast<size_t>(pixel) * p.outputs + output;
            *reinterpret_cast<float4*>(to) = make_float4(y[0], y[1], y[2], y[3]);
            *reinterpret_cast<float4*>(to + 4) = make_float4(y[4], y[5], y[6], y[7]);
#elif BFLOATS
            const size_t to = static_cast<size_t>(pixel) * p.outputs + output;
            *reinterpret_cast<uint4*>(static_cast<u16*>(p.out) + to) = make_uint4(
                bfloat_pair(y[0], y[1]), bfloat_pair(y[2], y[3]), bfloat_pair(y[4], y[5]), bfloat_pair(y[6], y[7]));
#else
            const size_t to = static_cast<size_t>(pixel) * p.outputs + output;
#if CONV
            if (p.sample_bias)
                add_halves(y, *reinterpret_cast<const uint4*>(p.sample_bias + n * p.outputs + output));
#endif
            if (p.residual) add_halves(y, residual[turn]);
#if CODES
            u32 codes[8];
#pragma unroll
            for (int i = 0; i < 8; i += 2) {
                const u32 pair = half_pair(y[i], y[i + 1]);
                codes[i] = quantize(low_half(pair)), codes[i + 1] = quantize(high_half(pair));
            }
            *reinterpret_cast<uint2*>(static_cast<unsigned char*>(p.out) + to) = make_uint2(
                four_bytes(codes[0], codes[1], codes[2], codes[3]), four_bytes(codes[4], codes[5], codes[6], codes[7]));
#else
            *reinterpret_cast<uint4*>(static_cast<u16*>(p.out) + to) = make_uint4(
                half_pair(y[0], y[1]), half_pair(y[2], y[3]), half_pair(y[4], y[5]), half_pair(y[6], y[7]));
#endif
#endif
        }
    }
    if (SPLIT > 1) cluster_sync();  // peers may still read this block's part
}
