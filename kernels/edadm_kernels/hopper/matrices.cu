// Products of large matrices of int8 codes on the tensor cores of compute capability 9.0: one left operand, whose
// columns may be in two tensors, and up to four right operands, each with a separate output.
//
// Blocks stay on their multiprocessor and compute one tile of BM rows and BN columns after another. Two groups of four
// warps multiply 64 rows each. One warp copies BK channels of both operands per step into one of STAGES buffers, ahead
// of the products and across tiles. The CLUSTER blocks of a cluster compute tiles below each other: each block copies
// its rows and a part of the columns, which all of them multiply. The second group begins LAG steps after the first, so
// that one group writes its sums while the other uses the tensor cores alone.
//
// These macros are defined: BM (128), BN, BK, STAGES, CLUSTER, LAG, BOX, BFLOATS (bfloat16 is written instead of
// float16) and RASTER (the number of rows of tiles that are computed one after another). Before this text is the
// function `multiply`.

constexpr int GROUPS = 2, THREADS = GROUPS * 128;
constexpr int A_BYTES = BM * BK, B_BYTES = BN * BK;
constexpr u64 SWIZZLE = BK == 128 ? 1 : 2;
// BOX (32 or 64) is the number of columns that are written at once.
constexpr int BOX_BYTES = 16 * BOX * 2;          // by a warp; half of them where codes are written
constexpr int BOXES = BN / BOX;
constexpr int PART = BN / CLUSTER;               // columns that one block copies
static_assert(BM == GROUPS * 64 && BN % BOX == 0 && (PART * BK) % 1024 == 0 && LAG < STAGES, "tile");

struct Columns {
    const float* scale;
    const int* correction;
    const float* bias;          // or null
    const float* out_scale;     // of the codes of gelu(y), or null if y is written in floating point
    const int* out_zero_point;
    float quant_max;
    int outputs, tiles;
};

struct Problem {
    Columns columns[4];
    int rows, products, row_tiles, column_tiles;  // row tiles of a cluster
    int first_products;                           // columns of the first tensor of the left operand
};

__device__ __forceinline__ u64 operand(u32 address) {
    return static_cast<u64>((address & 0x3ffff) >> 4) | (1ull << 16) | (static_cast<u64>(8 * BK >> 4) << 32) |
           (SWIZZLE << 62);
}

__device__ __forceinline__ void copy_rows(u32 target, const TensorMap* map, u32 barrier, int c, int row) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(
            target),
        "l"(map), "r"(barrier), "r"(c), "r"(row)
        : "memory");
}

__device__ __forceinline__ void copy_rows_to_all(u32 target, const TensorMap* map, u32 barrier, int c, int row) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, "
        "{%3, %4}], [%2], %5;" ::"r"(target),
        "l"(map), "r"(barrier), "r"(c), "r"(row), "h"(static_cast<u16>((1 << CLUSTER) - 1))
        : "memory");
}

__device__ __forceinline__ void write_box(const TensorMap* map, u32 source, int column, int row) {
    asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];" ::"l"(map), "r"(source),
                 "r"(column), "r"(row)
                 : "memory");
}

// Arrives at a barrier of any block of the cluster. It orders no memory accesses: the operands were read by matrix
// instructions, which have ended. (A release to the cluster is a fence of the whole device, 0.8 microseconds per step.)
__device__ __forceinline__ void arrive_at(u32 peer_barrier) {
    asm volatile("mbarrier.arrive.relaxed.cluster.shared::cluster.b64 _, [%0];" ::"r"(peer_barrier) : "memory");
}

// Brings the line of an address into the first-level cache.
__device__ __forceinline__ void touch(const void* address) {
    u32 unused;
    asm volatile("ld.global.ca.u32 %0, [%1];" : "=r"(unused) : "l"(address));
}

