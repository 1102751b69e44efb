"""The search (mapping 5.1): policy and gradient by plain loops, one threshold's rates, memory, kills, executors."""

import itertools
import json
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

import nbs_lib as nbs
from nbs_lib.mapping import evaluate
from nbs_lib.mapping.evaluate import Evaluator, global_rates, hold_out, mapping_id
from nbs_lib.mapping.exact import exact_mapping
from nbs_lib.mapping.live import Watch
from nbs_lib.mapping.policy import Policy, Reinforce, Uniform, states
from nbs_lib.mapping.search import SCHEMES, Search, legal_schemes, paired_bootstrap, search_mapping
from nbs_lib.schemes import Block, BlockPunched, Channel, Filter, Pattern
from notebooks.beside.map_tab04_patdnn import Predicted

FEW = (Filter(), Channel(), Pattern(8), BlockPunched(2, 2), BlockPunched(4, 1), Block(2, 2))


def network():
    """3 CONV layers that can be pruned, a stem, a depthwise layer and a linear one; for 8x8 digits."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8)]
    layers += [nn.Conv2d(8, 16, 3, 2, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU()]
    layers += [nn.Conv2d(16, 12, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 10)]
    return nn.Sequential(*layers)


@pytest.fixture(scope="module")
def model():
    return network()


@pytest.fixture(scope="module")
def graph(model):
    return nbs.trace(model, torch.zeros(1, 3, 8, 8))


@pytest.fixture(scope="module")
def data():
    """A part of the digits, whose test images nobody may look at."""
    return unseen(nbs.load_data("digits", size=8).subset(320))


def unseen(data):
    return replace(data, test=replace(data.test, images=None, labels=None))


def kept_ms(model, mapping):
    """A latency that is the same on every machine: a part for every layer left over."""
    return 1.0 + sum(1 / choice.rate for choice in mapping.values())


# the policy and its gradient


def cell(weights, prefix, x, h):
    names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    suffix = "_l0" if prefix == "encoder" else ""
    w, u, b, c = (weights[f"{prefix}.{name}{suffix}"] for name in names)
    return w @ x + b + u @ h + c


def log_probability(policy, actions):
    """log pi of one mapping, from the formulas of an RNN, an LSTM and a softmax over what is legal, step by step."""
    weights = {name: value.detach().double().numpy() for name, value in policy.state_dict().items()}
    size, read = weights["encoder.weight_hh_l0"].shape[0], []
    h = np.zeros(size)
    for x in weights["states"]:
        h = np.tanh(cell(weights, "encoder", x, h))
        read.append(h)
    c, before, total = np.zeros(size), np.zeros(size), 0.0
    for step, (first, second) in enumerate(actions):
        gates = cell(weights, "decoder", np.concatenate([read[step] + weights["place.weight"][step], before]), h)
        i, f, o = (1 / (1 + np.exp(-gates[k * size : (k + 1) * size])) for k in (0, 1, 3))
        c = f * c + i * np.tanh(gates[2 * size : 3 * size])
        h = o * np.tanh(c)
        counts = weights["legal"][step].sum(axis=1)
        taken = weights["taken.0.weight"][first]
        for head, x, allowed, pick in (
            ("regularity", h, counts, first),
            ("block", np.concatenate([h, taken]), weights["legal"][step, first], second),
        ):
            logits = weights[f"{head}.weight"] @ x + weights[f"{head}.bias"]
            shares = [count * math.exp(logit) for count, logit in zip(allowed, logits, strict=True)]
            share = (1 - policy.floor) * shares[pick] / sum(shares) + policy.floor * allowed[pick] / sum(allowed)
            total += math.log(share) if share else -math.inf
        before = taken + weights["taken.1.weight"][second]
    return total


LEGAL = np.array([[[1, 0, 0], [0, 0, 0]], [[0, 1, 1], [1, 1, 0]], [[1, 0, 0], [0, 1, 1]]], bool)
STATES = np.array([[1, 0, 0, 1.5, 2, 3], [0, 1, 0, 0, 4, 3], [0, 0, 1, 0, 6, 5]], np.float32)


def shaken(floor=0.1):
    policy = Policy(STATES, LEGAL, hidden=5, floor=floor)
    with torch.no_grad():
        for number, weight in enumerate(policy.parameters()):
            weight += torch.randn(weight.shape, generator=torch.Generator().manual_seed(number))
    return policy


def every_mapping():
    return [np.array(pairs) for pairs in itertools.product(*(np.argwhere(layer) for layer in LEGAL))]


def test_log_probabilities_equal_the_formulas_and_sum_to_one():
    policy, mappings = shaken(), every_mapping()
    log = policy(torch.tensor(np.array(mappings)))[1].detach().numpy()
    np.testing.assert_allclose(log, [log_probability(policy, one) for one in mappings], rtol=1e-5)
    assert len(mappings) == 12 and np.exp(log).sum() == pytest.approx(1, abs=1e-5)
    drawn, told = policy(samples=7, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(told, policy(drawn)[1])


def test_a_policy_draws_as_often_as_it_says_and_never_what_is_illegal():
    policy, mappings = shaken(), every_mapping()
    drawn = policy(samples=4000, generator=torch.Generator().manual_seed(0))[0].numpy()
    for step in range(3):
        assert LEGAL[step][tuple(drawn[:, step].T)].all()
    often = [(drawn == one).all(axis=(1, 2)).mean() for one in mappings]
    shares = np.exp([log_probability(policy, one) for one in mappings])
    assert sum(often) == 1 and np.abs(often - shares).max() < 0.03
    assert policy(torch.tensor([[[0, 1], [0, 1], [0, 0]]]))[1].isneginf().all()


def test_a_new_policy_is_uniform_over_legal_pairs():
    log = Policy(STATES, LEGAL)(torch.tensor(np.array(every_mapping())))[1].detach().exp().numpy()
    np.testing.assert_allclose(log, 1 / 12, rtol=1e-5)
    drawn = Uniform(STATES, LEGAL, seed=3).propose(2000)
    often = [(drawn == one).all(axis=(1, 2)).mean() for one in every_mapping()]
    assert sum(often) == 1 and np.abs(np.array(often) - 1 / 12).max() < 0.03


def test_the_gradient_is_equation_6_by_plain_loops():
    learner = Reinforce(STATES, LEGAL)
    learner.policy, actions, rewards = shaken(), np.array(every_mapping()[::3]), np.array([0.3, -1.0, 2.0, 0.5])
    learner.optimizer, learner.baseline = torch.optim.SGD(learner.policy.parameters(), 0.5), 0.25
    wanted = [torch.zeros_like(weight) for weight in learner.policy.parameters()]
    for one, reward in zip(actions, rewards, strict=True):
        log = learner.policy(torch.tensor(one[None]))[1].sum()
        for total, part in zip(wanted, torch.autograd.grad(log, list(learner.policy.parameters())), strict=True):
            total += (reward - 0.25) * part / len(rewards)
    before = [weight.detach().clone() for weight in learner.policy.parameters()]
    learner.learn(actions, rewards)
    for old, new, gradient in zip(before, learner.policy.parameters(), wanted, strict=True):
        torch.testing.assert_close(new - old, 0.5 * gradient, rtol=1e-3, atol=1e-5)
    assert learner.baseline == pytest.approx(0.8 * 0.25 + 0.2 * rewards.mean())


def test_a_policy_needs_something_legal_for_every_layer():
    with pytest.raises(ValueError, match="Expected a legal"):
        Policy(STATES, LEGAL & (np.arange(3) > 0)[:, None, None])


# the search, with rewards whose optimum is known


def test_states_and_legal_schemes(graph):
    table = states(graph.layers.values())
    np.testing.assert_allclose(table[1], [0, 1, 0, np.log2(3), 3, 3], rtol=1e-6)
    np.testing.assert_allclose(table[-1], [0, 0, 1, 0, np.log2(12), np.log2(10)], rtol=1e-6)
    names = list(graph.layers)
    legal = legal_schemes(graph, SCHEMES, ignored_layers=names[-1:], rate=4.0)
    assert [bool(legal[name]) for name in names] == [False, False, True, True, True, False]
    assert {s.name for s in legal[names[2]]} == {"filter", "channel", "pattern", "block_punched"}
    assert {s.name for s in legal[names[4]]} == {"filter", "channel", "block", "block_punched"}
    assert max(s.p for s in legal[names[4]] if s.name == "block") == 8
    assert BlockPunched(8, 16) not in legal[names[4]]  # 128 * 4 > 192 weights: none would be left


def toy(graph, reward, calls):
    """An evaluator that takes no time; writes down what it was asked."""

    def evaluator(batch):
        calls.extend(batch)
        facts = {"accuracy": 0.5, "ms": 1.0, "seconds": 0.0, "timed": "function", "error": ""}
        return [facts | {"mapping": nbs.Mapping(), "id": mapping_id(one), "reward": reward(one)} for one in batch]

    return evaluator


def deep():
    """Six equal layers and a stem."""
    layers = [nn.Conv2d(3, 8, 3, padding=1), *(nn.Conv2d(8, 8, 3, padding=1) for _ in range(6))]
    return nbs.trace(nn.Sequential(*layers), torch.zeros(1, 3, 8, 8))


def test_rl_finds_a_known_optimum_and_random_search_does_not():
    graph = deep()
    legal = legal_schemes(graph, FEW)
    assert math.prod(len(found) for found in legal.values() if found) == 5**6
    best = {name: found[number % 5] for number, (name, found) in enumerate(legal.items()) if found}
    found = {"rl": [], "random": []}
    for strategy, seed in itertools.product(found, range(3)):
        reward = lambda one: sum(one[name] == scheme for name, scheme in best.items()) / len(best)  # noqa: E731
        run = Search(graph, legal, toy(graph, reward, []), strategy, samples=8, evaluations=240, seed=seed)
        run.run()
        assert run.history.evaluation.tolist() == list(range(1, 241)) and run.history.mapping.is_unique
        found[strategy].append(run.best["reward"])
    assert sum(value == 1 for value in found["rl"]) >= 2 and max(found["random"]) < 1
    assert paired_bootstrap(found["rl"], found["random"])[1] > 0


@pytest.mark.parametrize("strategy", ["rl", "random"])
def test_a_mapping_is_evaluated_once_and_a_small_space_to_its_end(graph, strategy):
    calls, ignored = [], list(graph.layers)[3:]
    legal = legal_schemes(graph, FEW, ignored)
    run = Search(graph, legal, toy(graph, lambda one: float(len(calls)), calls), strategy, evaluations=1000)
    run.run()
    assert len(calls) == len(run.history) == 5 == len({mapping_id(one) for one in calls})
    assert run.history.best.is_monotonic_increasing and run.best["reward"] == run.history.reward.max()
    again = Search(graph, legal, toy(graph, lambda one: 0.0, []), strategy, evaluations=3)
    again.run()
    assert again.history.mapping.tolist() == run.history.mapping[:3].tolist() or strategy == "rl"
    assert len(again.history) == 3


def test_a_search_refuses_what_it_cannot_do(graph):
    with pytest.raises(KeyError, match="rl, random"):
        Search(graph, legal_schemes(graph), None, "genetic")
    with pytest.raises(ValueError, match="at least 1"):
        Search(graph, legal_schemes(graph), None, evaluations=0)


# rates by one threshold


def test_global_rates_meet_the_models_rate_with_one_threshold(model, graph):
    names = list(graph.layers)
    schemes = {names[2]: Pattern(8), names[3]: BlockPunched(2, 2), names[4]: Filter(), names[5]: Block(2, 2)}
    mapping = global_rates(graph, schemes, 3.0)
    assert list(mapping) == names[2:] and mapping[names[5]].rate == 3.0
    assert mapping[names[2]].scheme.patterns and mapping.report().reason[:2].str.contains("stem|dense").all()
    pruned = network()
    masks = nbs.prune(pruned, mapping)
    assert nbs.trace(pruned, torch.zeros(1, 3, 8, 8)).rates().conv == pytest.approx(3.0, rel=0.03)
    kept, gone = [], []
    for name in names[3:5]:  # groups by plain loops: what is kept is stronger than what goes, over both layers
        ids = schemes[name].groups(graph[name].shape)
        for group in range(ids.max() + 1):
            energy = float(np.mean(graph[name].weight[ids == group] ** 2))
            (kept if masks[name].numpy()[ids == group].all() else gone).append(energy)
    assert min(kept) >= max(gone) and len(kept) + len(gone) == 8 * 8 * 9 + 12


def test_global_rates_know_their_limits(graph):
    names = list(graph.layers)
    with pytest.raises(ValueError, match="Expected a CONV rate below"):
        global_rates(graph, {names[2]: Filter()}, 20.0)
    with pytest.raises(KeyError, match="nope"):
        global_rates(graph, {"nope": Filter()}, 2.0)
    assert global_rates(graph, {}, 2.0) == {} and global_rates(graph, {names[5]: Filter()}, 2.0)[names[5]].rate == 2
    assert global_rates(graph, {names[2]: Filter()}, 1.0)[names[2]].rate == 1


# the evaluator


def drawn(graph, count, seed=0):
    """Some different candidates."""
    rng, legal = np.random.default_rng(seed), {k: v for k, v in legal_schemes(graph, FEW).items() if v}
    return [{name: found[rng.integers(len(found))] for name, found in legal.items()} for _ in range(count)]


def comparable(rows):
    return pd.DataFrame(rows)[["id", "accuracy", "ms", "reward", "timed", "error"]]


@pytest.fixture(scope="module")
def serial(model, data, graph):
    """Five evaluations in this process."""
    return comparable(Evaluator(model, data, graph, 3.0, kept_ms, weight=0.5)(drawn(graph, 5)))


def test_an_evaluation_is_pruning_at_once_retraining_and_the_held_out_images(model, data, graph, serial):
    (candidate,) = drawn(graph, 1)
    evaluator = Evaluator(model, data, graph, 3.0, kept_ms, weight=0.5, runs=3)
    (row,) = evaluator([candidate])
    assert comparable([row]).iloc[0].to_dict() == serial.iloc[0].to_dict()
    assert evaluator.dense_ms == 1 and row["ms"] == kept_ms(None, row["mapping"])
    assert row["reward"] == row["accuracy"] - 0.5 * row["ms"] and row["seconds"] > 0
    part = hold_out(data, 0.1)
    assert row["accuracy"] * len(part.test.labels) == pytest.approx(round(row["accuracy"] * len(part.test.labels)))
    before = [weight.clone() for weight in model.state_dict().values()]
    assert all(torch.equal(old, new) for old, new in zip(before, network().state_dict().values(), strict=True))


def test_held_out_images_are_training_images_of_every_class(data):
    part, other = hold_out(data, 0.25, seed=1), hold_out(data, 0.25, seed=2)
    assert part.train.labels.bincount().min() == 24 and part.test.labels.bincount().tolist() == [8] * 10
    whole = {image.numpy().tobytes() for image in data.train.images}
    parts = [{image.numpy().tobytes() for image in images} for images in (part.train.images, part.test.images)]
    assert parts[0] | parts[1] == whole and not parts[0] & parts[1]
    assert not torch.equal(part.test.images, other.test.images) and not part.test.crop and not part.test.shuffle
    with pytest.raises(ValueError, match="share"):
        hold_out(data, 1.0)


class Later(Executor):
    """Runs what was submitted when its result is waited for, last first; has the workers it is told to have."""

    def __init__(self, workers):
        self._max_workers, self.events = workers, []

    def submit(self, fn, *args):
        future, executor = Future(), self

        class Waiting(list):
            def append(self, waiter):  # as_completed waits from here on
                super().append(waiter)
                executor.events.append("train")
                future.set_result(fn(*args))

        future._waiters = Waiting()
        return future


@pytest.mark.parametrize(
    ("workers", "overlap", "beside"), [(1, None, True), (64, None, False), (64, True, True), (1, False, False)]
)
def test_rows_say_whether_the_clock_ran_beside_training(model, data, graph, monkeypatch, workers, overlap, beside):
    executor, events = Later(workers), []

    def measured(network, device, **_):
        executor.events.append("measure")
        return pd.DataFrame({"ok": [True], "median_ms": [0.5]})

    monkeypatch.setattr(evaluate, "measure", measured)
    monkeypatch.setattr(evaluate, "compile", lambda *_, **__: events.append("compile"))
    monkeypatch.setattr(evaluate.psutil, "cpu_count", lambda logical: 2)
    monkeypatch.setattr(evaluate.os, "sched_getaffinity", lambda _: {0, 1})
    evaluator = Evaluator(model, data, graph, 3.0, epochs=0, executor=executor, overlap=overlap)
    rows = evaluator(drawn(graph, 2))
    steps = ["measure", "measure", "train", "train"][:: 1 if beside else -1]
    assert executor.events == ["measure", *steps] and len(events) == 3
    assert {row["timed"] for row in rows} == {"measured beside training" if beside else "measured alone"}
    assert evaluator.dense_ms == 0.5


def test_latencies_are_measured_on_compiled_code_or_predicted(model, data, graph):
    class Predictor:
        def predict(self, graph, mapping):
            return 2.0 + len(mapping)

    (candidate,) = drawn(graph, 1)
    evaluator = Evaluator(model, data, graph, 3.0, Predictor(), epochs=0)
    (row,) = evaluator([candidate])
    assert (evaluator.dense_ms, row["ms"], row["timed"]) == (2, 6, "predicted")
    evaluator = Evaluator(model, data, graph, 3.0, epochs=0, runs=20)
    (row,) = evaluator([candidate])
    assert 0 < row["ms"] < 100 and 0 < evaluator.dense_ms < 100 and row["timed"] == "measured alone"


def test_an_evaluator_refuses_what_is_not_its_own(model, data, graph, tmp_path):
    file = tmp_path / "search.json"
    Evaluator(model, data, graph, 3.0, kept_ms, checkpoint=file, epochs=0)(drawn(graph, 1))
    with pytest.raises(ValueError, match="'rate': 2.0.*'rate': 3.0"):
        Evaluator(model, data, graph, 2.0, kept_ms, checkpoint=file, epochs=0)
    file.write_text("{")
    with pytest.raises(ValueError, match="Expected a checkpoint of a search. Got .*search.json"):
        Evaluator(model, data, graph, 3.0, kept_ms, checkpoint=file)
    with pytest.raises(ValueError, match="Expected the graph of this model"):
        Evaluator(nn.Sequential(*network()[:-1], nn.Linear(12, 10)), data, graph, 3.0, kept_ms)
    with pytest.raises(TypeError, match="latency"):
        Evaluator(model, data, graph, 3.0, "fast")
    with pytest.raises(TypeError, match="Expected Data"):
        Evaluator(model, [], graph, 3.0, kept_ms)


def test_a_loss_that_is_not_finite_costs_its_candidate_alone(model, data, graph):
    (row,) = Evaluator(model, data, graph, 3.0, kept_ms, lr=1e30)(drawn(graph, 1))
    assert row["accuracy"] == 0 and row["reward"] < 0 and "finite loss" in row["error"]


# executors and kills


def test_processes_evaluate_as_this_process_does(model, data, graph, serial):
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        evaluator = Evaluator(model, data, graph, 3.0, kept_ms, weight=0.5, executor=pool)
        pd.testing.assert_frame_equal(comparable(evaluator(drawn(graph, 5))), serial)


def test_a_cluster_that_loses_a_worker_evaluates_all_the_same(model, data, graph, serial):
    distributed = pytest.importorskip("distributed")
    quiet = {"processes": True, "threads_per_worker": 1, "dashboard_address": None, "silence_logs": 50}
    with distributed.LocalCluster(n_workers=2, **quiet) as cluster, distributed.Client(cluster) as client:
        victim = next(iter(client.run(os.getpid).values()))

        class Killer(Executor):
            """The cluster's own executor; kills a worker once both have work."""

            def __init__(self):
                self.inner, self.submitted = client.get_executor(), 0

            def submit(self, fn, *args):
                future = self.inner.submit(fn, *args)
                self.submitted += 1
                if self.submitted == 5:
                    os.kill(victim, signal.SIGKILL)
                return future

        evaluator = Evaluator(model, data, graph, 3.0, kept_ms, weight=0.5, executor=Killer())
        pd.testing.assert_frame_equal(comparable(evaluator(drawn(graph, 5))), serial)
        assert victim not in client.run(os.getpid).values()


