"""Steps that only move values: into another layout, into stride phases, side by side."""

import math
from itertools import accumulate, product

import numpy as np

from nbs_lib.compiler.layout import Flat, Planar
from nbs_lib.compiler.steps import Launch, Step, whole
from nbs_lib.kernels import copy as kernels


def split_by_phase(layer) -> bool:
    """Strided layers read phases, but for depthwise layers of stride 2, whose kernel strides by itself."""
    return layer.stride != (1, 1) and not (layer.kind == "depthwise" and layer.stride == (2, 2))


def phases(layer) -> dict[tuple[int, int], int]:
    """Phases (tap position modulo stride) a layer reads -> their number."""
    axes = zip(layer.shape[2:], layer.dilation, layer.stride, strict=True)
    taps = [sorted({k * d % s for k in range(n)}) for n, d, s in axes]
    return {phase: number for number, phase in enumerate(product(*taps))}


def tap_offsets(layer, x: Planar) -> np.ndarray:
    """Floats from an output pixel to the input of tap (kh, kw) in the first channel: int64 (Kh, Kw)."""
    kh = np.arange(layer.Kh)[:, None] * layer.dilation[0]
    kw = np.arange(layer.Kw)[None, :] * layer.dilation[1]
    if not split_by_phase(layer):
        return (kh - layer.padding[0]) * x.row + kw - layer.padding[2]
    number, (sh, sw) = phases(layer), layer.stride
    phase = np.array([[number[int(h % sh), int(w % sw)] for w in kw[0]] for h in kh[:, 0]])
    return phase * x.plane + kh // sh * x.row + kw // sw


def channel_distance(layer, x: Planar) -> int:
    """Floats from one input channel to the next: phases of a channel lie together."""
    return x.plane * (len(phases(layer)) if split_by_phase(layer) else 1)


def locate(name: str, value: Planar | Flat | None, shape=(1, 1, 1, 1)) -> dict[str, int]:
    """A value's address and the bytes between its images, channels and rows, as fields of a kernel.

    What is not `Planar` holds contiguous images of `shape`; None: the address is not known yet.
    """
    images, channels, height, width = shape
    image, plane, row = getattr(value, "image", channels * height * width), height * width, width
    if isinstance(value, Planar):
        plane, row = value.plane, value.row
    address = value.address if value else 0
    return {name: address, f"{name}_image": 4 * image, f"{name}_plane": 4 * plane, f"{name}_row": 4 * row}


def copy(step: Step, threads: int, name: str, shape, source, target) -> list[Launch]:
    """Bring a value of `shape` from `source` (None: the caller's or PyTorch's contiguous array) to `target`."""
    if len(shape) != 4 or target.images != shape[0]:
        shape = (target.images, 1, 1, math.prod(shape) // target.images)
    fields = locate("x", source, shape) | locate("out", target, shape) | {"images": shape[0], "rows": shape[2]}
    fields |= {"columns": shape[3], "height": shape[2], "width": shape[3], "h_first": 0, "w_first": 0, "h_step": 1}
    return [Launch(kernels.kernel(1, shape[3]), whole(threads, 0, shape[1]), fields, None if source else name)]


def split(step: Step, threads: int, name: str, shape, source, x: Planar, layer) -> list[Launch]:
    """Copy a strided layer's input into its phases, padding included."""
    kernel = kernels.kernel(layer.stride[1], min(x.W - 1, shape[3] // layer.stride[1]))
    fields = locate("x", source, shape) | locate("out", x) | {"out_plane": 4 * channel_distance(layer, x)}
    fields |= {"images": shape[0], "rows": x.H, "columns": x.W, "height": shape[2], "width": shape[3]}
    fields |= {"h_step": layer.stride[0]}
    launches = []
    for (h, w), phase in phases(layer).items():
        at = {"out": x.address + 4 * phase * x.plane, "h_first": h - layer.padding[0], "w_first": w - layer.padding[2]}
        launches.append(Launch(kernel, whole(threads, 0, shape[1]), fields | at, None if source else name))
    return launches


def cat(step: Step, threads: int, parts: list[Planar], out: Planar) -> list[Launch]:
    """Copy images side by side along the channels."""
    launches = [copy(step, threads, "", (out.images, part.C, out.H, out.W), part, out)[0] for part in parts]
    for launch, channel in zip(launches, accumulate((part.C for part in parts), initial=0), strict=False):
        launch.fields["out"] += 4 * channel * out.plane
    return launches


def clear(threads: int, x: Planar, filled: bool) -> Launch:
    """Make the zeros around `x` again, whose memory other values have used; between its rows, too, unless `filled`."""
    lines = {"rows": 1, "row": 4 * x.vectors * x.width, "width": 4 * x.vectors * x.width}
    lines = lines if filled else {"rows": x.H, "row": 4 * x.row, "width": 4 * x.W}
    fields = {"out": x.address, "guard": 4 * x.guard, "plane": 4 * x.plane} | lines
    return Launch(kernels.clear_kernel(), whole(threads, 0, x.images * x.C), fields)
