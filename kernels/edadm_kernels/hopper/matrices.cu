// Products of large matrices of int8 codes on the tensor cores of compute capability 9.0: one left operand, whose
// columns may be in two tensors, and up to four right operands, each with a separate output.
//
// Blocks stay on their multiprocessor and compute one tile of BM rows and BN columns after another. Two groups of four
// warps alternate: one group multiplies a tile while the other writes the sums of the tile before. One warp copies BK
// channels of both operands per step into one of STAGES buffers, ahead of the products and across tiles. The CLUSTER
// blocks of a cluster compute tiles below each other: each block copies its rows and a part of the columns, which all
// of them multiply.
//
// These macros are defined: BM (128), BN, BK, STAGES, CLUSTER, BOX (columns that are written at once, 32 or 64),
// BFLOATS (bfloat16 is written instead of float16), GEGLU (values and gates alternate, and the codes of gated values
// are written), GATES_LAST (they alternate in a tile, but in the right operand and in its constants all values come
// before all gates), RESIDUAL (a matrix is added to the product, which a vector per sample may scale before) and RASTER
// (the number of rows of tiles that are computed one after another). Before this text is the function `multiply`.

constexpr int GROUPS = 2, THREADS = GROUPS * 128;
constexpr int HALVES = BM / 64;                  // matrix instructions for the rows of a tile
constexpr int A_BYTES = BM * BK, B_BYTES = BN * BK;
constexpr u64 SWIZZLE = BK == 128 ? 1 : 2;
constexpr int BOX_BYTES = 16 * (GEGLU ? 32 : 2 * BOX);  // of a warp; half of them if codes of gelu(y) are written
constexpr int BOXES = BN / BOX;
constexpr int PART = BN / CLUSTER;               // columns that one block copies
constexpr int SLOTS = RESIDUAL ? 4 : 2;          // boxes per warp
// Words per group: scales, corrections and biases of its columns, and their factors in 16 bits.
constexpr int CONSTANTS = 3 * BN, ALL_CONSTANTS = CONSTANTS + (RESIDUAL ? BN / 2 : 0);
static_assert(BM == HALVES * 64 && BN % BOX == 0 && (PART * BK) % 1024 == 0, "tile");
static_assert(!GEGLU || BOX == 64, "a box of gated values has 32 bytes");
static_assert(!GATES_LAST || (GEGLU && CLUSTER == 1), "gates");
static_assert(!RESIDUAL || (!GEGLU && BN / BOX * HALVES >= SLOTS), "residual");

struct Columns {
    const float* scale;
    const int* correction;
    const float* bias;          // or null
    const float* out_scale;     // of the codes, or null if y is written in floating point
    const int* out_zero_point;  // of unsigned codes; if it is null, `out_scale` is the inverse of a scale
    const float* out_shift;     // the zero-point of signed codes, if `out_zero_point` is null
    float quant_max;
    int outputs, tiles;
};

struct Problem {
    Columns columns[4];
    int rows, products, row_tiles, column_tiles;  // row tiles of a cluster
    int first_products;                           // columns of the first tensor of the left operand
    int rows_per_sample, factor_stride;           // rows that share a row of factors; elements between these rows
    const u16* factor;                            // 16-bit [samples, outputs], or null
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

// Copies the rows of values from `pair` on, and between them the rows of their gates.
__device__ __forceinline__ void copy_pairs(u32 target, const TensorMap* map, u32 barrier, int c, int pair) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], "
        "[%2];" ::"r"(target),
        "l"(map), "r"(barrier), "r"(c), "r"(0), "r"(pair)
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

// Starts a copy of 16 bytes into shared memory, or of zeros if `bytes` is 0.
__device__ __forceinline__ void copy_words(u32 target, const void* from, int bytes) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(target), "l"(from), "r"(bytes) : "memory");
}

// Starts a copy of 4 bytes into shared memory, or of zeros if `bytes` is 0.
__device__ __forceinline__ void copy_word(u32 target, const void* from, int bytes) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(target), "l"(from), "r"(bytes) : "memory");
}

__device__ __forceinline__ void sync_group(int group) {
    asm volatile("bar.sync %0, 128;" ::"r"(group + 1) : "memory");
}

__device__ __forceinline__ void store_matrices(u32 address, u32 a, u32 b, u32 c, u32 d) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(a), "r"(b),
                 "r"(c), "r"(d)
                 : "memory");
}

__device__ __forceinline__ uint4 load_matrices(u32 address) {
    uint4 v;
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "r"(address)
                 : "memory");
    return v;
}

__device__ __forceinline__ u32 load_word(u32 address) {
    u32 word;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(word) : "r"(address) : "memory");
    return word;
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

