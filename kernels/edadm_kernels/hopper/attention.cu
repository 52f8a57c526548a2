// Attention of 16-bit heads on the tensor cores of compute capability 9.0. The result is written in 16 bits, or as the
// codes of the layer that follows.
//
// A block computes CONSUMERS * 64 queries of one head in turns: a turn is one iteration of the loop over keys, with
// KEYS keys and values. One warp copies the queries and then the keys and values of each turn, by the tensor memory
// accelerator, into STAGES buffers for keys and as many for values. Channels past WIDTH and tokens past the last are
// copied as zeros. The loop begins with the last keys, of which some may be missing. Each group of four warps has 64
// queries. While it multiplies the values of one turn by their weights, it computes the exponentials of the scores of
// the next turn. Groups issue their products one after another, so that some multiply while others compute exponentials
// (FlashAttention-3, arXiv 2407.08608). Where all keys fit into one turn (SHORT), keys and values stay in shared
// memory, and the queries of the next tile are copied while the current ones are processed.
//
// Weights are powers of two relative to a reference score per row. The reference is set to the largest score only when
// that exceeds it by more than 8 powers of two: sums are divided by the sum of the same weights in the end, so only
// rounding depends on it.
//
// These macros are defined: WIDTH, KEYS, STAGES, CONSUMERS, BLOCKS (per multiprocessor), REGISTERS (per thread that
// multiplies; 0 keeps the number at the start), SHORT, CODES (codes are written), BFLOATS (bfloat16 instead of
// float16), HELD (queries are held in registers, so that products read only keys from shared memory) and BIAS (a number
// per key is added to the scores). Before this text are `attention.cuh` and the functions `multiply_scores` and
// `multiply_values`, one wgmma instruction each.

constexpr int THREADS = CONSUMERS * 128;       // threads that multiply
constexpr int COPIERS = REGISTERS ? 128 : 32;  // threads of the warps that copy; only four warps can give up registers
constexpr int ROWS = CONSUMERS * 64;           // queries per tile
constexpr int CHUNKS = (WIDTH + 63) / 64;      // chunks of 64 channels: the swizzled rows of 128 bytes of a token
constexpr int STEPS = (WIDTH + 15) / 16;       // instructions for the scores of a turn
constexpr int TILES = SHORT ? 2 : 1;           // tiles of queries in shared memory
constexpr int QUERY_BYTES = CHUNKS * ROWS * 128, TURN_BYTES = CHUNKS * KEYS * 128;
constexpr int RESULT = CODES ? 1 : 2;          // bytes per element
constexpr float SLACK = 8.0f;                  // powers of two by which a score may exceed the reference
static_assert(!CODES || !BFLOATS, "codes are computed from float16");
static_assert(WIDTH % 8 == 0 && KEYS % 16 == 0 && KEYS <= 256 && ROWS <= 256 && (!SHORT || STAGES == 1), "tile");

// Queries of a sample before `first` belong to the first output, the others to the second. Rows of a tile after the last
// query use the grid of one of them, so `first` is larger than any row where there is only one output.
struct Output {
    const float* scale;     // of the codes; their inverse if `zero_point` is null
    const int* zero_point;  // the zero-point of unsigned codes
    const float* shift;     // the zero-point of signed codes, if `zero_point` is null
    unsigned char* values;  // [samples, queries, heads * WIDTH], RESULT bytes per element
    float quant_max;
};

struct Problem {
    Output outputs[2];
    const u16* bias;  // rows of `keys` numbers
    int queries, keys, heads, tiles;
    int parts;  // blocks per head; a block computes every `parts`th tile of the head
    int first;
    int bias_of_sample, bias_of_head;  // distances of rows, in elements
    float scale;  // factor of the scores, times log2(e)
};

// The descriptor of an operand in shared memory with rows of 128 swizzled bytes: its address; the distance of the next
// 64 channels, which is used for values; and the distance of the next 8 rows.
struct Operand {
    u32 low;

    __device__ __forceinline__ Operand(u32 address, u32 next_chunk)
        : low((address & 0x3ffff) >> 4 | next_chunk >> 4 << 16) {}

    __device__ __forceinline__ u64 at(u32 bytes) const {
        constexpr u32 HIGH = 1024 >> 4 | 1u << 30;
        return static_cast<u64>(HIGH) << 32 | (low + (bytes >> 4));
    }
};

__device__ __forceinline__ void copy_rows(u32 target, const TensorMap* map, u32 barrier, int rows, int head, int token,
                                          int sample) {
    barrier_expect(barrier, CHUNKS * rows * 128);
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; ++chunk)
        asm volatile(
            "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], "
            "[%2];" ::"r"(target + chunk * rows * 128),
            "l"(map), "r"(barrier), "r"(chunk * 128), "r"(head), "r"(token), "r"(sample)
            : "memory");
}

