"""Fully connected layers at small batch: bound by reading the weights once, so `lanes` filters share a column list.

A register holds one column's weights of `lanes` neighbouring filters; the input value is broadcast. Four columns are in
flight to hide the latency of the multiply-add.
"""

from __future__ import annotations

from functools import cache

from nbs_lib.kernels import epilogue as ending
from nbs_lib.kernels.jit import Kernel, build, header, width

FIELDS = (
    "x", "out", "residual", "weights", "columns", "begins", "planes", "bias", "bounds",
    "images", "x_image", "out_image",
)  # fmt: skip
FLIGHT = 4


def lanes() -> int:
    """Filters per group: 8, or what a narrower register holds."""
    return min(8, width())


@cache
def kernel(epilogue: tuple[str, ...]) -> Kernel:
    """The kernel; `columns` are byte offsets into the input vector, `planes` byte offsets of the groups' outputs."""
    return build(f"linear_{lanes()}_{'_'.join(epilogue) or 'linear'}", source(epilogue, 4 * lanes()), FIELDS, lanes())


def source(epilogue: tuple[str, ...], size: int) -> str:
    """Python source; `size` is the byte size of a register."""
    text = [*header(FIELDS), *ending.constants(epilogue)]
    text += [
        "    for group in range(group_begin, group_end):",
        "        begin = load_int32(begins + 4 * group)",
        "        end = load_int32(begins + 4 * group + 4)",
        f"        whole = begin + (end - begin) // {FLIGHT} * {FLIGHT}",
        "        plane = load_int32(planes + 4 * group)",
        "        for image in range(images):",
        "            source = x + image * x_image",
        f"            w = weights + {size} * begin",
        f"            a0 = load(bias + {size} * group)",
        *[f"            a{i} = splat(float32(0))" for i in range(1, FLIGHT)],
        f"            for column in range(begin, whole, {FLIGHT}):",
    ]
    for i in range(FLIGHT):
        value = f"splat(load_float(source + load_int32(columns + 4 * column + {4 * i})))"
        text += [f"                a{i} = fma(load(w + {size * i}), {value}, a{i})"]
    text += [
        f"                w += {FLIGHT * size}",
        "            for column in range(whole, end):",
        "                a0 = fma(load(w), splat(load_float(source + load_int32(columns + 4 * column))), a0)",
        f"                w += {size}",
        "            target = image * out_image + plane",
        f"            a0 = {'add(' * (FLIGHT - 1)}a0{''.join(f', a{i})' for i in range(1, FLIGHT))}",
        f"            store(out + target, {ending.apply(epilogue, 'a0', 'residual + target')})",
    ]
    return "\n".join(text)
