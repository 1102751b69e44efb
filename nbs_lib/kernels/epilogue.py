"""What a kernel does to an accumulator before storing it: activations and the residual add, as source text.

An epilogue is a tuple of the words below, applied in order; a network's batch norm is folded into the weights before.
Bounds are data (a pair of float32 at `bounds` per clamp and per relu): a constant zero would invite LLVM to replace the
one instruction of a ReLU by three.
"""

BOUNDED = ("relu", "clamp")
WORDS = (*BOUNDED, "hardswish", "hardsigmoid", "silu", "sigmoid", "add")


def name(epilogue: tuple[str, ...]) -> str:
    """What a kernel's name says of its end."""
    return "_".join(epilogue) or "linear"


def constants(epilogue: tuple[str, ...]) -> list[str]:
    """Source lines that load the clamp bounds, once per call."""
    unknown = set(epilogue) - set(WORDS)
    if unknown or epilogue.count("add") > 1:
        raise ValueError(f"Expected epilogue words out of {WORDS}, at most one add. Got {epilogue}.")
    lines = []
    for i, word in enumerate(word for word in epilogue if word in BOUNDED):
        lines += [f"    low{i} = splat(load_float(bounds + {8 * i}))"]
        lines += [f"    high{i} = splat(load_float(bounds + {8 * i + 4}))"] * (word == "clamp")
    return lines


def apply(epilogue: tuple[str, ...], value: str, residual: str) -> str:
    """The expression for the stored vector, from the accumulator `value` and the address expression `residual`."""
    number = 0
    for word in epilogue:
        if word in BOUNDED:
            value = f"maximum({value}, low{number})"
            value = f"minimum({value}, high{number})" if word == "clamp" else value
            number += 1
        elif word == "add":
            value = f"add({value}, load({residual}))"
        else:
            value = f"{word}({value})"
    return value
