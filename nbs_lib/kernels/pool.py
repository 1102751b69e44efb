"""Pooling. `rows` kernels are vectorised over one output row; `window` handles every other shape in plain loops."""

from nbs_lib.kernels.jit import Kernel, build, width

FIELDS = "x out taps mask scale images x_image out_image x_plane out_plane rows out_row x_row scale_row"
WINDOW_FIELDS = FIELDS.replace("taps mask", "h_begin h_end w_begin w_end dilation_h dilation_w columns")


def rows_kernel(operation: str, kernel_h: int, kernel_w: int, stride: int) -> Kernel:
    """Max or average over `kernel_h` x `kernel_w` windows, horizontal stride 1 or 2, zeros around the image.

    `scale` multiplies an average: reciprocal window sizes, one row of floats per output row.
    """
    lanes, taps = 4 * width(), range(kernel_h * kernel_w)
    text = [
        *[f"    t{t} = load_int32(taps + {4 * t})" for t in taps],
        "    for image in range(images):",
        "        for group in range(group_begin, group_end):",
        "            source = x + image * x_image + group * x_plane",
        "            target = out + image * out_image + group * out_plane",
        "            for row in range(rows):",
        "                for tile in range(tile_begin, tile_end):",
        f"                    position = tile * {lanes}",
        f"                    p = source + row * x_row + {stride} * position",
    ]
    values = [f"load(p + t{t})" if stride == 1 else f"even(load(p + t{t}), load(p + t{t} + {lanes}))" for t in taps]
    join = "largest" if operation == "max" else "add"
    body = [f"a = {values[0]}", *[f"a = {join}(a, {value})" for value in values[1:]]]
    body += ["a = mul(a, load(scale + row * scale_row + position))"] * (operation == "average")
    body += ["store_kept(target + row * out_row + position, a, load_mask(mask + position))"]
    name = f"{operation}pool_{kernel_h}x{kernel_w}s{stride}"
    return build(name, FIELDS, "\n".join(text + [" " * 20 + line for line in body]), width())


def window_kernel(operation: str) -> Kernel:
    """Any window: `h_begin` .. `w_end` list each output row's and column's input range, in steps of the dilation.

    A NaN in the window is the result, as in PyTorch.
    """
    start, step = ("-inf", "value if value > a or value != value else a") if operation == "max" else ("0", "a + value")
    finish = "a * load_float(scale + row * scale_row + 4 * column)" if operation == "average" else "a"
    body = f"""
    for image in range(images):
        for group in range(group_begin, group_end):
            source = x + image * x_image + group * x_plane
            target = out + image * out_image + group * out_plane
            for row in range(rows):
                for column in range(columns):
                    a = float32({start})
                    first, last = load_int32(w_begin + 4 * column), load_int32(w_end + 4 * column)
                    for h in range(load_int32(h_begin + 4 * row), load_int32(h_end + 4 * row), dilation_h):
                        p = source + h * x_row
                        for w in range(first, last, dilation_w):
                            value = load_float(p + 4 * w)
                            a = {step}
                    store_float(target + row * out_row + 4 * column, {finish})
    """
    return build(f"{operation}pool_window", WINDOW_FIELDS, body, width())


def mean_kernel() -> Kernel:
    """The mean of each whole channel: what lies between and behind its rows is zero, so registers are just summed.

    `factor` is the address of 1 / pixels.
    """
    body = f"""
    for image in range(images):
        for group in range(group_begin, group_end):
            p = x + image * x_image + group * x_plane
            a = splat(float32(0))
            for tile in range(tile_begin, tile_end):
                a = add(a, load(p + {4 * width()} * tile))
            store_float(out + image * out_image + group * out_plane, total(a) * load_float(factor))
    """
    return build("mean", "x out factor images x_image out_image x_plane out_plane", body, width())
