"""Pruning: masks in place, kept through training, saved and read elsewhere; errors name the layer."""

import copy
import gc
import json

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from nbs_lib.pruning import Masks, load_pruned, prune, save_pruned
from nbs_lib.schemes import Block, BlockPunched, Channel, Choice, Filter, Pattern, Unstructured, reached


class Net(nn.Module):
    """A module, a grouped convolution, a parameter used without a module, a linear layer."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 14, 3, groups=2), nn.ReLU())
        self.kernel = nn.Parameter(torch.randn(7, 14, 1, 1))
        self.head = nn.Linear(7, 5)

    def forward(self, x):
        x = nn.functional.conv2d(self.features(x), self.kernel)
        return self.head(x.mean((2, 3)))


MAPPING = {
    "features.0": Choice(BlockPunched(4, 2), 3),
    "features.2": Choice(Pattern(4), 4),
    "kernel": Choice(Block(3, 4), 2),
    "head": Choice(Unstructured(), 5),
}


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net()


def weights(model):
    return {name: dict(model.named_parameters())[name if name == "kernel" else f"{name}.weight"] for name in MAPPING}


def assert_pruned(model, masks):
    for name, weight in weights(model).items():
        assert not weight[~masks[name]].any(), name


def train(model, optimizer, steps=3):
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(4, 3, 8, 8)).square().sum().backward()
        optimizer.step()


def test_prune_zeroes_in_place_what_the_projection_says(net):
    before = {name: weight.detach().clone() for name, weight in weights(net).items()}
    state, keys = weights(net), list(net.state_dict())
    masks = prune(net, MAPPING)
    assert isinstance(masks, Masks) and list(masks) == list(MAPPING)
    fitted = Pattern(4).fit([before["features.2"].numpy()])
    for name, choice in MAPPING.items():
        scheme = fitted if name == "features.2" else choice.scheme
        expected = scheme.project(before[name].numpy(), choice.rate, 2 if name == "features.2" else 1)
        assert masks[name].dtype == torch.bool
        np.testing.assert_array_equal(masks[name].numpy(), expected)
        assert weights(net)[name] is state[name]
        torch.testing.assert_close(state[name].detach(), before[name] * masks[name], rtol=0, atol=0)
    assert list(net.state_dict()) == keys and masks.choices["features.2"] == Choice(fitted, 4)


def test_summary(net):
    masks = prune(net, MAPPING)
    table = masks.summary()
    assert list(table.columns) == ["layer", "scheme", "rate", "kept", "total", "nominal_rate", "bound"]
    for row in table.itertuples():
        assert row.rate == reached(masks[row.layer].numpy()) == row.total / row.kept
        assert (row.scheme, row.nominal_rate) == (str(MAPPING[row.layer].scheme), MAPPING[row.layer].rate)
    blocks = masks.summary(per_block=True)
    per_layer = blocks.groupby("layer", sort=False)
    assert per_layer["block"].count().to_dict() == {"features.0": 2 * 2, "features.2": 1, "kernel": 3 * 4, "head": 1}
    assert per_layer[["kept", "total"]].sum().to_numpy().tolist() == table[["kept", "total"]].to_numpy().tolist()
    assert Masks({}, {}, {}).summary().empty


def test_patterns_are_fitted_once_over_all_layers():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3))
    arrays = [module.weight.detach().numpy().copy() for module in model]
    own = Pattern(2, (15, 23))
    masks = prune(model, {"0": Choice(Pattern(6), 3), "1": Choice(own, 3), "2": Choice(Pattern(6), 5)})
    fitted = Pattern(6).fit([arrays[0], arrays[2]])
    assert [choice.scheme for choice in masks.choices.values()] == [fitted, own, fitted]
    assert [choice.rate for choice in masks.choices.values()] == [3, 3, 5]


def test_global_scope_is_one_threshold(net):
    with torch.no_grad():
        net.head.weight *= 100
        net.features[0].weight *= 0.01
    mapping = {name: Choice(Filter() if name == "kernel" else Unstructured(), 4) for name in MAPPING}
    arrays = {name: weight.detach().numpy().copy() for name, weight in weights(net).items()}
    masks = prune(net, mapping, scope="global")
    total, kept = (masks.summary()[column].sum() for column in ("total", "kept"))
    assert abs(kept - total / 4) <= 14  # a filter of "kernel" is the largest unit
    assert masks["head"].all() and masks["features.0"].sum() == 1  # the strongest group of a layer stays
    kept_energy, gone_energy = [], []
    for name, array in arrays.items():
        ids = mapping[name].scheme.groups(array.shape)
        energy = np.bincount(ids.ravel(), array.ravel().astype(float) ** 2) / np.bincount(ids.ravel())
        alive = np.bincount(ids.ravel(), masks[name].numpy().ravel()) > 0
        if name != "features.0":
            kept_energy += energy[alive].tolist()
        gone_energy += energy[~alive].tolist()
    assert min(kept_energy) >= max(gone_energy)
    for name, choice in masks.choices.items():
        assert choice.rate == pytest.approx(reached(masks[name].numpy()))


@pytest.mark.parametrize("rate", [None, 2.5, 8])
def test_global_scope_respects_every_scheme(net, rate):
    masks = prune(net, MAPPING, scope="global", rate=rate)
    total = sum(mask.numel() for mask in masks.values())
    wanted = total / rate if rate else sum(masks[name].numel() / choice.rate for name, choice in MAPPING.items())
    assert abs(sum(int(mask.sum()) for mask in masks.values()) - wanted) <= 8
    assert set(masks["features.2"].sum((2, 3)).unique().tolist()) <= {0, 4}
    for i in range(0, 7, 3):
        for j in range(0, 14, 4):
            part = masks["kernel"][i : i + 3, j : j + 4, 0, 0].numpy()
            np.testing.assert_array_equal(part, np.outer(part.any(1), part.any(0)))
    assert_pruned(net, masks)


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.1, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_hold_keeps_zeros_through_training(net, optimizer):
    optimizer = OPTIMIZERS[optimizer](net.parameters())
    train(net, optimizer)  # momentum from before the pruning
    masks = prune(net, MAPPING)
    before, keys = copy.deepcopy(net.state_dict()), list(net.state_dict())
    handle = masks.hold(net)
    train(net, optimizer)
    assert_pruned(net, masks)
    assert list(net.state_dict()) == keys
    assert not torch.equal(before["head.weight"], net.head.weight)  # it did train
    handle.remove()
    train(net, optimizer)
    assert any(weight[~masks[name]].any() for name, weight in weights(net).items())


def test_hold_as_a_context_manager(net):
    masks = prune(net, MAPPING)
    optimizer = OPTIMIZERS["sgd"](net.parameters())
    with masks.hold(net):
        train(net, optimizer)
        assert_pruned(net, masks)
    train(net, optimizer)
    with pytest.raises(ValueError, match="hold"):
        save_pruned("nowhere", net, masks)
    masks.hold(net)  # applies at once
    assert_pruned(net, masks)


def test_hold_ends_with_the_model():
    model = Net()
    handle = prune(model, MAPPING).hold(model)
    assert handle.id in handle.hooks_dict_ref()
    del model
    gc.collect()
    assert handle.id not in handle.hooks_dict_ref()


def test_masks_and_weights_load_elsewhere(net, tmp_path):
    masks = prune(net, MAPPING)
    save_pruned(tmp_path / "pruned", net, masks)
    assert sorted(path.name for path in (tmp_path / "pruned").iterdir()) == [
        "masks.json", "masks.safetensors", "model.safetensors",
    ]  # fmt: skip
    elsewhere = Net()
    elsewhere.load_state_dict(safetensors.torch.load_file(tmp_path / "pruned" / "model.safetensors"))
    assert_pruned(elsewhere, masks)
    again = Net()
    loaded = load_pruned(tmp_path / "pruned", again)
    for name, weight in net.state_dict().items():
        assert torch.equal(again.state_dict()[name], weight)
    assert list(loaded) == list(masks) and all(torch.equal(loaded[name], masks[name]) for name in masks)
    assert (loaded.choices, loaded.groups) == (masks.choices, masks.groups)
    assert loaded.summary(per_block=True).equals(masks.summary(per_block=True))


def test_tied_weights_save(tmp_path):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    save_pruned(tmp_path, model, prune(model, {"0": Choice(Block(2, 2), 2)}))
    assert set(safetensors.torch.load_file(tmp_path / "model.safetensors")) == set(model.state_dict())


@pytest.mark.parametrize("name", ["masks.safetensors", "masks.json"])
@pytest.mark.parametrize("damage", [b"", b"{", b'{"head": {}}', b"\xff" * 50])
def test_damaged_masks_are_named(net, tmp_path, name, damage):
    prune(net, MAPPING).save(tmp_path)
    (tmp_path / name).write_bytes(damage)
    with pytest.raises(ValueError, match=str(tmp_path)):
        Masks.load(tmp_path)


def test_masks_that_do_not_match_their_json_are_refused(net, tmp_path):
    prune(net, MAPPING).save(tmp_path)
    facts = json.loads((tmp_path / "masks.json").read_text())
    facts["head"]["kept"] += 1
    (tmp_path / "masks.json").write_text(json.dumps(facts))
    with pytest.raises(ValueError, match="other masks"):
        Masks.load(tmp_path)


def test_a_model_that_is_one_layer():
    model = nn.Linear(8, 8)
    assert reached(prune(model, {"": Choice(Filter(), 4)})[""].numpy()) == 4
    assert reached(prune(nn.Linear(8, 8), {"weight": Choice(Channel(), 4)})["weight"].numpy()) == 4


def test_convolution_groups_come_from_the_mapping_where_no_module_has_them(net):
    class Traced(dict):
        layers = [{"layer": "kernel", "groups": 7}]

    masks = prune(net, Traced(kernel=Choice(BlockPunched(4, 14), 2)))
    assert masks.groups == {"kernel": 7}  # blocks of one filter: they stop at their convolution group
    assert set(masks["kernel"].sum((1, 2, 3)).tolist()) == {0, 14}


def test_other_precisions(net):
    for dtype in (torch.bfloat16, torch.float64):
        model = copy.deepcopy(net).to(dtype)
        assert_pruned(model, prune(model, MAPPING))
        assert model.head.weight.dtype == dtype


@pytest.mark.parametrize(
    ("mapping", "error", "match"),
    [
        ({"features.9": Choice(Filter(), 2)}, KeyError, "features.0.*Got 'features.9'"),
        ({"features.3": Choice(Filter(), 2)}, KeyError, "Got 'features.3'"),  # no weight
        ({"features.1": Choice(Filter(), 2)}, ValueError, r"'features.1'.*\(8,\)"),  # batch norm
        ({"head": Choice(Pattern(8), 3)}, ValueError, "'head'.*3x3"),
        ({"features.0": Choice(Block(8, 4), 3)}, ValueError, "'features.0'.*block_punched"),
        ({"head": Filter()}, TypeError, "'head'"),
    ],
)
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_errors_name_the_layer_and_leave_the_model_alone(net, mapping, error, match, scope):
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(error, match=match):
        prune(net, {"kernel": Choice(Filter(), 2)} | mapping, scope=scope)
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())


def test_more_errors(net):
    with pytest.raises(KeyError, match="magnitude"):
        prune(net, MAPPING, algorithm="lottery")
    for options in ({"scope": "block"}, {"scope": "layer", "rate": 3}, {"scope": "global", "rate": 0.5}):
        with pytest.raises(ValueError, match="Expected"):
            prune(net, MAPPING, **options)
    with torch.no_grad():
        net.head.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="'head'.*finite"):
        prune(net, MAPPING)
    nn.utils.parametrizations.weight_norm(net.head)
    with pytest.raises(KeyError, match="plain weight"):
        prune(net, MAPPING)


def test_masks_of_another_model_are_refused(net):
    masks = prune(net, MAPPING)
    other = Net()
    other.head = nn.Linear(7, 6)
    before = other.features[0].weight.detach().clone()
    with pytest.raises(ValueError, match="'head' of shape"):
        masks.apply(other)
    assert torch.equal(before, other.features[0].weight)


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_an_empty_mapping_prunes_nothing(net, scope):
    before = copy.deepcopy(net.state_dict())
    assert prune(net, {}, scope=scope) == {}
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