__device__ __forceinline__ float largest_of_four(float x) {
    x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
    return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

__device__ __forceinline__ u32 pair_of(float low, float high) {
    return BFLOATS ? bfloat_pair(low, high) : half_pair(low, high);
}

__device__ __forceinline__ Quantizer quantizer_of(const Output& output) {
    return quantizer_of(output.scale, output.zero_point, output.shift, output.quant_max);
}

// Returns two neighboring numbers as powers of two; no score becomes infinite.
__device__ __forceinline__ float2 bias_of(u32 pair) {
    constexpr float LOG2_E = 1.44269504f, LEAST = -1e30f;
    const float low = BFLOATS ? __int_as_float(pair << 16) : low_half(pair);
    const float high = BFLOATS ? __int_as_float(pair & 0xffff0000u) : high_half(pair);
    return make_float2(fmaxf(low * LOG2_E, LEAST), fmaxf(high * LOG2_E, LEAST));
}

// Loads four 8x8 matrices of 16-bit numbers; each lane gives the address of one row.
__device__ __forceinline__ void load_matrices(u32* to, u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(address)
                 : "memory");
}

// The softmax of a thread's scores. Of every 8 columns, a thread has two in row `lane / 4` and two in row `lane / 4 +
// 8`.
struct Softmax {
    float reference[2] = {lowest(), lowest()}, sum[2] = {};

    // Replaces scores by weights. Returns whether all earlier sums must be multiplied by `shrink`.
    __device__ __forceinline__ bool operator()(float (&s)[KEYS / 2], float scale, float (&shrink)[2]) {
        bool grows = false;
        float most[2];
#pragma unroll
        for (int row = 0; row < 2; ++row) {
            most[row] = fmaxf(s[2 * row], s[2 * row + 1]);
#pragma unroll
            for (int j = 1; j < KEYS / 8; ++j)
                most[row] = fmaxf(most[row], fmaxf(s[4 * j + 2 * row], s[4 * j + 2 * row + 1]));
            grows |= most[row] * scale > reference[row] + SLACK;
        }
        grows = __any_sync(0xffffffffu, grows);
        if (grows)
#pragma unroll
            for (int row = 0; row < 2; ++row) {
                const float larger = fmaxf(largest_of_four(most[row]) * scale, reference[row]);
                shrink[row] = power_of_two(reference[row] - larger);
                reference[row] = larger;
                sum[row] *= shrink[row];
            }
#pragma unroll
        for (int i = 0; i < KEYS / 2; ++i) {
            const int row = i / 2 % 2;
            s[i] = power_of_two(fmaf(s[i], scale, -reference[row]));
            sum[row] += s[i];
        }
        return grows;
    }
};