__device__ __forceinline__ void store_matrices(u32 address, u32 a, u32 b, u32 c, u32 d) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(a), "r"(b),
                 "r"(c), "r"(d)
                 : "memory");
}

__device__ __forceinline__ void store_word(u32 address, u32 word) {
    asm volatile("st.shared.u32 [%0], %1;" ::"r"(address), "r"(word) : "memory");
}

// The rows and columns of a tile. RASTER rows of tiles are computed one after another, so that they share operands.
struct Tile {
    int row, column, member;  // first row of the cluster; first column within the right operand `member`

    __device__ __forceinline__ Tile(int tile, const Problem& p) {
        const int width = RASTER * p.column_tiles, band = tile / width, inside = tile - band * width;
        const int high = min(RASTER, p.row_tiles - band * RASTER);
        row = (band * RASTER + inside % high) * (BM * CLUSTER);
        int left = inside / high;
        member = 0;
        while (member < 3 && left >= p.columns[member].tiles) left -= p.columns[member++].tiles;
        column = left * BN;
    }
};

// What the epilogue needs of the columns of a thread's box.
struct Constants {
    float2 scale[BOX / 8], bias[BOX / 8];
    int2 correction[BOX / 8];

    // There are no branches, which would make one load wait for another; columns past the end repeat the last two.
    __device__ __forceinline__ void load(const Columns& from, int column) {
        const float* const biases = from.bias ? from.bias : from.scale;
        const float factor = from.bias ? 1.0f : 0.0f;
#pragma unroll
        for (int j = 0; j < BOX / 8; ++j) {
            const int at = min(column + 8 * j, from.outputs - 2);
            scale[j] = __ldg(reinterpret_cast<const float2*>(from.scale + at));
            correction[j] = __ldg(reinterpret_cast<const int2*>(from.correction + at));
            bias[j] = __ldg(reinterpret_cast<const float2*>(biases + at));
        }
#pragma unroll
        for (int j = 0; j < BOX / 8; ++j) bias[j].x *= factor, bias[j].y *= factor;
    }
};

// Computes y of blocks j and j + 1 of eight columns: of a pair of columns in one row and in the row eight below.
__device__ __forceinline__ void finish(float (&y)[2][4], const int* sums, const Constants& by, int j) {
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int at = 0; at < 4; ++at) {
            const int correction = at % 2 ? by.correction[j + i].y : by.correction[j + i].x;
            const float scale = at % 2 ? by.scale[j + i].y : by.scale[j + i].x;
            const float bias = at % 2 ? by.bias[j + i].y : by.bias[j + i].x;
            y[i][at] = __fadd_rn(__fmul_rn(__int2float_rn(sums[4 * i + at] - correction), scale), bias);
        }
}

__device__ __forceinline__ u32 pair(float x, float y) {
#if BFLOATS
    return bfloat_pair(x, y);
#else
    return half_pair(x, y);
#endif
}

// Computes GELU approximated by a hyperbolic tangent: 0.5 y (1 + tanh u) = y / (1 + exp(-2 u)).
__device__ __forceinline__ float gelu_tanh(float y) {
    // 2 u log2(e) = y (2.3022082 + 0.10294324 y^2)
    float e, r;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(e) : "f"(-y * fmaf(0.10294324f, y * y, 2.3022082f)));
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(1.0f + e));
    return y * r;
}

