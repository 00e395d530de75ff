"""Write the demo's digits, sl_queue/local/digits.npz, from scikit-learn's copy: `python ops/digits.py`.

Its source and licence stand in sl_queue/local/digits.md. The file is the same byte for byte each time.
"""

from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits

FILE = Path(__file__).parents[1] / "sl_queue" / "local" / "digits.npz"


def main() -> None:
    digits = load_digits()
    arrays = {"images": digits.images.astype(np.uint8), "target": digits.target.astype(np.uint8)}
    assert all((arrays[name] == digits[name]).all() for name in arrays), "not whole numbers below 256"
    np.savez_compressed(FILE, **arrays)
    print(f"{FILE}: {FILE.stat().st_size} bytes")


if __name__ == "__main__":
    main()
