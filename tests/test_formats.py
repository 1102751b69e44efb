"""Packed formats: bit-exact round trips, the arrays of a plain-loop packer, honest byte counts, refusals by name."""

import numpy as np
import pytest

from nbs_lib.formats import BCS, CSR, FORMATS
from nbs_lib.formats.packed import alike

ROOM = list(FORMATS.values())
MATRICES = [(1, 1), (1, 17), (17, 1), (7, 9), (8, 16)]
TENSORS = [(13, 8, 3, 3), (9, 7, 1, 1), (16, 1, 3, 3), (1, 5, 5, 1), (6, 4, 1, 7)]
SHAPES = MATRICES + TENSORS


def random_weight(shape, seed=0):
    weight = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    weight[weight == 0] = 1
    return weight


def punched(shape, p, q, density, seed=0):
    """A mask as block-punched pruning leaves it: p filters x q channels live and die together at each (kh, kw)."""
    blocks = np.random.default_rng(seed).random((-(-shape[0] // p), -(-shape[1] // q), *shape[2:])) < density
    return blocks.repeat(p, 0).repeat(q, 1)[: shape[0], : shape[1]]


def masks(shape):
    """Zeros as each kind of pruning leaves them."""
    rng = np.random.default_rng(1)
    rows, columns = rng.random(shape[0]) < 0.5, rng.random(shape[1]) < 0.5
    yield "dense", np.ones(shape, bool)
    yield "empty", np.zeros(shape, bool)
    yield "unstructured", rng.random(shape) < 0.3
    yield "filter", np.broadcast_to(rows.reshape(-1, *[1] * (len(shape) - 1)), shape)
    yield "channel", np.broadcast_to(columns.reshape(1, -1, *[1] * (len(shape) - 2)), shape)
    for p, q in [(1, 1), (8, 4), (4, 3), (100, 100)]:
        yield f"block_punched({p}x{q})", punched(shape, p, q, 0.4)
    yield "block", np.broadcast_to(rows.reshape(-1, *[1] * (len(shape) - 1)), shape) & punched(shape, 4, 4, 0.5)
    if shape[2:] == (3, 3):
        patterns = np.array([[1, 1, 0, 1, 1, 0, 0, 0, 0], [0, 1, 0, 1, 1, 1, 0, 0, 0], [0] * 9], bool)
        yield "pattern", patterns[rng.integers(0, 3, shape[:2])].reshape(shape)


def same_bits(a, b):
    return a.dtype == b.dtype == np.float32 and a.shape == b.shape and a.tobytes() == b.tobytes()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("options", [{}, {"reorder": False}], ids=["default", "in_place"])
def test_round_trip_is_bit_exact_for_every_kind_of_zeros(shape, options):
    for name, mask in masks(shape):
        weight = random_weight(shape) * mask
        for kind in [BCS] if options else ROOM:
            packed = kind.pack(weight, **options)
            assert same_bits(packed.unpack(), weight + np.float32(0)), (kind.__name__, name)
            assert packed.nnz == np.count_nonzero(weight) and (packed.weights != 0).all()


@pytest.mark.parametrize("kind", ROOM)
def test_only_what_equals_zero_is_dropped(kind):
    weight = np.array([[np.nan, -0.0, np.inf, 1e-45], [0.0, -np.inf, -0.0, -1e-45]], np.float32)
    weight.view(np.uint32)[0, 0] = 0xFFA00001  # a signalling NaN with a payload
    back = kind.pack(weight).unpack()
    expected = weight.copy()
    expected[[0, 1], [1, 2]] = 0.0  # -0.0 is a zero and comes back as +0.0
    assert same_bits(back, expected)


@pytest.mark.parametrize("kind", ROOM)
def test_views_and_foreign_memory_orders_pack_like_copies(kind):
    weight = np.abs(random_weight((9, 12))) * punched((9, 12), 3, 2, 0.5)
    for view in (np.asfortranarray(weight), weight[::-1, ::2], weight.T, np.broadcast_to(weight[:1], (5, 12))):
        assert same_bits(kind.pack(view).unpack(), np.ascontiguousarray(view))


def naive_bcs(matrix, reorder):
    """BCS by plain loops: rows grouped by their column lists, longest list first, equal ones by first appearance."""
    lists = [[c for c, value in enumerate(row) if value != 0] for row in matrix]
    order = list(range(len(matrix)))
    if reorder:
        order.sort(key=lambda row: (-len(lists[row]), lists.index(lists[row]), row))
    columns, stride, occurrence, offset, weights = [], [0], [0], [0], []
    for place, row in enumerate(order):
        if place and lists[row] == lists[order[place - 1]]:
            occurrence[-1] = place + 1
        else:
            columns += lists[row]
            stride.append(len(columns))
            occurrence.append(place + 1)
        weights += [matrix[row][c] for c in lists[row]]
        offset.append(len(weights))
    return weights, columns, stride, occurrence, offset, order


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("reorder", [True, False])
def test_bcs_arrays_equal_a_plain_loop_packer(shape, reorder):
    for name, mask in masks(shape):
        weight = random_weight(shape) * mask
        packed = BCS.pack(weight, reorder=reorder)
        names = ["weights", "compact_column", "column_stride", "occurrence", "row_offset", "row_order"]
        for array, expected in zip(names, naive_bcs(weight.reshape(shape[0], -1), reorder), strict=True):
            assert getattr(packed, array).tolist() == expected, (name, array)
            assert getattr(packed, array).dtype == (np.float32 if array == "weights" else np.int32)


def test_csr_arrays_by_hand():
    packed = CSR.pack(np.array([[0, 5, 0], [0, 0, 0], [7, 0, 8]], np.float32))
    assert packed.weights.tolist() == [5, 7, 8]
    assert packed.column_index.tolist() == [1, 0, 2]
    assert packed.row_offset.tolist() == [0, 1, 1, 3]
    assert packed.bytes == {"dense": 36, "weights": 12, "column_index": 12, "row_offset": 16, "index": 28, "total": 40}


def test_reordering_joins_shuffled_rows_and_has_an_inverse():
    mask = punched((64, 40), 8, 4, 0.4)
    shuffle = np.random.default_rng(2).permutation(64)
    weight = (random_weight((64, 40)) * mask)[shuffle]
    packed, in_place = BCS.pack(weight), BCS.pack(weight, reorder=False)
    assert packed.occurrence.size - 1 == len({row.tobytes() for row in weight != 0}) < in_place.occurrence.size - 1
    assert packed.row_order[packed.inverse_order].tolist() == list(range(64))
    lengths = np.diff(packed.column_stride)
    assert (np.diff(lengths) <= 0).all(), "runs go from most to fewest non-zeros"
    assert packed.bytes["index"] < in_place.bytes["index"]


def test_alike_rows_are_grouped_in_the_order_they_came():
    kept = np.array([[1, 0, 1], [0, 0, 0], [1, 0, 1], [0, 1, 1], [0, 0, 0], [1, 0, 1]], bool)
    assert [rows.tolist() for rows in alike(kept)] == [[0, 2, 5], [1, 4], [3]]
    assert [rows.tolist() for rows in alike(np.ones((3, 20), bool))] == [[0, 1, 2]]


def test_groups_cover_every_row_once_with_its_own_weights():
    weight = random_weight((13, 4, 3, 3)) * punched((13, 4, 3, 3), 4, 2, 0.5)
    matrix = weight.reshape(13, -1)
    for packed in (BCS.pack(weight), BCS.pack(weight, reorder=False), CSR.pack(weight)):
        seen = []
        for rows, columns, block in packed.groups():
            assert block.shape == (len(rows), len(columns)) and (matrix[np.ix_(rows, columns)] == block).all()
            seen += rows.tolist()
        assert sorted(seen) == list(range(13))


@pytest.mark.parametrize("kind", ROOM)
def test_bytes_are_those_of_the_arrays(kind):
    weight = random_weight((32, 16, 3, 3)) * punched((32, 16, 3, 3), 8, 4, 0.125)
    packed = kind.pack(weight)
    size = packed.bytes
    assert size["dense"] == weight.nbytes and size["weights"] == 4 * np.count_nonzero(weight)
    stored = {name: array.nbytes for name, array in vars(packed).items() if name not in ("shape", "weights")}
    assert {name: size[name] for name in stored} == stored
    assert size["index"] == sum(stored.values()) and size["total"] == size["weights"] + size["index"]


def test_a_row_order_costs_bytes_only_where_rows_moved():
    weight = random_weight((4, 5))
    assert BCS.pack(weight).bytes["row_order"] == 0
    assert BCS.pack(np.tril(weight)).bytes["row_order"] == 4 * 4
    assert BCS.pack(np.tril(weight), reorder=False).bytes["row_order"] == 0


@pytest.mark.parametrize("p", [2, 4, 8, 16])
def test_bcs_is_smaller_than_csr_where_rows_share_columns(p):
    weight = random_weight((128, 64, 3, 3)) * punched((128, 64, 3, 3), p, 4, 1 / 8)
    bcs, csr = BCS.pack(weight).bytes, CSR.pack(weight).bytes
    assert bcs["compact_column"] * p == csr["column_index"], "p rows share one list"
    assert bcs["index"] < csr["index"] and bcs["total"] < csr["total"]


@pytest.mark.parametrize("kind", ROOM)
@pytest.mark.parametrize(
    "weight", [np.zeros((3, 3)), np.zeros(3, np.float32), np.zeros((2, 3, 4), np.float32), np.zeros((0, 3), np.float32)]
)
def test_other_arrays_are_refused(kind, weight):
    with pytest.raises(ValueError, match="Expected a float32 weight"):
        kind.pack(weight)
