// Attention of heads whose queries and keys are int8, on the tensor cores of compute capability 9.0.
//
// Scores are int32. Weights of the values are rounded to uint8 and values are int8, so the sums of their products are
// exact.
//
// A block computes CONSUMERS * 64 queries of one head, as in `attention.cu`: one warp copies, and groups of four warps
// alternate between products and exponentials. Both operands of an 8-bit product must have the terms of a sum side by
// side in memory, so values are stored transposed, [channels, keys]. A thread has the scores of other keys than those
// whose weights the instruction reads from it, so the keys of every 16 columns are stored in another order: slot 4 t +
// 2 b + c has key 8 b + 2 t + c.
//
// Weights are relative to a reference score per row. The reference grows by whole powers of two, so that earlier sums
// are shifted when it grows. An int32 score below 2^22 is converted to float32 by one addition to its bits.
//
// With STATIC the operands are on the grids of the model. Weights are then rounded after they are divided by their sum,
// as the model defines them, so the kernel reads the keys twice, the first time for the sums.
//
// These macros are defined: WIDTH, KEYS, STAGES, CONSUMERS, BLOCKS and REGISTERS as in `attention.cu`; COLUMNS (of the
// instruction for values), BFLOATS (bfloat16 is written), QUERIES (they are multiplied from registers) and STATIC.
// Before this text are `attention.cuh` and the functions `multiply_scores` and `multiply_values`.

constexpr int THREADS = CONSUMERS * 128;       // threads that multiply
constexpr int COPIERS = REGISTERS ? 128 : 32;  // threads of the warps that copy
constexpr int ROWS = CONSUMERS * 64;           // queries per tile
constexpr int LINE = WIDTH <= 64 ? 64 : 128;   // bytes per swizzled row of queries and keys
constexpr int CHUNKS = (WIDTH + LINE - 1) / LINE;
constexpr int STEPS = (WIDTH + 31) / 32;  // instructions for the scores of a turn
constexpr int QUERY_BYTES = CHUNKS * ROWS * LINE, KEY_BYTES = CHUNKS * KEYS * LINE;
constexpr int VALUE_BYTES = COLUMNS * KEYS;
constexpr int WEIGHTS = KEYS / 8;    // words of four weights per thread and turn
constexpr int KEY_BLOCK = 128;       // keys that share a scale
constexpr float MARGIN = 0.25f;      // powers of two by which the first reference exceeds the largest score
constexpr float MAGIC = 12582912.0f;  // 1.5 * 2^23
constexpr int MAGIC_BITS = 0x4b400000, LEAST = -0x3fffff;
static_assert(WIDTH % 8 == 0 && (KEYS == 64 || KEYS == 128) && ROWS <= 256, "tile");

// With STATIC each scale is one element, and `v_center` is the scale of the weights.
struct Problem {
    const float* q_scale;   // [samples, heads, queries]
    const float* k_scale;   // [samples, heads, blocks of 128 keys]
    const float* v_scale;   // [samples, heads, WIDTH]
    const float* v_center;  // [samples, heads, WIDTH]
    u16* out;               // [samples, queries, heads, WIDTH]
    int queries, keys, heads, tiles;
    float scale;  // factor of the scores, times log2(e)
    float most;   // largest code of a weight
};

// The descriptor of an operand in shared memory with swizzled rows of BYTES bytes.
template <int BYTES>
struct Operand {
    u32 low;

    __device__ __forceinline__ Operand(u32 address, u32 next_chunk)
        : low((address & 0x3ffff) >> 4 | next_chunk >> 4 << 16) {}

    __device__ __forceinline__ u64 at(u32 bytes) const {
        constexpr u32 HIGH = BYTES * 8 >> 4 | (BYTES == 128 ? 1u : 2u) << 30;
        return static_cast<u64>(HIGH) << 32 | (low + (bytes >> 4));
    }
};

__device__ __forceinline__ void copy_box(u32 target, const TensorMap* map, u32 barrier, int x, int y, int z, int w) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], "
        "[%2];" ::"r"(target), "l"(map), "r"(barrier), "r"(x), "r"(y), "r"(z), "r"(w)
        : "memory");
}

// Returns 1024 + rne(255 * 2^a) and the same of b as float16: the low byte of each is the weight.
__device__ __forceinline__ u32 weight_pair(float a, float b) {
    const u32 powers = half_pair(power_of_two(a), power_of_two(b));
    u32 pair;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(pair) : "r"(powers), "r"(0x5bf85bf8), "r"(0x64006400));
    return pair;
}

