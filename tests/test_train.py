"""Training: against plain loops; a killed, interrupted or broken run goes on to the very same weights."""

import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from nbs_lib import train as module
from nbs_lib.data import Batches, Data, load_data
from nbs_lib.train import Hook, evaluate, fit, refresh_batch_norm

COLUMNS = ["epoch", "lr", "loss", "train_accuracy", "test_accuracy", "images_per_s"]


def net(seed=0, width=6):
    torch.manual_seed(seed)
    layers = [nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()]
    return nn.Sequential(*layers, nn.Dropout(0.1), nn.Linear(16 * width, 10))


def digits(count=70, batch_size=20):
    """Four batches: three of 20 and one of 10, shuffled and shifted."""
    data = load_data(size=8, batch_size=batch_size, device="cpu").subset(count)
    test = Batches(data.test.images[:50], data.test.labels[:50], batch_size=17)
    return Data(data.name, data.train, test, data.classes)


@pytest.fixture(scope="module")
def small():
    return digits()


def run(model, data, epochs=3, **options):
    """`fit`, the same on every machine."""
    fixed = {"device": "cpu", "lr": 0.05, "progress": False, "mixed": False, "channels_last": False}
    return fit(model, data, epochs, **fixed | options)


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same(one, two):
    assert list(one) == list(two)
    for name in one:
        assert torch.equal(one[name], two[name]), name


def assert_same_history(one, two):
    drop = dict(columns="images_per_s")
    pd.testing.assert_frame_equal(one.drop(**drop), two.drop(**drop), check_exact=True)


class Pull(Hook):
    """A hook with a state that matters: pulls the weights to their running mean, ever more."""

    def __init__(self, model):
        self.weight = model[0].weight
        self.mean, self.strength = self.weight.detach().clone(), 0.01

    def penalty(self):
        return self.strength * (self.weight - self.mean).square().sum()

    def step(self, lr):
        self.mean = 0.9 * self.mean + 0.1 * self.weight.detach()

    def epoch(self, done, epochs):
        self.strength *= 1.5
        return {"strength": np.float64(self.strength), "norm": self.mean.norm()}

    def state_dict(self):
        return {"mean": self.mean, "strength": self.strength}

    def load_state_dict(self, state):
        self.mean, self.strength = state["mean"].clone(), state["strength"]


# --- learning ---


def test_digits_are_learnt():
    data, model = load_data(size=8, batch_size=64, device="cpu"), net(width=12)
    history = run(model, data, 4, lr=0.1)
    assert list(history) == COLUMNS and history.epoch.tolist() == [1, 2, 3, 4]
    assert history.loss.is_monotonic_decreasing and (history.images_per_s > 0).all()
    assert history.test_accuracy.iloc[-1] > 0.9 and history.train_accuracy.iloc[-1] > 0.75
    assert history.test_accuracy.iloc[-1] == evaluate(model, data, progress=False)


def test_seeds(small):
    before = torch.random.get_rng_state()
    one, two, other = net(), net(), net()
    torch.random.set_rng_state(before)
    histories = [run(one, small, seed=5), run(two, small, seed=5), run(other, small, seed=6)]
    assert torch.equal(torch.random.get_rng_state(), before)  # the caller's dice are left alone
    assert_same(state(one), state(two))
    assert_same_history(*histories[:2])
    assert not torch.equal(one[0].weight, other[0].weight)


def test_history_of_no_epochs_and_rare_tests(small):
    model = net()
    before = state(model)
    assert run(model, small, 0).empty and run(model, small, 0, average=0.9).empty
    assert_same(state(model), before)
    assert run(net(), small, 3, test_every=2).test_accuracy.isna().tolist() == [True, False, False]
    assert run(net(), small, 2, test_every=0).test_accuracy.isna().all()