extern "C" __global__ void __launch_bounds__(THREADS + COPIERS, BLOCKS)
    attention(const __grid_constant__ TensorMap q_map, const __grid_constant__ TensorMap k_map,
              const __grid_constant__ TensorMap v_map, const __grid_constant__ Problem p) {
    extern __shared__ __align__(1024) unsigned char shared[];
    const u32 q_at = shared_address(shared), k_at = q_at + TILES * QUERY_BYTES, v_at = k_at + STAGES * TURN_BYTES;
    const u32 q_full = v_at + STAGES * TURN_BYTES, q_empty = q_full + 8 * TILES;
    const u32 k_full = q_empty + 8 * TILES, v_full = k_full + 8 * STAGES;
    const u32 k_empty = v_full + 8 * STAGES, v_empty = k_empty + 8 * STAGES;
    const int lane = threadIdx.x % 32;
    const int group = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0);
    const int part = blockIdx.x % p.parts, head = blockIdx.x / p.parts % p.heads, sample = blockIdx.x / p.parts / p.heads;
    const int turns = SHORT ? 1 : (p.keys + KEYS - 1) / KEYS;

    if (threadIdx.x == 0) {
        for (int tile = 0; tile < TILES; ++tile) {
            barrier_init(q_full + 8 * tile, 1);
            barrier_init(q_empty + 8 * tile, CONSUMERS * 4);
        }
        for (int stage = 0; stage < STAGES; ++stage) {
            barrier_init(k_full + 8 * stage, 1);
            barrier_init(v_full + 8 * stage, 1);
            barrier_init(k_empty + 8 * stage, CONSUMERS * 4);
            barrier_init(v_empty + 8 * stage, CONSUMERS * 4);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    }
    __syncthreads();

    if (group == CONSUMERS) {
        if (REGISTERS) asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
        if (threadIdx.x == THREADS) {
            await_previous();
            copy_rows(q_at, &q_map, q_full, ROWS, head, part * ROWS, sample);
            int stage = 0, phase = 1;
            for (int turn = turns - 1; turn >= 0; --turn) {
                barrier_wait(k_empty + 8 * stage, phase);
                copy_rows(k_at + stage * TURN_BYTES, &k_map, k_full + 8 * stage, KEYS, head, turn * KEYS, sample);
                barrier_wait(v_empty + 8 * stage, phase);
                copy_rows(v_at + stage * TURN_BYTES, &v_map, v_full + 8 * stage, KEYS, head, turn * KEYS, sample);
                if (++stage == STAGES) stage = 0, phase ^= 1;
            }
            if (SHORT)
                for (int tile = part + p.parts, at = 1, empty = 1; tile < p.tiles; tile += p.parts) {
                    barrier_wait(q_empty + 8 * at, empty);
                    copy_rows(q_at + at * QUERY_BYTES, &q_map, q_full + 8 * at, ROWS, head, tile * ROWS, sample);
                    if ((at ^= 1) == 0) empty ^= 1;
                }
        }
        return;
    }

    if (REGISTERS) asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS ? REGISTERS : 24));
    await_previous();
    const Operand queries(q_at + group * 64 * 128, 16), keys(k_at, 16), values(v_at, KEYS * 128);
    float scores[KEYS / 2], sums[WIDTH / 2];
    u32 weights[KEYS / 4];
    u32 held[HELD ? 4 * STEPS : 1];
    const auto hold_queries = [&](int at) {  // a warp's 16 queries, as the left operand of an instruction
        const u32 row = q_at + at * QUERY_BYTES + (threadIdx.x / 32 * 16 + lane % 16) * 128;
#pragma unroll
        for (int step = 0; step < (HELD ? STEPS : 0); ++step)
            load_matrices(&held[4 * step],
                          row + step / 4 * ROWS * 128 + ((step % 4 * 2 + lane / 16) ^ (lane % 8)) * 16);
    };
    const auto multiply_keys = [&](int at, int stage, int phase) {
        barrier_wait(k_full + 8 * stage, phase);
        fence_registers();
#pragma unroll
        for (int step = 0; step < STEPS; ++step) {
            const u64 right = keys.at(stage * TURN_BYTES + step / 4 * KEYS * 128 + step % 4 * 32);
#if HELD
            multiply_scores(scores, &held[4 * step], right, step > 0);
#else
            const u64 left = queries.at(at * QUERY_BYTES + step / 4 * ROWS * 128 + step % 4 * 32);
            multiply_scores(scores, left, right, step > 0);
#endif
        }
        commit_products();
    };
    u32 biases[BIAS ? KEYS / 8 : 1];
    const u16* const bias_row = BIAS ? p.bias + sample * p.bias_of_sample + head * p.bias_of_head + lane % 4 * 2 : nullptr;
    const auto load_biases = [&](int turn) {
#pragma unroll
        for (int j = 0; j < (BIAS ? KEYS / 8 : 0); ++j) {
            const int key = turn * KEYS + 8 * j;
            biases[j] = key + lane % 4 * 2 < p.keys ? __ldg(reinterpret_cast<const u32*>(bias_row + key)) : 0;
        }
    };
    const auto add_biases = [&]() {
#pragma unroll
        for (int i = 0; i < (BIAS ? KEYS / 2 : 0); ++i) {
            const float2 bias = bias_of(biases[i / 4]);
            scores[i] = fmaf(scores[i], p.scale, i % 2 ? bias.y : bias.x);
        }
    };
    const float scale = BIAS ? 1.0f : p.scale;
    const auto multiply_weights = [&](int stage, int phase, bool first) {
        barrier_wait(v_full + 8 * stage, phase);
        fence_registers();
#pragma unroll
        for (int step = 0; step < KEYS / 16; ++step)
            multiply_values(sums, &weights[4 * step], values.at(stage * TURN_BYTES + step * 2048), !first || step > 0);
        commit_products();
    };
    const auto mask = [&](int left) {
#pragma unroll
        for (int i = 0; i < KEYS / 2; ++i)
            if (i / 4 * 8 + lane % 4 * 2 + i % 2 >= left) scores[i] = lowest();
    };
    const auto pack = [&]() {
#pragma unroll
        for (int i = 0; i < KEYS / 4; ++i) weights[i] = pair_of(scores[2 * i], scores[2 * i + 1]);
    };
    unsigned char* const written =
        shared + (v_empty + 8 * STAGES + 15) / 16 * 16 - q_at + threadIdx.x / 32 * (16 * WIDTH * RESULT);
    const auto write = [&](int tile, const Softmax& softmax) {  // writes the 16 rows of a warp through shared memory
        const int first = tile * ROWS + threadIdx.x / 32 * 16;
        __syncwarp();
#pragma unroll
        for (int row = 0; row < 2; ++row) {
            const Output& output = p.outputs[first + lane / 4 + 8 * row < p.first ? 0 : 1];
            const Quantizer quantize = CODES ? quantizer_of(output) : Quantizer(1.0f, 0, 0.0f);
            const float inverse = __frcp_rn(sum_of_four(softmax.sum[row]));
#pragma unroll
            for (int j = 0; j < WIDTH / 8; ++j) {
                const u32 pair = pair_of(sums[4 * j + 2 * row] * inverse, sums[4 * j + 2 * row + 1] * inverse);
                unsigned char* const to = written + ((lane / 4 + 8 * row) * WIDTH + 8 * j + lane % 4 * 2) * RESULT;
                if (CODES) {
                    const u32 low = quantize(low_half(pair)), high = quantize(high_half(pair));
                    *reinterpret_cast<u16*>(to) = __byte_perm(low, high, 0x0040);
                } else {
                    *reinterpret_cast<u32*>(to) = pair;
                }
            }
        }
        __syncwarp();
#if SHORT
#pragma unroll 1  // registers are needed by the loop over tiles
#endif
        for (int i = lane; i < 2 * WIDTH; i += 32) {
            const int query = first + i / (WIDTH / 8), column = head * WIDTH + i % (WIDTH / 8) * 8;
            const int which = query < p.first ? 0 : 1, count = which ? p.queries - p.first : min(p.first, p.queries);
            if (query < p.queries) {
                const size_t to = static_cast<size_t>(sample) * count + query - (which ? p.first : 0);
                unsigned char* const at = p.outputs[which].values + (to * (p.heads * WIDTH) + column) * RESULT;
                if (CODES)
                    *reinterpret_cast<u64*>(at) = *reinterpret_cast<const u64*>(written + i * 8);
                else
                    *reinterpret_cast<int4*>(at) = *reinterpret_cast<const int4*>(written + i * 16);
            }
        }
    };

    float shrink[2];
    const int last_keys = p.keys - (turns - 1) * KEYS;