// Starts the copies of the constants of a tile's columns into shared memory.
__device__ __forceinline__ void copy_constants(u32 target, const Columns& from, int column, int thread) {
    constexpr int WORDS = GATES_LAST ? 1 : 4;  // neighbors in memory
    for (int i = thread; i < CONSTANTS / WORDS; i += 128) {
        const int kind = i / (BN / WORDS), at = column + i % (BN / WORDS) * WORDS;
        const void* const source = kind == 0 ? static_cast<const void*>(from.scale)
                                   : kind == 1 ? static_cast<const void*>(from.correction)
                                               : static_cast<const void*>(from.bias);
        const bool exists = source != nullptr && at < from.outputs;
#if GATES_LAST
        const int place = at / 2 + at % 2 * (from.outputs / 2);
        copy_word(target + 4 * i, exists ? static_cast<const float*>(source) + place : from.scale, exists ? 4 : 0);
#else
        copy_words(target + 16 * i, exists ? static_cast<const float*>(source) + at : from.scale, exists ? 16 : 0);
#endif
    }
}

// Starts the copies of the factors of a tile's columns into shared memory.
__device__ __forceinline__ void copy_factors(u32 target, const Problem& p, int row, int column, int thread) {
    const int sample = min(row, p.rows - 1) / p.rows_per_sample;
    const u16* const from = p.factor + static_cast<size_t>(sample) * p.factor_stride;
    for (int i = thread; i < BN / 8; i += 128) {
        const bool exists = column + 8 * i < p.columns[0].outputs;
        copy_words(target + 16 * i, exists ? from + column + 8 * i : p.factor, exists ? 16 : 0);
    }
}

// The load has no fixed place among other instructions: `address` depends on the barrier that it comes after.
__device__ __forceinline__ float2 load_floats(u32 address) {
    float2 v;
    asm("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(v.x), "=f"(v.y) : "r"(address));
    return v;
}

// The constants of a thread's two columns in each of two blocks of eight columns.
struct Constants {
    float2 scale[2], bias[2];
    int2 correction[2];

    __device__ __forceinline__ explicit Constants(u32 address) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const float2 c = load_floats(address + 4 * BN + 32 * i);
            scale[i] = load_floats(address + 32 * i);
            correction[i] = make_int2(__float_as_int(c.x), __float_as_int(c.y));
            bias[i] = load_floats(address + 8 * BN + 32 * i);
        }
    }
};

