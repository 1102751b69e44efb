"""The vocabulary: the ATen operators the compiler knows. A rule takes the operator's name, its arguments by name (what
depends on an input is a FakeTensor) and its output; it gives `(op, attrs)`, attributes in plain Python and NumPy, or
None for a use the vocabulary has no word for. "conv2d" and "linear" give LayerSpec fields instead, except the sizes."""

import math

import torch
from torch._subclasses.fake_tensor import FakeTensor


def _computed(*values) -> bool:
    return any(isinstance(value, FakeTensor) for value in values)


def _pair(value) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value) * (2 // len(value))


def _conv(name, a, out):
    weight, bias, groups, padding, dilation = a["weight"], a["bias"], a["groups"], a["padding"], _pair(a["dilation"])
    if out.dim() != 4 or _computed(weight, bias) or a.get("transposed"):
        return None
    if padding == "same":  # the odd one goes to the bottom and the right
        totals = [d * (k - 1) for k, d in zip(weight.shape[2:], dilation, strict=True)]
    else:
        totals = [2 * side for side in _pair(0 if padding == "valid" else padding)]
    padding = tuple(side for total in totals for side in (total // 2, total - total // 2))
    kind = "depthwise" if weight.shape[1] == 1 < groups else "conv"
    window = dict(stride=_pair(a["stride"]), padding=padding, dilation=dilation, groups=groups)
    return "conv2d", dict(kind=kind, weight=weight, bias=bias, **window)


def _linear(name, a, out):
    x, weight, bias = a.get("input"), a.get("weight"), a.get("bias")
    if name != "linear":  # x @ weight.t() + bias with a weight of shape (P, Q) is one too
        x, matrix = (a["mat1"], a["mat2"]) if name == "addmm" else (a["self"], a.get("mat2", a.get("other")))
        if matrix.dim() != 2 or matrix.is_contiguous() or not matrix.t().is_contiguous():
            return None
        weight, bias = matrix.t(), a["self"] if name == "addmm" else None
    scaled = (a.get("alpha", 1), a.get("beta", 1)) != (1, 1)
    if x.dim() < 2 or _computed(weight, bias) or scaled or (bias is not None and bias.shape != weight.shape[:1]):
        return None
    window = dict(stride=(1, 1), padding=(0, 0, 0, 0), dilation=(1, 1), groups=1)
    return "linear", dict(kind="linear", weight=weight, bias=bias, **window)


def _affine(name, a, out):
    weight, bias, mean, variance = (a[key] for key in ("weight", "bias", "running_mean", "running_var"))
    if _computed(weight, bias, mean, variance) or variance is None or a.get("training"):
        return None
    scale = (variance.double() + a["eps"]).rsqrt() * (1 if weight is None else weight.double())
    shift = (0 if bias is None else bias.double()) - mean.double() * scale
    return "affine", {"scale": scale.float().numpy(), "shift": shift.float().numpy()}


def _clamp(name, a, out):
    limits = {"relu": (0, None), "relu6": (0, 6), "hardtanh": (a.get("min_val"), a.get("max_val"))}
    low, high = limits.get(name, (a.get("min"), a.get("max")))
    if isinstance(low, torch.Tensor) or isinstance(high, torch.Tensor):
        return None
    return "clamp", {"lo": -math.inf if low is None else float(low), "hi": math.inf if high is None else float(high)}


def _arithmetic(name, a, out):
    scalar = None if isinstance(a["other"], torch.Tensor) else float(a["other"])
    return (name, {"scalar": scalar}) if a.get("alpha", 1) == 1 else None


def _pool(name, a, out):
    kernel, rest = _pair(a["kernel_size"]), {"padding": _pair(a["padding"]), "ceil_mode": a["ceil_mode"]}
    if name == "avg_pool2d":
        rest |= {"count_include_pad": a["count_include_pad"], "divisor": a["divisor_override"]}
    else:
        rest |= {"dilation": _pair(a["dilation"])}
    return (name[:10], {"kernel": kernel, "stride": _pair(a["stride"] or kernel)} | rest) if out.dim() == 4 else None


def _adaptive_pool(name, a, out):
    return ("adaptive_avg_pool2d", {"output": tuple(out.shape[2:])}) if out.dim() == 4 else None


def _mean(name, a, out):
    maps = a["self"].dim() == 4 and {dim % 4 for dim in a.get("dim") or ()} == {2, 3}
    return ("global_avg", {"keepdim": a["keepdim"]}) if maps else None


def _cat(name, a, out):
    return ("cat", {"dim": a["dim"] % out.dim()}) if all(part.dim() == out.dim() for part in a["tensors"]) else None


RULES = (
    dict.fromkeys(("conv2d", "convolution"), _conv)
    | dict.fromkeys(("linear", "mm", "addmm", "matmul"), _linear)
    | dict.fromkeys(("_native_batch_norm_legit_no_training", "batch_norm"), _affine)
    | dict.fromkeys(("relu", "relu6", "hardtanh", "clamp", "clip", "clamp_min", "clamp_max"), _clamp)
    | dict.fromkeys(("add", "mul"), _arithmetic)
    | dict.fromkeys(("max_pool2d", "max_pool2d_with_indices", "avg_pool2d"), _pool)
    | dict.fromkeys(("adaptive_avg_pool2d", "_adaptive_avg_pool2d"), _adaptive_pool)
    | dict.fromkeys(("view", "_unsafe_view", "squeeze", "unsqueeze"), lambda name, a, out: ("reshape", {}))
    | dict.fromkeys(("hardswish", "hardsigmoid", "silu", "sigmoid"), lambda name, a, out: (name, {}))
    | {"mean": _mean, "cat": _cat}
)
READ_CONSTANTS = {"add", "mul", "cat"}  # ops with constants among their operands: these become nodes
IDENTITIES = {"clone", "alias", "detach", "_to_copy", "expand", "slice", "view", "adaptive_avg_pool2d"}
