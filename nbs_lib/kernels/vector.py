"""SIMD vectors inside Numba: a type that holds one LLVM vector of float32, and the few operations kernels need.

Plain Numba loops leave the choice of registers to the auto-vectoriser and reach a fraction of the FMA peak. Here a
register tile is written down explicitly: every name in a generated kernel is one hardware register.
Addresses are int64 bytes, so that one kernel serves every array and the structure of a pruned layer is plain data.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from types import SimpleNamespace

import llvmlite.binding as llvm
from llvmlite import ir
from numba import types
from numba.extending import intrinsic, models, register_model

FLOAT = ir.FloatType()
BYTE = ir.IntType(8)
TRUTH = ir.IntType(1)
INT = ir.IntType(32)
LONG = ir.IntType(64)


def host_width() -> int:
    """Floats per register of this CPU: 16 (AVX-512), 8 (AVX), 4 (SSE, NEON), or what `NBS_VECTOR_WIDTH` forces."""
    features = llvm.get_host_cpu_features()
    width = 16 if features.get("avx512f") else 8 if features.get("avx") else 4
    forced = os.environ.get("NBS_VECTOR_WIDTH")
    if forced and int(forced) not in (4, 8, 16):
        raise ValueError(f"Expected NBS_VECTOR_WIDTH to be 4, 8 or 16. Got {forced}.")
    return int(forced) if forced else width


# 32 architectural vector registers with AVX-512 and NEON, 16 before.
HOST_REGISTERS = (
    32 if llvm.get_host_cpu_features().get("avx512f") or not llvm.get_host_cpu_features().get("sse") else 16
)


class Vector(types.Type):
    """Numba type of one register: `width` float32, or truth values (an AVX-512 mask, or lanes of ones and zeros)."""

    def __init__(self, width: int, element: ir.Type = FLOAT):
        self.register = ir.VectorType(element, width)
        super().__init__(name=f"{element}x{width}")


@register_model(Vector)
class VectorModel(models.PrimitiveModel):
    def __init__(self, manager, vector):
        super().__init__(manager, vector, vector.register)


def _pointer(builder, address, to):
    return builder.inttoptr(address, ir.PointerType(to))


def _loader(result: types.Type, stored: ir.Type) -> Callable:
    """An intrinsic: what lies at an address (bytes); integers come as int64."""

    @intrinsic
    def load(typing, address):
        def codegen(context, builder, signature, args):
            value = builder.load(_pointer(builder, args[0], stored))
            return value if stored == FLOAT else builder.sext(value, LONG)

        return result(types.int64), codegen

    return load


load_int64, load_int32 = _loader(types.int64, LONG), _loader(types.int64, INT)
load_float = _loader(types.float32, FLOAT)


@intrinsic
def store_float(typing, address, value):
    """Write one float32 at `address`."""

    def codegen(context, builder, signature, args):
        builder.store(args[1], _pointer(builder, args[0], FLOAT))
        return context.get_dummy_value()

    return types.void(types.int64, types.float32), codegen


@intrinsic
def prefetch(typing, address):
    """Ask for the cache line at `address`; never faults."""

    def codegen(context, builder, signature, args):
        kind = ir.FunctionType(ir.VoidType(), [BYTE.as_pointer(), INT, INT, INT])
        function = builder.module.declare_intrinsic("llvm.prefetch.p0", fnty=kind)
        builder.call(function, [_pointer(builder, args[0], BYTE), INT(0), INT(3), INT(1)])
        return context.get_dummy_value()

    return types.void(types.int64), codegen


@intrinsic
def call(typing, function, arguments, thread):
    """Call the kernel at address `function` (a `cfunc` of signature void(int64, int64))."""

    def codegen(context, builder, signature, args):
        kind = ir.FunctionType(ir.VoidType(), [LONG, LONG])
        builder.call(_pointer(builder, args[0], kind), args[1:])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen


@intrinsic
def fetch_add(typing, address, value):
    """Atomically add to the int64 at `address`; returns what was there before."""

    def codegen(context, builder, signature, args):
        return builder.atomic_rmw("add", _pointer(builder, args[0], LONG), args[1], "seq_cst")

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def atomic_load(typing, address):
    """The int64 at `address`, as other threads last wrote it."""

    def codegen(context, builder, signature, args):
        return builder.load_atomic(_pointer(builder, args[0], LONG), "acquire", 8)

    return types.int64(types.int64), codegen


@cache
def operations(width: int) -> SimpleNamespace:
    """Operations on vectors of `width` float32; every name is about one machine instruction.

    `load_mask` reads int32 lanes (not 0: true); `store_kept` writes those lanes, and zeros into the others;
    `even` and `odd` take every second lane of two vectors, `slide<n>` the lanes from n on; `total` sums the lanes.

    NaN passes through `maximum(x, bound)` and `minimum(x, bound)` when it is in `x`, as in PyTorch's clamp.
    """
    if width not in (4, 8, 16):
        raise ValueError(f"Expected a vector width of 4, 8 or 16 floats. Got {width}.")
    vector, truth = Vector(width), Vector(width, TRUTH)
    register, bits = vector.register, ir.VectorType(INT, width)
    zero = ir.Constant(register, [0.0] * width)

    def constant_shuffle(builder, a, b, lanes):
        return builder.shuffle_vector(a, b, ir.Constant(bits, lanes))

    @intrinsic
    def load(typing, address):
        def codegen(context, builder, signature, args):
            value = builder.load(_pointer(builder, args[0], register))
            value.align = 4
            return value

        return vector(types.int64), codegen

    @intrinsic
    def store(typing, address, value):
        def codegen(context, builder, signature, args):
            builder.store(args[1], _pointer(builder, args[0], register), align=4)
            return context.get_dummy_value()

        return types.void(types.int64, vector), codegen

    @intrinsic
    def gather(typing, base, numbers):
        def codegen(context, builder, signature, args):
            short = ir.VectorType(ir.IntType(16), width)
            loaded = builder.load(_pointer(builder, args[1], short))
            loaded.align = 2
            if width == 16 and llvm.get_host_cpu_features().get("avx512f"):
                kind = ir.FunctionType(register, [register, BYTE.as_pointer(), bits, truth.register, INT])
                function = builder.module.declare_intrinsic("llvm.x86.avx512.mask.gather.dps.512", fnty=kind)
                everywhere = ir.Constant(truth.register, [1] * width)
                operands = [zero, _pointer(builder, args[0], BYTE), builder.zext(loaded, bits), everywhere, INT(4)]
                return builder.call(function, operands)
            value = zero
            for lane in range(width):
                number = builder.zext(builder.extract_element(loaded, INT(lane)), LONG)
                address = builder.add(args[0], builder.mul(number, LONG(4)))
                value = builder.insert_element(value, builder.load(_pointer(builder, address, FLOAT)), INT(lane))
            return value

        return vector(types.int64, types.int64), codegen

    @intrinsic
    def splat(typing, scalar):
        def codegen(context, builder, signature, args):
            single = builder.insert_element(ir.Constant(register, ir.Undefined), args[0], ir.Constant(INT, 0))
            return constant_shuffle(builder, single, single, [0] * width)

        return vector(types.float32), codegen

    @intrinsic
    def fma(typing, a, b, c):
        def codegen(context, builder, signature, args):
            kind = ir.FunctionType(register, [register] * 3)
            return builder.call(builder.module.declare_intrinsic(f"llvm.fma.v{width}f32", fnty=kind), args)

        return vector(vector, vector, vector), codegen

    def binary(operation):
        @intrinsic
        def function(typing, a, b):
            def codegen(context, builder, signature, args):
                return operation(builder, *args)

            return vector(vector, vector), codegen

        return function

    @intrinsic
    def load_mask(typing, address):
        def codegen(context, builder, signature, args):
            value = builder.load(_pointer(builder, args[0], bits))
            value.align = 4
            return builder.icmp_signed("!=", value, ir.Constant(bits, [0] * width))

        return truth(types.int64), codegen

    @intrinsic
    def store_kept(typing, address, value, mask):
        def codegen(context, builder, signature, args):
            builder.store(builder.select(args[2], args[1], zero), _pointer(builder, args[0], register), align=4)
            return context.get_dummy_value()

        return types.void(types.int64, vector, truth), codegen

    def hard_gate(builder, a):
        """min(max(a + 3, 0), 6) / 6, NaN kept."""
        value = builder.fadd(a, ir.Constant(register, [3.0] * width))
        for sign, bound in ((">", 0.0), ("<", 6.0)):
            limit = ir.Constant(register, [bound] * width)
            value = builder.select(builder.fcmp_ordered(sign, limit, value), limit, value)
        return builder.fmul(value, ir.Constant(register, [1 / 6] * width))

    def unary(operation):
        @intrinsic
        def function(typing, a):
            def codegen(context, builder, signature, args):
                return operation(builder, *args)

            return vector(vector), codegen

        return function

    @intrinsic
    def total(typing, a):
        def codegen(context, builder, signature, args):
            value, lanes = args[0], width
            while lanes > 1:
                lanes //= 2
                folded = [min(i + lanes, width - 1) if i < lanes else i for i in range(width)]
                value = builder.fadd(value, constant_shuffle(builder, value, value, folded))
            return builder.extract_element(value, ir.Constant(INT, 0))

        return types.float32(vector), codegen

    return SimpleNamespace(
        width=width,
        load=load,
        store=store,
        splat=splat,
        gather=gather,
        fma=fma,
        total=total,
        add=binary(lambda b, x, y: b.fadd(x, y)),
        mul=binary(lambda b, x, y: b.fmul(x, y)),
        maximum=binary(lambda b, x, y: b.select(b.fcmp_ordered(">", y, x), y, x)),
        # The larger one, and NaN if either is: PyTorch's max pooling.
        largest=binary(lambda b, x, y: b.select(b.or_(b.fcmp_ordered(">", y, x), b.fcmp_unordered("uno", y, y)), y, x)),
        minimum=binary(lambda b, x, y: b.select(b.fcmp_ordered("<", y, x), y, x)),
        load_mask=load_mask,
        store_kept=store_kept,
        hardsigmoid=unary(hard_gate),
        hardswish=unary(lambda b, x: b.fmul(x, hard_gate(b, x))),
        even=binary(lambda b, x, y: constant_shuffle(b, x, y, list(range(0, 2 * width, 2)))),
        odd=binary(lambda b, x, y: constant_shuffle(b, x, y, list(range(1, 2 * width, 2)))),
        **{
            f"slide{n}": binary(lambda b, x, y, n=n: constant_shuffle(b, x, y, list(range(n, n + width))))
            for n in range(1, width)
        },
    )