__device__ __forceinline__ int largest_of_four(int x) {
    x = max(x, __shfl_xor_sync(0xffffffffu, x, 1));
    return max(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

__device__ __forceinline__ u32 output_pair(float low, float high) {
    return BFLOATS ? bfloat_pair(low, high) : half_pair(low, high);
}

// The softmax of a thread's scores. Of every 8 columns, a thread has two in row `lane / 4` and two in row `lane / 4 +
// 8`.
struct Softmax {
    float reference[2] = {lowest(), lowest()};
    int sum[2] = {}, shift[2] = {};

    // Finds the largest of the thread's scores in each row. With MASKED only the first `left` keys count.
    template <bool MASKED>
    __device__ __forceinline__ void largest(const int (&s)[KEYS / 2], int (&most)[2], int left, int lane) const {
#pragma unroll
        for (int row = 0; row < 2; ++row) {
            int parts[2] = {LEAST, LEAST};
#pragma unroll
            for (int j = 0; j < KEYS / 8; ++j) {
                const int at = 4 * j + 2 * row;
                const int a = counts<MASKED>(at, left, lane) ? s[at] : LEAST;
                const int b = counts<MASKED>(at + 1, left, lane) ? s[at + 1] : LEAST;
                parts[j % 2] = max(max(a, b), parts[j % 2]);
            }
            most[row] = max(parts[0], parts[1]);
        }
    }

    // Converts scores to weights relative to the current reference.
    template <bool MASKED>
    __device__ __forceinline__ void weigh(const int (&s)[KEYS / 2], u32 (&w)[WEIGHTS], const float (&scale)[2], int left,
                                          int lane) const {
        const float base[2] = {-fmaf(MAGIC, scale[0], reference[0]), -fmaf(MAGIC, scale[1], reference[1])};
        const auto power = [&](int i) {
            const float f = fmaf(__int_as_float(s[i] + MAGIC_BITS), scale[i / 2 % 2], base[i / 2 % 2]);
            return counts<MASKED>(i, left, lane) ? f : lowest();
        };
#pragma unroll
        for (int i = 0; i < WEIGHTS; ++i) {  // alternating rows, of 16 keys each
            const int at = i / 2 * 8 + i % 2 * 2;
            w[i] = __byte_perm(weight_pair(power(at), power(at + 1)), weight_pair(power(at + 4), power(at + 5)), 0x6420);
        }
    }

    // Raises the reference of each row by whole powers of two above the largest score.
    __device__ __forceinline__ void raise(const int (&most)[2], const float (&scale)[2]) {
#pragma unroll
        for (int row = 0; row < 2; ++row) {
            const float top = static_cast<float>(largest_of_four(most[row])) * scale[row];
            const bool first = reference[row] == lowest();
            const float up = first ? 0.0f : ceilf(fmaxf(top - reference[row], 0.0f));
            reference[row] = first ? top + MARGIN : reference[row] + up;
            shift[row] = min(static_cast<int>(up), 31);
            sum[row] >>= shift[row];
        }
    }

    // Returns whether a score of the warp is above the reference of its row.
    __device__ __forceinline__ bool exceeds(const int (&most)[2], const float (&scale)[2]) const {
        return __any_sync(0xffffffffu, static_cast<float>(most[0]) * scale[0] > reference[0] ||
                                           static_cast<float>(most[1]) * scale[1] > reference[1]);
    }

    __device__ __forceinline__ void add(const u32 (&w)[WEIGHTS]) {
#pragma unroll
        for (int i = 0; i < WEIGHTS; ++i)
            asm("dp4a.u32.u32 %0, %1, %2, %0;" : "+r"(sum[i % 2]) : "r"(w[i]), "r"(0x01010101));
    }

    template <bool MASKED>
    static __device__ __forceinline__ bool counts(int i, int left, int lane) {
        return !MASKED || i / 4 * 8 + lane % 4 * 2 + i % 2 < left;
    }
};

// The softmax with weights on the grid of the model. A first pass over the keys computes the sums, with a separate
// reference per thread; the second pass computes the codes.
struct StaticSoftmax {
    float reference[2] = {lowest(), lowest()}, sum[2] = {}, base[2];

    template <bool MASKED>
    __device__ __forceinline__ void gather(const int (&s)[KEYS / 2], float scale, int left, int lane) {
        int most[2];
        Softmax().template largest<MASKED>(s, most, left, lane);
#pragma unroll
        for (int row = 0; row < 2; ++row) {
            const float larger = fmaxf(reference[row], static_cast<float>(most[row]) * scale);
            sum[row] *= power_of_two(reference[row] - larger);
            reference[row] = larger;
        }
#pragma unroll
        for (int i = 0; i < KEYS / 2; ++i) {
            const float weight = power_of_two(fmaf(static_cast<float>(s[i]), scale, -reference[i / 2 % 2]));
            sum[i / 2 % 2] += Softmax::counts<MASKED>(i, left, lane) ? weight : 0.0f;
        }
    }

    // After the first pass: computes what converts a score to the exponent of its weight in steps of the grid.
    __device__ __forceinline__ void settle(float step) {
#pragma unroll
        for (int row = 0; row < 2; ++row) {
            float most = reference[row];
            most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 1));
            most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 2));
            base[row] = -most - log2f(sum_of_four(sum[row] * power_of_two(reference[row] - most)) * step);
        }
    }

    template <bool MASKED>
    __device__ __forceinline__ void weigh(const int (&s)[KEYS / 2], u32 (&w)[WEIGHTS], float scale, float top, int left,
                                          int lane) const {
        const auto code = [&](int i) {
            const float steps = fminf(power_of_two(fmaf(static_cast<float>(s[i]), scale, base[i / 2 % 2])), top);
            return Softmax::counts<MASKED>(i, left, lane) ? static_cast<u32>(__float_as_int(__fadd_rn(steps, MAGIC))) : 0u;
        };
#pragma unroll
        for (int i = 0; i < WEIGHTS; ++i) {
            const int at = i / 2 * 8 + i % 2 * 2;
            w[i] = four_bytes(code(at), code(at + 1), code(at + 4), code(at + 5));
        }
    }
};

