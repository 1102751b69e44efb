"""Pruning algorithms that train: their steps against plain loops, and what every scheme gets from every algorithm."""

import copy
import itertools
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from nbs_lib.data import load_data
from nbs_lib.pruning import ALGORITHMS, Masks, prune
from nbs_lib.pruning.admm import Admm
from nbs_lib.pruning.cut import by_layer
from nbs_lib.pruning.magnitude import Gradual
from nbs_lib.pruning.reweighted import GroupLasso, Reweighted, _search
from nbs_lib.pruning.targets import targets
from nbs_lib.pruning.training import Penalty
from nbs_lib.schemes import Block, BlockPunched, Channel, Choice, Filter, Pattern, Unstructured

TRAINED = ("magnitude", "group_lasso", "admm", "reweighted")  # patdnn is admm for patterns
BOUND = ["nothing pruned", "all but the strongest group pruned"]


# Oracles: the groups of a scheme, from its definition, in plain loops.


def cut(start, stop, size):
    """The ranges of `size` (the last may be shorter) from start to stop."""
    return [range(i, min(i + size, stop)) for i in range(start, stop, size)]


def families(scheme, shape, conv_groups=1):
    """The groups of a weight of this shape: per family a list of lists of positions; none straddles conv groups."""
    (P, Q), kernel = shape[:2], list(np.ndindex(*shape[2:]))
    parts = [range(g * (P // conv_groups), (g + 1) * (P // conv_groups)) for g in range(conv_groups)]
    name, p, q = scheme.name, getattr(scheme, "p", 1), getattr(scheme, "q", 1)
    tiles = [(rows, columns) for part in parts for rows in cut(part[0], part[-1] + 1, p) for columns in cut(0, Q, q)]
    if name == "unstructured":
        return [[[place] for place in np.ndindex(*shape)]]
    if name == "filter":
        return [[[(i, j, *k) for j in range(Q) for k in kernel] for i in range(P)]]
    if name == "channel":
        return [[[(i, j, *k) for i in part for k in kernel] for part in parts for j in range(Q)]]
    if name == "pattern":
        return [[[(i, j, *k) for k in kernel] for i in range(P) for j in range(Q)]]
    if name == "block_punched":
        return [[[(i, j, *k) for i in rows for j in columns] for rows, columns in tiles for k in kernel]]
    segments = [[[(i, j) for j in columns] for rows, columns in tiles for i in rows]]
    segments += [[[(i, j) for i in rows] for rows, columns in tiles for j in columns]]
    return [[[(*place, *kernel[0]) for place in group] for group in family] for family in segments]


def at(group):
    """Positions as an index."""
    return tuple(np.array(group).T)


def energy(weight, group):
    return sum(float(weight[place]) ** 2 for place in group)


def assert_legal(scheme, mask, conv_groups=1):
    """The mask has the scheme's structure: no group is kept in part."""
    for family in families(scheme, mask.shape, conv_groups):
        for group in family:
            kept = mask[at(group)]
            if scheme.name == "pattern":
                assert kept.sum() == 0 or int((kept << np.arange(9)).sum()) in scheme.patterns
            elif scheme.name != "block":
                assert kept.all() or not kept.any()
    if scheme.name == "block":
        matrix = mask.reshape(mask.shape[:2])
        for part in np.split(matrix, conv_groups):
            for rows, columns in itertools.product(cut(0, len(part), scheme.p), cut(0, part.shape[1], scheme.q)):
                block = part[np.ix_(rows, columns)]
                np.testing.assert_array_equal(block, np.outer(block.any(1), block.any(0)))


def largest(scheme, shape, conv_groups=1):
    return max(len(group) for family in families(scheme, shape, conv_groups) for group in family)


# The layers the steps are tried on: odd sizes, convolution groups, depthwise, 1x1, linear.

LAYERS = {
    "conv": lambda: nn.Conv2d(7, 9, 3),
    "grouped": lambda: nn.Conv2d(6, 14, 3, groups=2),
    "depthwise": lambda: nn.Conv2d(7, 7, 3, groups=7),
    "wide": lambda: nn.Conv2d(3, 17, (1, 3)),
    "pointwise": lambda: nn.Conv2d(9, 7, 1),
    "linear": lambda: nn.Linear(17, 9),
}
SCHEMES = [Unstructured(), Filter(), Channel(), Pattern(4), BlockPunched(4, 3), Block(4, 3)]
CASES = [
    pytest.param(scheme, layer, id=f"{scheme.name}-{layer}")
    for scheme, layer in itertools.product(SCHEMES, LAYERS)
    if not scheme.refuses(tuple(LAYERS[layer]().weight.shape))
]


def one_layer(scheme, layer, rate=3.0):
    """A model of one layer, its weight in float64 as it is at first, its convolution groups, and its targets."""
    torch.manual_seed(1)
    model = nn.Sequential(LAYERS[layer]())
    weight = model[0].weight.detach().numpy().astype(float)
    return model, weight, getattr(model[0], "groups", 1), targets(model, {"0": Choice(scheme, rate)})


def alphas(weight, scheme, conv_groups, eps, unit=None):
    """The sum over the families of alpha^2, of every weight. unit: the mean square that energies are relative to."""
    total = np.zeros(weight.shape)
    for family in families(scheme, weight.shape, conv_groups):
        for group in family:
            total[at(group)] += (energy(weight, group) / (1 if unit is None else len(group) * unit) + eps) ** -2
    return total


def assert_weight(model, expected):
    np.testing.assert_allclose(
        model[0].weight.detach().numpy(), expected, rtol=3e-5, atol=1e-6 * np.abs(expected).max()
    )


@pytest.mark.parametrize(("scheme", "layer"), CASES)
def test_reweighted_takes_implicit_steps_and_updates_alpha(scheme, layer):
    model, weight, conv_groups, found = one_layer(scheme, layer)
    hook = Reweighted(model, found, 0.03, 0.01, eps=0.02, form="relative", interval=2)
    unit, lr = (weight**2).mean(), 0.5
    for _ in range(2):  # updates of alpha
        pressure = alphas(weight, scheme, conv_groups, 0.02, unit)
        for _ in range(2):  # steps with the same alpha
            assert hook.penalty() == 0.0
            hook.step(lr)
            weight = weight / (1 + 2 * lr * 0.03 * pressure)
            assert_weight(model, weight)
    np.testing.assert_allclose(hook.pressure["0"].numpy(), alphas(weight, scheme, conv_groups, 0.02, unit), rtol=1e-4)


@pytest.mark.parametrize(("scheme", "layer"), CASES)
def test_the_literal_penalty_is_equations_2_to_4(scheme, layer):
    model, weight, conv_groups, found = one_layer(scheme, layer)
    hook = Reweighted(model, found, 0.3, 0.01, eps=0.1, form="literal", interval=1)
    for scale in (1.0, 0.5):
        pressure = alphas(weight, scheme, conv_groups, 0.1)
        value = hook.penalty()
        assert value.item() == pytest.approx(0.3 * (pressure * weight**2).sum(), rel=1e-5)
        model.zero_grad()
        value.backward()
        np.testing.assert_allclose(model[0].weight.grad.numpy(), 2 * 0.3 * pressure * weight, rtol=1e-4, atol=1e-9)
        assert_weight(model, weight)
        with torch.no_grad():
            model[0].weight.mul_(scale / 2)
        weight = weight * (scale / 2)
        hook.step(0.1)
        assert_weight(model, weight)


@pytest.mark.parametrize(("scheme", "layer"), CASES)
def test_group_lasso_takes_proximal_steps(scheme, layer):
    model, weight, conv_groups, found = one_layer(scheme, layer)
    hook = GroupLasso(model, found, 2.0, 0.01)
    unit, lr = (weight**2).mean(), 0.4
    for _ in range(2):
        factors = np.ones(weight.shape)
        for family in families(scheme, weight.shape, conv_groups):
            for group in family:
                # the proximal map of t ||w_g|| at t = lr lambda sqrt(|g| s): w_g max(0, 1 - t / ||w_g||)
                norm = max(energy(weight, group), 1e-30) ** 0.5
                factors[at(group)] *= max(0.0, 1 - lr * 2.0 * (len(group) * unit) ** 0.5 / norm)
        weight = weight * factors
        hook.step(lr)
        assert_weight(model, weight)
        zero = factors == 0
        assert not model[0].weight.detach().numpy()[zero].any()


@pytest.mark.parametrize(("scheme", "layer"), CASES)
def test_energies_are_relative_to_the_first_mean_square(scheme, layer):
    model, weight, conv_groups, found = one_layer(scheme, layer)
    hook = GroupLasso(model, found, 1.0, 0.01)
    with torch.no_grad():
        model[0].weight.mul_(0.5)
    for got, family in zip(hook.relative("0"), families(scheme, weight.shape, conv_groups), strict=True):
        want = [energy(weight / 2, group) / len(group) / (weight**2).mean() for group in family]
        np.testing.assert_allclose(np.sort(got.numpy()), np.sort(want), rtol=1e-4)


def test_a_cut_at_tau_drops_the_groups_below_it():
    model, weight, _, found = one_layer(BlockPunched(4, 3), "conv")
    hook = GroupLasso(model, found, 1.0, 0.9)
    for tau in (0.9, 1.2):
        want = np.zeros(weight.shape, bool)
        for group in families(BlockPunched(4, 3), weight.shape)[0]:
            want[at(group)] = energy(weight, group) / len(group) / (weight**2).mean() >= tau
        masks = hook.masks(tau)
        np.testing.assert_array_equal(masks["0"].numpy(), want)
        assert masks.choices["0"].rate == masks.rate == want.size / want.sum()
    assert 0 < hook.masks().rate < hook.masks(1.2).rate


@pytest.mark.parametrize(("families", "rows", "columns"), [("both", 1, 1), ("rows", 1, 0), ("columns", 0, 1)])
def test_block_is_penalised_by_rows_by_columns_or_by_both(families, rows, columns):
    model = nn.Sequential(nn.Linear(6, 4, bias=False))
    weight = model[0].weight.detach().double().numpy().copy()
    hook = Reweighted(model, targets(model, {"0": Choice(Block(4, 6), 2)}), 0.5, 0.01, 0.1, "relative", 9, families)
    hook.step(0.1)
    square = weight**2 / (weight**2).mean()
    alpha = 1 / (square.mean(axis=1, keepdims=True) + 0.1), 1 / (square.mean(axis=0, keepdims=True) + 0.1)
    want = weight / (1 + 2 * 0.1 * 0.5 * (rows * alpha[0] ** 2 + columns * alpha[1] ** 2))
    np.testing.assert_allclose(model[0].weight.detach().numpy(), want, rtol=1e-5)


def test_admm_is_the_loop_on_a_quadratic_problem():
    """f(W) = ||W - T||^2 / 2 with 3 of 9 filters to be kept: W, Z and U by hand, then the residual."""
    rng, lr, first, growth, epochs, steps = np.random.default_rng(0), 0.1, 0.1, 3.0, 6, 5
    goal, weight = (rng.normal(size=(9, 17)) for _ in range(2))
    model = nn.Sequential(nn.Linear(17, 9, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.from_numpy(weight))
    hook = Admm(model, targets(model, {"0": Choice(Filter(), 3)}), first, growth)

    def strongest(matrix):
        kept = np.zeros(matrix.shape)
        for row in sorted(range(9), key=lambda row: energy(matrix[row], [(j,) for j in range(17)]))[-3:]:
            kept[row] = matrix[row]
        return kept

    near, scaled_dual, rho, rows = strongest(weight), np.zeros(weight.shape), first, []
    for epoch in range(1, epochs + 1):
        for _ in range(steps):
            weight = weight - lr * (weight - goal)
            weight = (weight + lr * rho * (near - scaled_dual)) / (1 + lr * rho)
            with torch.no_grad():
                model[0].weight.sub_(lr * (model[0].weight - torch.from_numpy(goal)))
            hook.step(lr)
        assert_close = np.testing.assert_allclose
        assert_close(model[0].weight.detach().numpy(), weight, rtol=1e-4, atol=1e-5)
        near = strongest(weight + scaled_dual)
        residual = weight - near
        scaled_dual = (scaled_dual + residual) / growth
        rows.append(hook.epoch(epoch, epochs))
        want = np.linalg.norm(residual) / np.linalg.norm(weight)
        assert rows[-1] == pytest.approx({"primal_residual": want, "rho": rho}, rel=1e-3, abs=1e-6)
        rho = growth * rho
        assert_close(hook.near["0"].numpy(), near, rtol=1e-4, atol=1e-5)
        assert_close(hook.dual["0"].numpy(), scaled_dual, rtol=1e-4, atol=1e-5)
    residuals = [row["primal_residual"] for row in rows]
    assert residuals[1:] == sorted(residuals[1:], reverse=True) and residuals[-1] < 0.01


# Whole runs, on tiny networks and digits of 8 x 8 pixels.


class Stream:
    """Batches that call `seen` before each one."""

    def __init__(self, batches, seen):
        self.batches, self.seen = batches, seen

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        for batch in self.batches:
            self.seen()
            yield batch


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Threads gain nothing on networks this small, and lose much where other processes want the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def data():
    return load_data("digits", size=8, batch_size=32, augment=False, device="cpu").subset(128)


def build():
    """A stem, a depthwise, a 1x1 and a grouped layer, and a linear one, of 7, 9, 18 and 10 filters."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 7, 3, padding=1, bias=False), nn.BatchNorm2d(7), nn.ReLU()),
        nn.Conv2d(7, 7, 3, padding=1, groups=7),
        nn.Sequential(nn.Conv2d(7, 9, 1), nn.BatchNorm2d(9), nn.ReLU()),
        nn.Sequential(nn.Conv2d(9, 18, 3, stride=2, groups=3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        nn.Linear(18, 10),
    )


CONV_GROUPS = {"0.0": 1, "1": 7, "2.0": 1, "3.0": 3, "4": 1}
MIXED = {
    "0.0": Choice(BlockPunched(4, 2), 2),
    "1": Choice(Filter(), 1.5),
    "2.0": Choice(Block(3, 4), 3),
    "3.0": Choice(Pattern(4), 4),
    "4": Choice(Block(4, 4), 2),
}
HAND_SET = dict(epochs=2, retrain_epochs=2)
OPTIONS = {
    "magnitude": HAND_SET,
    "admm": HAND_SET,
    "patdnn": HAND_SET,
    "group_lasso": HAND_SET | {"lam": 1.5},
    "reweighted": HAND_SET | {"lam": 0.6},
}


def run(algorithm, data, mapping=MIXED, model=None, **options):
    """(the pruned model, its masks); warnings about bounds are no matter here."""
    model = build() if model is None else model
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The penalty left layers")
        options = OPTIONS[algorithm] | {"data": data, "device": "cpu", "test_every": 0, "progress": False} | options
        return model, prune(model, mapping, algorithm, **options)


def weight_of(model, layer):
    return model.get_parameter(f"{layer}.weight").detach()


def assert_pruned(model, masks):
    for layer, mask in masks.items():
        assert mask.dtype == torch.bool and mask.any()
        assert not weight_of(model, layer)[~mask].any(), layer
        assert_legal(masks.choices[layer].scheme, mask.numpy(), masks.groups[layer])


def same(one, other):
    """Whether two (model, masks) are identical, to the last bit."""
    states, masks = [model.state_dict() for model, _ in (one, other)], (one[1], other[1])
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert list(masks[0]) == list(masks[1]) and all(torch.equal(masks[0][k], masks[1][k]) for k in masks[0])
    shown = [m.history.drop(columns="images_per_s") for m in masks]
    assert shown[0].equals(shown[1])


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_scheme_with_every_algorithm(algorithm, scheme, data):
    model = build()
    shapes = {layer: tuple(weight_of(model, layer).shape) for layer in CONV_GROUPS}
    mapping = {layer: Choice(scheme, 3) for layer, shape in shapes.items() if not scheme.refuses(shape)}
    refused = set(shapes) - set(mapping)
    assert len(mapping) >= 2
    before = copy.deepcopy(model.state_dict())
    for layer in refused:
        with pytest.raises(ValueError, match=f"Layer {layer!r}.*{scheme.name}"):
            run(algorithm, data, {layer: Choice(scheme, 3)}, model)
    if algorithm == "patdnn" and scheme.name != "pattern":
        with pytest.raises(ValueError, match=f"pattern for every layer.*{scheme.name}"):
            run(algorithm, data, mapping, model)
        assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
        return
    if algorithm in ("group_lasso", "reweighted"):
        _, masks = run(algorithm, data, mapping, model, target_rate=3.0, lam=None, trials=1, retrain_epochs=1)
        total, kept = (sum(int(m) for m in masks.summary()[name]) for name in ("total", "kept"))
        step = max(largest(scheme, shapes[layer], CONV_GROUPS[layer]) for layer in mapping)
        assert abs(kept - total / 3) <= step
        assert set(masks.energies) == set(mapping)
    else:
        _, masks = run(algorithm, data, mapping, model, epochs=1, retrain_epochs=1)
        for row in masks.summary().itertuples():
            assert row.nominal_rate == 3
            assert abs(row.kept - row.total / 3) <= largest(scheme, shapes[row.layer], CONV_GROUPS[row.layer])
    assert list(masks) == list(masks.choices) == list(masks.groups) == list(mapping)
    assert masks.groups == {layer: CONV_GROUPS[layer] for layer in mapping}
    assert_pruned(model, masks)
    untouched = {f"{layer}.weight" for layer in refused}
    assert all(value.all() for name, value in model.state_dict().items() if name in untouched)


@pytest.mark.parametrize("algorithm", TRAINED)
def test_the_same_seed_gives_the_same_and_history_has_every_epoch(algorithm, data):
    random = torch.get_rng_state()
    first, again, other = (run(algorithm, data, seed=seed) for seed in (3, 3, 4))
    same(first, again)
    assert not torch.equal(weight_of(first[0], "4"), weight_of(other[0], "4"))
    assert_pruned(*first)
    history = first[1].history
    assert list(history.phase) == ["penalty"] * 2 + ["retrain"] * 2 and list(history.epoch) == [1, 2, 1, 2]
    assert torch.equal(random, torch.get_rng_state())
    assert first[1].choices["3.0"].scheme.patterns


@pytest.mark.parametrize("algorithm", [*TRAINED, "search"])
def test_a_killed_call_goes_on_to_the_same_result(algorithm, data, tmp_path):
    options = {}
    if algorithm == "search":  # two trials at least: the first lambda is far too small
        algorithm, options = "reweighted", {"lam": 0.01, "target_rate": 4.0, "trials": 2}
    start, steps = build(), len(data.train)
    whole = run(algorithm, data, model=copy.deepcopy(start), **options)
    assert whole[1].history.phase.nunique() == (3 if options else 2)
    phases = steps * 2 * (whole[1].history.phase.nunique() - 1)
    #       in the first epoch, in the second, between phases, in the retrain's second epoch, refreshing batch norm
    kills = (1, steps + 2, phases, phases + steps + 1, phases + 2 * steps)
    kills += (2 * steps, 3 * steps + 1) if options else ()
    for kill in kills:
        batches = itertools.count()

        def seen(batches=batches, kill=kill):
            if next(batches) == kill:
                raise KeyboardInterrupt

        folder = tmp_path / str(kill)
        broken = replace(data, train=Stream(data.train, seen))
        with pytest.raises(KeyboardInterrupt):
            run(algorithm, broken, model=copy.deepcopy(start), checkpoint=folder, **options)
        same(run(algorithm, data, model=copy.deepcopy(start), checkpoint=folder, **options), whole)
    same(run(algorithm, data, model=copy.deepcopy(start), checkpoint=folder, **options), whole)


@pytest.mark.parametrize(
    ("algorithm", "options", "changed"),
    [
        ("reweighted", {"lam": 0.3}, "lam"),
        ("reweighted", {"eps": 0.1}, "eps"),
        ("group_lasso", {"tau": 0.1}, "tau"),
        ("admm", {"rho": 3.0}, "rho"),
        ("magnitude", {"scope": "global"}, "scope"),
        ("admm", {"mapping": MIXED | {"4": Choice(Block(4, 4), 5)}}, "'4'"),
        ("magnitude", {"epochs": 0, "mapping": MIXED | {"4": Choice(Block(4, 4), 5)}}, "'4'"),
    ],
)
def test_a_checkpoint_of_other_settings_is_refused(algorithm, options, changed, data, tmp_path):
    first = {"checkpoint": tmp_path} | ({"epochs": 0} if "epochs" in options else {})
    run(algorithm, data, **first)
    model = build()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=f"Expected a checkpoint.*{changed}"):
        run(algorithm, data, model=model, checkpoint=tmp_path, **options)
    if "epochs" not in options:  # there, only the retrain finds out
        assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_log_for_each_phase(data, tmp_path):
    run("admm", data, log=tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["penalty.csv", "retrain.csv"]


@pytest.mark.parametrize("algorithm", TRAINED)
def test_zeros_stay_zero_in_the_retrain_and_batch_norm_is_refreshed(algorithm, data):
    model, zeros, images = build(), [], []

    def seen():
        zeros.append({layer: weight_of(model, layer) == 0 for layer in MIXED})

    watched = replace(data, train=Stream(data.train, seen))
    _, masks = run(algorithm, watched, model=model, momentum=0.9, weight_decay=0.1)
    steps = len(data.train)
    assert len(zeros) == 5 * steps  # two epochs and two, and one that refreshes batch norm
    for found in zeros[2 * steps :]:
        assert all(torch.equal(found[layer], ~mask) for layer, mask in masks.items())
    with torch.random.fork_rng():
        torch.manual_seed(0)
        images = [batch for batch, _ in data.train]
    stem, norm = model[0][0], model[0][1]
    with torch.no_grad():
        means, variances = zip(*((y.mean((0, 2, 3)), y.var((0, 2, 3))) for y in map(stem, images)), strict=True)
    torch.testing.assert_close(norm.running_mean, torch.stack(means).mean(0))
    torch.testing.assert_close(norm.running_var, torch.stack(variances).mean(0))


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_gradual_rates_follow_the_cubic_schedule(scope, data):
    mapping = {"2.0": Choice(Unstructured(), 4), "3.0": Choice(Unstructured(), 4)}
    _, masks = run("magnitude", data, mapping, epochs=4, scope=scope)
    total = sum(mask.numel() for mask in masks.values())
    rising = masks.history[masks.history.phase == "penalty"].rate
    for done, rate in enumerate(rising, start=1):
        share = 1 / 4 + (1 - 1 / 4) * (1 - done / 4) ** 3
        assert abs(total / rate - total * share) <= len(mapping)
    assert masks.rate == rising.iloc[-1] == pytest.approx(4, rel=0.02)


def test_gradual_zeros_are_held_between_epochs_and_patterns_do_not_warn(data, recwarn):
    model = build()
    found = targets(model, {"3.0": Choice(Pattern(4), 4), "4": Choice(Unstructured(), 2)})
    hook = Gradual(model, found, lambda now, at: by_layer(now))
    hook.epoch(1, 4)
    with torch.no_grad():
        model[4].weight.add_(1.0)
    hook.step(0.1)
    assert int((weight_of(model, "4") == 0).sum()) == 90
    run("magnitude", data, {"3.0": Choice(Pattern(4), 4)})
    assert not [warning for warning in recwarn if "least" in str(warning.message)]


def test_admm_reaches_its_projection_before_it_is_cut(data):
    _, masks = run("admm", data, epochs=6, retrain_epochs=1)
    penalty = masks.history[masks.history.phase == "penalty"]
    residuals = list(penalty.primal_residual)
    assert residuals[-1] < 0.01 < 0.1 < residuals[0] and residuals[-1] == min(residuals)
    assert list(penalty.rho) == sorted(penalty.rho) and penalty.rho.iloc[-1] == pytest.approx(12 / (0.02 * 4))


@pytest.mark.parametrize(("algorithm", "low", "high"), [("reweighted", 0.15, 1.2), ("group_lasso", 0.7, 2.5)])
def test_lambda_alone_sets_rates_per_layer_and_per_block(algorithm, low, high, data):
    mapping = {layer: Choice(BlockPunched(4, 2), 2) for layer in ("0.0", "2.0", "3.0")}
    mapping["4"] = Choice(Block(4, 4), 2)
    rates = []
    for lam in (low, high):
        _, masks = run(algorithm, data, mapping, lam=lam, epochs=3)
        _, again = run(algorithm, data, {k: Choice(c.scheme, 9) for k, c in mapping.items()}, lam=lam, epochs=3)
        assert all(torch.equal(masks[layer], again[layer]) for layer in mapping)  # the mapping's rates are ignored
        rates.append(masks.rate)
        table = masks.summary()
        assert (table.rate == table.nominal_rate).all()
        assert list(masks.tau_rates) == [0.01 / 3, 0.01, 0.03]
        assert list(masks.tau_rates.values()) == sorted(masks.tau_rates.values())
        assert masks.tau_rates[0.01] == masks.rate == masks.history.rate.dropna().iloc[-1]
        assert list(masks.history.lam.dropna()) == [lam] * 3
        for layer, energies in masks.energies.items():
            groups = families(mapping[layer].scheme, masks[layer].shape, CONV_GROUPS[layer])
            assert energies.shape == (sum(len(family) for family in groups),)
    assert 1 < rates[0] < rates[1]
    assert table.rate.nunique() >= 3
    blocks = masks.summary(per_block=True)
    assert blocks.groupby("layer").rate.nunique().max() >= 3


@pytest.mark.parametrize("algorithm", ["reweighted", "group_lasso"])
def test_target_rate_is_met_and_its_cost_counted(algorithm, data):
    model = build()
    _, masks = run(algorithm, data, model=model, lam=0.01, target_rate=5.0, trials=3)
    total = sum(mask.numel() for mask in masks.values())
    step = max(largest(MIXED[layer].scheme, tuple(mask.shape), CONV_GROUPS[layer]) for layer, mask in masks.items())
    assert abs(total / masks.rate - total / 5) <= step
    assert_pruned(model, masks)
    trials = masks.history[masks.history.phase != "retrain"]
    tried = trials.groupby("phase").agg(lam=("lam", "first"), rate=("rate", "last"), epochs=("epoch", "count"))
    assert 2 <= len(tried) <= 3 and (tried.epochs == 2).all() and len(masks.history) == 2 * len(tried) + 2
    assert tried.lam["trial 1"] == 0.01 < tried.lam["trial 2"]
    apart = (np.log(tried.rate) - np.log(5)).abs()
    assert trials.phase.iloc[-1] == apart.idxmin()  # the history ends with the chosen one
    assert masks.tau_rates[0.01] == trials.rate.iloc[-1]
    if len(tried) < 3:
        assert apart.min() < np.log(1.1)


def test_a_search_ends_with_the_nearest_trial(data):
    options = dict(lr=0.02, test_every=0, progress=False)

    def search(*lams):
        model, lams = build(), iter(lams)
        scales, found = Penalty(model, targets(model, MIXED)).scales, targets(model, MIXED)

        def make(_):
            return Reweighted(model, found, next(lams), 0.01, eps=0.01, form="relative", interval=4)

        hook, histories = _search(model, make, 0.3, 6.0, data, 2, 2, options)
        assert hook.scales == scales and next(lams, None) is None
        return model, hook, histories

    model, hook, histories = search(1.0, 100.0, 1.0)  # the second one is far away
    other, other_hook, others = search(100.0, 1.0, 1.0)
    assert [history.phase[0] for history in histories] == ["trial 2", "trial 1"]
    assert [history.phase[0] for history in others] == ["trial 1", "trial 2"]
    assert hook.masks().rate == histories[-1].rate.iloc[-1] == others[-1].rate.iloc[-1] == other_hook.masks().rate
    assert all(torch.equal(weight_of(model, layer), weight_of(other, layer)) for layer in MIXED)


def test_the_literal_form_trains_or_says_that_it_diverges(data):
    model, masks = run("reweighted", data, form="literal", lam=1e-5, eps=0.1)
    assert_pruned(model, masks)
    with pytest.raises(FloatingPointError, match="finite loss"):
        run("reweighted", data, form="literal", lam=100.0, eps=1e-3)


def test_alpha_is_updated_as_often_as_wanted(data):
    one, four = (run("reweighted", data, updates=updates) for updates in (1, 4))
    assert not torch.equal(weight_of(one[0], "0.0"), weight_of(four[0], "0.0"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("algorithm", TRAINED)
def test_a_model_of_the_cpu_trains_on_the_gpu_and_comes_back(algorithm, data):
    model, masks = run(algorithm, data, device=None)
    assert {value.device.type for value in [*model.state_dict().values(), *masks.values()]} == {"cpu"}
    assert_pruned(model, masks)


# Bounds, empty mappings, what is refused.


@pytest.mark.parametrize("algorithm", ["reweighted", "group_lasso"])
@pytest.mark.parametrize(("lam", "bound"), [(1e-9, BOUND[0]), (1e5, BOUND[1])])
def test_layers_at_the_bounds_are_reported(algorithm, lam, bound, data):
    mapping = {"0.0": MIXED["0.0"], "1": MIXED["1"], "4": MIXED["4"]}
    options = OPTIONS[algorithm] | {"lam": lam, "data": data, "device": "cpu", "progress": False, "tau": 1e-6}
    with pytest.warns(UserWarning, match=f"0.0: {bound}; 1: {bound}; 4: {bound}") as caught:
        masks = prune(build(), mapping, algorithm, **options)
    assert len([warning for warning in caught if "The penalty left" in str(warning.message)]) == 1
    assert list(masks.summary().bound) == [bound] * 3
    assert "bound" not in masks.summary(per_block=True)


@pytest.mark.parametrize(
    ("scheme", "shape", "kept", "bound"),
    [
        (Unstructured(), (3, 3), [(0, 0)], BOUND[1]),
        (Unstructured(), (3, 3), [(0, 0), (0, 1)], ""),
        (Filter(), (7, 2, 3, 3), [2], BOUND[1]),
        (Filter(), (7, 2, 3, 3), [2, 5], ""),
        (Channel(), (7, 2, 1, 1), [(slice(None), 1)], BOUND[1]),
        (BlockPunched(4, 2), (7, 2, 1, 1), [slice(0, 4)], BOUND[1]),  # more than half of the weights
        (BlockPunched(4, 2), (9, 2, 1, 1), [slice(0, 8)], ""),
        (Block(4, 2), (9, 7), [(slice(0, 4), 1)], BOUND[1]),  # a column segment
        (Block(4, 2), (9, 7), [(8, slice(4, 6))], BOUND[1]),  # a row segment
        (Block(4, 2), (9, 7), [(slice(0, 2), slice(0, 2))], ""),
        (Pattern(1, (15,)), (2, 2, 3, 3), [(0, 0, 0), (0, 0, 1, 0)], BOUND[1]),
        (Block(4, 2), (9, 7), [slice(None)], BOUND[0]),
        (Filter(), (1, 7), [slice(None)], BOUND[0]),  # its only group is kept
        (Filter(), (2, 7), [], ""),
    ],
)
def test_bounds_of_masks(scheme, shape, kept, bound):
    mask = np.zeros(shape, bool)
    for place in kept:
        mask[place] = True
    masks = Masks({"layer": mask}, {"layer": Choice(scheme, 2)}, {"layer": 1})
    assert list(masks.summary().bound) == [bound] and masks.bounds() == ({"layer": bound} if bound else {})


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("options", [{}, {"target_rate": 3.0}], ids=["", "search"])
def test_an_empty_mapping_trains_and_prunes_nothing(algorithm, options, data):
    if options and algorithm not in ("reweighted", "group_lasso"):
        options = {"seed": 1}
    model = build()
    before = weight_of(model, "4").clone()
    _, masks = run(algorithm, data, {}, model, **options)
    assert masks == {} and masks.rate == 1.0 and len(masks.history) == 4 and masks.summary().empty
    assert not torch.equal(before, weight_of(model, "4"))
    assert prune(nn.ReLU(), {}) == {}


REFUSED = [
    *[(name, {"data": None}, ValueError, "Expected data=.*Got None") for name in OPTIONS],
    *[(name, {"epochs": -1}, ValueError, "epochs.*Got -1") for name in OPTIONS],
    *[(name, {"retrain_epochs": -1}, ValueError, "retrain_epochs.*-1") for name in OPTIONS],
    *[(name, {"retrain_epochs": 1.5}, ValueError, "retrain_epochs.*1.5") for name in OPTIONS],
    *[(name, {"lr": 0.0}, ValueError, "lr > 0.*0.0") for name in OPTIONS],
    *[(name, {"retrain": 3}, TypeError, "retrain") for name in OPTIONS],
    *[(name, {"schedule": "steps"}, ValueError, "schedule.*'steps'") for name in OPTIONS],
    ("magnitude", {"epochs": 0, "retrain_epochs": 0, "epoch": 3}, TypeError, "'epoch'"),
    ("magnitude", {"scope": "global", "rate": 0.5}, ValueError, "rate.*0.5"),
    ("magnitude", {"scope": "block"}, ValueError, "scope.*'block'"),
    ("magnitude", {"lam": 1.0}, TypeError, "lam"),
    ("admm", {"target_rate": 3.0}, TypeError, "target_rate"),
    ("admm", {"rho": 0.0}, ValueError, "rho > 0.*0.0"),
    ("admm", {"growth": 0.5}, ValueError, "growth >= 1.*0.5"),
    ("admm", {"rho": 2.0, "data": None}, ValueError, "Expected data="),
    ("reweighted", {"form": "printed"}, ValueError, "relative, literal.*'printed'"),
    ("reweighted", {"eps": 0.0}, ValueError, "eps > 0.*0.0"),
    ("reweighted", {"updates": 0}, ValueError, "updates in 1..4.*0"),
    ("reweighted", {"updates": 5}, ValueError, "updates in 1..4.*5"),
    *[
        (name, options, ValueError, match)
        for name in ("reweighted", "group_lasso")
        for options, match in [
            ({"lam": None}, "lam > 0, or target_rate.*None and None"),
            ({"lam": 0.0}, "lam > 0.*0.0"),
            ({"lam": float("nan")}, "lam > 0.*nan"),
            ({"lam": float("inf")}, "lam > 0.*inf"),
            ({"tau": 0.0}, "tau > 0.*0.0"),
            ({"target_rate": 1.0}, "target_rate > 1.*1.0"),
            ({"target_rate": 0.0}, "target_rate > 1.*0.0"),
            ({"target_rate": 2.0, "trials": 0}, "trials >= 1.*0"),
            ({"epochs": 0}, "epochs, trials >= 1.*0"),
        ]
    ],
]


@pytest.mark.parametrize(("algorithm", "options", "error", "match"), REFUSED)
def test_bad_arguments_are_named_and_leave_the_model_alone(algorithm, options, error, match, data):
    model = build()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=match):
        run(algorithm, mapping={"3.0": MIXED["3.0"]}, model=model, **{"data": data} | options)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_an_unknown_algorithm_lists_the_known_ones(data):
    with pytest.raises(KeyError, match=f"{', '.join(ALGORITHMS)}.*'lottery'"):
        prune(build(), MIXED, "lottery", data=data)