extern "C" __global__ void __launch_bounds__(THREADS + 128, 1)
    matrices(const __grid_constant__ TensorMap x_map, const __grid_constant__ TensorMap more_map,
             const __grid_constant__ TensorMap w0,
             const __grid_constant__ TensorMap w1, const __grid_constant__ TensorMap w2,
             const __grid_constant__ TensorMap w3, const __grid_constant__ TensorMap y0,
             const __grid_constant__ TensorMap y1, const __grid_constant__ TensorMap y2,
             const __grid_constant__ TensorMap y3, const __grid_constant__ Problem p) {
    extern __shared__ __align__(1024) unsigned char shared[];
    const u32 a_at = shared_address(shared), b_at = a_at + STAGES * A_BYTES;
    const u32 staged = b_at + STAGES * B_BYTES;
    const u32 full = staged + GROUPS * 4 * 2 * BOX_BYTES, empty = full + 8 * STAGES, begun = empty + 8 * STAGES;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const u32 rank = CLUSTER > 1 ? cluster_rank() : 0;
    const int first = blockIdx.x / CLUSTER, clusters = gridDim.x / CLUSTER;
    const int tiles = p.row_tiles * p.column_tiles, steps = (p.products + BK - 1) / BK;

    if (threadIdx.x == 0) {
        for (int stage = 0; stage < STAGES; ++stage) {
            barrier_init(full + 8 * stage, 1);
            barrier_init(empty + 8 * stage, GROUPS * 4 * CLUSTER);
        }
        barrier_init(begun, 1);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    }
    __syncthreads();
    if (CLUSTER > 1) cluster_sync();

    if (warp >= GROUPS * 4) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
        if (threadIdx.x == THREADS) {
            await_previous();
            int stage = 0, phase = 1;
            for (int at = first; at < tiles; at += clusters) {
                const Tile tile(at, p);
                const TensorMap* const w_map = tile.member == 0 ? &w0 : tile.member == 1 ? &w1 : tile.member == 2 ? &w2 : &w3;
                for (int step = 0; step < steps; ++step) {
                    const u32 ready = full + 8 * stage;
                    barrier_wait(empty + 8 * stage, phase);
                    barrier_expect(ready, A_BYTES + B_BYTES);
                    const int past = step * BK - p.first_products;
                    copy_rows(a_at + stage * A_BYTES, past < 0 ? &x_map : &more_map, ready,
                              past < 0 ? step * BK : past, tile.row + rank * BM);
                    const u32 to = b_at + stage * B_BYTES + rank * (PART * BK);
                    if (CLUSTER > 1)
                        copy_rows_to_all(to, w_map, ready, step * BK, tile.column + rank * PART);
                    else
                        copy_rows(to, w_map, ready, step * BK, tile.column);
                    if (++stage == STAGES) stage = 0, phase ^= 1;
                }
            }
        }
        __syncwarp();
        if (CLUSTER > 1) cluster_sync();
    } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    await_previous();
    const int group = warp / 4;
    const u32 boxes = staged + warp * 2 * BOX_BYTES;
    // A warp stores four matrices of 8x8 values at once; each lane gives the address of one row.
    const u32 row_at = lane % 16 * (BOX * 2), turned = BOX == 64 ? lane % 8 : lane / 2 % 4;
    // A lane stores four codes of a row and four of the row eight below, which has the same swizzle.
    const u32 codes_at = lane / 4 * BOX + lane % 2 * 8 + lane % 4 / 2 * 4;
    const u32 codes_turned = BOX == 64 ? lane / 8 : lane / 16;
    const u32 peer_empty = CLUSTER > 1 ? peer_address(empty, lane % CLUSTER) : empty;
    int stage = 0, phase = 0, box = 0;
    if (LAG > 0 && group == 1) barrier_wait(begun, 0);
    for (int at = first; at < tiles; at += clusters) {
        const Tile tile(at, p);
        const Columns& columns = p.columns[tile.member];
        if (warp * 32 < BN && tile.column + warp * 32 + lane < columns.outputs) {
            const int at = tile.column + warp * 32 + lane;
            touch(columns.scale + at), touch(columns.correction + at);
            if (columns.bias) touch(columns.bias + at);
        }
        int sums[BN / 2];
        int before = 0;
        for (int step = 0; step < steps; ++step) {
            barrier_wait(full + 8 * stage, phase);
            const u64 a = operand(a_at + stage * A_BYTES + group * 64 * BK);
            const u64 b = operand(b_at + stage * B_BYTES);
            asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
            for (int k = 0; k < BK / 32; ++k) multiply(sums, a + k * 2, b + k * 2, step + k > 0);
            asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
            if (LAG > 0 && at == first && step == min(LAG, steps) - 1 && threadIdx.x == 0) barrier_arrive(begun);
            asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
            if (step > 0 && lane < CLUSTER) {
                if (CLUSTER > 1)
                    arrive_at(peer_empty + 8 * before);
                else
                    barrier_arrive(empty + 8 * before);
            }
            before = stage;
            if (++stage == STAGES) stage = 0, phase ^= 1;
        }
        const bool as_codes = columns.out_scale != nullptr;
        const Quantizer quantize(as_codes ? __ldg(columns.out_scale) : 1.0f,
                                 as_codes ? __ldg(columns.out_zero_point) : 0, columns.quant_max);
        const int column = tile.column + lane % 4 * 2;
        asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
        if (lane < CLUSTER) {
            if (CLUSTER > 1)
                arrive_at(peer_empty + 8 * before);
            else
                barrier_arrive(empty + 8 * before);
        }
#pragma unroll
        for (int i = 0; i < BN / 2; ++i) asm volatile("" : "+r"(sums[i])::"memory");

        const TensorMap* const y_map = tile.member == 0 ? &y0 : tile.member == 1 ? &y1 : tile.member == 2 ? &y2 : &y3;
#pragma unroll
        for (int c = 0; c < BOXES; ++c) {
            Constants constants;
            constants.load(columns, column + c * BOX);
            if (lane == 0) asm volatile("cp.async.bulk.wait_group.read 1;" ::: "memory");
            __syncwarp();  // the box that was written two rounds ago has been copied
            const u32 to = boxes + box * BOX_BYTES;
            if (!as_codes) {
#pragma unroll
                for (int j = 0; j < BOX / 8; j += 2) {
                    float y[2][4];
                    finish(y, sums + c * (BOX / 2) + j * 4, constants, j);
                    store_matrices(to + row_at + ((j + lane / 16) ^ turned) * 16, pair(y[0][0], y[0][1]),
                                   pair(y[0][2], y[0][3]), pair(y[1][0], y[1][1]), pair(y[1][2], y[1][3]));
                }
            } else {
#pragma unroll
                for (int j = 0; j < BOX / 8; j += 2) {
                    float y[2][4];
                    finish(y, sums + c * (BOX / 2) + j * 4, constants, j);
                    u32 codes[2];
#pragma unroll
                    for (int i = 0; i < 2; ++i)
                        codes[i] = four_bytes(quantize(gelu_tanh(y[i][0])), quantize(gelu_tanh(y[i][1])),
                                              quantize(gelu_tanh(y[i][2])), quantize(gelu_tanh(y[i][3])));
                    // Of two lanes, the left stores four columns of the first block and the right of the second.
                    const u32 mine = lane % 2 ? codes[1] : codes[0];
                    const u32 other = __shfl_xor_sync(0xffffffff, lane % 2 ? codes[0] : codes[1], 1);
                    const u32 left = lane % 2 ? other : mine, right = lane % 2 ? mine : other;
                    const u32 at = to + codes_at + (((j / 2) ^ codes_turned) * 16);
                    store_word(at, __byte_perm(left, right, 0x5410));
                    store_word(at + 8 * BOX, __byte_perm(left, right, 0x7632));
                }
            }
            asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
            __syncwarp();
            const int from = tile.column + c * BOX;
            if (lane == 0) {
                if (from < columns.outputs)  // in bytes: two per 16-bit float
                    write_box(y_map, to, as_codes ? from : 2 * from, tile.row + rank * BM + warp * 16);
                asm volatile("cp.async.bulk.commit_group;" ::: "memory");
            }
            box ^= 1;
        }
    }
    if (lane == 0) asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
    if (CLUSTER > 1) cluster_sync();
    }
}
