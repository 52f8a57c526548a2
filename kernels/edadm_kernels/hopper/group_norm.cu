// GroupNorm of a float16 image with channels innermost, optionally with SiLU, in two kernels. The result is written as
// codes or in float16.
//
// The pixels of a sample are divided into chunks. A block processes REPEAT chunks one after the other, with all their
// channels, and reads a chunk while it processes the one before. A thread keeps eight channels, which belong to at most
// two groups, of VECTORS pixels. `group_statistics` computes mean and squared deviations of each group over the pixels
// of a chunk. `group_apply` reads the pixels while it waits for these statistics; then it merges the statistics of all
// chunks of its sample, in the same order in every block, normalizes and writes. Statistics are merged as by Chan,
// Golub and LeVeque (1983).
//
// The channels may come from two images: the first FIRST channels from one, the rest from the other.
//
// These macros are defined: PIXELS, CHANNELS, FIRST, GROUPS, CHUNKS (per sample), CHUNK_PIXELS, VECTORS and REPEAT
// describe the shape; STATISTICS selects one of the two kernels; THREADS, BLOCKS (per multiprocessor), QUANTIZERS (with
// 0, float16 is written), RAW (the last quantizer takes the pixels as they are, not normalized) and SILU.

constexpr int WARPS = THREADS / 32, GROUP_CHANNELS = CHANNELS / GROUPS;
constexpr int ACROSS = CHANNELS / 8, STRIDE = THREADS / ACROSS;  // vectors per pixel; pixels that a block reads at once
constexpr int LOADS = (CHUNKS + 31) / 32, SPANS = (CHUNKS + REPEAT - 1) / REPEAT;  // blocks per sample
static_assert(RAW == 0 || (RAW == 1 && QUANTIZERS > 1), "quantizers");
static_assert(GROUP_CHANNELS >= 8 && CHANNELS % 8 == 0 && FIRST % 8 == 0 && STRIDE >= 1 && VECTORS * STRIDE >= CHUNK_PIXELS, "shape");

struct Problem {
    const u16* x;            // [samples, PIXELS, FIRST]
    const u16* more;         // [samples, PIXELS, CHANNELS - FIRST], or null if there is one image
    const void* weight;      // [CHANNELS], float32, or float16 with HALF_AFFINE
    const void* bias;        // [CHANNELS]
    const float* scales;     // [QUANTIZERS]; their inverses if `zero_points` is null
    const int* zero_points;  // [QUANTIZERS], of unsigned codes
    const float* shifts;     // [QUANTIZERS], the zero-points of signed codes, if `zero_points` is null
    float2* partials;        // [samples, GROUPS, CHUNKS]: mean and squared deviations
    void* out[3];            // [samples, PIXELS, CHANNELS]: codes or float16
    float eps, quant_max;
};

__device__ __forceinline__ constexpr int pixels_of(int chunk) {
    return chunk < CHUNKS - 1 ? CHUNK_PIXELS : chunk == CHUNKS - 1 ? PIXELS - (CHUNKS - 1) * CHUNK_PIXELS : 0;
}

__device__ __forceinline__ float count_of(int chunk) { return static_cast<float>(pixels_of(chunk) * GROUP_CHANNELS); }

// The position of a thread's vectors in the chunk of a turn, and the groups that they belong to.
struct Place {
    int sample, chunk, row, pixels, channel, group, in_first;

    __device__ __forceinline__ explicit Place(int turn) {
        sample = blockIdx.x / SPANS, chunk = blockIdx.x % SPANS * REPEAT + turn;
        row = threadIdx.x / ACROSS;
        channel = threadIdx.x % ACROSS * 8;
        pixels = row < STRIDE && turn < REPEAT ? pixels_of(chunk) : 0;
        group = channel / GROUP_CHANNELS;
        in_first = min(8, (group + 1) * GROUP_CHANNELS - channel);  // channels of the vector in its first group
    }

    __device__ __forceinline__ size_t pixel() const {
        return static_cast<size_t>(sample) * PIXELS + chunk * CHUNK_PIXELS + row;
    }

    __device__ __forceinline__ bool has(int i) const { return row + i * STRIDE < pixels; }
};

__device__ __forceinline__ void fetch(uint4 (&held)[VECTORS], const Problem& p, const Place& at) {
    const bool is_first = FIRST == CHANNELS || at.channel < FIRST;
    const int channels = is_first ? FIRST : CHANNELS - FIRST, channel = is_first ? at.channel : at.channel - FIRST;
    const uint4* const from = reinterpret_cast<const uint4*>((is_first ? p.x : p.more) + at.pixel() * channels + channel);
#pragma unroll
    for (int i = 0; i < VECTORS; ++i)
        held[i] = at.has(i) ? __ldcg(from + i * STRIDE * (channels / 8)) : make_uint4(0, 0, 0, 0);
}

__device__ __forceinline__ void unpack(float (&x)[8], uint4 held) {
    const u32 pairs[4] = {held.x, held.y, held.z, held.w};
#pragma unroll
    for (int c = 0; c < 4; ++c) x[2 * c] = low_half(pairs[c]), x[2 * c + 1] = high_half(pairs[c]);
}

