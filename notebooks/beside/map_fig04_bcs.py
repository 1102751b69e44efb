"""The example of mapping Fig. 4, completed: the text gives fragments, the figure itself is not at hand."""

import numpy as np


def paper_example() -> np.ndarray:
    """A float32 (8, 8) weight. The paper's: weights 1, 2, 3 in columns 0, 3, 6 (compact column [0, 3, 6], column stride
    [0, 3]), which rows 0 and 1 share (occurrence [0, 2]). Ours: the size, the weights from 4 on, rows 2 to 7."""
    weight = np.zeros((8, 8), np.float32)
    weight[:2, [0, 3, 6]] = np.arange(1, 7).reshape(2, 3)
    weight[2:6, [1, 2, 5]] = np.arange(7, 19).reshape(4, 3)
    weight[6, [4, 7]] = 19, 20
    return weight