@pytest.mark.parametrize(
    "wrong",
    [dict(schedule="step"), dict(epochs=-1), dict(lr=0), dict(lr=float("nan")), dict(average=1), dict(average=-0.1)],
)
def test_wrong_arguments_are_named(small, wrong):
    with pytest.raises(
        ValueError, match="Expected a schedule out of cosine, one_cycle, constant, epochs >= 0, lr > 0 and"
    ):
        run(net(), small, **wrong)


# --- against plain loops ---


def rate(schedule, lr, step, steps):
    """The learning rate of step `step` (from 0) out of `steps`."""
    if schedule == "constant":
        return lr
    if schedule == "cosine":
        return lr * (1 + math.cos(math.pi * step / steps)) / 2
    top = 0.3 * (steps + 1) - 1  # up over 30 % of the steps, then down to almost nothing
    first, last = lr / 25, lr / 25e4
    begin, end, share = (first, lr, step / top) if step <= top else (lr, last, (step - top) / (steps - top))
    return end + (begin - end) * (1 + math.cos(math.pi * share)) / 2


@pytest.mark.parametrize("schedule", module.SCHEDULES)
@pytest.mark.parametrize("epochs, batches", [(1, 1), (2, 3), (7, 5)])
def test_learning_rates_are_the_formulas(schedule, epochs, batches):
    used = []

    class Watch(Hook):
        def step(self, lr):
            used.append(lr)

    one = (torch.randn(2, 3, 4, 4), torch.tensor([0, 1]))
    data = SimpleNamespace(train=[one] * batches, test=[one])
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 2))
    history = run(model, data, epochs, schedule=schedule, lr=0.3, hook=Watch())
    steps = epochs * batches
    assert used == pytest.approx([rate(schedule, 0.3, step, steps) for step in range(steps)], rel=1e-6, abs=1e-9)
    assert history.lr.tolist() == used[batches - 1 :: batches]


@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(momentum=0.0, schedule="constant"),
        dict(weight_decay=0.1, label_smoothing=0.2),
        dict(schedule="one_cycle", average=0.8, weight_decay=0.05, momentum=0.5),
    ],
)
def test_fit_is_the_plain_loop(options):
    torch.manual_seed(0)
    batches = [(torch.randn(n, 3, 5, 7), torch.randint(4, (n,))) for n in (5, 4, 1)]
    data, epochs = SimpleNamespace(train=batches, test=batches), 3
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.Tanh(), nn.Flatten(), nn.Linear(75, 4))
    settings = dict(lr=0.1, momentum=0.9, weight_decay=5e-4, schedule="cosine", label_smoothing=0.0, average=0.0)
    settings |= options
    weights = [p.detach().double().requires_grad_() for p in model.parameters()]
    speeds, averages, losses, right = [torch.zeros_like(w) for w in weights], None, [], []
    for step in range(epochs * len(batches)):
        x, y = batches[step % len(batches)]
        hidden = torch.conv2d(x.double(), weights[0], weights[1]).tanh().flatten(1)
        logits = hidden @ weights[2].T + weights[3]
        log_p, s = logits.log_softmax(1), settings["label_smoothing"]
        loss = -((1 - s) * log_p[torch.arange(len(y)), y] + s * log_p.mean(1)).mean()
        losses.append(float(loss.detach()) * len(y))
        right.append(int((logits.argmax(1) == y).sum()))
        lr = rate(settings["schedule"], settings["lr"], step, epochs * len(batches))
        gradients = torch.autograd.grad(loss, weights)
        with torch.no_grad():
            for weight, gradient, speed in zip(weights, gradients, speeds, strict=True):
                if weight.ndim >= 2:  # biases are not pulled to zero
                    gradient = gradient + settings["weight_decay"] * weight
                speed.mul_(settings["momentum"]).add_(gradient)
                weight -= lr * (gradient + settings["momentum"] * speed)
            now = [weight.clone() for weight in weights]
        decay = settings["average"]
        averages = [decay * a + (1 - decay) * w for a, w in zip(averages, now, strict=True)] if averages else now
    history = run(model, data, epochs, **settings)
    wanted = averages if settings["average"] else weights
    for parameter, weight in zip(model.parameters(), wanted, strict=True):
        torch.testing.assert_close(parameter.double(), weight.detach(), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(history.loss, np.reshape(losses, (epochs, -1)).sum(1) / 10, rtol=1e-5)
    assert history.train_accuracy.tolist() == (np.reshape(right, (epochs, -1)).sum(1) / 10).tolist()


def test_batch_norm_is_averaged_but_not_decayed(small):
    model = net()
    history = run(model, small, 2, average=0.7, weight_decay=0.5)
    assert history.test_accuracy.iloc[-1] == evaluate(model, small, progress=False)  # of the averaged weights
    one, two = net(), net()
    for model in (one, two):
        model[1].weight.data.fill_(2.0)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name == "1.weight")
    run(one, small, 1, weight_decay=0.5)
    run(two, small, 1, weight_decay=0.0)
    assert torch.equal(one[1].weight, two[1].weight) and not torch.equal(one[1].weight, torch.full((6,), 2.0))
    assert torch.equal(one[0].weight, net()[0].weight)  # frozen


