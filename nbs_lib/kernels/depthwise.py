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
def kernel(kernel_h: int, kernel_w: int, apart: int, stride: int, vectors: int, epilogue: tuple[str, ...]) -> Kernel:
    """Stride 1: `vectors` registers at a time over the flat image (`rows` is 1). Stride 2: per output row.

    `apart`: floats from one tap of a kernel row to the next (the dilation); 0 where only `taps` knows (phases).
    """
    if stride not in (1, 2):
        raise ValueError(f"Expected stride 1 or 2 for the depthwise kernel. Got {stride}.")
    size = f"{kernel_h}x{kernel_w}s{stride}" + f"d{apart}" * (apart != 1)
    name = f"depthwise_{size}_v{vectors}_{'_'.join(epilogue) or 'linear'}"
    read = _whole_rows if stride == 1 else _every_second
    lines = [line for h in range(kernel_h) for line in read(h, kernel_w, apart, vectors, width())]
    return build(name, source(kernel_h, kernel_w, stride, vectors, epilogue, lines, 4 * width()), FIELDS, width())


def _whole_rows(h: int, kernel_w: int, apart: int, vectors: int, lanes: int) -> list[str]:
    """One kernel row at stride 1: each register is loaded once, its neighbours' lanes are slid in."""
    middle = kernel_w // 2
    shifts = [(w - middle) * apart for w in range(kernel_w)]
    if apart == 0 or max(map(abs, shifts)) >= lanes:  # unknown, or too far to slide: load every tap
        taps = [
            (w, j, f"load(p + t{h * kernel_w + w} + {4 * lanes * j})") for w in range(kernel_w) for j in range(vectors)
        ]
        return [f"a{j} = fma({value}, w{h * kernel_w + w}, a{j})" for w, j, value in taps]
    first, last = -1 if shifts[0] < 0 else 0, vectors + 1 if shifts[-1] > 0 else vectors
    lines = [f"x{j + 1} = load(p + t{h * kernel_w + middle} + {4 * lanes * j})" for j in range(first, last)]
    for w, shift in enumerate(shifts):
        for j in range(vectors):
            value = f"x{j + 1}"
            if shift:
                value = f"slide{shift}(x{j + 1}, x{j + 2})" if shift > 0 else f"slide{lanes + shift}(x{j}, x{j + 1})"
            lines.append(f"a{j} = fma({value}, w{h * kernel_w + w}, a{j})")
    return lines


def _every_second(h: int, kernel_w: int, apart: int, vectors: int, lanes: int) -> list[str]:
    """One kernel row at stride 2: two registers hold the lanes of one tap and, undilated, those of the next."""
    lines = []
    for w in range(0, kernel_w, 2 if apart == 1 else 1):
        tap = h * kernel_w + w
        for j in range(vectors):
            lines += [
                f"x0 = load(p + t{tap} + {8 * lanes * j})",
                f"x1 = load(p + t{tap} + {8 * lanes * j + 4 * lanes})",
            ]
            lines += [f"a{j} = fma(even(x0, x1), w{tap}, a{j})"]
            if apart == 1 and w + 1 < kernel_w:
                lines += [f"a{j} = fma(odd(x0, x1), w{tap + 1}, a{j})"]
    return lines


def source(kh: int, kw: int, stride: int, vectors: int, epilogue: tuple[str, ...], reads: list[str], lanes: int) -> str:
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
    inner = [f"a{j} = b" for j in range(vectors)] + reads
    for j in range(vectors):
        value = ending.apply(epilogue, f"a{j}", f"residual + target + {lanes * j}")
        mask = f"load_mask(mask + position + {lanes * j})"
        inner += [f"store_kept(out + target + {lanes * j}, {value}, {mask})"]
    return "\n".join(text + [" " * 20 + line for line in inner])
