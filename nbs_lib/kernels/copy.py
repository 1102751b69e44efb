"""Moving values: between layouts, into stride phases, and pointwise work that no other kernel could take over."""

from __future__ import annotations

from functools import cache

from nbs_lib.kernels import epilogue as ending
from nbs_lib.kernels.jit import Kernel, build, header, width

FIELDS = (
    "x", "out", "images", "x_image", "out_image", "x_plane", "out_plane", "x_row", "out_row",
    "rows", "columns", "h_first", "w_first", "h_step", "height", "width",
)  # fmt: skip
CLEAR_FIELDS = ("out", "guard", "plane", "rows", "row", "width")
POINTWISE_FIELDS = (
    "x", "out", "residual", "scale", "shift", "factor", "mask", "bounds",
    "images", "x_image", "out_image", "residual_image", "factor_image",
    "x_plane", "out_plane", "residual_plane", "factor_plane",
)  # fmt: skip


@cache
def kernel(step: int, columns: int) -> Kernel:
    """out[row, column] = x[h_first + row * h_step, w_first + column * step] inside height x width, else 0.

    `columns`: how many columns a row copies at least; the register is chosen to fit into them.
    """
    per = max((n for n in (16, 8, 4) if n <= min(columns, width())), default=4)
    return build(f"copy_s{step}_v{per}", source(step, per), FIELDS, per)


def source(step: int, per: int) -> str:
    """Python source: registers of `per` floats for steps 1 and 2, the last one overlapping; single floats for the rest.

    Stride 2 keeps every second float of two registers, so it reads one float too many, behind the last it needs or
    before the first: whichever lies inside the row, as there may be no memory behind the caller's array.
    """
    text = [
        *header(FIELDS),
        f"    left = min(columns, max(0, (-w_first + {step - 1}) // {step}))",
        f"    right = max(left, min(columns, (width - w_first + {step - 1}) // {step}))",
        f"    last = right - {per}",
        f"    behind = last >= left and w_first + {step} * right - 1 < width",
        f"    before = last >= left and w_first + {step} * last - 1 >= 0",
        f"    fits = {step} == 1 and last >= left or {step} == 2 and (behind or before)",
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
        "                for column in range(right, columns):",
        "                    store_float(t + 4 * column, float32(0))",
        "                if not fits:",
        "                    for column in range(left, right):",
        f"                        store_float(t + 4 * column, load_float(p + {4 * step} * column))",
        "                    continue",
    ]
    if step == 1:
        text += [
            f"                for column in range(left, last, {per}):",
            "                    store(t + 4 * column, load(p + 4 * column))",
            "                store(t + 4 * last, load(p + 4 * last))",
        ]
    elif step == 2:
        text += [
            f"                for column in range(left, last, {per}):",
            "                    q = p + 8 * column",
            f"                    store(t + 4 * column, even(load(q), load(q + {4 * per})))",
            "                q = p + 8 * last",
            "                if behind:",
            f"                    store(t + 4 * last, even(load(q), load(q + {4 * per})))",
            "                else:",
            f"                    store(t + 4 * last, odd(load(q - 4), load(q + {4 * per - 4})))",
        ]
    return "\n".join(text)


@cache
def clear_kernel() -> Kernel:
    """Zeros before, between and behind the rows of all channels (groups); what lies `guard` bytes before the first."""
    text = ["for place in range(out - guard, out if group_begin == 0 else out - guard, 4):"]
    text += ["    store_float(place, float32(0))", "for group in range(group_begin, group_end):"]
    text += ["    start = out + group * plane", "    for line in range(start, start + rows * row, row):"]
    text += ["        for place in range(line + width, line + row, 4):", "            store_float(place, float32(0))"]
    text += ["    for place in range(start + rows * row, start + plane, 4):", "        store_float(place, float32(0))"]
    return build("clear", "\n".join([*header(CLEAR_FIELDS), *("    " + line for line in text)]), CLEAR_FIELDS, width())


@cache
def pointwise_kernel(affine: bool, factor: str, epilogue: tuple[str, ...]) -> Kernel:
    """epilogue((x * scale + shift) * factor), `factor` being "", "image" (same shape) or "channel" (a float each)."""
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
        *(
            [
                "            s = splat(load_float(scale + 4 * group))",
                "            b = splat(load_float(shift + 4 * group))",
            ]
            * affine
        ),
        *(["            k = splat(load_float(f))"] * (factor == "channel")),
        "            for tile in range(tile_begin, tile_end):",
        f"                position = tile * {lanes}",
        f"                store_kept(q + position, {value}, load_mask(mask + position))",
    ]
    return "\n".join(text)
