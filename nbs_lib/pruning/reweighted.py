"""Reweighted dynamic regularisation (mapping 4.2, Eqs. 1-4) and group lasso: penalties that set the rates themselves.

Energies are relative: v_g = ||w_g||^2 / (|g| s), s the layer's mean square weight at the start. lambda is then the same
for groups of any size and layers of any scale. After every step of the optimizer, `reweighted` takes an implicit one,
w_g <- w_g / (1 + 2 lr lambda alpha_g^2), alpha_g = 1 / (v_g + eps), which is stable however large alpha is; group lasso
takes its proximal one, w_g <- w_g max(0, 1 - lr lambda / sqrt(v_g)). Block's rows and columns are both penalised.
"""

import copy
import math
import warnings
from functools import partial

import torch
from torch import nn

from nbs_lib.pruning import cut
from nbs_lib.pruning.masks import Masks
from nbs_lib.pruning.targets import Target
from nbs_lib.pruning.training import Groups, Penalty, checked, retrain, train_under

EPS, TAU = 1e-2, 1e-2  # relative energies: alpha is at most 1 / EPS; what falls under TAU is cut
FORMS = ("relative", "literal")
FAMILIES = {"both": slice(0, 2), "rows": slice(0, 1), "columns": slice(1, 2)}  # of Block; other schemes have one


class GroupPenalty(Penalty):
    """What the two penalties share: the groups (of the families in `of`) and their relative energies."""

    def __init__(self, model, targets: dict[str, Target], lam: float, tau: float, of=FAMILIES["both"], **settings):
        if not tau > 0:
            raise ValueError(f"Expected tau > 0, a relative energy. Got {tau!r}.")
        super().__init__(model, targets, lam=lam, tau=tau, **settings)
        self.lam, self.tau = lam, tau
        self.groups = {layer: Groups(target, self.weights[layer], of) for layer, target in targets.items()}

    def relative(self, layer: str) -> list[torch.Tensor]:
        """v_g of a layer, float32 (G,), by family."""
        groups = self.groups[layer]
        pairs = zip(groups.energies(), groups.sizes, strict=True)
        return [energy / (size * self.scales[layer]) for energy, size in pairs]

    def masks(self, tau: float | None = None) -> Masks:
        """What is left when all below tau goes."""
        return cut.over_all(self.current(), scales=self.scales, threshold=self.tau if tau is None else tau)

    def epoch(self, done: int, epochs: int) -> dict[str, float]:
        return {"lam": self.lam, "rate": self.masks().rate}


class GroupLasso(GroupPenalty):
    """A fixed penalty, lambda sum of sqrt(|g| s) ||w_g||."""

    @torch.no_grad()
    def step(self, lr: float) -> None:
        for layer, weight in self.weights.items():
            norms = [v.sqrt().clamp_min(1e-12) for v in self.relative(layer)]
            # of two families, the product of both factors, in logarithms
            factors = [(1 - lr * self.lam / norm).clamp_min(0).log() for norm in norms]
            weight.mul_(self.groups[layer].spread(factors).exp())


class Reweighted(GroupPenalty):
    """Eqs. 1-4; `form="literal"` adds them to the loss as they stand."""

    kept = ("scales", "pressure", "steps")

    def __init__(self, model, targets, lam: float, tau: float, eps: float, form: str, interval: int, families="both"):
        named = {"eps": eps, "form": form, "interval": interval, "families": families}
        super().__init__(model, targets, lam, tau, FAMILIES[families], **named)
        self.eps, self.form, self.interval, self.steps = eps, form, interval, 0
        self._reweight()

    @torch.no_grad()
    def _reweight(self) -> None:
        """alpha^2 of every weight (the sum of both families'), of the weight's shape."""
        self.pressure = {}
        for layer, groups in self.groups.items():
            energies = groups.energies() if self.form == "literal" else self.relative(layer)
            self.pressure[layer] = groups.spread([(energy + self.eps) ** -2 for energy in energies])

    def penalty(self) -> torch.Tensor | float:
        if self.form != "literal":
            return 0.0
        return self.lam * sum((self.pressure[k] * weight.square()).sum() for k, weight in self.weights.items())

    @torch.no_grad()
    def step(self, lr: float) -> None:
        if self.form == "relative":
            for layer, weight in self.weights.items():
                weight.div_(1 + 2 * lr * self.lam * self.pressure[layer])
        self.steps += 1
        if self.steps % self.interval == 0:
            self._reweight()