SETTINGS = {"rate": 3.0, "weight": 0.5, "samples": 3, "evaluations": 9, "epochs": 1, "progress": False}


def graph_of():
    return nbs.trace(network(), torch.zeros(1, 3, 8, 8))


def searched(checkpoint, **options):
    data = unseen(nbs.load_data("digits", size=8).subset(320))
    return search_mapping(
        network(), data, graph_of(), latency=kept_ms, checkpoint=checkpoint, schemes=FEW, **SETTINGS, **options
    )


def stop_after_six(run):
    """In the process that will be killed: says that it is time, and waits."""
    if len(run.rows) == 6:
        print("now", flush=True)
        time.sleep(60)


def test_a_killed_search_goes_on_to_the_same_history(tmp_path):
    file = tmp_path / "search.json"
    code = f"import sys; sys.path.insert(0, {os.path.dirname(__file__)!r}); import test_search as test; "
    code += f"test.searched({str(file)!r}, callback=test.stop_after_six)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "now\n"
        process.kill()
    assert process.returncode == -signal.SIGKILL
    left = json.loads(file.read_text())["candidates"]
    assert len(left) == 6
    calls = []
    whole = searched(None)
    again = searched(file, callback=lambda run: calls.append(len(run.rows)))
    pd.testing.assert_frame_equal(again.history.drop(columns="seconds"), whole.history.drop(columns="seconds"))
    assert again == whole and calls == [3, 6, 9]
    assert again.history.seconds[:6].tolist() == [one["seconds"] for one in left.values()]  # not evaluated again
    assert again.report().reason.str.contains("rl search, best of 9 mappings").sum() == len(again)


