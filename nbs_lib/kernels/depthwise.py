"""Depthwise convolution: every output channel reads one input channel through Kh x Kw taps.

Stride 1 runs along whole images like `conv`. Stride 2 goes row by row and keeps every second lane of the loads.
"""

from __future__ import annotations

from functools import cache

from nbs_lib.kernels import epilogue as ending
from nbs_lib.kernels.jit import Kernel, build, header, width

FIELDS = (
    "x", "out", "residual", "weights", "taps", "sources", "planes", "bias", "mask", "bounds",
    "images", "x_image", "out_image", "rows", "out_row", "x_row",
)  # fmt: skip


@cache
def kernel(kernel_h: int, kernel_w: int, stride: int, vectors: int, epilogue: tuple[str, ...]) -> Kernel:
    """Stride 1: `vectors` registers at a time over the flat image (`rows` is 1). Stride 2: per output row."""
    if stride not in (1, 2):
        raise ValueError(f"Expected stride 1 or 2 for the depthwise kernel. Got {stride}.")
    name = f"depthwise_{kernel_h}x{kernel_w}s{stride}_v{vectors}_{'_'.join(epilogue) or 'linear'}"
    text = source(kernel_h, kernel_w, stride, vectors, epilogue, 4 * width())
    return build(name, text, FIELDS, width())


def source(kh: int, kw: int, stride: int, vectors: int, epilogue: tuple[str, ...], lanes: int) -> str:
    """Python source; `taps` holds the byte distance of each tap from (row * x_row + tile * stride) of its channel."""
    text = [*header(FIELDS), *ending.constants(epilogue)]
    text += [
        "    for image in range(images):",
        "        for group in range(group_begin, group_end):",
        "            source = x + image * x_image + load_int32(sources + 4 * group)",
        "            plane = image * out_image + load_int32(planes + 4 * group)",
        "            b = splat(load_float(bias + 4 * group))",
        f"            w = weights + {4 * kh * kw} * group",
    ]
    text += [f"            w{t} = splat(load_float(w + {4 * t}))" for t in range(kh * kw)]
    text += [f"            t{t} = load_int32(taps + {4 * t})" for t in range(kh * kw)]
    text += [
        "            for row in range(rows):",
        "                for tile in range(tile_begin, tile_end):",
        f"                    position = tile * {lanes * vectors}",
        f"                    p = source + row * x_row + {stride} * position",
        "                    target = plane + row * out_row + position",
    ]
    inner = [f"a{j} = b" for j in range(vectors)]
    for tap in range(kh * kw):
        for j in range(vectors):
            at = f"p + t{tap} + {stride * lanes * j}"
            value = f"load({at})" if stride == 1 else f"even(load({at}), load({at} + {lanes}))"
            inner += [f"a{j} = fma({value}, w{tap}, a{j})"]
    for j in range(vectors):
        value = ending.apply(epilogue, f"a{j}", f"residual + target + {lanes * j}")
        inner += [f"store_kept(out + target + {lanes * j}, {value}, load_mask(mask + position + {lanes * j}))"]
    return "\n".join(text + [" " * 20 + line for line in inner])