// Loads the elements of eight channels of the weight or the bias.
__device__ __forceinline__ void load_affine(float (&x)[8], const void* from, int channel) {
#if HALF_AFFINE
    unpack(x, __ldg(reinterpret_cast<const uint4*>(static_cast<const u16*>(from) + channel)));
#else
#pragma unroll
    for (int c = 0; c < 8; c += 4)
        *reinterpret_cast<float4*>(x + c) =
            __ldg(reinterpret_cast<const float4*>(static_cast<const float*>(from) + channel + c));
#endif
}

__device__ __forceinline__ float sum_warp(float x) {
#pragma unroll
    for (int step = 16; step; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
    return x;
}

// Adds the values of eight channels per group.
__device__ __forceinline__ float2 by_group(const float (&values)[8], int in_first) {
    float2 sum = make_float2(0.0f, 0.0f);
#pragma unroll
    for (int c = 0; c < 8; ++c) {
        sum.x += c < in_first ? values[c] : 0.0f;
        sum.y += c < in_first ? 0.0f : values[c];
    }
    return sum;
}

#if STATISTICS
__device__ __forceinline__ void statistics_of(const uint4 (&held)[VECTORS], const Problem& p, const Place& at,
                                              float4 (&entries)[THREADS]) {
    float totals[8] = {}, x[8];
    int count = 0;
#pragma unroll
    for (int i = 0; i < VECTORS; ++i) {
        unpack(x, held[i]);
#pragma unroll
        for (int c = 0; c < 8; ++c) totals[c] += x[c];
        count += at.has(i);
    }
    const float2 sums = by_group(totals, at.in_first);
    const float mean_0 = count ? sums.x / static_cast<float>(count * at.in_first) : 0.0f;
    const float mean_1 = count && at.in_first < 8 ? sums.y / static_cast<float>(count * (8 - at.in_first)) : 0.0f;
#pragma unroll
    for (int c = 0; c < 8; ++c) totals[c] = 0.0f;
#pragma unroll
    for (int i = 0; i < VECTORS; ++i)
        if (at.has(i)) {
            unpack(x, held[i]);
#pragma unroll
            for (int c = 0; c < 8; ++c) {
                const float distance = x[c] - (c < at.in_first ? mean_0 : mean_1);
                totals[c] += distance * distance;
            }
        }
    const float2 deviations = by_group(totals, at.in_first);
    entries[threadIdx.x] = make_float4(mean_0, deviations.x, mean_1, deviations.y);
    __syncthreads();

    // A warp merges the entries of one group: of each row of threads, those whose channels belong to the group.
    constexpr int TOUCH = (GROUP_CHANNELS + 7) / 8 + 1, TURNS = (STRIDE * TOUCH + 31) / 32;
    const int lane = threadIdx.x % 32, pixels = pixels_of(at.chunk);
    for (int group = threadIdx.x / 32; group < GROUPS; group += WARPS) {
        const int start = group * GROUP_CHANNELS, end = start + GROUP_CHANNELS;
        float means[TURNS], counts[TURNS], sum = 0.0f, squares = 0.0f;
#pragma unroll
        for (int turn = 0; turn < TURNS; ++turn) {
            const int row = (lane + 32 * turn) / TOUCH, channel = (start / 8 + (lane + 32 * turn) % TOUCH) * 8;
            means[turn] = counts[turn] = 0.0f;
            if (row < STRIDE && row < pixels && channel < end) {
                const float4 entry = entries[row * ACROSS + channel / 8];
                const bool is_first = channel >= start;
                const int channels = is_first ? min(8, end - channel) : channel + 8 - start;
                counts[turn] = static_cast<float>(channels * ((pixels - row + STRIDE - 1) / STRIDE));
                means[turn] = is_first ? entry.x : entry.z;
                squares += is_first ? entry.y : entry.w;
            }
            sum += means[turn] * counts[turn];
        }
        const float mean = sum_warp(sum) / static_cast<float>(pixels * GROUP_CHANNELS);
#pragma unroll
        for (int turn = 0; turn < TURNS; ++turn) {
            const float distance = means[turn] - mean;
            squares += counts[turn] * distance * distance;
        }
        squares = sum_warp(squares);
        if (lane == 0) p.partials[(at.sample * GROUPS + group) * CHUNKS + at.chunk] = make_float2(mean, squares);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) group_statistics(const __grid_constant__ Problem p) {
    __shared__ float4 entries[THREADS];  // mean and squared deviations of a thread's values, of either group
    await_previous();
    uint4 held[VECTORS];
    fetch(held, p, Place(0));
#pragma unroll 1
    for (int turn = 0; turn < REPEAT; ++turn) {
        const Place at(turn);
        if (REPEAT > 1 && at.chunk >= CHUNKS) break;
#if REPEAT > 1
        uint4 next[VECTORS];
        fetch(next, p, Place(turn + 1));
#endif
        statistics_of(held, p, at, entries);
#if REPEAT > 1
        __syncthreads();  // the entries have been read
#pragma unroll
        for (int i = 0; i < VECTORS; ++i) held[i] = next[i];
#endif
    }
}

#else

// y sigmoid(y) = h + h tanh(h) with h = y / 2. For codes the special function unit's tangent is near enough: it is off by
// 2^-11 at most. What is written in float16 takes its exponential and a reciprocal.
__device__ __forceinline__ float silu(float y) {
#if QUANTIZERS
    const float half = 0.5f * y;
    float t;
    asm("tanh.approx.f32 %0, %1;" : "=f"(t) : "f"(half));
    return fmaf(half, t, half);
#else
    float e, r;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(e) : "f"(y * -1.4426950f));
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(1.0f + e));
    return y * r;
#endif
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) group_apply(const __grid_constant__ Problem p) {
    __shared__ float2 joined[GROUPS + 1];  // mean, and 1 / standard deviation
    const Place at(0);
    // These inputs were complete before `group_statistics` allowed this kernel to be launched.
    uint4 held[VECTORS];
    fetch(held, p, at);
    float gain[8], shift[8];
    load_affine(gain, p.weight, at.channel);
    load_affine(shift, p.bias, at.channel);
#if QUANTIZERS
    float inverses[QUANTIZERS];
    int zero_points[QUANTIZERS];
#pragma unroll
    for (int q = 0; q < QUANTIZERS; ++q) {
        const float scale = __ldg(p.scales + q);
        inverses[q] = p.zero_points == nullptr ? scale : __frcp_rn(scale);
        zero_points[q] =
            p.zero_points == nullptr ? static_cast<int>(__ldg(p.shifts + q)) + 128 : __ldg(p.zero_points + q);
    }
#endif

    await_previous();
    const int lane = threadIdx.x % 32;
    constexpr float ALL = static_cast<float>(PIXELS) * GROUP_CHANNELS;
    for (int group = threadIdx.x / 32; group < GROUPS; group += WARPS) {
        const float2* const partials = p.partials + (at.sample * GROUPS + group) * CHUNKS;
        float2 parts[LOADS];
#pragma unroll
        for (int i = 0; i < LOADS; ++i)
            parts[i] = lane + 32 * i < CHUNKS ? __ldcg(partials + lane + 32 * i) : make_float2(0.0f, 0.0f);
        float sum = 0.0f, squares = 0.0f;
#pragma unroll
        for (int i = 0; i < LOADS; ++i) sum += parts[i].x * count_of(lane + 32 * i);
        const float mean = sum_warp(sum) * (1.0f / ALL);
#pragma unroll
        for (int i = 0; i < LOADS; ++i) {
            const float distance = parts[i].x - mean;
            squares += parts[i].y + count_of(lane + 32 * i) * distance * distance;
        }
        squares = sum_warp(squares);
        if (lane == 0) joined[group] = make_float2(mean, rsqrtf(squares * (1.0f / ALL) + p.eps));
    }
    __syncthreads();

    const float2 first = joined[at.group], second = joined[at.group + 1];
#pragma unroll
    for (int c = 0; c < 8; ++c) {
        gain[c] *= c < at.in_first ? first.y : second.y;
        shift[c] -= (c < at.in_first ? first.x : second.x) * gain[c];
    }
#pragma unroll 1
    for (int turn = 0; turn < REPEAT; ++turn) {
        const Place now(turn);
        if (REPEAT > 1 && now.chunk >= CHUNKS) break;
#if REPEAT > 1
        uint4 next[VECTORS];
        fetch(next, p, Place(turn + 1));
#endif
        const size_t base = now.pixel() * CHANNELS + now.channel;
#pragma unroll
        for (int i = 0; i < VECTORS; ++i) {
            if (!now.has(i)) continue;
            const size_t to = base + i * STRIDE * CHANNELS;
            float x[8], y[8];
            unpack(x, held[i]);
#pragma unroll
            for (int c = 0; c < 8; ++c) {
                y[c] = fmaf(x[c], gain[c], shift[c]);
#if SILU
                y[c] = silu(y[c]);
#endif
            }
#if QUANTIZERS
#pragma unroll
            for (int q = 0; q < QUANTIZERS; ++q) {
                Quantizer quantize(1.0f, zero_points[q], p.quant_max);
                quantize.inverse = inverses[q];
                u32 code[8];
#pragma unroll
                for (int c = 0; c < 8; ++c) code[c] = quantize(RAW && q == QUANTIZERS - 1 ? x[c] : y[c]);
                *reinterpret_cast<uint2*>(static_cast<unsigned char*>(p.out[q]) + to) =
                    make_uint2(four_bytes(code[0], code[1], code[2], code[3]),
                               four_bytes(code[4], code[5], code[6], code[7]));
            }
#else
            *reinterpret_cast<uint4*>(static_cast<u16*>(p.out[0]) + to) = make_uint4(
                half_pair(y[0], y[1]), half_pair(y[2], y[3]), half_pair(y[4], y[5]), half_pair(y[6], y[7]));
#endif
        }
#if REPEAT > 1
#pragma unroll
        for (int i = 0; i < VECTORS; ++i) held[i] = next[i];
#endif
    }
}
#endif
