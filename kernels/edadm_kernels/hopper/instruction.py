"""Writes the CUDA C++ functions that issue Hopper's warp-group matrix instruction, `wgmma` (PTX ISA, wgmma)."""

from __future__ import annotations

from collections.abc import Sequence


def wgmma(columns: int, adds_always: bool = True) -> str:
    """Returns the source of `multiply(d, a, b)`, one matrix instruction of 64 rows and 32 terms per sum: `d += a b`.

    Args:
        columns: Number of columns of the instruction.
        adds_always: Whether `multiply` always adds. Otherwise it has a fourth argument, and computes `d = a b` where
            that is zero.
    """
    count = columns // 2
    registers = ", ".join(f"%{i}" for i in range(count))
    operands = ", ".join(f'"+r"(d[{i}])' for i in range(count))
    instruction = (
        f"wgmma.mma_async.sync.aligned.m64n{columns}k32.s32.s8.s8 {{{registers}}}, %{count}, %{count + 1}, "
        + ("1;" if adds_always else "p;")
    )
    if adds_always:
        arguments, text, inputs = "u64 a, u64 b", instruction, '"l"(a), "l"(b)'
    else:
        arguments, inputs = "u64 a, u64 b, int adds", '"l"(a), "l"(b), "r"(adds)'
        text = f"{{\\n.reg .pred p;\\nsetp.ne.b32 p, %{count + 2}, 0;\\n{instruction}\\n}}\\n"
    return (
        f"__device__ __forceinline__ void multiply(int (&d)[{count}], {arguments}) {{\n"
        f'    asm volatile("{text}" : {operands} : {inputs});\n}}\n'
    )


def accumulating_wgmma(name: str, columns: int, types: str, from_registers: bool, flags: Sequence[int] = ()) -> str:
    """Returns the source of `name(d, a, b, accumulate)`, one matrix instruction of 64 rows: `d = a b` or `d += a b`.

    Args:
        name: Name of the function.
        columns: Number of columns of the instruction.
        types: Terms per sum and the types of `d`, `a` and `b`, as in the name of the instruction: `k16.f32.f16.f16`.
        from_registers: Whether `a` is in registers instead of shared memory.
        flags: The immediate operands after the predicate; an instruction of integers has none.
    """
    count = columns // 2
    element, constraint = ("int", "r") if ".s32." in types else ("float", "f")
    registers = ", ".join(f"%{i}" for i in range(count))
    outputs = ", ".join(f'"+{constraint}"(d[{i}])' for i in range(count))
    if from_registers:
        parameter, left = "const u32* a", "{" + ", ".join(f"%{count + i}" for i in range(4)) + "}"
        inputs, used = ", ".join(f'"r"(a[{i}])' for i in range(4)), 4
    else:
        parameter, left, inputs, used = "u64 a", f"%{count}", '"l"(a)', 1
    operands = ", ".join(["more", *map(str, flags)])
    return (
        f"__device__ __forceinline__ void {name}({element} (&d)[{count}], {parameter}, u64 b, bool accumulate) {{\n"
        f'    asm volatile("{{\\n.reg .pred more;\\nsetp.ne.b32 more, %{count + used + 1}, 0;\\n'
        f"wgmma.mma_async.sync.aligned.m64n{columns}{types} {{{registers}}}, {left}, %{count + used}, "
        f'{operands};\\n}}" : {outputs} : {inputs}, "l"(b), "r"(static_cast<int>(accumulate)));\n}}\n'
    )
