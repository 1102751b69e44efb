"""Pooling. `rows` kernels are vectorised over one output row; `window` handles every other shape in plain loops."""

from __future__ import annotations

from functools import cache

from nbs_lib.kernels.jit import Kernel, build, header, width

FIELDS = (
    "x", "out", "taps", "mask", "scale",
    "images", "x_image", "out_image", "x_plane", "out_plane", "rows", "out_row", "x_row", "scale_row",
)  # fmt: skip
WINDOW_FIELDS = (
    "x", "out", "h_begin", "h_end", "w_begin", "w_end", "scale", "dilation_h", "dilation_w",
    "images", "x_image", "out_image", "x_plane", "out_plane", "rows", "columns", "out_row", "x_row", "scale_row",
)  # fmt: skip


@cache
def rows_kernel(operation: str, kernel_h: int, kernel_w: int, stride: int) -> Kernel:
    """Max or average over `kernel_h` x `kernel_w` windows, horizontal stride 1 or 2, zeros around the image."""
    name = f"{operation}pool_{kernel_h}x{kernel_w}s{stride}"
    return build(name, rows_source(operation, kernel_h * kernel_w, stride, 4 * width()), FIELDS, width())


def rows_source(operation: str, taps: int, stride: int, lanes: int) -> str:
    """Python source: `scale` multiplies an average (reciprocal window sizes, one row of floats per output row)."""
    text = header(FIELDS)
    text += [f"    t{t} = load_int32(taps + {4 * t})" for t in range(taps)]
    text += [
        "    for image in range(images):",
        "        for group in range(group_begin, group_end):",
        "            source = x + image * x_image + group * x_plane",
        "            target = out + image * out_image + group * out_plane",
        "            for row in range(rows):",
        "                for tile in range(tile_begin, tile_end):",
        f"                    position = tile * {lanes}",
        f"                    p = source + row * x_row + {stride} * position",
    ]
    inner = []
    for t in range(taps):
        value = f"load(p + t{t})" if stride == 1 else f"even(load(p + t{t}), load(p + t{t} + {lanes}))"
        inner += [f"a = {value}" if t == 0 else f"a = {'largest' if operation == 'max' else 'add'}(a, {value})"]
    if operation == "average":
        inner += ["a = mul(a, load(scale + row * scale_row + position))"]
    inner += ["store_kept(target + row * out_row + position, a, load_mask(mask + position))"]
    return "\n".join(text + [" " * 20 + line for line in inner])


@cache
def window_kernel(operation: str) -> Kernel:
    """Any window: `h_begin` .. `w_end` list each output row's and column's input range, in steps of the dilation."""
    return build(f"{operation}pool_window", window_source(operation), WINDOW_FIELDS, width())


def window_source(operation: str) -> str:
    """Python source; a NaN in the window is the result, as in PyTorch."""
    start, step = ("-inf", "value if value > a or value != value else a") if operation == "max" else ("0", "a + value")
    finish = "a * load_float(scale + row * scale_row + 4 * column)" if operation == "average" else "a"
    return "\n".join([
        *header(WINDOW_FIELDS),
        "    for image in range(images):",
        "        for group in range(group_begin, group_end):",
        "            source = x + image * x_image + group * x_plane",
        "            target = out + image * out_image + group * out_plane",
        "            for row in range(rows):",
        "                for column in range(columns):",
        f"                    a = float32({start})",
        "                    first, last = load_int32(w_begin + 4 * column), load_int32(w_end + 4 * column)",
        "                    for h in range(load_int32(h_begin + 4 * row), load_int32(h_end + 4 * row), dilation_h):",
        "                        p = source + h * x_row",
        "                        for w in range(first, last, dilation_w):",
        "                            value = load_float(p + 4 * w)",
        f"                            a = {step}",
        f"                    store_float(target + row * out_row + 4 * column, {finish})",
    ])  # fmt: skip


MEAN_FIELDS = ("x", "out", "factor", "images", "x_image", "out_image", "x_plane", "out_plane")


@cache
def mean_kernel() -> Kernel:
    """The mean of each whole channel: what lies between and behind its rows is zero, so registers are just summed."""
    return build("mean", mean_source(4 * width()), MEAN_FIELDS, width())


def mean_source(lanes: int) -> str:
    """Python source; `factor` is the address of 1 / pixels."""
    return "\n".join([
        *header(MEAN_FIELDS),
        "    for image in range(images):",
        "        for group in range(group_begin, group_end):",
        "            p = x + image * x_image + group * x_plane",
        "            a = splat(float32(0))",
        "            for tile in range(tile_begin, tile_end):",
        f"                a = add(a, load(p + {lanes} * tile))",
        "            store_float(out + image * out_image + group * out_plane, total(a) * load_float(factor))",
    ])  # fmt: skip
