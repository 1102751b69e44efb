"""Convolution: `rows` filters that share one list of kept columns, times `vectors` registers of output pixels.

Every regularity is the same loop over a list: a column is one (input channel, kh, kw), stored as the byte distance from
an output pixel to the input value it meets. Dense layers list all columns, pruned ones what is left (the BCS
occurrence runs of mapping 4.3). Images keep their rows apart by zero columns, so that a run of pixels may cross row
ends: `mask` says where not to write. Stride is gone before: the input has been split into its phases.
"""

from nbs_lib.kernels import epilogue as ending
from nbs_lib.kernels.jit import Kernel, build, width

FIELDS = "x out residual weights columns begins planes bias mask bounds images x_image out_image first step block"
FETCHES = ("", "columns", "tile")
DISTANCE = 12  # columns from a multiply-add to the inputs it prefetches: `columns` must go on that far behind its end


def kernel(rows: int, vectors: int, epilogue: tuple[str, ...], fetch: str = "", unroll: int = 1) -> Kernel:
    """The kernel for a register tile of `rows` x `vectors`. `block` tiles go over a group's weights in turn.

    `fetch`, what to prefetch: "columns", inputs some columns ahead, which left the nearest cache; "tile", those of the
    next tile, which are further away; "", nothing. `unroll`: columns per turn of the inner loop. Accumulator `a{i}_{j}`
    holds filter i of the group at pixel vector j. Per column the shorter side of the tile stays in registers and the
    longer one streams, so that the tile never spills.
    """
    lanes = 4 * width()
    text = [
        *ending.constants(epilogue),
        "    for image in range(images):",
        "        for head in range(tile_begin, tile_end, block):",
        "            tail = min(head + block, tile_end)",
        "            for group in range(group_begin, group_end):",
        "                first_column = load_int32(begins + 4 * group)",
        "                end = load_int32(begins + 4 * group + 4)",
        f"                row = {4 * rows} * group",
        "                for tile in range(head, tail):",
    ]
    body = ["position = first + tile * step", "pixel = x + image * x_image + position"]
    body += ["begin = first_column", f"w = weights + {4 * rows} * begin"]
    for i in range(rows):
        body += [f"b = splat(load_float(bias + row + {4 * i}))", *[f"a{i}_{j} = b" for j in range(vectors)]]
    turns = [_column(rows, vectors, fetch, n, lanes) for n in range(unroll)]
    if unroll > 1:
        body += [f"whole = begin + (end - begin) // {unroll} * {unroll}"]
        body += [f"for column in range(begin, whole, {unroll}):", *["    " + line for turn in turns for line in turn]]
        body += [f"    w += {4 * rows * unroll}", "begin = whole"]
    body += ["for column in range(begin, end):", *["    " + line for line in [*turns[0], f"w += {4 * rows}"]]]
    body += ["target = image * out_image + position"]
    body += [f"m{j} = load_mask(mask + position + {lanes * j})" for j in range(vectors)]
    for i in range(rows):
        body += [f"plane = target + load_int32(planes + row + {4 * i})"]
        for j in range(vectors):
            value = ending.apply(epilogue, f"a{i}_{j}", f"residual + plane + {lanes * j}")
            body += [f"store_kept(out + plane + {lanes * j}, {value}, m{j})"]
    name = f"conv_{rows}x{vectors}_{ending.name(epilogue)}{fetch and '_' + fetch}{f'_u{unroll}' * (unroll > 1)}"
    return build(name, FIELDS, "\n".join(text + [" " * 20 + line for line in body]), width())


def _column(rows: int, vectors: int, fetch: str, n: int, lanes: int) -> list[str]:
    """The multiply-adds of column number `column + n`."""
    values = [f"x{j} = load(p + {lanes * j})" for j in range(vectors)]
    weights = [f"w{i} = splat(load_float(w + {4 * (i + rows * n)}))" for i in range(rows)]
    multiply = [[f"a{i}_{j} = fma(x{j}, w{i}, a{i}_{j})" for j in range(vectors)] for i in range(rows)]
    body = [f"p = pixel + load_int32(columns + 4 * column + {4 * n})"]
    if fetch == "columns":
        body += [f"q = pixel + load_int32(columns + 4 * column + {4 * (n + DISTANCE)})"]
        body += [f"prefetch(q + {line})" for line in (*range(0, lanes * vectors, 64), lanes * vectors - 4)]
    if vectors <= rows:
        body += values + [line for i in range(rows) for line in (weights[i], *multiply[i])]
    else:
        body += weights + [line for j in range(vectors) for line in (values[j], *(m[j] for m in multiply))]
    if fetch == "tile":
        body += [f"prefetch(p + step + {lanes * j})" for j in range(vectors)]
    return body + [f"prefetch(w + {1024 + 4 * rows * n})"]  # weights are read once: stay a kilobyte ahead of the stream
