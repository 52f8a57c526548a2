// What the attention kernels share: the order in which groups of four warps issue products, waiting for these products,
// and exponentials. CONSUMERS is the number of groups that multiply.

// Waits for all committed groups of products but the last PENDING.
template <int PENDING>
__device__ __forceinline__ void wait_products() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

__device__ __forceinline__ void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

__device__ __forceinline__ void fence_registers() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

// `await_turn` waits until a group may issue products; `give_turn` allows a group to issue them.
__device__ __forceinline__ void await_turn(int group) {
    if (CONSUMERS > 1) asm volatile("bar.sync %0, 256;" ::"r"(group + 1) : "memory");
}

__device__ __forceinline__ void give_turn(int group) {
    if (CONSUMERS > 1) asm volatile("bar.arrive %0, 256;" ::"r"(group + 1) : "memory");
}

// Keeps the compiler from moving uses of `x` to before a wait.
template <int N>
__device__ __forceinline__ void keep(float (&x)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) asm volatile("" : "+f"(x[i])::"memory");
}

template <typename Word, int N>
__device__ __forceinline__ void keep(Word (&x)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) asm volatile("" : "+r"(x[i])::"memory");
}

__device__ __forceinline__ float power_of_two(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ float sum_of_four(float x) {
    x += __shfl_xor_sync(0xffffffffu, x, 1);
    return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

__device__ __forceinline__ float lowest() { return __int_as_float(0xff800000); }
