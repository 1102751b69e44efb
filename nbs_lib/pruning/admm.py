"""ADMM pruning (mapping Table 1): the weights W are pulled to their projection Z; rates are set by hand. And PatDNN."""

import torch
from torch import nn

from nbs_lib.pruning import cut
from nbs_lib.pruning.masks import Masks
from nbs_lib.pruning.targets import Target
from nbs_lib.pruning.training import Penalty, checked, retrain, train_under

PULL = 12.0  # lr rho, summed over the last epoch


class Admm(Penalty):
    """min f(W) + rho/2 ||W - Z + U||^2 by steps W <- (W + lr rho (Z - U)) / (1 + lr rho), implicit and so stable for
    any rho; after each epoch Z <- projection(W + U), U <- U + W - Z, and rho grows `growth` times, from `rho` on."""

    kept = ("scales", "dual", "near", "rho")

    def __init__(self, model: nn.Module, targets: dict[str, Target], rho: float, growth: float):
        super().__init__(model, targets, rho=rho, growth=growth)
        self.rho, self.growth, self.near = rho, growth, {}
        self.dual = {layer: torch.zeros_like(weight) for layer, weight in self.weights.items()}
        self._project()

    @torch.no_grad()
    def _project(self) -> None:
        for layer, target in self.targets.items():
            wanted = (self.weights[layer] + self.dual[layer]).detach()
            mask = target.choice.scheme.project(wanted.float().cpu().numpy(), target.choice.rate, target.groups)
            self.near[layer] = wanted * torch.as_tensor(mask, device=wanted.device)

    @torch.no_grad()
    def step(self, lr: float) -> None:
        for layer, weight in self.weights.items():
            weight.lerp_(self.near[layer] - self.dual[layer], lr * self.rho / (1 + lr * self.rho))

    @torch.no_grad()
    def epoch(self, done: int, epochs: int) -> dict[str, float]:
        self._project()
        apart = {layer: weight - self.near[layer] for layer, weight in self.weights.items()}
        for layer, residual in apart.items():
            self.dual[layer] = (self.dual[layer] + residual) / self.growth  # U is the dual divided by rho
        used, self.rho = self.rho, self.rho * self.growth
        norm = sum(float(weight.square().sum()) for weight in self.weights.values())
        residual = sum(float(residual.square().sum()) for residual in apart.values())
        return {"primal_residual": (residual / max(norm, 1e-30)) ** 0.5, "rho": used}


def admm(
    model, targets: dict[str, Target], data=None, epochs=10, retrain_epochs=5, lr=0.02, rho=None, growth=3.0, **options
) -> Masks:
    """Masks at the nominal rates, after `epochs` of ADMM; then retraining. History: primal_residual, ||W - Z|| / ||W||.

    rho: of the last epoch, by default what pulls W to Z but for exp(-12) in it; it grows `growth` times an epoch.
    Options, such as seed and checkpoint (a folder), go to `fit`."""
    if not (rho is None or rho > 0) or not growth >= 1:
        raise ValueError(f"Expected rho > 0 and growth >= 1. Got {rho!r} and {growth!r}.")
    steps = checked(data, epochs, retrain_epochs, lr, **options)
    hook = Admm(model, targets, (rho or PULL / (lr * steps)) / growth ** max(0, epochs - 1), growth)
    history = train_under(hook, model, data, epochs, lr=lr, **options)
    return retrain(model, cut.by_layer(hook.current()), [history], data, retrain_epochs, lr=lr, **options)


def patdnn(model: nn.Module, targets: dict[str, Target], **options) -> Masks:
    """The papers' baseline (mapping 6.3.4): patterns and connectivity on 3x3 layers, by ADMM, rates set by hand.

    Raises ValueError naming a layer whose scheme is not a pattern; uniform_mapping(graph, rate, Pattern(8), None) has
    none. Options as in `admm`."""
    if odd := {layer: str(t.choice.scheme) for layer, t in targets.items() if t.choice.scheme.name != "pattern"}:
        raise ValueError(f"Expected a pattern for every layer of patdnn, which prunes 3x3 layers only. Got {odd}.")
    return admm(model, targets, **options)
