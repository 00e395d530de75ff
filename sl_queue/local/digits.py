"""The demo's handwritten digits; digits.md says where they come from."""

from importlib.resources import files

import numpy as np
import numpy.typing as npt


def read_digits() -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """Return the images, shape (rows, 8, 8) with values from 0 to 16, and the digit that each shows."""
    with files("sl_queue.local").joinpath("digits.npz").open("rb") as file, np.load(file) as arrays:
        return arrays["images"], arrays["target"]
