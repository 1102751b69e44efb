"""Moving values: between layouts, into stride phases, and pointwise work that no other kernel could take over."""

from nbs_lib.kernels import epilogue as ending
from nbs_lib.kernels.jit import Kernel, build, width

FIELDS = (
    "x out images x_image out_image x_plane out_plane x_row out_row rows columns h_first w_first h_step height width"
)
POINTWISE_FIELDS = (
    "x out residual scale shift factor mask bounds images x_image out_image residual_image factor_image "
    "x_plane out_plane residual_plane factor_plane"
)


def kernel(step: int, columns: int) -> Kernel:
    """out[row, column] = x[h_first + row * h_step, w_first + column * step] inside height x width, else 0.

    `columns`: how many columns a row copies at least. Steps 1 and 2 go by registers that fit into them, the last one
    overlapping; the rest by single floats. Step 2 keeps every second float of two registers, so it reads one float too
    many, behind the last it needs or before the first: whichever lies inside the row, as there may be no memory behind
    the caller's array.
    """
    per = max((n for n in (16, 8, 4) if n <= min(columns, width())), default=4)
    behind = before = "load(q)"
    if step > 1:
        behind, before = f"even(load(q), load(q + {4 * per}))", f"odd(load(q - 4), load(q + {4 * per - 4}))"
    body = f"""
    left = min(columns, max(0, (-w_first + {step - 1}) // {step}))
    right = max(left, min(columns, (width - w_first + {step - 1}) // {step}))
    last = right - {per}
    behind = w_first + {step} * right - 1 < width
    fits = {step < 3} and last >= left and (behind or w_first + {step} * last - 1 >= 0)
    for image in range(images):
        for group in range(group_begin, group_end):
            source = x + image * x_image + group * x_plane
            target = out + image * out_image + group * out_plane
            for row in range(rows):
                h = h_first + row * h_step
                t = target + row * out_row
                if h < 0 or h >= height:
                    for column in range(columns):
                        store_float(t + 4 * column, float32(0))
                    continue
                p = source + h * x_row + 4 * w_first
                for column in range(left):
                    store_float(t + 4 * column, float32(0))
                for column in range(right, columns):
                    store_float(t + 4 * column, float32(0))
                if not fits:
                    for column in range(left, right):
                        store_float(t + 4 * column, load_float(p + {4 * step} * column))
                    continue
                for column in range(left, last, {per}):
                    q = p + {4 * step} * column
                    store(t + 4 * column, {behind})
                q = p + {4 * step} * last
                store(t + 4 * last, {behind} if behind else {before})
    """
    return build(f"copy_s{step}_v{per}", FIELDS, body, per)


def clear_kernel() -> Kernel:
    """Zeros before, between and behind the rows of all channels (groups); what lies `guard` bytes before the first."""
    body = """
    for place in range(out - guard, out if group_begin == 0 else out - guard, 4):
        store_float(place, float32(0))
    for group in range(group_begin, group_end):
        start = out + group * plane
        for line in range(start, start + rows * row, row):
            for place in range(line + width, line + row, 4):
                store_float(place, float32(0))
        for place in range(start + rows * row, start + plane, 4):
            store_float(place, float32(0))
    """
    return build("clear", "out guard plane rows row width", body, width())


def pointwise_kernel(affine: bool, factor: str, epilogue: tuple[str, ...]) -> Kernel:
    """epilogue((x * scale + shift) * factor), `factor` being "", "image" (same shape) or "channel" (a float each).

    The addresses in `scale`, `shift` and `factor` are always read.
    """
    value = "fma(load(p + position), s, b)" if affine else "load(p + position)"
    if factor:
        value = f"mul({value}, {'load(f + position)' if factor == 'image' else 'k'})"
    constants = "\n".join(ending.constants(epilogue))
    body = f"""
{constants}
    for image in range(images):
        for group in range(group_begin, group_end):
            p = x + image * x_image + group * x_plane
            q = out + image * out_image + group * out_plane
            r = residual + image * residual_image + group * residual_plane
            f = factor + image * factor_image + group * factor_plane
            s, b = splat(load_float(scale + 4 * group)), splat(load_float(shift + 4 * group))
            k = splat(load_float(f))
            for tile in range(tile_begin, tile_end):
                position = tile * {4 * width()}
                value = {ending.apply(epilogue, value, "r + position")}
                store_kept(q + position, value, load_mask(mask + position))
    """
    name = f"pointwise{'_affine' * affine}{'_times_' * bool(factor)}{factor}_{ending.name(epilogue)}"
    return build(name, POINTWISE_FIELDS, body, width())
