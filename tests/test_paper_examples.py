"""The fragments mapping 4.3 gives of Fig. 4, literally, and the whole example as we completed it, by hand."""

import numpy as np
import pytest

from nbs_lib.formats import BCS, CSR
from notebooks.beside.map_fig04_bcs import paper_example

# The example is ours beyond the paper's fragments: its size, the weights from 4 on, and rows 2 to 7.
WEIGHT = [
    [1, 0, 0, 2, 0, 0, 3, 0],
    [4, 0, 0, 5, 0, 0, 6, 0],
    [0, 7, 8, 0, 0, 9, 0, 0],
    [0, 10, 11, 0, 0, 12, 0, 0],
    [0, 13, 14, 0, 0, 15, 0, 0],
    [0, 16, 17, 0, 0, 18, 0, 0],
    [0, 0, 0, 0, 19, 0, 0, 20],
    [0, 0, 0, 0, 0, 0, 0, 0],
]
ARRAYS = {
    "weights": [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20],
    "compact_column": [0, 3, 6, 1, 2, 5, 4, 7],
    "column_stride": [0, 3, 6, 8, 8],
    "occurrence": [0, 2, 6, 7, 8],
    "row_offset": [0, 3, 6, 9, 12, 15, 18, 20, 20],
}


@pytest.mark.parametrize("reorder", [True, False])
def test_the_fragments_the_text_gives(reorder):
    packed = BCS.pack(paper_example(), reorder=reorder)
    assert packed.weights[:3].tolist() == [1, 2, 3]
    assert packed.compact_column[:3].tolist() == [0, 3, 6], "column ids of the first three weights"
    assert packed.column_stride[:2].tolist() == [0, 3], "the first row's ids are at 0, 1 and 2"
    assert packed.occurrence[:2].tolist() == [0, 2], "rows 0 and 1 share them"


@pytest.mark.parametrize("reorder", [True, False])
def test_the_completed_example_by_hand(reorder):
    assert paper_example().dtype == np.float32 and paper_example().tolist() == WEIGHT
    packed = BCS.pack(paper_example(), reorder=reorder)
    assert {name: getattr(packed, name).tolist() for name in ARRAYS} == ARRAYS
    assert packed.row_order.tolist() == [0, 1, 2, 3, 4, 5, 6, 7], "its rows are in order already"
    assert packed.unpack().tolist() == WEIGHT


def test_reordering_brings_shuffled_rows_back_together():
    shuffled = [2, 7, 0, 3, 6, 4, 1, 5]
    packed = BCS.pack(paper_example()[shuffled])
    # lists as long as each other go by first appearance: rows 2, 3, 4, 5 of the example now lead rows 0, 1
    assert [shuffled[row] for row in packed.row_order] == [2, 3, 4, 5, 0, 1, 6, 7]
    assert packed.compact_column.tolist() == [1, 2, 5, 0, 3, 6, 4, 7]
    assert packed.occurrence.tolist() == [0, 4, 6, 7, 8]
    assert packed.unpack().tolist() == [WEIGHT[row] for row in shuffled]


def test_bytes_of_the_example_by_hand():
    bcs, csr = BCS.pack(paper_example()).bytes, CSR.pack(paper_example()).bytes
    assert bcs["dense"] == 4 * 64 and bcs["weights"] == csr["weights"] == 4 * 20
    assert bcs["index"] == 4 * (8 + 5 + 5 + 9) == 108
    assert csr["index"] == 4 * (20 + 9) == 116
