"""SIMD vectors inside Numba: a type that holds one LLVM vector of float32, and the few operations kernels need.

Plain Numba loops leave the choice of registers to the auto-vectoriser and reach a fraction of the FMA peak. Here a
register tile is written down explicitly: every name in a generated kernel is one hardware register.
Addresses are int64 bytes, so that one kernel serves every array and the structure of a pruned layer is plain data.
"""

import os
from collections.abc import Callable, Iterable
from functools import cache, wraps
from types import SimpleNamespace

import llvmlite.binding as llvm
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic, models, register_model

FLOAT = ir.FloatType()
BYTE, SHORT, INT, LONG = (ir.IntType(bits) for bits in (8, 16, 32, 64))
TRUTH = ir.IntType(1)
FEATURES = llvm.get_host_cpu_features()
HOST_REGISTERS = 32 if FEATURES.get("avx512f") or not FEATURES.get("sse") else 16  # 32 with AVX-512 and NEON


def host_width() -> int:
    """Floats per register of this CPU: 16 (AVX-512), 8 (AVX), 4 (SSE, NEON), or what `NBS_VECTOR_WIDTH` forces."""
    forced = os.environ.get("NBS_VECTOR_WIDTH")
    if forced and int(forced) not in (4, 8, 16):
        raise ValueError(f"Expected NBS_VECTOR_WIDTH to be 4, 8 or 16. Got {forced}.")
    return int(forced) if forced else 16 if FEATURES.get("avx512f") else 8 if FEATURES.get("avx") else 4


class Vector(types.Type):
    """Numba type of one register: `width` float32, or truth values (an AVX-512 mask, or lanes of ones and zeros)."""

    def __init__(self, width: int, element: ir.Type = FLOAT):
        self.register = ir.VectorType(element, width)
        super().__init__(name=f"{element}x{width}")


@register_model(Vector)
class VectorModel(models.PrimitiveModel):
    def __init__(self, manager, vector):
        super().__init__(manager, vector, vector.register)


def operation(result: types.Type, *arguments: types.Type) -> Callable:
    """Decorator: what a function of an LLVM builder and values emits becomes an operation on these Numba types."""

    def decorate(emit: Callable) -> Callable:
        def codegen(context, builder, signature, values):
            value = emit(builder, *values)
            return context.get_dummy_value() if result is types.void else value

        @intrinsic
        @wraps(emit)  # Numba takes the number of arguments from its signature
        def typed(typing, *_):
            return result(*arguments), codegen

        return typed

    return decorate


def _pointer(builder, address, to):
    return builder.inttoptr(address, ir.PointerType(to))


def _read(builder, address, stored: ir.Type, align: int | None = None):
    return builder.load(_pointer(builder, address, stored), align=align)


load_int64 = operation(types.int64, types.int64)(lambda b, address: _read(b, address, LONG))
load_int32 = operation(types.int64, types.int64)(lambda b, address: b.sext(_read(b, address, INT), LONG))
load_float = operation(types.float32, types.int64)(lambda b, address: _read(b, address, FLOAT))


@operation(types.void, types.int64, types.float32)
def store_float(builder, address, value):
    builder.store(value, _pointer(builder, address, FLOAT))


@operation(types.void, types.int64)
def prefetch(builder, address):
    """Ask for the cache line at `address`; never faults."""
    kind = ir.FunctionType(ir.VoidType(), [BYTE.as_pointer(), INT, INT, INT])
    function = builder.module.declare_intrinsic("llvm.prefetch.p0", fnty=kind)
    builder.call(function, [_pointer(builder, address, BYTE), INT(0), INT(3), INT(1)])


@operation(types.void, types.int64, types.int64, types.int64)
def call(builder, function, arguments, thread):
    """Call the kernel at address `function` (a `cfunc` of signature void(int64, int64))."""
    builder.call(_pointer(builder, function, ir.FunctionType(ir.VoidType(), [LONG, LONG])), [arguments, thread])


@operation(types.int64, types.int64, types.int64)
def fetch_add(builder, address, value):
    """Atomically add to the int64 at `address`; returns what was there before."""
    return builder.atomic_rmw("add", _pointer(builder, address, LONG), value, "seq_cst")


@operation(types.int64, types.int64)
def atomic_load(builder, address):
    """The int64 at `address`, as other threads last wrote it."""
    return builder.load_atomic(_pointer(builder, address, LONG), "acquire", 8)


MAGIC = 1.5 * 2.0**23  # the sum of it and a small float32 is rounded to a whole number
EXP = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)  # Cephes


