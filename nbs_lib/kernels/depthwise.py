"""Depthwise convolution: every output channel reads one input channel through Kh x Kw taps.

Stride 1 runs along whole images like `conv`. Stride 2 goes row by row and keeps every second lane of the loads.
"""

from itertools import product

from nbs_lib.kernels import epilogue as ending
from nbs_lib.kernels.jit import Kernel, build, width

FIELDS = "x out residual weights taps sources planes bias mask bounds images x_image out_image rows out_row x_row"


def kernel(kernel_h: int, kernel_w: int, apart: int, stride: int, vectors: int, epilogue: tuple[str, ...]) -> Kernel:
    """Stride 1: `vectors` registers at a time over the flat image (`rows` is 1). Stride 2: per output row, one.

    `apart`: floats from one tap of a kernel row to the next (the dilation); 0 where only `taps` knows (phases). `taps`
    holds the byte distance of each tap from (row * x_row + tile * stride) of its channel.
    """
    lanes, taps = 4 * width(), range(kernel_h * kernel_w)
    text = [
        *ending.constants(epilogue),
        "    for image in range(images):",
        "        for group in range(group_begin, group_end):",
        "            source = x + image * x_image + load_int32(sources + 4 * group)",
        "            plane = image * out_image + load_int32(planes + 4 * group)",
        "            b = splat(load_float(bias + 4 * group))",
        f"            w = weights + {4 * len(taps)} * group",
        *[f"            w{t} = splat(load_float(w + {4 * t}))" for t in taps],
        *[f"            t{t} = load_int32(taps + {4 * t})" for t in taps],
        "            for row in range(rows):",
        "                for tile in range(tile_begin, tile_end):",
        f"                    position = tile * {lanes * vectors}",
        f"                    p = source + row * x_row + {stride} * position",
        "                    target = plane + row * out_row + position",
    ]
    body = [f"a{j} = b" for j in range(vectors)]
    for h in range(kernel_h):
        if stride == 1:
            body += _whole_rows(h, kernel_w, apart, vectors, width())
        else:
            body += _every_second(h, kernel_w, apart, width())
    for j in range(vectors):
        value = ending.apply(epilogue, f"a{j}", f"residual + target + {lanes * j}")
        body += [f"store_kept(out + target + {lanes * j}, {value}, load_mask(mask + position + {lanes * j}))"]
    name = f"depthwise_{kernel_h}x{kernel_w}s{stride}{f'd{apart}' * (apart != 1)}_v{vectors}_{ending.name(epilogue)}"
    return build(name, FIELDS, "\n".join(text + [" " * 20 + line for line in body]), width())


def _whole_rows(h: int, kernel_w: int, apart: int, vectors: int, lanes: int) -> list[str]:
    """One kernel row at stride 1: each register is loaded once, its neighbours' lanes are slid in."""
    middle = kernel_w // 2
    shifts = [(w - middle) * apart for w in range(kernel_w)]
    if apart == 0 or max(map(abs, shifts)) >= lanes:  # unknown, or too far to slide: load every tap
        taps = product(range(h * kernel_w, (h + 1) * kernel_w), range(vectors))
        return [f"a{j} = fma(load(p + t{tap} + {4 * lanes * j}), w{tap}, a{j})" for tap, j in taps]
    first, last = -1 if shifts[0] < 0 else 0, vectors + 1 if shifts[-1] > 0 else vectors
    lines = [f"x{j + 1} = load(p + t{h * kernel_w + middle} + {4 * lanes * j})" for j in range(first, last)]
    for w, shift in enumerate(shifts):
        for j in range(vectors):
            value = f"x{j + 1}"
            if shift:
                value = f"slide{shift}(x{j + 1}, x{j + 2})" if shift > 0 else f"slide{lanes + shift}(x{j}, x{j + 1})"
            lines.append(f"a{j} = fma({value}, w{h * kernel_w + w}, a{j})")
    return lines


def _every_second(h: int, kernel_w: int, apart: int, lanes: int) -> list[str]:
    """One kernel row at stride 2: two registers hold the lanes of one tap and, undilated, those of the next."""
    lines, end = [], (h + 1) * kernel_w
    for tap in range(h * kernel_w, end, 2 if apart == 1 else 1):
        lines += [f"x0 = load(p + t{tap} + 0)", f"x1 = load(p + t{tap} + {4 * lanes})"]
        lines += [f"a0 = fma(even(x0, x1), w{tap}, a0)"]
        lines += [f"a0 = fma(odd(x0, x1), w{tap + 1}, a0)"] * (apart == 1 and tap + 1 < end)
    return lines
