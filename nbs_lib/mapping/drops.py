"""What pruning one layer alone costs, by layer and Choice: measured on a trained network, or by a proxy of our own.

Drops are a dict {layer: {Choice: drop}}; None stands for a layer left dense, at a drop of 0. `layer_drops` measures
them; `energy_drops` stands in for it where there are no trained weights.
"""

import hashlib
import json
import math
from collections.abc import Iterable

import numpy as np
from tqdm.auto import tqdm

from nbs_lib.mapping.evaluate import hold_out
from nbs_lib.mapping.table import Mapping, check_layers
from nbs_lib.paths import read_checkpoint, write_atomic
from nbs_lib.pruning import prune
from nbs_lib.pruning.targets import find_weight, targets
from nbs_lib.schemes import Choice, Pattern
from nbs_lib.train import evaluate

Drops = dict[str, dict[Choice | None, float]]


def energy_drops(graph, options: dict[str, Iterable[Choice | None]], sample: int = 1 << 16) -> Drops:
    """A proxy for the accuracy drop, ours: the share of a layer's energy (sum of squares) that pruning by magnitude
    removes, in [0, 1). Larger blocks remove more at the same rate.

    It is the relative squared error of the layer's output for white inputs, so its sum over layers is a first-order
    measure of the noise that pruning brings in. It says nothing of how sensitive a layer is, nor of what retraining
    mends. sample: of larger layers, as many weights, the first filters and channels, stand for all."""
    check_layers(graph, options)
    found: Drops = {}
    for name, listed in options.items():
        layer, found[name] = graph[name], {}
        weight, groups = _part(layer.weight, layer.groups, sample)
        square = np.square(weight, dtype=np.float64)
        for choice in listed:
            kept = 1.0 if choice is None else square.sum(where=choice.scheme.project(weight, choice.rate, groups))
            found[name][choice] = 0.0 if choice is None else float(1 - kept / (square.sum() or 1.0))
    return found


def _part(weight: np.ndarray, groups: int, sample: int) -> tuple[np.ndarray, int]:
    """At most `sample` weights of a layer, as square a part of it as can be, and its convolution groups."""
    if weight.size <= sample or groups > 1:
        return weight, groups
    (P, Q), cells = weight.shape[:2], max(1, sample // int(np.prod(weight.shape[2:])))
    q = _whole(min(Q, max(math.isqrt(cells), cells // P)))
    return weight[: _whole(cells // q), :q], 1


def _whole(size: int, step: int = 64) -> int:
    """The size less what does not fill a last block of `step`, so that a part has no smaller blocks at its edges."""
    return size // step * step or size


def layer_drops(
    model, data, graph, options: dict[str, Iterable[Choice | None]], share=0.1, seed=0, checkpoint=None, progress=True
) -> Drops:
    """Accuracy of the model less that with one layer pruned, by magnitude at the choice's rate and without retraining:
    in [-1, 1], negative where pruning helps.

    Measured where the search measures: on `share` of the training images, `hold_out(data, share, seed).test`, never on
    test images. They are truly held out if the model was trained on `hold_out(data, share, seed).train`; of a model
    trained on all images, drops come out somewhat small. Patterns are fitted over all layers that have them. The
    weights are afterwards as they were. checkpoint: a JSON file, written after every evaluation; a killed call goes on
    from it. Raises ValueError for a checkpoint of other weights or images; KeyError for unknown layers; as `prune`."""
    check_layers(graph, options)
    held = hold_out(data, share, seed)
    state = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        state.update(name.encode() + tensor.detach().cpu().numpy().tobytes())
    settings = {"weights": state.hexdigest(), "data": held.name}
    rows = read_checkpoint(checkpoint, "a checkpoint written by layer_drops", settings).get("drops", {})
    listed = {name: list(choices) for name, choices in options.items()}
    work = [(name, choice) for name, choices in listed.items() for choice in choices if choice is not None]
    patterns, dense = {}, None
    for name, choice in tqdm(work, "Accuracy drops", disable=not progress, mininterval=1):
        if (key := _key(name, choice)) in rows:
            continue
        if isinstance(scheme := choice.scheme, Pattern) and scheme not in patterns:
            alike = {name: each for name, each in work if each.scheme == scheme}
            patterns[scheme] = targets(model, alike)[name].choice.scheme
        dense = evaluate(model, held, progress=False) if dense is None else dense
        weight, _ = find_weight(model, name)
        whole = weight.detach().clone()
        row = {"layer": name, "groups": graph[name].groups}  # where no module has them
        try:
            prune(model, Mapping({name: Choice(patterns.get(scheme, scheme), choice.rate)}, [row]))
            rows[key] = dense - evaluate(model, held, progress=False)
        finally:
            weight.data.copy_(whole)
        if checkpoint:
            write_atomic(checkpoint, json.dumps({"settings": settings, "drops": rows}, indent=1))
    return {k: {c: 0.0 if c is None else rows[_key(k, c)] for c in choices} for k, choices in listed.items()}


def total_drop(mapping: dict[str, Choice], drops: Drops) -> float:
    """The sum of a mapping's drops; a layer it leaves out counts 0. KeyError for a choice without a drop on record."""
    total = 0.0
    for layer, options in drops.items():
        if layer in mapping and mapping[layer] not in options:
            known = ", ".join(map(str, options))
            raise KeyError(f"Expected a choice with a drop, for layer {layer!r}: {known}. Got {mapping[layer]}.")
        total += options[mapping[layer]] if layer in mapping else 0.0
    if missing := set(mapping) - set(drops):
        raise KeyError(f"Expected drops of every mapped layer. Got none of {', '.join(sorted(missing))}.")
    return float(total)


def _key(layer: str, choice: Choice) -> str:
    return f"{layer} {json.dumps(choice.to_json())}"
