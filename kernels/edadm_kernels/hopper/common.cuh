// What the kernels for compute capability 9.0 share: barriers, copies, grids that overlap, rounding to codes.

typedef unsigned int u32;
typedef unsigned long long u64;
typedef unsigned short u16;

struct alignas(64) TensorMap {
    unsigned char opaque[128];
};

__device__ __forceinline__ u32 shared_address(const void* p) {
    return static_cast<u32>(__cvta_generic_to_shared(p));
}

// ---- barriers in shared memory --------------------------------------------------------------------------------------

__device__ __forceinline__ void barrier_init(u32 barrier, u32 arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

__device__ __forceinline__ void barrier_arrive(u32 barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ void barrier_expect(u32 barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

__device__ __forceinline__ void barrier_wait(u32 barrier, u32 phase) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again;\n"
        "}\n" ::"r"(barrier),
        "r"(phase)
        : "memory");
}

// Waits for the threads of the warps that multiply; the warp that copies does not take part.
__device__ __forceinline__ void sync_threads(int threads) {
    asm volatile("bar.sync 1, %0;" ::"r"(threads) : "memory");
}

__device__ __forceinline__ u32 cluster_rank() {
    u32 rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

__device__ __forceinline__ void cluster_sync() {
    asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}

// Returns the address that `address` has in the shared memory of another block of the cluster.
__device__ __forceinline__ u32 peer_address(u32 address, u32 rank) {
    u32 peer;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(peer) : "r"(address), "r"(rank));
    return peer;
}

__device__ __forceinline__ int4 load_peer(u32 address) {
    int4 v;
    asm volatile("ld.shared::cluster.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "r"(address)
                 : "memory");
    return v;
}

// ---- grids that overlap ---------------------------------------------------------------------------------------------

// Waits for the results of the kernel before this one, and then allows the next one to be launched. It does nothing
// where the launches did not ask for it.
__device__ __forceinline__ void await_previous() {
    asm volatile("griddepcontrol.wait;\ngriddepcontrol.launch_dependents;" ::: "memory");
}

// ---- numbers --------------------------------------------------------------------------------------------------------

__device__ __forceinline__ float half_to_float(u16 h) {
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h));
    return f;
}

__device__ __forceinline__ float low_half(u32 pair) { return half_to_float(static_cast<u16>(pair & 0xffff)); }

__device__ __forceinline__ float high_half(u32 pair) { return half_to_float(static_cast<u16>(pair >> 16)); }

__device__ __forceinline__ u32 half_pair(float low, float high) {
    u32 pair;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

__device__ __forceinline__ u32 bfloat_pair(float low, float high) {
    u32 pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

// Computes clamp(rne(x * inverse) + zero_point, 0, quant_max) - 128 in the low byte, like `rounding.quantize_s8`.
struct Quantizer {
    float inverse, low, high;
    int offset;

    __device__ __forceinline__ Quantizer(float scale, int zero_point, float quant_max)
        : inverse(__frcp_rn(scale)),
          low(-static_cast<float>(zero_point)),
          high(quant_max - static_cast<float>(zero_point)),
          offset(zero_point - 128) {}

    __device__ __forceinline__ u32 operator()(float x) const {
        const float scaled = fminf(fmaxf(__fmul_rn(x, inverse), low), high);
        return static_cast<u32>(__float_as_int(__fadd_rn(scaled, 12582912.0f)) + offset);  // 1.5 * 2^23
    }
};

// Returns the quantizer of a grid: a scale and the zero-point of unsigned codes or, if `zero_point` is null, the inverse of
// a scale and the zero-point of signed codes, `shift`.
__device__ __forceinline__ Quantizer quantizer_of(const float* scale, const int* zero_point, const float* shift,
                                                  float quant_max) {
    if (zero_point != nullptr) return Quantizer(__ldg(scale), __ldg(zero_point), quant_max);
    Quantizer quantize(1.0f, static_cast<int>(__ldg(shift)) + 128, quant_max);
    quantize.inverse = __ldg(scale);
    return quantize;
}

// 0.5 g (1 + erf(g / sqrt 2)) = max(g, 0) - 0.5 |g| (1 - erf(|g| / sqrt 2)), after Abramowitz and Stegun 7.1.26: the
// error function is off by at most 1.5e-7.
__device__ __forceinline__ float gelu(float g) {
    const float scaled = g * 0.84932180f;  // its square is g^2 log2(e) / 2
    float t, e;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(t) : "f"(fmaf(0.23164190f, fabsf(g), 1.0f)));
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(e) : "f"(-scaled * scaled));
    float p = fmaf(0.5307027145f, t, -0.7265760135f);  // halves of the published coefficients
    p = fmaf(p, t, 0.7107068705f);
    p = fmaf(p, t, -0.142248368f);
    p = fmaf(p, t, 0.127414796f);
    return fmaf(-fabsf(g), p * t * e, fmaxf(g, 0.0f));
}

// Returns the low bytes of four words as one word.
__device__ __forceinline__ u32 four_bytes(u32 a, u32 b, u32 c, u32 d) {
    return __byte_perm(__byte_perm(a, b, 0x0040), __byte_perm(c, d, 0x0040), 0x5410);
}
