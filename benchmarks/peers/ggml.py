"""What do random weights look like in the block formats that chatglm.cpp and llama.cpp share?

A block holds a float16 scale and 32 integers: Q4_0 in 16 bytes, Q8_0 in 32. Needs numpy alone.
"""

import numpy as np
from numpy.typing import NDArray

BLOCK = 32
INTEGER_BYTES = {"q4_0": 16, "q8_0": 32}
DEVIATION = 0.02  # of the weights
LARGEST = {"q4_0": 8, "q8_0": 128}


def row_bytes(columns: int, kind: str) -> int:
    return columns // BLOCK * (2 + INTEGER_BYTES[kind])


def random_blocks(rows: int, columns: int, kind: str) -> NDArray[np.uint8]:
    """The bytes ``[rows, bytes of a row]`` of a weight ``[rows, columns]``."""
    blocks = rows * columns // BLOCK
    found = np.empty((blocks, 2 + INTEGER_BYTES[kind]), dtype=np.uint8)
    scale = np.float16(DEVIATION * 3**0.5 / LARGEST[kind])
    found[:, :2] = np.frombuffer(scale.tobytes(), dtype=np.uint8)
    found[:, 2:] = np.random.default_rng(0).integers(0, 256, (blocks, INTEGER_BYTES[kind]), dtype=np.uint8)
    return found.reshape(rows, -1)
