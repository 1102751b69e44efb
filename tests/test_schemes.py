"""Schemes against plain loops: groups, projections, rates, text and JSON."""

import heapq
import json
import warnings
from itertools import combinations
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nbs_lib.schemes import (
    SCHEMES,
    Block,
    BlockPunched,
    Channel,
    Choice,
    Filter,
    Pattern,
    Unstructured,
    from_json,
    keep_strongest,
    parse,
    reached,
)
from nbs_lib.schemes.pattern import CANDIDATES

ALL = [
    Unstructured(),
    Filter(),
    Channel(),
    Pattern(8),
    Block(8, 4),
    BlockPunched(8, 4),
    BlockPunched(3, 5),
    Block(3, 5),
]
SHAPES = [  # shape, convolution groups
    ((7, 5, 3, 3), 1),
    ((13, 9, 1, 1), 1),
    ((13, 9), 1),
    ((1, 17), 1),
    ((17, 1), 1),
    ((1, 1, 1, 1), 1),
    ((8, 1, 3, 3), 8),  # depthwise
    ((12, 1, 5, 5), 12),
    ((14, 5, 3, 3), 2),  # grouped: 7 filters to a group
    ((15, 4, 1, 1), 3),
    ((16, 8, 3, 3), 1),
]
CASES = [(s, shape, groups) for s in ALL for shape, groups in SHAPES if not s.refuses(shape)]


