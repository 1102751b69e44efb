"""Fully connected layers at small batch: bound by reading the weights once. Two kernels, for two kinds of structure.

`kernel`: `lanes` neighbouring filters share a column list. A register holds one column's weights of all of them, the
input value is broadcast; four columns are in flight to hide the latency of the multiply-add.
`gathered`: every filter has a list of its own. A register holds `width` kept weights of one filter, their inputs are
gathered; `width` filters go side by side, so that what one brings into the near cache serves the others.
"""

from nbs_lib.kernels import epilogue as ending
from nbs_lib.kernels.jit import Kernel, build, width

FIELDS = "x out residual weights columns begins planes bias bounds images x_image out_image"
FLIGHT = 4
AHEAD = 8192  # bytes


def lanes() -> int:
    """Filters per group: 8, or what a narrower register holds."""
    return min(8, width())


def kernel(epilogue: tuple[str, ...]) -> Kernel:
    """The kernel; `columns` are byte offsets into the input vector, `planes` byte offsets of the groups' outputs."""
    size = 4 * lanes()
    text = [
        *ending.constants(epilogue),
        "    for group in range(group_begin, group_end):",
        "        begin = load_int32(begins + 4 * group)",
        "        end = load_int32(begins + 4 * group + 4)",
        f"        whole = begin + (end - begin) // {FLIGHT} * {FLIGHT}",
        "        plane = load_int32(planes + 4 * group)",
        "        for image in range(images):",
        "            source = x + image * x_image",
        f"            w = weights + {size} * begin",
        f"            a0 = load(bias + {size} * group)",
        *[f"            a{i} = splat(float32(0))" for i in range(1, FLIGHT)],
        f"            for column in range(begin, whole, {FLIGHT}):",
    ]
    for i in range(FLIGHT):
        value = f"splat(load_float(source + load_int32(columns + 4 * column + {4 * i})))"
        text += [f"                a{i} = fma(load(w + {size * i}), {value}, a{i})"]
    text += [
        f"                w += {FLIGHT * size}",
        "            for column in range(whole, end):",
        "                a0 = fma(load(w), splat(load_float(source + load_int32(columns + 4 * column))), a0)",
        f"                w += {size}",
        "            target = image * out_image + plane",
        f"            a0 = {'add(' * (FLIGHT - 1)}a0{''.join(f', a{i})' for i in range(1, FLIGHT))}",
        f"            store(out + target, {ending.apply(epilogue, 'a0', 'residual + target')})",
    ]
    return build(f"linear_{lanes()}_{ending.name(epilogue)}", FIELDS, "\n".join(text), lanes())


def gathered(epilogue: tuple[str, ...]) -> Kernel:
    """The kernel for filters with lists of their own; `columns` are uint16 column numbers, `begins` count registers.

    Register r of filter i of a group lies at ((begin + r) * width + i) * width weights.
    """
    size, filters = 4 * width(), range(width())
    group = size * width()  # bytes of a register of every filter
    text = [
        *ending.constants(epilogue),
        "    for group in range(group_begin, group_end):",
        "        begin = load_int32(begins + 4 * group)",
        "        end = load_int32(begins + 4 * group + 4)",
        "        plane = load_int32(planes + 4 * group)",
        "        for image in range(images):",
        "            source = x + image * x_image",
        f"            w = weights + {group} * begin",
        f"            c = columns + {group // 2} * begin",
        *[f"            a{i} = splat(float32(0))" for i in filters],
        "            for register in range(begin, end):",
    ]
    for i in filters:
        text += [f"                a{i} = fma(gather(source, c + {size // 2 * i}), load(w + {size * i}), a{i})"]
        text += [f"                prefetch(w + {AHEAD + size * i})"]  # the weights come from memory, once
    text += [
        f"                w += {group}",
        f"                c += {group // 2}",
        "            target = image * out_image + plane",
        *[f"            store_float(out + target + {4 * i}, total(a{i}))" for i in filters],
        f"            a = add(load(out + target), load(bias + {size} * group))",
        f"            store(out + target, {ending.apply(epilogue, 'a', 'residual + target')})",
    ]
    return build(f"gathered_{width()}_{ending.name(epilogue)}", FIELDS, "\n".join(text), width())