// Computes y of two blocks of eight columns: of a pair of columns in one row and in the row eight below.
__device__ __forceinline__ void finish(float (&y)[2][4], const int* sums, const Constants& by) {
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int at = 0; at < 4; ++at) {
            const int correction = at % 2 ? by.correction[i].y : by.correction[i].x;
            const float scale = at % 2 ? by.scale[i].y : by.scale[i].x;
            const float bias = at % 2 ? by.bias[i].y : by.bias[i].x;
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

__device__ __forceinline__ float2 unpaired(u32 pair) {
#if BFLOATS
    return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
#else
    return make_float2(low_half(pair), high_half(pair));
#endif
}

// Computes `residual + y * factor` of a pair of columns.
__device__ __forceinline__ u32 added(float x, float y, u32 residual, float2 factor) {
    const float2 r = unpaired(residual);
    return pair(__fadd_rn(r.x, __fmul_rn(x, factor.x)), __fadd_rn(r.y, __fmul_rn(y, factor.y)));
}

// Computes the code of GELU approximated by a hyperbolic tangent, 0.5 y (1 + tanh u), in the low byte of a word: `half`
// is half of the inverse of the codes' scale, and `magic` adds their zero-point while it rounds. The tangent is off by
// 2^-11 at most.
__device__ __forceinline__ u32 gelu_code(float y, float half, float magic, const Quantizer& by) {
    const float scaled = y * half;
    float t;
    asm("tanh.approx.f32 %0, %1;" : "=f"(t) : "f"(y * fmaf(0.035677408f, y * y, 0.79788456f)));
    return __float_as_int(fminf(fmaxf(fmaf(scaled, t, scaled), by.low), by.high) + magic);
}

// Byte b of the word of each of four neighboring lanes belongs to block b. Returns the four bytes of one block to each
// lane: those of block 0 to the first lane, and so on, in the order of the lanes.
__device__ __forceinline__ u32 transposed(u32 word, int lane) {
    const u32 beside = __shfl_xor_sync(0xffffffff, word, 1);
    const u32 pairs = __byte_perm(word, beside, lane % 2 ? 0x3715 : 0x6240);
    const u32 across = __shfl_xor_sync(0xffffffff, pairs, 2);
    return __byte_perm(pairs, across, lane % 4 < 2 ? 0x5410 : 0x3276);
}

extern "C" __global__ void __launch_bounds__(THREADS + 128, 1)
    matrices(const __grid_constant__ TensorMap x_map, const __grid_constant__ TensorMap more_map,
             const __grid_constant__ TensorMap w0,
             const __grid_constant__ TensorMap w1, const __grid_constant__ TensorMap w2,
             const __grid_constant__ TensorMap w3, const __grid_constant__ TensorMap y0,
             const __grid_constant__ TensorMap y1, const __grid_constant__ TensorMap y2,
             const __grid_constant__ TensorMap y3,
#if RESIDUAL
             const __grid_constant__ TensorMap r_map,
#endif
             const __grid_constant__ Problem p) {
    extern __shared__ __align__(1024) unsigned char shared[];
    const u32 a_at = shared_address(shared), b_at = a_at + STAGES * A_BYTES;
    const u32 staged = b_at + STAGES * B_BYTES;
    const u32 constants_at = staged + GROUPS * 4 * SLOTS * BOX_BYTES;
    const u32 full = constants_at + GROUPS * ALL_CONSTANTS * 4, empty = full + 8 * STAGES, turns = empty + 8 * STAGES;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const u32 rank = CLUSTER > 1 ? cluster_rank() : 0;
    const int first = blockIdx.x / CLUSTER, clusters = gridDim.x / CLUSTER;
    const int tiles = p.row_tiles * p.column_tiles, steps = (p.products + BK - 1) / BK;

    if (threadIdx.x == 0) {
        for (int stage = 0; stage < STAGES; ++stage) {
            barrier_init(full + 8 * stage, 1);
            barrier_init(empty + 8 * stage, 4 * CLUSTER);
        }
        for (int group = 0; group < GROUPS; ++group) barrier_init(turns + 8 * group, 4);
#if RESIDUAL
        for (int slot = 0; slot < GROUPS * 4 * SLOTS; ++slot) barrier_init(turns + 8 * (GROUPS + slot), 1);
#endif
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    }
    __syncthreads();
    if (CLUSTER > 1) cluster_sync();

    if (warp >= GROUPS * 4) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
        if (threadIdx.x == THREADS) {
            await_previous();
            int stage = 0, phase = 1;
            for (int at = first; at < tiles; at += clusters) {
                const Tile tile(at, p);
                const int member = tile.member;
                const TensorMap* const w_map = member == 0 ? &w0 : member == 1 ? &w1 : member == 2 ? &w2 : &w3;
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
                    else if (GATES_LAST)
                        copy_pairs(to, w_map, ready, step * BK, tile.column / 2);
                    else
                        copy_rows(to, w_map, ready, step * BK, tile.column);
                    if (++stage == STAGES) stage = 0, phase ^= 1;
                }
            }
        }
        __syncwarp();
        if (CLUSTER > 1) cluster_sync();
    } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");
    await_previous();
    const int group = warp / 4;
    const u32 boxes = staged + warp * SLOTS * BOX_BYTES, constants = constants_at + group * ALL_CONSTANTS * 4;
    // A warp stores four matrices of 8x8 values at once; each lane gives the address of one row.
    const u32 row_at = lane % 16 * (BOX * 2), turned = BOX == 64 ? lane % 8 : lane / 2 % 4;
    // A lane stores four codes of a row and four of the row eight below, which has the same swizzle.
    const u32 codes_at = lane / 4 * BOX + lane % 2 * 8 + lane % 4 / 2 * 4;
    const u32 codes_turned = BOX == 64 ? lane / 8 : lane / 16;
    const u32 peer_empty = CLUSTER > 1 ? peer_address(empty, lane % CLUSTER) : empty;
#if RESIDUAL
    const u32 arrived = turns + 8 * (GROUPS + warp * SLOTS);
    int boxes_before = 0;  // of this warp before this tile