# what one sees of it


def test_progress_is_a_line_per_mapping_without_a_screen_and_silence_on_request(graph, capsys, monkeypatch):
    run = Search(graph, legal_schemes(graph, FEW), toy(graph, lambda one: 0.25, []), samples=2, evaluations=4)
    with Watch(run) as watch:
        run.run(watch)
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[3] == "rl search, 4 of 4: accuracy 0.5000, 1 ms (function), reward 0.2500, best 0.2500"
    with Watch(run, progress=False) as watch:
        watch(run)
    assert capsys.readouterr() == ("", "")


def test_a_curve_is_drawn_where_there_is_a_notebook(graph, monkeypatch):
    class Picture:
        value = b""

    monkeypatch.setattr("nbs_lib.mapping.live._picture", lambda: pictures[-1])
    pictures = [Picture()]
    run = Search(graph, legal_schemes(graph, FEW), toy(graph, lambda one: 0.25, []), samples=2, evaluations=4)
    with Watch(run) as watch:
        run.run(watch)
    assert pictures[0].value.startswith(b"\x89PNG")


def test_a_paired_bootstrap_draws_pairs():
    ours, others = [0.5, 0.7, 0.4], [0.4, 0.1, 0.4]
    means = sorted(sum(ours[i] - others[i] for i in drawn) / 3 for drawn in itertools.product(range(3), repeat=3))
    mean, low, high = paired_bootstrap(ours, others)
    assert mean == pytest.approx(0.7 / 3)
    assert (low, high) == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])))
    assert paired_bootstrap([1.0] * 8, [0.5] * 8) == (0.5, 0.5, 0.5)
    for wrong in (([1.0], [1.0, 2.0]), ([], []), ([math.nan], [0.0])):
        with pytest.raises(ValueError, match="Expected finite pairs"):
            paired_bootstrap(*wrong)


