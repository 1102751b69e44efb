"""Moving values: between layouts, into stride phases, and pointwise work that no other kernel could take over."""

from __future__ import annotations

from functools import cache

from nbs_lib.kernels import epilogue as ending
from nbs_lib.kernels.jit import Kernel, build, header, width

FIELDS = (
    "x", "out", "images", "x_image", "out_image", "x_plane", "out_plane", "x_row", "out_row",
    "rows", "columns", "h_first", "w_first", "h_step", "height", "width",
)  # fmt: skip
POINTWISE_FIELDS = (
    "x", "out", "residual", "scale", "shift", "factor", "mask", "bounds",
    "images", "x_image", "out_image", "residual_image", "factor_image", "x_plane", "out_plane", "residual_plane", "factor_plane",
)  # fmt: skip


@cache
def kernel(step: int) -> Kernel:
    """out[row, column] = x[h_first + row * h_step, w_first + column * step] where that is inside height x width, else 0."""
    return build(f"copy_s{step}", source(step, 4 * width()), FIELDS, width())


def source(step: int, lanes: int) -> str:
    """Python source: whole registers in the middle (steps 1 and 2), single floats at both ends."""
    per = lanes // 4
    wide = step in (1, 2)
    load = "load(q)" if step == 1 else f"even(load(q), load(q + {lanes}))"
    text = [
        *header(FIELDS),
        f"    left = min(columns, max(0, (-w_first + {step - 1}) // {step}))",
        f"    right = max(left, min(columns, (width - w_first + {step - 1}) // {step}))",
        # An `even` load reads one float beyond the last one it uses: keep a register's distance from the row's end.
        f"    whole = left + max(0, right - left - {step - 1}) // {per} * {per}" if wide else "    whole = left",
        "    for image in range(images):",
        "        for group in range(group_begin, group_end):",
        "            source = x + image * x_image + group * x_plane",
        "            target = out + image * out_image + group * out_plane",
        "            for row in range(rows):",
        "                h = h_first + row * h_step",
        "                t = target + row * out_row",
        "                if h < 0 or h >= height:",
        "                    for column in range(columns):",
        "                        store_float(t + 4 * column, float32(0))",
        "                    continue",
        "                p = source + h * x_row + 4 * w_first",
        "                for column in range(left):",
        "                    store_float(t + 4 * column, float32(0))",
    ]
    if wide:
        text += [
            f"                for column in range(left, whole, {per}):",
            f"                    q = p + {4 * step} * column",
            f"                    store(t + 4 * column, {load})",
        ]
    return "\n".join([
        *text,
        "                for column in range(whole, right):",
        f"                    store_float(t + 4 * column, load_float(p + {4 * step} * column))",
        "                for column in range(right, columns):",
        "                    store_float(t + 4 * column, float32(0))",
    ])  # fmt: skip


@cache
def pointwise_kernel(affine: bool, factor: str, epilogue: tuple[str, ...]) -> Kernel:
    """epilogue(x * scale + shift) [* factor]: `factor` is "", "image" (same shape) or "channel" (one float per channel)."""
    name = f"pointwise{'_affine' * affine}{'_times_' * bool(factor)}{factor}_{'_'.join(epilogue) or 'linear'}"
    return build(name, pointwise_source(affine, factor, epilogue, 4 * width()), POINTWISE_FIELDS, width())


def pointwise_source(affine: bool, factor: str, epilogue: tuple[str, ...], lanes: int) -> str:
    """Python source: one pass over whole images."""
    value = "load(p + position)"
    if affine:
        value = f"fma({value}, s, b)"
    if factor:
        value = f"mul({value}, {'load(f + position)' if factor == 'image' else 'k'})"
    value = ending.apply(epilogue, value, "r + position")
    text = [
        *header(POINTWISE_FIELDS),
        *ending.constants(epilogue),
        "    for image in range(images):",
        "        for group in range(group_begin, group_end):",
        "            p = x + image * x_image + group * x_plane",
        "            q = out + image * out_image + group * out_plane",
        "            r = residual + image * residual_image + group * residual_plane",
        "            f = factor + image * factor_image + group * factor_plane",
        *(["            s = splat(load_float(scale + 4 * group))", "            b = splat(load_float(shift + 4 * group))"] * affine),
        *(["            k = splat(load_float(f))"] * (factor == "channel")),
        "            for tile in range(tile_begin, tile_end):",
        f"                position = tile * {lanes}",
        f"                store(q + position, bits_and({value}, load(mask + position)))",
    ]
    return "\n".join(text)