def loop_groups(scheme, shape, groups):
    """{key: [indices]} by plain loops; keys sort in the order in which ties are dropped."""
    per_group = shape[0] // groups
    found = {}
    for index in np.ndindex(*shape):
        i, j, *k = index
        conv_group, row = divmod(i, per_group)
        key = {
            "unstructured": index,
            "filter": (i,),
            "channel": (conv_group, j),
            "pattern": (i, j),
            "block_punched": (conv_group, row // getattr(scheme, "p", 1), j // getattr(scheme, "q", 1), *k),
        }[scheme.name]
        found.setdefault(key, []).append(index)
    return dict(sorted(found.items()))


def loop_cut(order, total, rate):
    """The number of groups to drop from `order` (sizes, weakest first): nearest to total / rate, one must stay."""
    left, best = sum(order), (abs(sum(order) - total / rate), 0)
    for dropped, size in enumerate(order[:-1], start=1):
        left -= size
        best = min(best, (abs(left - total / rate), dropped))
    return best[1]


def loop_project(scheme, weight, rate, groups):
    """Projection by plain loops, for the schemes whose groups are fixed."""
    members = list(loop_groups(scheme, weight.shape, groups).values())
    energy = [sum(float(weight[i]) ** 2 for i in group) / len(group) for group in members]
    order = sorted(range(len(members)), key=lambda g: (energy[g], g))
    mask = np.ones(weight.shape, dtype=bool)
    for g in order[: loop_cut([len(members[g]) for g in order], weight.size, rate)]:
        for index in members[g]:
            mask[index] = False
    return mask


def loop_pattern(scheme, weight, rate):
    """Best pattern of each kernel, then the weakest kernels go."""
    mask, energy = np.zeros(weight.shape, dtype=bool), []
    for i, j in np.ndindex(*weight.shape[:2]):
        kernel = weight[i, j].astype(float).ravel() ** 2
        sums = [sum(kernel[b] for b in range(9) if bits >> b & 1) for bits in scheme.patterns]
        best = scheme.patterns[sums.index(max(sums))]
        mask[i, j] = np.array([best >> b & 1 for b in range(9)]).reshape(3, 3)
        energy.append((max(sums), (i, j)))
    kernels = [index for _, index in sorted(energy)]
    for index in kernels[: loop_cut([4] * len(kernels), weight.size, rate)]:
        mask[index] = False
    return mask


def heap_block(scheme, weight, rate, groups):
    """Layer-wide greedy with a heap: drop the live segment with the least remaining energy per remaining weight."""
    shape, weight = weight.shape, weight.reshape(weight.shape[:2]).astype(float)
    P, Q, per_group = *weight.shape, weight.shape[0] // groups
    live, heap, version = np.ones((P, Q), dtype=bool), [], {}
    block = {}  # block -> its segments

    def push(key):
        where = block[key[:3]][key[3:]]
        rest = [weight[i] ** 2 for i in where if live[i]]
        version[key] = version.get(key, 0) + 1
        if rest:
            heapq.heappush(heap, (sum(rest) / len(rest), key, version[key]))

    for i, j in np.ndindex(P, Q):
        conv_group, row = divmod(i, per_group)
        segments = block.setdefault((conv_group, row // scheme.p, j // scheme.q), {})
        segments.setdefault((0, i), []).append((i, j))
        segments.setdefault((1, j), []).append((i, j))
    for name, segments in block.items():
        for segment in segments:
            push(name + segment)
    states, target = [live.copy()], weight.size / rate
    while heap:
        _, key, seen = heapq.heappop(heap)
        if seen != version[key]:
            continue
        for i in block[key[:3]][key[3:]]:
            live[i] = False
        version[key] += 1
        for segment in block[key[:3]]:
            if segment[0] != key[3]:
                push(key[:3] + segment)
        states.append(live.copy())
    states = [state for state in states if state.any()]
    return min(states, key=lambda state: abs(state.sum() - target)).reshape(shape)


def oracle(scheme, weight, rate, groups):
    if scheme.name == "block":
        return heap_block(scheme, weight, rate, groups)
    if scheme.name == "pattern":
        return loop_pattern(scheme if scheme.patterns else scheme.fit([weight]), weight, rate)
    return loop_project(scheme, weight, rate, groups)


def quiet_project(scheme, weight, rate, groups=1):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the pattern's least rate
        return scheme.project(weight, rate, groups)


@pytest.mark.parametrize(("scheme", "shape", "groups"), CASES, ids=str)
def test_projection_equals_loops(scheme, shape, groups, rng):
    weight = rng.standard_normal(shape).astype(np.float32)
    for rate in (1.3, 2.25, 4.0, 8.2):
        mask = quiet_project(scheme, weight, rate, groups)
        assert mask.dtype == bool and mask.shape == shape
        np.testing.assert_array_equal(mask, oracle(scheme, weight, rate, groups))


@pytest.mark.parametrize(("scheme", "shape", "groups"), CASES, ids=str)
def test_projection_with_many_ties_equals_loops(scheme, shape, groups, rng):
    weight = rng.integers(-1, 2, shape).astype(np.float32)
    for rate in (2.25, 5.0):
        expected = oracle(scheme, weight, rate, groups)
        np.testing.assert_array_equal(quiet_project(scheme, weight, rate, groups), expected)


@pytest.mark.parametrize(("scheme", "shape", "groups"), CASES, ids=str)
def test_rate_one_and_rates_beyond_what_is_left(scheme, shape, groups, rng):
    weight = rng.standard_normal(shape).astype(np.float32)
    assert scheme.project(weight, 1, groups).all()
    assert 1 <= scheme.project(weight, 1e9, groups).sum() <= weight.size
    assert scheme.project(np.zeros(shape, np.float32), 1e9, groups).any()


@pytest.mark.parametrize(("scheme", "shape", "groups"), [case for case in CASES if case[0].name != "block"], ids=str)
def test_groups_are_the_loops_and_the_mask_is_constant_inside_them(scheme, shape, groups, rng):
    ids = scheme.groups(shape, groups)
    assert ids.shape == shape
    for number, members in enumerate(loop_groups(scheme, shape, groups).values()):
        assert {int(ids[i]) for i in members} == {number}
    weight = rng.standard_normal(shape).astype(np.float32)
    mask = scheme.project(weight, 3.0, groups)
    if scheme.name != "pattern":
        size = np.bincount(ids.ravel())
        kept = np.bincount(ids.ravel(), mask.ravel())
        assert set((kept / size).tolist()) <= {0.0, 1.0}
        energy = np.bincount(ids.ravel(), weight.ravel().astype(float) ** 2) / size
        assert (kept == 0).sum() == 0 or energy[kept > 0].min() >= energy[kept == 0].max()
        assert abs(mask.sum() - weight.size / 3.0) <= size.max() or (kept > 0).sum() == 1


@pytest.mark.parametrize(("scheme", "shape", "groups"), [case for case in CASES if case[0].name == "block"], ids=str)
def test_block_families_and_structure(scheme, shape, groups, rng):
    rows, columns = scheme.groups(shape, groups)
    blocks = scheme.blocks(shape, groups)
    assert rows.shape == columns.shape == blocks.shape == shape
    weight = rng.standard_normal(shape).astype(np.float32)
    mask = scheme.project(weight, 2.5, groups).reshape(shape[:2])
    for family in (rows, columns, blocks):
        assert set(np.unique(family)) == set(range(family.max() + 1))
    per_group = shape[0] // groups
    for b in range(blocks.max() + 1):
        i, j = np.nonzero(blocks.reshape(shape[:2]) == b)
        assert i.max() - i.min() < scheme.p and j.max() - j.min() < scheme.q
        assert i.min() // per_group == i.max() // per_group  # inside one convolution group
        part = mask[i.min() : i.max() + 1, j.min() : j.max() + 1]
        np.testing.assert_array_equal(part, np.outer(part.any(1), part.any(0)))
        assert len(np.unique(rows.reshape(shape[:2])[i, j])) == i.max() - i.min() + 1
        assert len(np.unique(columns.reshape(shape[:2])[i, j])) == j.max() - j.min() + 1


def test_block_with_only_weak_rows_loses_rows(rng):
    weight = rng.uniform(1, 2, (16, 12)).astype(np.float32)
    weight[1::2] *= 1e-3
    np.testing.assert_array_equal(Block(8, 4).project(weight, 2), np.repeat([[True], [False]] * 8, 12, axis=1))
    np.testing.assert_array_equal(Block(4, 8).project(weight.T, 2), np.repeat([[True], [False]] * 8, 12, axis=1).T)


def test_block_across_chunks_equals_one_chunk(rng, monkeypatch):
    weight = rng.standard_normal((45, 37)).astype(np.float32)
    whole = Block(8, 4).project(weight, 5)
    monkeypatch.setattr("nbs_lib.schemes.block._CHUNK", 100)
    np.testing.assert_array_equal(Block(8, 4).project(weight, 5), whole)


def test_block_takes_blocks_larger_than_the_matrix_and_one_by_one(rng):
    weight = rng.standard_normal((9, 7)).astype(np.float32)
    np.testing.assert_array_equal(Block(64, 64).project(weight, 3), heap_block(Block(64, 64), weight, 3, 1))
    np.testing.assert_array_equal(Block(1, 1).project(weight, 3), Unstructured().project(weight, 3))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_block_equals_the_heap_on_any_shape(data):
    P, Q, p, q, groups = (data.draw(st.integers(1, high)) for high in (6, 9, 5, 5, 2))
    weight = np.random.default_rng(data.draw(st.integers(0, 999))).standard_normal((P * groups, Q))
    weight *= 10.0 ** data.draw(st.integers(-20, 10))
    rate = data.draw(st.floats(1, 20))
    np.testing.assert_array_equal(
        Block(p, q).project(weight, rate, groups), heap_block(Block(p, q), weight, rate, groups)
    )


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_block_punched_one_by_one_is_unstructured(data):
    shape = tuple(data.draw(st.integers(1, 5)) for _ in range(4))
    weight = np.random.default_rng(data.draw(st.integers(0, 999))).integers(-2, 3, shape).astype(np.float32)
    rate = data.draw(st.floats(1, 30))
    np.testing.assert_array_equal(BlockPunched(1, 1).project(weight, rate), Unstructured().project(weight, rate))


SCORES = st.sampled_from([0.0, 1e-300, 1e-9, 0.5, 0.5000000001, 3.0, 1e30])


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(SCORES, st.integers(1, 9)), min_size=1), st.floats(0.001, 1))
def test_keep_strongest_is_the_nearest_cut_of_a_sort(units, share):
    score, size = np.array([s for s, _ in units]), np.array([n for _, n in units])
    kept = share * size.sum()
    order = np.argsort(score, kind="stable")
    left = size.sum() - np.concatenate([[0], np.cumsum(size[order])])
    expected = np.ones(len(units), dtype=bool)
    expected[order[: np.argmin(np.abs(left - kept))]] = False
    np.testing.assert_array_equal(keep_strongest(score, size, kept), expected)


def test_pattern_candidates_are_all_ways_to_keep_four_of_nine():
    expected = sorted(sum(1 << b for b in bits) for bits in combinations(range(9), 4))
    assert CANDIDATES.tolist() == expected and len(expected) == 126


def test_pattern_fit_takes_the_most_frequent_best_patterns():
    a, b, c = 0b000011011, 0b110110000, 0b000001111
    kernel = {bits: np.array([bits >> k & 1 for k in range(9)], np.float32).reshape(3, 3) + 0.01 for bits in (a, b, c)}
    first = np.stack([kernel[b], kernel[a], kernel[a]])[:, None]
    second = np.stack([kernel[a], kernel[b], kernel[c]])[None]
    fitted = Pattern(2).fit([first, second])
    assert fitted.patterns == (a, b)  # a three times, b twice, c once
    mask = fitted.project(second, 2.25)
    assert reached(mask) == 2.25
    np.testing.assert_array_equal(mask[0, 0], kernel[a] > 0.5)
    np.testing.assert_array_equal(mask[0, 1], kernel[b] > 0.5)


def test_pattern_connectivity_drops_whole_kernels(rng):
    weight = rng.standard_normal((8, 8, 3, 3)).astype(np.float32)
    kept = Pattern(8).project(weight, 9).sum(axis=(2, 3))
    assert set(kept.ravel().tolist()) == {0, 4} and (kept > 0).sum() == 16


def test_pattern_says_that_it_reaches_its_least_rate(rng):
    weight = rng.standard_normal((4, 4, 3, 3))
    with pytest.warns(UserWarning, match="2.25 for pattern"):
        assert reached(Pattern(8).project(weight, 1.5)) == 2.25


def test_column_pruning_in_row_groups_on_a_1x1_layer():
    weight = np.ones((4, 3, 1, 1), np.float32)
    weight[:2, 1] = weight[2:, 2] = 0.1
    expected = np.array([[1, 0, 1], [1, 0, 1], [1, 1, 0], [1, 1, 0]], bool).reshape(4, 3, 1, 1)
    np.testing.assert_array_equal(BlockPunched(2, 1).project(weight, 1.5), expected)


@pytest.mark.parametrize("scheme", [*ALL, Pattern(4, (15, 23, 27, 29))], ids=str)
def test_text_and_json_round_trip(scheme):
    assert from_json(json.loads(json.dumps(scheme.to_json()))) == scheme
    choice = Choice(scheme, 8.2)
    assert Choice.from_json(json.loads(json.dumps(choice.to_json()))) == choice
    assert str(choice) == f"{scheme}@8.2x"
    if getattr(scheme, "patterns", None) is None:
        assert parse(str(scheme)) == scheme and hash(parse(str(scheme))) == hash(scheme)


def test_text_forms():
    assert [str(s) for s in ALL[:6]] == [
        "unstructured", "filter", "channel", "pattern(8)", "block(8x4)", "block_punched(8x4)",
    ]  # fmt: skip
    assert parse("pattern") == Pattern(8)
    assert list(SCHEMES) == ["unstructured", "filter", "channel", "pattern", "block", "block_punched"]
    assert Block(8, 4) != BlockPunched(8, 4)
    assert BlockPunched(np.int64(8), np.int32(4)).to_json() == {"name": "block_punched", "p": 8, "q": 4}


@pytest.mark.parametrize(
    "text", ["block", "block(8)", "filter(3)", "block_punched(0x4)", "block[8x4]", "pattern(127)", ""]
)
def test_bad_text(text):
    with pytest.raises(ValueError, match="Expected"):
        parse(text)


def test_unknown_scheme_lists_the_known_ones():
    with pytest.raises(KeyError, match="block_punched"):
        parse("banana(8x4)")
    with pytest.raises(KeyError, match="block_punched"):
        from_json({"name": "banana"})
    with pytest.raises(ValueError, match="parameters of block"):
        from_json({"name": "block", "rows": 3})


def test_bad_parameters():
    for scheme, *values in [(Block, 0, 4), (BlockPunched, 8, 2.5), (Pattern, 0), (Pattern, 2, (15, 15)),
                            (Pattern, 2, (15, 1)), (Choice, Filter(), 0.5), (Choice, Filter(), np.nan)]:  # fmt: skip
        with pytest.raises(ValueError, match="Expected"):
            scheme(*values)
    with pytest.raises(TypeError, match="Expected a scheme"):
        Choice("filter", 2.0)


@pytest.mark.parametrize("scheme", ALL, ids=str)
def test_bad_weights(scheme):
    weight = np.ones((4, 4, 3, 3) if scheme.name == "pattern" else (4, 4, 1, 1), np.float32)
    for bad_rate in (0.9, 0, -1, np.inf, np.nan, "2"):
        with pytest.raises(ValueError, match="rate"):
            scheme.project(weight, bad_rate)
    with pytest.raises(ValueError, match="divide P = 4"):
        scheme.project(weight, 2, groups=3)
    with pytest.raises(ValueError, match=r"shape \(4,\)"):
        scheme.project(np.ones(4), 2)
    with pytest.raises(ValueError, match="empty"):
        scheme.project(weight[:0], 2)
    weight[1, 2] = np.nan
    with pytest.raises(ValueError, match="finite"):
        scheme.project(weight, 2)


def test_legal_gives_a_reason():
    def layer(*shape):
        return SimpleNamespace(shape=shape)

    assert Pattern(8).legal(layer(8, 8, 3, 3)) == (True, "")
    for scheme, shape in [(Pattern(8), (8, 8, 1, 1)), (Pattern(8), (8, 8)), (Block(8, 4), (8, 8, 3, 3)),
                          (BlockPunched(8, 4), (8, 8)), (Filter(), (8, 8, 3))]:  # fmt: skip
        legal, reason = scheme.legal(layer(*shape))
        assert not legal and scheme.name in reason
    assert all(Block(8, 4).legal(layer(*shape))[0] for shape in [(8, 8), (8, 8, 1, 1)])


def test_reached():
    assert reached(np.array([True, False, False, False])) == 4.0
    assert reached(np.zeros(3, bool)) == np.inf