def test_gradients_left_over_are_not_used(small):
    one, two = net(), net()
    for parameter in one.parameters():
        parameter.grad = torch.full_like(parameter, 100.0)
    run(one, small, 1)
    run(two, small, 1)
    assert_same(state(one), state(two))


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("channels_last", [False, True])
def test_mixed_precision_and_layout_leave_a_plain_model(small, mixed, channels_last):
    model, seen = net(), []

    def look(module, inputs, output):
        if module.training:
            seen.append((output.dtype, inputs[0].is_contiguous(memory_format=torch.channels_last)))

    model[0].register_forward_hook(look)
    parameters = list(model.parameters())
    history = run(model, small, 4, mixed=mixed, channels_last=channels_last)
    assert set(seen) == {(torch.bfloat16 if mixed else torch.float32, channels_last)}
    assert all(p is q for p, q in zip(model.parameters(), parameters, strict=True))
    for value in state(model).values():
        assert value.is_contiguous() and value.dtype in (torch.float32, torch.int64)
    assert history.loss.iloc[-1] < 0.9 * history.loss.iloc[0]
    assert history.test_accuracy.iloc[-1] == evaluate(model, small, progress=False)


def test_a_plain_data_loader_is_data_too():
    torch.manual_seed(0)
    pairs = TensorDataset(torch.randn(30, 3, 8, 8), torch.randint(10, (30,)))
    data = SimpleNamespace(train=DataLoader(pairs, 8, shuffle=True), test=DataLoader(pairs, 7))
    one, two = net(), net()
    assert_same_history(run(one, data), run(two, data))
    assert_same(state(one), state(two))
    refresh_batch_norm(one, data)


# --- hooks ---


def test_hook_is_called_in_order(small):
    calls = []

    class Watch(Hook):
        def penalty(self):
            calls.append("penalty")
            return 0.0

        def step(self, lr):
            calls.append(lr)

        def epoch(self, done, epochs):
            calls.append((done, epochs))
            return {"half": done / 2}

    history = run(net(), small, 2, schedule="constant", lr=0.25, hook=Watch())
    assert calls == ["penalty", 0.25] * 4 + [(1, 2)] + ["penalty", 0.25] * 4 + [(2, 2)]
    assert list(history) == [*COLUMNS, "half"] and history.half.tolist() == [0.5, 1.0]
    plain, watched = net(), net()
    run(plain, small)
    run(watched, small, hook=Watch())
    assert_same(state(plain), state(watched))


def test_penalty_is_added_to_the_loss(small):
    class L2(Hook):
        def __init__(self, model):
            self.weights = [p for p in model.parameters() if p.ndim > 1]

        def penalty(self):
            return 0.1 / 2 * sum(weight.square().sum() for weight in self.weights)

    one, two = net(), net()
    run(one, small, 2, weight_decay=0.1)
    run(two, small, 2, weight_decay=0.0, hook=L2(two))
    for name, value in state(one).items():
        torch.testing.assert_close(value, two.state_dict()[name], rtol=1e-4, atol=1e-5)


