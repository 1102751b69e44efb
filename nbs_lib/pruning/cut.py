"""From weights to masks: one threshold on the energy per weight, over a layer or over all of them."""

import numpy as np

from nbs_lib.pruning.masks import Masks
from nbs_lib.pruning.targets import Target
from nbs_lib.schemes import Choice, check_rate, keep_strongest, reached


def by_layer(targets: dict[str, Target]) -> Masks:
    """Masks that bring each layer on its own to its nominal rate."""
    masks = {layer: t.choice.scheme.project(t.weight, t.choice.rate, t.groups) for layer, t in targets.items()}
    return Masks(masks, {k: t.choice for k, t in targets.items()}, {k: t.groups for k, t in targets.items()})


def over_all(
    targets: dict[str, Target], rate: float | None = None, scales: dict[str, float] | None = None, threshold=None
) -> Masks:
    """Masks by one threshold on the energy per weight, divided by the layer's scale: every layer gets its own rate.

    rate: of all targets together (by default what their nominal ones amount to), met as nearly as groups allow; or the
    threshold itself. Each layer keeps at least its strongest group."""
    if not targets:
        return Masks({}, {}, {})
    units = {layer: target.choice.scheme.units(target.weight, target.groups) for layer, target in targets.items()}
    score = np.concatenate([unit.score / (scales or {}).get(layer, 1.0) for layer, unit in units.items()])
    if threshold is None:
        kept = sum(t.weight.size / (t.choice.rate if rate is None else check_rate(rate)) for t in targets.values())
        keep = keep_strongest(score, np.concatenate([unit.size for unit in units.values()]), kept)
    else:
        keep = score >= threshold
    parts = np.split(keep, np.cumsum([unit.score.size for unit in units.values()])[:-1])
    masks = {layer: unit.mask(part) for (layer, unit), part in zip(units.items(), parts, strict=True)}
    choices = {layer: Choice(targets[layer].choice.scheme, reached(mask)) for layer, mask in masks.items()}
    return Masks(masks, choices, {layer: target.groups for layer, target in targets.items()})