# candidates that are not trained


class Steps:
    """A latency model: a layer takes 1 ms, less what its rate and its block's height save; all else takes 2 ms."""

    def predict_layers(self, graph, mapping):
        ms = {"": 2.0} | dict.fromkeys(graph.layers, 1.0)
        ms |= {name: (1 + 1 / getattr(choice.scheme, "p", 1)) / choice.rate for name, choice in mapping.items()}
        return pd.DataFrame(ms.items(), columns=["layer", "ms"])


def test_candidates_are_worth_what_is_predicted_and_the_exact_solver_finds_the_best_of_all(graph):
    judge = Predicted(graph, Steps(), {"rate": 2.5}, (Filter(), Pattern(8), BlockPunched(1, 1), BlockPunched(2, 2)))
    assert {len(found) for found in judge.legal.values()} == {2, 3}  # filters go, patterns stay on 3x3 layers
    names = list(judge.legal)
    rows = judge([dict(zip(names, some, strict=True)) for some in itertools.product(*judge.legal.values())])
    row = rows[-1]
    assert row["ms"] == pytest.approx(Steps().predict_layers(graph, row["mapping"]).ms.sum())
    drops = nbs.mapping.drops.energy_drops(graph, {name: [choice] for name, choice in row["mapping"].items()})
    mean = sum(drops[name][choice] for name, choice in row["mapping"].items()) / len(names)
    dense = 2.0 + len(graph.layers)
    assert row["reward"] == pytest.approx(1 - judge.slope * mean - judge.weight * row["ms"] / dense)
    best = max(row["reward"] for row in rows)
    solved = exact_mapping(graph, judge, judge.drops, weight=judge.exact_weight)
    found = judge([{name: choice.scheme for name, choice in solved.items()}])[0]["reward"]
    assert found == pytest.approx(best)
    assert Search(graph, judge.legal, judge, "rl", evaluations=8).run().history.reward.max() <= best
