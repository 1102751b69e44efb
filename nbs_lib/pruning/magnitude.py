"""One-shot magnitude pruning: what has the least energy per weight under its scheme goes."""

import numpy as np
from torch import nn

from nbs_lib.pruning.masks import Masks
from nbs_lib.pruning.targets import Target
from nbs_lib.schemes import Choice, check_rate, keep_strongest, reached


def magnitude(model: nn.Module, targets: dict[str, Target], scope: str = "layer", rate: float | None = None) -> Masks:
    """Masks by magnitude. scope="layer": each layer on its own, at its nominal rate.

    scope="global": one threshold on the energy per weight over all targets gives every layer its rate, such that
    together they reach `rate` (by default what the nominal ones amount to); each keeps at least its strongest group."""
    if scope not in ("layer", "global") or (scope == "layer" and rate is not None):
        raise ValueError(f"Expected scope='layer', or scope='global' with or without rate. Got {scope!r}, rate {rate}.")
    choices = {layer: target.choice for layer, target in targets.items()}
    if scope == "layer" or not targets:
        masks = {layer: t.choice.scheme.project(t.weight, t.choice.rate, t.groups) for layer, t in targets.items()}
    else:
        kept = sum(t.weight.size / (t.choice.rate if rate is None else check_rate(rate)) for t in targets.values())
        units = [target.choice.scheme.units(target.weight, target.groups) for target in targets.values()]
        score, size = (np.concatenate([getattr(unit, what) for unit in units]) for what in ("score", "size"))
        keep = np.split(keep_strongest(score, size, kept), np.cumsum([unit.score.size for unit in units])[:-1])
        masks = {layer: unit.mask(part) for layer, unit, part in zip(targets, units, keep, strict=True)}
        choices = {layer: Choice(choices[layer].scheme, reached(mask)) for layer, mask in masks.items()}
    return Masks(masks, choices, {layer: target.groups for layer, target in targets.items()})
