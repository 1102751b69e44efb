"""What a kernel does to an accumulator before storing it: activations and the residual add, as source text.

An epilogue is a tuple of the words below, applied in order; a network's batch norm is folded into the weights before.
`clamp` bounds are data (pairs of float32 at `bounds`), so ReLU, ReLU6 and no activation share one compiled kernel.
"""

from __future__ import annotations

WORDS = ("clamp", "hardswish", "hardsigmoid", "add")


def constants(epilogue: tuple[str, ...]) -> list[str]:
    """Source lines that load the clamp bounds, once per call."""
    unknown = set(epilogue) - set(WORDS)
    if unknown or epilogue.count("add") > 1:
        raise ValueError(f"Expected epilogue words out of {WORDS}, at most one add. Got {epilogue}.")
    lines = []
    for i in range(epilogue.count("clamp")):
        lines += [f"    low{i} = splat(load_float(bounds + {8 * i}))"]
        lines += [f"    high{i} = splat(load_float(bounds + {8 * i + 4}))"]
    return lines


def apply(epilogue: tuple[str, ...], value: str, residual: str) -> str:
    """The expression for the stored vector, from the accumulator `value` and the address expression `residual`."""
    clamps = 0
    for word in epilogue:
        if word == "clamp":
            value = f"minimum(maximum({value}, low{clamps}), high{clamps})"
            clamps += 1
        elif word == "add":
            value = f"add({value}, load({residual}))"
        else:
            value = f"{word}({value})"
    return value
