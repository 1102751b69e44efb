"""Convolution: `rows` filters that share one list of kept columns, times `vectors` registers of output pixels.

Every regularity is the same loop over a list: a column is one (input channel, kh, kw), stored as the byte distance from
an output pixel to the input value it meets. Dense layers list all columns, pruned ones what is left (the BCS
occurrence runs of mapping 4.3). Images keep their rows apart by zero columns, so that a run of pixels may cross row
ends: `mask` says where not to write. Stride is gone before: the input has been split into its phases.
"""

from __future__ import annotations

from functools import cache

from nbs_lib.kernels import epilogue as ending
from nbs_lib.kernels.jit import Kernel, build, header, width

FIELDS = (
    "x", "out", "residual", "weights", "columns", "begins", "planes", "bias", "mask", "bounds",
    "images", "x_image", "out_image", "first", "step",
)  # fmt: skip


@cache
def kernel(rows: int, vectors: int, epilogue: tuple[str, ...], ahead: bool = False) -> Kernel:
    """The kernel for a register tile of `rows` x `vectors`; `ahead` prefetches the next tile (inputs far away)."""
    lanes = 4 * width()
    name = f"conv_{rows}x{vectors}_{'_'.join(epilogue) or 'linear'}{'_ahead' if ahead else ''}"
    return build(name, source(rows, vectors, epilogue, ahead, lanes), FIELDS, width())


def source(rows: int, vectors: int, epilogue: tuple[str, ...], ahead: bool, lanes: int) -> str:
    """Python source of the kernel; `lanes` is the byte size of a register.

    Accumulator `a{i}_{j}` holds filter i of the group at pixel vector j. Per column the shorter side of the tile stays
    in registers and the longer one streams, so that the tile never spills.
    """
    text = [*header(FIELDS), *ending.constants(epilogue)]
    text += [
        "    for image in range(images):",
        "        for tile in range(tile_begin, tile_end):",
        "            position = first + tile * step",
        "            pixel = x + image * x_image + position",
        "            target = image * out_image + position",
    ]
    text += [f"            m{j} = load_mask(mask + position + {lanes * j})" for j in range(vectors)]
    text += [
        "            for group in range(group_begin, group_end):",
        "                begin = load_int32(begins + 4 * group)",
        "                end = load_int32(begins + 4 * group + 4)",
        f"                w = weights + {4 * rows} * begin",
        f"                row = {4 * rows} * group",
    ]
    for i in range(rows):
        text += [f"                b = splat(load_float(bias + row + {4 * i}))"]
        text += [f"                a{i}_{j} = b" for j in range(vectors)]
    text += [
        "                for column in range(begin, end):",
        "                    p = pixel + load_int32(columns + 4 * column)",
    ]
    values = [f"x{j} = load(p + {lanes * j})" for j in range(vectors)]
    weights = [f"w{i} = splat(load_float(w + {4 * i}))" for i in range(rows)]
    multiply = [[f"a{i}_{j} = fma(x{j}, w{i}, a{i}_{j})" for j in range(vectors)] for i in range(rows)]
    if vectors <= rows:
        body = values + [line for i in range(rows) for line in (weights[i], *multiply[i])]
    else:
        body = weights + [line for j in range(vectors) for line in (values[j], *(m[j] for m in multiply))]
    body += ["prefetch(w + 1024)"]  # weights are read once: stay a kilobyte ahead of the stream
    if ahead:
        body += [f"prefetch(p + step + {lanes * j})" for j in range(vectors)]
    text += [" " * 20 + line for line in [*body, f"w += {4 * rows}"]]
    for i in range(rows):
        text += [f"                plane = target + load_int32(planes + row + {4 * i})"]
        for j in range(vectors):
            value = ending.apply(epilogue, f"a{i}_{j}", f"residual + plane + {lanes * j}")
            text += [f"                store_kept(out + plane + {lanes * j}, {value}, m{j})"]
    return "\n".join(text)