extern "C" __global__ void __launch_bounds__(THREADS + COPIERS, BLOCKS)
    attention_int8(const __grid_constant__ TensorMap q_map, const __grid_constant__ TensorMap k_map,
                   const __grid_constant__ TensorMap v_map, const __grid_constant__ Problem p) {
    extern __shared__ __align__(1024) unsigned char shared[];
    const u32 q_at = shared_address(shared), k_at = q_at + QUERY_BYTES, v_at = k_at + STAGES * KEY_BYTES;
    const u32 q_full = v_at + STAGES * VALUE_BYTES;
    const u32 k_full = q_full + 8, v_full = k_full + 8 * STAGES;
    const u32 k_empty = v_full + 8 * STAGES, v_empty = k_empty + 8 * STAGES;
    const int lane = threadIdx.x % 32;
    const int group = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0);
    const int tile = blockIdx.x % p.tiles, head = blockIdx.x / p.tiles % p.heads, sample = blockIdx.x / p.tiles / p.heads;
    const int turns = (p.keys + KEYS - 1) / KEYS;

    if (threadIdx.x == 0) {
        barrier_init(q_full, 1);
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
            barrier_expect(q_full, QUERY_BYTES);
            for (int chunk = 0; chunk < CHUNKS; ++chunk)
                copy_box(q_at + chunk * ROWS * LINE, &q_map, q_full, chunk * LINE, head, tile * ROWS, sample);
            int stage = 0, phase = 1, v_stage = 0, v_phase = 1;
            for (int pass = STATIC ? 0 : 1; pass < 2; ++pass)
                for (int turn = turns - 1; turn >= 0; --turn) {
                    barrier_wait(k_empty + 8 * stage, phase);
                    barrier_expect(k_full + 8 * stage, KEY_BYTES);
#pragma unroll
                    for (int chunk = 0; chunk < CHUNKS; ++chunk)
                        copy_box(k_at + stage * KEY_BYTES + chunk * KEYS * LINE, &k_map, k_full + 8 * stage,
                                 chunk * LINE, head, turn * KEYS, sample);
                    if (++stage == STAGES) stage = 0, phase ^= 1;
                    if (pass == 0) continue;
                    barrier_wait(v_empty + 8 * v_stage, v_phase);
                    barrier_expect(v_full + 8 * v_stage, VALUE_BYTES);
                    copy_box(v_at + v_stage * VALUE_BYTES, &v_map, v_full + 8 * v_stage, turn * KEYS, 0, head, sample);
                    if (++v_stage == STAGES) v_stage = 0, v_phase ^= 1;
                }
        }
        return;
    }

    if (REGISTERS) asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS ? REGISTERS : 24));
    await_previous();
    const Operand<LINE> keys(k_at, 16);
    const Operand<KEYS> values(v_at, 16);
    int scores[KEYS / 2];
    int sums[COLUMNS / 2];
    u32 weights[WEIGHTS];