#if SHORT
    for (int tile = part, at = 0, full = 0; tile < p.tiles; tile += p.parts) {
        Softmax softmax;
        barrier_wait(q_full + 8 * at, full);
        hold_queries(at);
        multiply_keys(at, 0, 0);
        load_biases(0);
        wait_products<0>();
        keep(scores);
        if (lane == 0) barrier_arrive(q_empty + 8 * at);
        add_biases();
        if (last_keys < KEYS) mask(last_keys);
        softmax(scores, scale, shrink);
        pack();
        multiply_weights(0, 0, true);
        wait_products<0>();
        keep(sums);
        write(tile, softmax);
        if ((at ^= 1) == 0) full ^= 1;
    }
#else
    Softmax softmax;
    barrier_wait(q_full, 0);
    if (turns > 1 && group == CONSUMERS - 1) give_turn(0);
    hold_queries(0);
    multiply_keys(0, 0, 0);
    load_biases(turns - 1);
    wait_products<0>();
    keep(scores);
    if (lane == 0) barrier_arrive(k_empty);
    add_biases();
    if (last_keys < KEYS) mask(last_keys);
    softmax(scores, scale, shrink);
    pack();
    int before = 0, before_phase = 0, stage = STAGES > 1 ? 1 : 0, phase = STAGES > 1 ? 0 : 1;
    for (int turn = 1; turn < turns; ++turn) {
        await_turn(group);
        multiply_keys(0, stage, phase);
        multiply_weights(before, before_phase, turn == 1);
        if (turn < turns - 1 || group < CONSUMERS - 1) give_turn((group + 1) % CONSUMERS);
        load_biases(turns - 1 - turn);
        wait_products<1>();
        keep(scores);
        if (lane == 0) barrier_arrive(k_empty + 8 * stage);
        add_biases();
        const bool grows = softmax(scores, scale, shrink);
        wait_products<0>();
        keep(sums);
        if (lane == 0) barrier_arrive(v_empty + 8 * before);
        if (grows)
#pragma unroll
            for (int i = 0; i < WIDTH / 2; ++i) sums[i] *= shrink[i / 2 % 2];
        pack();
        before = stage, before_phase = phase;
        if (++stage == STAGES) stage = 0, phase ^= 1;
    }
    multiply_weights(before, before_phase, turns == 1);
    wait_products<0>();
    keep(sums);
    write(part, softmax);
#endif
}
