"""Pruning algorithms: a model and a mapping {layer: Choice} give `Masks`. To add one: a file, a line in ALGORITHMS."""

from torch import nn

from nbs_lib.pruning.magnitude import magnitude
from nbs_lib.pruning.masks import Masks, load_pruned, save_pruned
from nbs_lib.pruning.targets import targets

ALGORITHMS = {"magnitude": magnitude}  # each takes (model, targets, **options) and returns Masks
__all__ = ["ALGORITHMS", "Masks", "load_pruned", "prune", "save_pruned"]


def prune(model: nn.Module, mapping: dict, algorithm: str = "magnitude", **options) -> Masks:
    """Zero weights of `model` in place as the mapping {layer: Choice} says, and return the masks. Nothing is renamed.

    options go to the algorithm, as scope="global" to `magnitude`. An unfitted Pattern is fitted over all its layers.
    Raises KeyError for unknown layers and algorithms and ValueError naming the layer whose weight is not legal for its
    scheme or not finite; the model is then unchanged."""
    if algorithm not in ALGORITHMS:
        raise KeyError(f"Expected an algorithm out of {', '.join(ALGORITHMS)}. Got {algorithm!r}.")
    masks = ALGORITHMS[algorithm](model, targets(model, mapping), **options)
    masks.apply(model)
    return masks