def reweighted(
    model, targets, data=None, eps=EPS, tau=TAU, updates=1, form="relative", families="both", **options
) -> Masks:
    """Masks whose rates, per layer and per block, come from lambda alone; the mapping's rates are ignored.

    updates: of alpha in an epoch; the paper's is one. families: whether FC layers under Block are penalised by "rows"
    (Eq. 2), "columns" (Eq. 3) or "both". form="literal": the loss gets the sum of lam alpha^2 ||w_g||^2
    with alpha = 1 / (||w_g||^2 + eps), as printed; it may diverge, which raises FloatingPointError.

    options: lam or target_rate, epochs=10 under the penalty, retrain_epochs=5, lr=0.02, trials=4, and those of `fit`,
    such as seed and checkpoint (a folder).
    lam: lambda; what it does grows with lr times steps (lam * lr summed to 0.25 gave about 4x on digits and CIFAR-10).
    target_rate, of all targets' weights together, finds lambda as `_search` says, in at most `trials` trainings (`lam`
    beside it is the first one tried); history has every epoch that took, by `phase`."""

    def hook(lam: float, steps: int) -> Reweighted:
        if form not in FORMS or families not in FAMILIES or not eps > 0 or not 1 <= updates <= steps:
            rule = f"Expected a form out of {', '.join(FORMS)}, families out of {', '.join(FAMILIES)}, eps > 0"
            got = f"Got {form!r}, {families!r}, {eps!r} and {updates!r}."
            raise ValueError(f"{rule} and updates in 1..{steps}. {got}")
        return Reweighted(model, targets, lam, tau, eps, form, steps // updates, families)

    return _pruned(model, hook, 0.3, data, **options)


def group_lasso(model: nn.Module, targets: dict[str, Target], data=None, tau: float = TAU, **options) -> Masks:
    """Masks by a penalty that is the same for all groups; options as in `reweighted`."""
    return _pruned(model, lambda lam, steps: GroupLasso(model, targets, lam, tau), 1.0, data, **options)


def _pruned(
    model, make, start, data, lam=None, target_rate=None, epochs=10, retrain_epochs=5, lr=0.02, trials=4, **options
) -> Masks:
    """Train under the GroupPenalty that `make` gives for a lambda and the batches of an epoch, cut, retrain.

    start: where a search starts, as lambda times lr, summed over all steps."""
    options = {"lr": lr} | options
    steps = checked(data, epochs, retrain_epochs, **options)
    if (lam is None and target_rate is None) or not (lam is None or 0 < lam < math.inf):
        raise ValueError(f"Expected lam > 0, or target_rate=. Got {lam!r} and {target_rate!r}.")
    if not (target_rate is None or 1 < target_rate < math.inf) or epochs < 1 or trials < 1:
        raise ValueError(f"Expected target_rate > 1, epochs, trials >= 1. Got {target_rate!r}, {epochs!r}, {trials!r}.")
    lam, make = start / (lr * epochs * steps) if lam is None else lam, partial(make, steps=steps)
    hook = make(lam)
    if target_rate is None or not hook.weights:
        histories = [train_under(hook, model, data, epochs, **options)]
        masks = hook.masks()
    else:
        hook, histories = _search(model, make, lam, target_rate, data, epochs, trials, options)
        masks = cut.over_all(hook.current(), target_rate, hook.scales)
    masks.energies = {layer: torch.cat(hook.relative(layer)).cpu().numpy() for layer in hook.weights}
    masks.tau_rates = {tau: hook.masks(tau).rate for tau in (hook.tau / 3, hook.tau, 3 * hook.tau)}
    if bounds := "; ".join(f"{layer}: {what}" for layer, what in masks.bounds().items()):
        warnings.warn(f"The penalty left layers at a bound: {bounds}.", stacklevel=4)
    return retrain(model, masks, histories, data, retrain_epochs, **options)


def _search(model, make, lam: float, target_rate: float, data, epochs: int, trials: int, options: dict):
    """The hook of the first lambda whose rate is within 10 % of the target's, or of the nearest; all histories, its
    own last.

    Every trial is a whole training from the same start. The logarithm of the rate grows about like a power of lambda,
    so the next lambda comes from the line through the last two trials in (log lambda, log log rate)."""
    start = copy.deepcopy(model.state_dict())
    wanted, histories, tried = math.log(math.log(target_rate)), [], []
    for trial in range(1, trials + 1):
        model.load_state_dict(start)
        hook = make(lam)
        histories.append(train_under(hook, model, data, epochs, f"trial {trial}", **options))
        rate = hook.masks().rate
        reached = math.log(max(math.log(rate), 1e-3))
        tried.append((abs(math.log(rate / target_rate)), math.log(lam), reached, copy.deepcopy(model.state_dict())))
        if tried[-1][0] < math.log(1.1):
            break
        slope = 1.2
        if trial > 1 and (apart := tried[-1][1] - tried[-2][1]):
            slope = min(4.0, max(0.5, (reached - tried[-2][2]) / apart))
        lam *= math.exp(min(2.0, max(-2.0, (wanted - reached) / slope)))
    best = min(range(len(tried)), key=lambda trial: tried[trial][0])
    if tried[best][0] >= math.log(1.1):
        shown = ", ".join(f"{math.exp(at):.3g}: {math.exp(math.exp(reached)):.3g}x" for _, at, reached, _ in tried)
        told = f"No lambda came within 10 % of {target_rate:g}x ({shown}); the cut goes there anyway."
        warnings.warn(told, stacklevel=4)
    histories.append(histories.pop(best))
    model.load_state_dict(start)
    hook = make(math.exp(tried[best][1]))  # its scales are the start's
    model.load_state_dict(tried[best][3])
    return hook, histories
