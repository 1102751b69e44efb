"""Pruning algorithms: a model and a mapping {layer: Choice} give `Masks`. To add one: a file, a line in ALGORITHMS."""

from torch import nn

from nbs_lib.pruning.admm import admm, patdnn
from nbs_lib.pruning.magnitude import magnitude
from nbs_lib.pruning.masks import Masks, load_pruned, save_pruned
from nbs_lib.pruning.reweighted import group_lasso, reweighted
from nbs_lib.pruning.targets import targets
from nbs_lib.train import training_device

# Each takes (model, targets, **options) and returns Masks.
ALGORITHMS = {f.__name__: f for f in (magnitude, group_lasso, admm, patdnn, reweighted)}
__all__ = ["ALGORITHMS", "Masks", "load_pruned", "prune", "save_pruned"]


def prune(model: nn.Module, mapping: dict, algorithm: str = "magnitude", **options) -> Masks:
    """Zero weights of `model` in place as the mapping {layer: Choice} says, and return the masks. Nothing is renamed.

    options go to the algorithm, as scope="global" to `magnitude`. An unfitted Pattern is fitted over all its layers.
    checkpoint= and log= are folders: a file per phase. A killed call goes on from its checkpoints, to the same result,
    when it is made again with the model as it was at first.
    Raises KeyError for unknown layers and algorithms and ValueError naming the layer whose weight is not legal for its
    scheme or not finite; the model is then unchanged."""
    if algorithm not in ALGORITHMS:
        raise KeyError(f"Expected an algorithm out of {', '.join(ALGORITHMS)}. Got {algorithm!r}.")
    found, home = targets(model, mapping), next((parameter.device for parameter in model.parameters()), None)
    if options.get("data") is not None:  # what the algorithms keep of the weights lies where `fit` trains
        model.to(training_device(model, options.get("device")))
    try:
        masks = ALGORITHMS[algorithm](model, found, **options)
    finally:
        model.to(home)
    masks.apply(model)
    return masks