@cache
def operations(width: int) -> SimpleNamespace:
    """Operations on vectors of `width` float32; every name is about one machine instruction.

    `load_mask` reads int32 lanes (not 0: true); `store_kept` writes those lanes, and zeros into the others;
    `even` and `odd` take every second lane of two vectors, `slide<n>` the lanes from n on; `total` sums the lanes;
    `gather` takes uint16 numbers of floats behind an address.

    NaN passes through `maximum(x, bound)` and `minimum(x, bound)` when it is in `x`, as in PyTorch's clamp;
    `largest` is the larger one, and NaN if either is, as in PyTorch's max pooling.
    """
    vector, truth = Vector(width), Vector(width, TRUTH)
    register, bits = vector.register, ir.VectorType(INT, width)
    unary, binary = operation(vector, vector), operation(vector, vector, vector)

    def constant(value: float) -> ir.Constant:
        return ir.Constant(register, [value] * width)

    def lanes(numbers: Iterable[int]) -> Callable:
        return lambda builder, a, b: builder.shuffle_vector(a, b, ir.Constant(bits, list(numbers)))

    @operation(vector, types.int64)
    def load(builder, address):
        return _read(builder, address, register, align=4)

    @operation(types.void, types.int64, vector)
    def store(builder, address, value):
        builder.store(value, _pointer(builder, address, register), align=4)

    @operation(truth, types.int64)
    def load_mask(builder, address):
        return builder.icmp_signed("!=", _read(builder, address, bits, align=4), ir.Constant(bits, [0] * width))

    @operation(types.void, types.int64, vector, truth)
    def store_kept(builder, address, value, mask):
        builder.store(builder.select(mask, value, constant(0.0)), _pointer(builder, address, register), align=4)

    @operation(vector, types.int64, types.int64)
    def gather(builder, base, numbers):
        loaded = _read(builder, numbers, ir.VectorType(SHORT, width), align=2)
        value = constant(0.0)
        if width == 16 and FEATURES.get("avx512f"):
            kind = ir.FunctionType(register, [register, BYTE.as_pointer(), bits, truth.register, INT])
            function = builder.module.declare_intrinsic("llvm.x86.avx512.mask.gather.dps.512", fnty=kind)
            everywhere = ir.Constant(truth.register, [1] * width)
            operands = [value, _pointer(builder, base, BYTE), builder.zext(loaded, bits), everywhere, INT(4)]
            return builder.call(function, operands)
        for lane in range(width):
            number = builder.zext(builder.extract_element(loaded, INT(lane)), LONG)
            address = builder.add(base, builder.mul(number, LONG(4)))
            value = builder.insert_element(value, _read(builder, address, FLOAT), INT(lane))
        return value

    @operation(vector, types.float32)
    def splat(builder, scalar):
        single = builder.insert_element(ir.Constant(register, ir.Undefined), scalar, INT(0))
        return lanes([0] * width)(builder, single, single)

    def fused(builder, a, b, c):
        kind = ir.FunctionType(register, [register] * 3)
        return builder.call(builder.module.declare_intrinsic(f"llvm.fma.v{width}f32", fnty=kind), [a, b, c])

    @operation(types.float32, vector)
    def total(builder, value):
        half = width // 2
        while half:
            folded = [min(i + half, width - 1) if i < half else i for i in range(width)]
            value, half = builder.fadd(value, lanes(folded)(builder, value, value)), half // 2
        return builder.extract_element(value, INT(0))

    def clamped(builder, a, low, high):
        """min(max(a, low), high), NaN kept."""
        for sign, limit in ((">", constant(low)), ("<", constant(high))):
            a = builder.select(builder.fcmp_ordered(sign, limit, a), limit, a)
        return a

    def hard_gate(builder, a):
        """min(max(a + 3, 0), 6) / 6, NaN kept."""
        return builder.fmul(clamped(builder, builder.fadd(a, constant(3.0)), 0.0, 6.0), constant(1 / 6))

    def gate(builder, a):
        """1 / (1 + exp(-a)) to some 1e-7, NaN kept. exp(r + n ln 2) is 2 ** n times exp(r), a polynomial (Cephes).

        Adding MAGIC leaves n in the lowest bits, from where it goes to those of the exponent. From 88 on it is inf."""
        a = builder.fmul(a, constant(-1.0))
        infinite = builder.fcmp_ordered(">", a, constant(88.0))
        a = clamped(builder, a, -87.0, 88.0)
        moved = fused(builder, a, constant(1 / np.log(2)), constant(MAGIC))
        n = builder.fsub(moved, constant(MAGIC))
        r = fused(builder, n, constant(-0.693359375), a)
        r = fused(builder, n, constant(2.12194440e-4), r)
        value = constant(EXP[0])
        for coefficient in (*EXP[1:], 1.0, 1.0):
            value = fused(builder, value, r, constant(coefficient))
        power = builder.shl(builder.bitcast(moved, bits), ir.Constant(bits, [23] * width))
        power = builder.bitcast(builder.add(power, ir.Constant(bits, [127 << 23] * width)), register)
        value = builder.select(infinite, constant(float("inf")), builder.fmul(value, power))
        return builder.fdiv(constant(1.0), builder.fadd(value, constant(1.0)))

    return SimpleNamespace(
        load=load, store=store, load_mask=load_mask, store_kept=store_kept, gather=gather, splat=splat,
        fma=operation(vector, vector, vector, vector)(fused), total=total,
        add=binary(lambda b, x, y: b.fadd(x, y)), mul=binary(lambda b, x, y: b.fmul(x, y)),
        maximum=binary(lambda b, x, y: b.select(b.fcmp_ordered(">", y, x), y, x)),
        minimum=binary(lambda b, x, y: b.select(b.fcmp_ordered("<", y, x), y, x)),
        largest=binary(lambda b, x, y: b.select(b.or_(b.fcmp_ordered(">", y, x), b.fcmp_unordered("uno", y, y)), y, x)),
        hardsigmoid=unary(hard_gate), hardswish=unary(lambda b, x: b.fmul(x, hard_gate(b, x))),
        sigmoid=unary(gate), silu=unary(lambda b, x: b.fmul(x, gate(b, x))),
        even=binary(lanes(range(0, 2 * width, 2))), odd=binary(lanes(range(1, 2 * width, 2))),
        **{f"slide{n}": binary(lanes(range(n, n + width))) for n in range(1, width)},
    )  # fmt: skip