# --- interruptions ---


class Breaking:
    """`data`, but instead of batch number `at`, counted over all epochs, comes an error."""

    def __init__(self, data, at, error):
        self.data, self.left, self.error, self.train, self.test = data, at, error, self, data.test

    def __len__(self):
        return len(self.data.train)

    def __iter__(self):
        for batch in self.data.train:
            if not self.left:
                raise self.error
            self.left -= 1
            yield batch


VARIANTS = {
    "plain": dict(),
    "averaged": dict(average=0.9, schedule="one_cycle", channels_last=True),
    "mixed": dict(mixed=True, label_smoothing=0.1, schedule="constant", test_every=2),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_run_broken_anywhere_goes_on_to_the_same_result(small, tmp_path, variant):
    options, whole = VARIANTS[variant], net()
    history = run(whole, small, hook=Pull(whole), **options)
    assert list(history) == [*COLUMNS, "strength", "norm"]
    for at in (0, 1, 4, 7, 11):
        file, model = tmp_path / f"{at}.pt", net()
        with pytest.raises(SystemExit):
            run(model, Breaking(small, at, SystemExit()), hook=Pull(model), checkpoint=file, **options)
        assert file.exists() == (at >= 4)
        torch.manual_seed(at)  # nothing depends on the caller's dice, nor on the weights there are
        model = net(seed=at + 1 if file.exists() else 0)
        resumed = run(model, small, hook=Pull(model), checkpoint=file, **options)
        assert_same(state(model), state(whole))
        assert_same_history(resumed, history)
    again = net(seed=9)
    left = run(again, Breaking(small, 0, SystemExit()), hook=Pull(again), checkpoint=file, **options)
    assert_same(state(again), state(whole))  # a finished run is only read
    assert_same_history(left, history)


def test_the_same_model_goes_on_where_it_was_interrupted(small, tmp_path):
    whole, model = net(), net()
    run(whole, small)
    for at in (6, 3, 2):
        with pytest.raises(KeyboardInterrupt):
            run(model, Breaking(small, at, KeyboardInterrupt()), checkpoint=tmp_path / "run.pt")
    with pytest.raises(KeyboardInterrupt):  # between the gradients and the step
        run(model, small, checkpoint=tmp_path / "run.pt", hook=Stop("step"))
    run(model, small, checkpoint=tmp_path / "run.pt")
    assert_same(state(model), state(whole))


class Stop(Hook):
    """Interrupts in one of its methods, at its second call."""

    def __init__(self, name):
        self.calls = 0
        setattr(self, name, self.stop)

    def stop(self, *arguments):
        self.calls += 1
        if self.calls == 2:
            raise KeyboardInterrupt
        return {} if len(arguments) == 2 else 0.0


@pytest.mark.parametrize("name", ["penalty", "step", "epoch"])
def test_a_run_stopped_by_a_hook(small, tmp_path, name):
    whole, model = net(), net()
    history = run(whole, small)
    with pytest.raises(KeyboardInterrupt):
        run(model, small, hook=Stop(name), checkpoint=tmp_path / "run.pt")
    assert_same_history(run(model, small, checkpoint=tmp_path / "run.pt"), history)
    assert_same(state(model), state(whole))


def test_a_full_disk_costs_nothing_but_the_last_epoch(small, tmp_path, monkeypatch):
    whole, model, written = net(), net(), []
    history, write = run(whole, small), module.write_atomic

    def full(path, content):
        written.append(path)
        if len(written) == 2:
            raise OSError("No space left on device")
        return write(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(module, "write_atomic", full)
        with pytest.raises(OSError, match="No space left"):
            run(model, small, checkpoint=tmp_path / "run.pt")
    assert_same_history(run(model, small, checkpoint=tmp_path / "run.pt"), history)
    assert_same(state(model), state(whole))


def test_evaluation_is_float32_whatever_the_caller_allows(small):
    class Seeing(nn.Module):
        def forward(self, images):
            flags.append((backends.cudnn.conv.fp32_precision, backends.mkldnn.matmul.fp32_precision))
            types.add((images[0, 0] @ images[0, 0]).dtype)
            return images.flatten(1)[:, :10]

    flags, types, backends, precision = [], set(), torch.backends, torch.get_float32_matmul_precision()
    if not hasattr(backends.cudnn, "conv"):
        pytest.skip("PyTorch 2.9 has a flag for each")
    torch.set_float32_matmul_precision("medium")
    try:
        before = (backends.cudnn.conv.fp32_precision, backends.mkldnn.matmul.fp32_precision)
        with torch.autocast("cpu", torch.bfloat16):
            evaluate(Seeing(), small, progress=False)
        assert before == ("tf32", "bf16") == (backends.cudnn.conv.fp32_precision, backends.mkldnn.matmul.fp32_precision)
        assert set(flags) == {("ieee", "ieee")} and types == {torch.float32}
    finally:
        torch.set_float32_matmul_precision(precision)


def slow_run(file, threads):
    """In a process of its own, to be killed."""
    torch.set_num_threads(threads)
    model, data = net(), digits()

    class Slow(Breaking):
        def __iter__(self):
            for batch in super().__iter__():
                time.sleep(0.1 if self.left else 600)  # the last epoch is never finished
                yield batch

    run(model, Slow(data, 10, SystemExit()), hook=Pull(model), checkpoint=file)


def test_a_killed_process_is_resumed_by_another(small, tmp_path):
    file, here = tmp_path / "run.pt", Path(__file__).resolve()
    code = f"import test_train; test_train.slow_run({str(file)!r}, {torch.get_num_threads()})"
    path = os.pathsep.join([str(here.parent), str(here.parent.parent)])
    process = subprocess.Popen([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": path})
    try:
        deadline = time.monotonic() + 300
        while not file.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(0.3)
    finally:
        process.kill()
    assert process.wait() == -signal.SIGKILL
    assert 1 <= len(torch.load(file, weights_only=True)["rows"]) < 3
    whole, model = net(), net(seed=7)
    history = run(whole, small, hook=Pull(whole))
    assert_same_history(run(model, small, hook=Pull(model), checkpoint=file), history)
    assert_same(state(model), state(whole))
    assert [entry.name for entry in tmp_path.iterdir()] == ["run.pt"]


@pytest.mark.parametrize(
    "error, at", [(KeyboardInterrupt, 0), (KeyboardInterrupt, 5), (KeyboardInterrupt, 11), (ValueError, 9)]
)
def test_an_interrupted_model_is_as_it_was_after_the_last_whole_epoch(small, error, at):
    model, wanted = net(), net()
    fit_epochs = at // 4
    with pytest.raises(error):
        run(model, Breaking(small, at, error("stop")), schedule="constant", average=0.5, channels_last=True)
    if fit_epochs:
        run(wanted, small, fit_epochs, schedule="constant", channels_last=True)
    assert_same(state(model), state(wanted))
    assert all(value.is_contiguous() for value in state(model).values())


def poisoned(data, at):
    """Batches of which number `at` gives NaN."""
    batches = [(x.clone(), y) for x, y in data.train]
    batches[at][0][0, 0, 0, 0] = float("nan")
    return SimpleNamespace(train=batches, test=data.test)


@pytest.mark.parametrize("at", [0, 2, 3])
def test_a_loss_that_is_not_finite_ends_training_with_the_model_as_before(small, tmp_path, at):
    model = net()
    before = state(model)
    with pytest.raises(
        FloatingPointError, match=r"Expected a finite loss. Got nan in epoch 1, lr 0.05. .*smaller learning rate"
    ):
        run(model, poisoned(small, at), checkpoint=tmp_path / "run.pt", log=tmp_path / "log.csv")
    assert_same(state(model), before)
    assert not list(tmp_path.iterdir())


def test_diverging_training_says_so_and_keeps_finite_weights(small):
    model = net()
    with pytest.raises(FloatingPointError, match="lr 1e"):
        run(model, small, 5, lr=1e30)
    assert all(value.isfinite().all() for value in state(model).values())


def test_weights_spoilt_by_the_last_step_are_noticed(small):
    one = SimpleNamespace(train=list(small.train)[:1], test=small.test)

    class Explode(Hook):
        def __init__(self, model):
            self.weight, self.epochs = model[0].weight, 0

        def penalty(self):
            return self.weight.sum() * (float("nan") if self.epochs else 0.0)

        def epoch(self, done, epochs):
            self.epochs = done
            return {}

    model, wanted = net(), net()
    with pytest.raises(FloatingPointError, match="in epoch 2"):
        run(model, one, 2, hook=Explode(model), schedule="constant")
    run(wanted, one, 1, schedule="constant")
    assert_same(state(model), state(wanted))


class Greedy(nn.Module):
    def __init__(self, error=None):
        super().__init__()
        self.layer, self.error = nn.Linear(192, 10), error

    def forward(self, x):
        if self.error:
            raise self.error
        torch.empty(1 << 50)  # 4 PB
        return self.layer(x.flatten(1))


@pytest.mark.parametrize("error", [None, torch.OutOfMemoryError("CUDA out of memory")])
def test_no_memory_is_said_clearly(small, error):
    model = Greedy(error)
    before = state(model)
    with pytest.raises(
        MemoryError, match="Expected a batch to fit into memory: use a smaller batch_size. Got: .*memory"
    ):
        run(model, small)
    assert_same(state(model), before)
    with pytest.raises(RuntimeError, match="^another$"):
        run(Greedy(RuntimeError("another")), small)


# --- checkpoints and logs ---


def spoil(kind, content):
    if kind == "truncated":
        return content[: len(content) // 2]
    if kind == "tail lost":
        return content[:-1]
    return {"empty": b"", "garbage": b"\x80\x02garbage", "text": b"epoch,lr\n"}[kind]


@pytest.mark.parametrize("kind", ["truncated", "tail lost", "empty", "garbage", "text"])
def test_damaged_checkpoints_are_named(small, tmp_path, kind):
    file, model = tmp_path / "run.pt", net()
    run(model, small, 2, checkpoint=file)
    file.write_bytes(spoil(kind, file.read_bytes()))
    content, before = file.read_bytes(), state(model)
    with pytest.raises(
        ValueError, match=f"Expected a checkpoint written by fit; delete it to start anew. Got {file}: "
    ):
        run(model, small, 2, checkpoint=file)
    assert file.read_bytes() == content
    assert_same(state(model), before)


@pytest.mark.parametrize("foreign", [{"state_dict": {}}, [1, 2], {"settings": 3, "rows": []}, 3])
def test_foreign_checkpoints_are_named(small, tmp_path, foreign):
    torch.save(foreign, tmp_path / "run.pt")
    with pytest.raises(ValueError, match=f"Expected a checkpoint written by fit; .* Got {tmp_path / 'run.pt'}: "):
        run(net(), small, checkpoint=tmp_path / "run.pt")


OTHER = [dict(lr=0.5), dict(seed=3), dict(epochs=4), dict(schedule="constant"), dict(average=0.5), dict(momentum=0.1)]
OTHER += [dict(weight_decay=0.1), dict(label_smoothing=0.1), dict(mixed=True)]


def test_checkpoints_of_other_settings_models_and_hooks_are_named(small, tmp_path):
    file, model = tmp_path / "run.pt", net()
    run(model, small, checkpoint=file, hook=Pull(model))
    content = file.read_bytes()
    for other in OTHER:
        (name,) = other
        with pytest.raises(
            ValueError, match=rf"Expected a checkpoint of the same run, {{'{name}': .*Got {file}, of {{'{name}"
        ):
            run(net(), small, checkpoint=file, **other)
    with pytest.raises(ValueError, match=r"the same run, {'steps': 3, .*Got .*{'steps': 4,"):
        run(net(), digits(60), checkpoint=file)
    for wrong in (net(width=5), nn.Sequential(nn.Flatten(), nn.Linear(192, 10))):
        before = state(wrong)
        with pytest.raises(ValueError, match=rf"Expected a checkpoint of the same model and hook. Got {file}: "):
            run(wrong, small, checkpoint=file, channels_last=True)
        assert_same(state(wrong), before)
        assert all(value.is_contiguous() for value in state(wrong).values())
    assert file.read_bytes() == content
    run(model, small, checkpoint=tmp_path / "plain.pt")
    with pytest.raises(ValueError, match="the same model and hook. Got .*plain.pt: KeyError: 'mean'"):
        run(net(), small, checkpoint=tmp_path / "plain.pt", hook=Pull(model))


def test_log_is_the_history(small, tmp_path):
    file, log = tmp_path / "new" / "run.pt", tmp_path / "logs" / "log.csv"
    model = net()
    with pytest.raises(KeyboardInterrupt):
        run(model, Breaking(small, 9, KeyboardInterrupt()), checkpoint=file, log=log)
    assert pd.read_csv(log).epoch.tolist() == [1, 2]
    history = run(model, small, checkpoint=file, log=log)
    pd.testing.assert_frame_equal(pd.read_csv(log), history)
    assert len(list(tmp_path.rglob("*"))) == 4


def test_progress_bar_changes_nothing(small, capfd):
    one, two = net(), net()
    run(one, small, progress=True)
    assert "12/12" in capfd.readouterr().err
    run(two, small)
    assert capfd.readouterr().err == ""
    assert_same(state(one), state(two))


# --- evaluation ---


@pytest.mark.parametrize("training", [True, False])
def test_evaluate_counts_and_leaves_the_mode(training):
    class Read(nn.Module):
        def forward(self, x):
            assert not self.training and not torch.is_grad_enabled() and x.dtype == torch.float32
            return x[:, :, 0, 0]

    torch.manual_seed(0)
    images, labels = torch.randn(23, 3, 2, 2), torch.randint(3, (23,))
    data = SimpleNamespace(test=list(zip(images.split(7), labels.split(7), strict=True)))
    right = sum(max(range(3), key=lambda c: float(x[c, 0, 0])) == int(y) for x, y in zip(images, labels, strict=True))
    model = Read().train(training)
    assert evaluate(model, data, progress=False) == right / 23 and model.training == training
    data.test = [(images.double(), labels)]
    with pytest.raises(AssertionError):
        evaluate(model, data, progress=False)
    assert model.training == training


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("batches", [1, 3, 100])
def test_refresh_batch_norm_gives_the_means(small, training, batches):
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU()).train(training)
    with torch.no_grad():
        model[1].weight.uniform_()
        model[1].running_mean.fill_(9.0)
    before, dice = state(model), torch.random.get_rng_state()
    refresh_batch_norm(model, small, batches, seed=4)
    assert torch.equal(torch.random.get_rng_state(), dice)
    torch.manual_seed(4)
    seen = [model[0](images).detach().transpose(0, 1).flatten(1) for images, _ in list(small.train)[:batches]]
    torch.testing.assert_close(
        model[1].running_mean, torch.stack([x.mean(1) for x in seen]).mean(0), rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(
        model[1].running_var, torch.stack([x.var(1) for x in seen]).mean(0), rtol=1e-4, atol=1e-5
    )
    for name in ("0.weight", "0.bias", "1.weight", "1.bias"):
        assert torch.equal(model.state_dict()[name], before[name])
    assert model.training == training and model[1].momentum == 0.1


def test_refresh_batch_norm_leaves_networks_without_it_alone(small):
    model = Greedy(RuntimeError("never called"))
    refresh_batch_norm(model, small)