#endif
    int box = 0, done = group * steps;  // steps of both groups before this tile
    for (int at = first + group * clusters; at < tiles; at += GROUPS * clusters, done += GROUPS * steps) {
        const Tile tile(at, p);
        const Columns& columns = p.columns[tile.member];
        sync_group(group);  // every warp has read the constants of the previous tile
        copy_constants(constants, columns, tile.column, threadIdx.x % 128);
#if RESIDUAL
        if (p.factor) copy_factors(constants + 12 * BN, p, tile.row + rank * BM, tile.column, threadIdx.x % 128);
        // Copies a box of the residual; the boxes of a warp follow one another through its slots, across tiles.
        const auto fetch = [&](int place) {
            const int slot = (boxes_before + place) % SLOTS;
            barrier_expect(arrived + 8 * slot, BOX_BYTES);
            copy_rows(boxes + slot * BOX_BYTES, &r_map, arrived + 8 * slot, 2 * (tile.column + place / HALVES * BOX),
                      tile.row + rank * BM + place % HALVES * 64 + warp % 4 * 16);
        };
        if (lane == 0) {
            asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");  // the boxes of the tile before are written
            for (int place = 0; place < SLOTS; ++place) fetch(place);
        }
#endif
        // Waits until the other group has received all of its steps: the parity of a buffer's barrier distinguishes a
        // step from the next one in that buffer, but not from the one after that.
        const int turn = done / (GROUPS * steps) + group - 1;
        if (turn >= 0) barrier_wait(turns + 8 * group, turn % 2);
        int sums[HALVES][BN / 2];
        int stage = done % STAGES, phase = done / STAGES % 2, before = 0;
        for (int step = 0; step < steps; ++step) {
            barrier_wait(full + 8 * stage, phase);
            const u64 a = operand(a_at + stage * A_BYTES);
            const u64 b = operand(b_at + stage * B_BYTES);
            asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
            for (int k = 0; k < BK / 32; ++k)
#pragma unroll
                for (int half = 0; half < HALVES; ++half)
                    multiply(sums[half], a + half * (64 * BK / 16) + k * 2, b + k * 2, step + k > 0);
            asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
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
        if (lane == 0) barrier_arrive(turns + 8 * (1 - group));
        const bool as_codes = columns.out_scale != nullptr;
        const Quantizer quantize = as_codes ? quantizer_of(columns.out_scale, columns.out_zero_point,
                                                           columns.out_shift, columns.quant_max)
                                            : Quantizer(1.0f, 0, 0.0f);
        asm volatile("cp.async.wait_all;" ::: "memory");
        asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
        if (lane < CLUSTER) {
            if (CLUSTER > 1)
                arrive_at(peer_empty + 8 * before);
            else
                barrier_arrive(empty + 8 * before);
        }
#pragma unroll
        for (int half = 0; half < HALVES; ++half)
#pragma unroll
            for (int i = 0; i < BN / 2; ++i) asm volatile("" : "+r"(sums[half][i])::"memory");
        sync_group(group);  // the constants of all threads have arrived

        u32 of_lane = constants + lane % 4 * 8;
        asm volatile("" : "+r"(of_lane)::"memory");  // keeps loads of constants behind the barrier
        const TensorMap* const y_map = tile.member == 0 ? &y0 : tile.member == 1 ? &y1 : tile.member == 2 ? &y2 : &y3;
#if !GEGLU && !RESIDUAL
        if (as_codes) {  // both halves of the rows at once, with the same constants; a box has the codes of both
            const float half_inverse = 0.5f * quantize.inverse;
            const float magic = 12582912.0f + static_cast<float>(quantize.offset);  // 1.5 * 2^23
#pragma unroll
            for (int c = 0; c < BOXES; ++c) {
                if (lane == 0) asm volatile("cp.async.bulk.wait_group.read 1;" ::: "memory");
                __syncwarp();  // the box that was written two rounds ago has been copied
                const u32 to = boxes + box * BOX_BYTES, of_box = of_lane + 4 * c * BOX;
                const int from = tile.column + c * BOX;
#pragma unroll
                for (int j = 0; j < BOX / 8; j += 2) {
                    const Constants by(of_box + 32 * j);
                    u32 codes[HALVES][2];
#pragma unroll
                    for (int half = 0; half < HALVES; ++half)
#pragma unroll
                        for (int i = 0; i < 2; ++i) {
                            u32 word[4];
#pragma unroll
                            for (int at = 0; at < 4; ++at) {
                                const int sum = sums[half][c * (BOX / 2) + j * 4 + 4 * i + at];
                                const int correction = at % 2 ? by.correction[i].y : by.correction[i].x;
                                const float scale = at % 2 ? by.scale[i].y : by.scale[i].x;
                                const float bias = at % 2 ? by.bias[i].y : by.bias[i].x;
                                const float y = fmaf(__int2float_rn(sum - correction), scale, bias);
                                word[at] = gelu_code(y, half_inverse, magic, quantize);
                            }
                            codes[half][i] = four_bytes(word[0], word[1], word[2], word[3]);
                        }
#pragma unroll
                    for (int half = 0; half < HALVES; ++half) {
                        const u32 mine = lane % 2 ? codes[half][1] : codes[half][0];
                        const u32 other = __shfl_xor_sync(0xffffffff, lane % 2 ? codes[half][0] : codes[half][1], 1);
                        const u32 left = lane % 2 ? other : mine, right = lane % 2 ? mine : other;
                        const u32 at = to + half * (16 * BOX) + codes_at + (((j / 2) ^ codes_turned) * 16);
                        store_word(at, __byte_perm(left, right, 0x5410));
                        store_word(at + 8 * BOX, __byte_perm(left, right, 0x7632));
                    }
                }
                asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
                __syncwarp();
                if (lane == 0) {
                    if (from < columns.outputs)
#pragma unroll
                        for (int half = 0; half < HALVES; ++half)
                            write_box(y_map, to + half * (16 * BOX), from,
                                      tile.row + rank * BM + half * 64 + warp % 4 * 16);
                    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
                }
                box ^= 1;
            }
            continue;
        }
#endif
#pragma unroll
        for (int c = 0; c < BOXES; ++c) {
#pragma unroll
            for (int half = 0; half < HALVES; ++half) {
                if (lane == 0) asm volatile("cp.async.bulk.wait_group.read 1;" ::: "memory");
#if RESIDUAL
                const int place = c * HALVES + half;
                if (lane == 0 && place > 1 && place + SLOTS - 2 < BOXES * HALVES) fetch(place + SLOTS - 2);
                box = (boxes_before + place) % SLOTS;
                barrier_wait(arrived + 8 * box, (boxes_before + place) / SLOTS % 2);
#endif
                __syncwarp();  // the box that was written two rounds ago has been copied
                const u32 to = boxes + box * BOX_BYTES;
                const u32 of_box = of_lane + 4 * c * BOX;
                const int* const sums_of_box = sums[half] + c * (BOX / 2);
                const int from = tile.column + c * BOX;
#if GEGLU
                const int inner = from / 2;  // the first byte
#pragma unroll
                for (int chunk = 0; chunk < BOX / 32; ++chunk) {
                    u32 codes[2][4];  // of a row, and of the row eight below
#pragma unroll
                    for (int j = 4 * chunk; j < 4 * chunk + 4; j += 2) {
                        float y[2][4];
                        finish(y, sums_of_box + j * 4, Constants(of_box + 32 * j));
#pragma unroll
                        for (int i = 0; i < 2; ++i) {
                            codes[0][j % 4 + i] = quantize(y[i][0] * gelu(y[i][1]));
                            codes[1][j % 4 + i] = quantize(y[i][2] * gelu(y[i][3]));
                        }
                    }
                    const u32 at = to + lane / 4 * 32 + (chunk ^ (lane / 16)) * 16 + lane % 4 * 4;
#pragma unroll
                    for (int i = 0; i < 2; ++i)
                        store_word(at + i * 8 * 32,
                                   transposed(four_bytes(codes[i][0], codes[i][1], codes[i][2], codes[i][3]), lane));
                }
#else
                const int inner = 2 * from;
#pragma unroll
                for (int j = 0; j < BOX / 8; j += 2) {
                    float y[2][4];
                    finish(y, sums_of_box + j * 4, Constants(of_box + 32 * j));
                    const u32 at = to + row_at + ((j + lane / 16) ^ turned) * 16;
#if RESIDUAL
                    const uint4 residual = load_matrices(at);
                    float2 factor[2] = {make_float2(1.0f, 1.0f), make_float2(1.0f, 1.0f)};
                    if (p.factor)
#pragma unroll
                        for (int i = 0; i < 2; ++i)
                            factor[i] = unpaired(load_word(constants + 12 * BN + 2 * (c * BOX + 8 * (j + i)) +
                                                           lane % 4 * 4));
                    store_matrices(at, added(y[0][0], y[0][1], residual.x, factor[0]),
                                   added(y[0][2], y[0][3], residual.y, factor[0]),
                                   added(y[1][0], y[1][1], residual.z, factor[1]),
                                   added(y[1][2], y[1][3], residual.w, factor[1]));
#else
                    store_matrices(at, pair(y[0][0], y[0][1]), pair(y[0][2], y[0][3]), pair(y[1][0], y[1][1]),
                                   pair(y[1][2], y[1][3]));
#endif
                }
#endif
                asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
                __syncwarp();
                if (lane == 0) {
                    if (from < columns.outputs)
                        write_box(y_map, to, inner, tile.row + rank * BM + half * 64 + warp % 4 * 16);
                    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
                }
#if !RESIDUAL
                box ^= 1;
#endif
            }
        }
#if RESIDUAL
        boxes_before += BOXES * HALVES;
#endif
    }
    if (lane == 0) asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
    if (CLUSTER > 1) cluster_sync();
    }
}