#if QUERIES
    u32 queries[4 * STEPS];  // in the order of the instruction
#else
    const Operand<LINE> queries(q_at + group * 64 * LINE, 16);
#endif
    const auto multiply_keys = [&](int stage) {
        fence_registers();
#pragma unroll
        for (int step = 0; step < STEPS; ++step)
#if QUERIES
            multiply_scores(scores, &queries[4 * step],
#else
            multiply_scores(scores, queries.at(step * 32 / LINE * ROWS * LINE + step * 32 % LINE),
#endif
                            keys.at(stage * KEY_BYTES + step * 32 / LINE * KEYS * LINE + step * 32 % LINE), step > 0);
        commit_products();
    };
    const auto multiply_weights = [&](int stage, int phase, bool first) {
        barrier_wait(v_full + 8 * stage, phase);
        fence_registers();
#pragma unroll
        for (int step = 0; step < WEIGHTS / 4; ++step)
            multiply_values(sums, &weights[4 * step], values.at(stage * VALUE_BYTES + step * 32), !first || step > 0);
        commit_products();
    };

    const int first_row = tile * ROWS + threadIdx.x / 32 * 16, heads_before = sample * p.heads + head;
    barrier_wait(q_full, 0);
#if QUERIES
#pragma unroll
    for (int i = 0; i < 4 * STEPS; ++i) {
        const int row = group * 64 + threadIdx.x / 32 % 4 * 16 + lane / 4 + i % 2 * 8;
        const int byte = i / 4 * 32 + i % 4 / 2 * 16 + lane % 4 * 4;
        const int swizzled = byte % LINE ^ (LINE == 128 ? row % 8 : row / 2 % 4) * 16;
        queries[i] = *reinterpret_cast<const u32*>(shared + byte / LINE * ROWS * LINE + row * LINE + swizzled);
    }
    keep(queries);
#endif
#if STATIC
    StaticSoftmax softmax;
    const float scale = p.q_scale[0] * p.k_scale[0] * p.scale;
    const int last_keys = p.keys - (turns - 1) * KEYS;
    int stage = 0, phase = 0;
    const auto next_keys = [&]() {
        if (lane == 0) barrier_arrive(k_empty + 8 * stage);
        if (++stage == STAGES) stage = 0, phase ^= 1;
    };
    const auto scores_of_turn = [&]() {
        barrier_wait(k_full + 8 * stage, phase);
        multiply_keys(stage);
        wait_products<0>();
        keep(scores);
        next_keys();
    };
    scores_of_turn();
    softmax.template gather<true>(scores, scale, last_keys, lane);
    for (int turn = 1; turn < turns; ++turn) {
        scores_of_turn();
        softmax.template gather<false>(scores, scale, 0, lane);
    }
    softmax.settle(p.v_center[0]);
    if (turns > 1 && group == CONSUMERS - 1) give_turn(0);
    scores_of_turn();
    softmax.template weigh<true>(scores, weights, scale, p.most, last_keys, lane);
    int before = 0, before_phase = 0;
    if (turns > 1) barrier_wait(k_full + 8 * stage, phase);
    for (int turn = 1; turn < turns; ++turn) {
        await_turn(group);
        multiply_keys(stage);
        multiply_weights(before, before_phase, turn == 1);
        if (turn < turns - 1 || group < CONSUMERS - 1) give_turn((group + 1) % CONSUMERS);
        wait_products<1>();
        keep(scores);
        next_keys();
        u32 fresh[WEIGHTS];
        softmax.template weigh<false>(scores, fresh, scale, p.most, 0, lane);
        keep(fresh);
        if (turn < turns - 1) barrier_wait(k_full + 8 * stage, phase);
        wait_products<0>();
        keep(sums);
        keep(weights);
        if (lane == 0) barrier_arrive(v_empty + 8 * before);
        if (++before == STAGES) before = 0, before_phase ^= 1;
#pragma unroll
        for (int i = 0; i < WEIGHTS; ++i) asm volatile("mov.b32 %0, %1;" : "=r"(weights[i]) : "r"(fresh[i]) : "memory");
    }
    multiply_weights(before, before_phase, turns == 1);
    wait_products<0>();
    keep(sums);
    const float steps = p.v_scale[0] * p.v_center[0];
    const auto result = [&](int i) { return static_cast<float>(sums[i]) * steps; };
#else
    float q_scale[2], scale[2];
#pragma unroll
    for (int row = 0; row < 2; ++row) {
        const int at = min(first_row + lane / 4 + 8 * row, p.queries - 1);
        q_scale[row] = p.q_scale[static_cast<size_t>(heads_before) * p.queries + at] * p.scale;
    }
    const float* const k_scale = p.k_scale + heads_before * ((p.keys + KEY_BLOCK - 1) / KEY_BLOCK);
    float next = k_scale[(turns - 1) * KEYS / KEY_BLOCK];
    const auto scales_of = [&](int turn) {  // turns are counted from the last keys
        scale[0] = q_scale[0] * next, scale[1] = q_scale[1] * next;
        if (turn < turns - 1) next = k_scale[(turns - 2 - turn) * KEYS / KEY_BLOCK];
    };

    Softmax softmax;
    int most[2];
    if (turns > 1 && group == CONSUMERS - 1) give_turn(0);
    barrier_wait(k_full, 0);
    multiply_keys(0);
    wait_products<0>();
    keep(scores);
    if (lane == 0) barrier_arrive(k_empty);
    scales_of(0);
    const int last_keys = p.keys - (turns - 1) * KEYS;
    softmax.template largest<true>(scores, most, last_keys, lane);
    softmax.raise(most, scale);
    softmax.template weigh<true>(scores, weights, scale, last_keys, lane);
    softmax.add(weights);
    int before = 0, before_phase = 0, stage = STAGES > 1 ? 1 : 0, phase = STAGES > 1 ? 0 : 1;
    for (int turn = 1; turn < turns; ++turn) {
        await_turn(group);
        barrier_wait(k_full + 8 * stage, phase);
        multiply_keys(stage);
        multiply_weights(before, before_phase, turn == 1);
        if (turn < turns - 1 || group < CONSUMERS - 1) give_turn((group + 1) % CONSUMERS);
        scales_of(turn);
        wait_products<1>();
        keep(scores);
        if (lane == 0) barrier_arrive(k_empty + 8 * stage);
        u32 fresh[WEIGHTS];
        softmax.template largest<false>(scores, most, 0, lane);
        const bool grows = softmax.exceeds(most, scale);
        if (grows) softmax.raise(most, scale);
        softmax.template weigh<false>(scores, fresh, scale, 0, lane);
        softmax.add(fresh);
        wait_products<0>();
        keep(sums);
        keep(weights);
        if (lane == 0) barrier_arrive(v_empty + 8 * before);
        if (grows)
#pragma unroll
            for (int i = 0; i < COLUMNS / 2; ++i) sums[i] >>= softmax.shift[i / 2 % 2];
#pragma unroll
        for (int i = 0; i < WEIGHTS; ++i) asm volatile("mov.b32 %0, %1;" : "=r"(weights[i]) : "r"(fresh[i]) : "memory");
        before = stage, before_phase = phase;
        if (++stage == STAGES) stage = 0, phase ^= 1;
    }
    multiply_weights(before, before_phase, turns == 1);
    wait_products<0>();
    keep(sums);

    const float* const v_scale = p.v_scale + heads_before * WIDTH;
    const float* const v_center = p.v_center + heads_before * WIDTH;
    const float inverse[2] = {__frcp_rn(sum_of_four(static_cast<float>(softmax.sum[0]))),
                              __frcp_rn(sum_of_four(static_cast<float>(softmax.sum[1])))};
    const auto result = [&](int i) {
        const int channel = i / 4 * 8 + lane % 4 * 2 + i % 2;
        return fmaf(static_cast<float>(sums[i]) * inverse[i / 2 % 2], v_scale[channel], v_center[channel]);
    };
#endif
    u32* const written =
        reinterpret_cast<u32*>(shared + (v_empty + 8 * STAGES + 15) / 16 * 16 - q_at) + threadIdx.x / 32 * (8 * WIDTH);
    __syncwarp();
#pragma unroll
    for (int i = 0; i < WIDTH / 2; i += 2)
        written[(lane / 4 + i / 2 % 2 * 8) * (WIDTH / 2) + i / 4 * 4 + lane % 4] = output_pair(result(i), result(i + 1));
    __syncwarp();
    u16* const to = p.out + (static_cast<size_t>(sample) * p.queries + first_row) * (p.heads * WIDTH) + head * WIDTH;
    for (int i = lane; i < 2 * WIDTH; i += 32) {
        const int row = i / (WIDTH / 8), column = i % (WIDTH / 8) * 8;
        if (first_row + row < p.queries)
            *reinterpret_cast<int4*>(to + static_cast<size_t>(row) * (p.heads * WIDTH) + column) =
                *reinterpret_cast<const int4*>(written + i * 4);
    }
}
