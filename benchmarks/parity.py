"""How far each reference case is from the public implementation's outputs.

    KERAS_BACKEND=jax python benchmarks/parity.py

Prints, per case, the largest difference of any stage relative to its largest value (at
least 1); under a minute.
"""

import sys
from pathlib import Path

import keras
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from helpers import CASES  # noqa: E402
from test_parity import compare_stages  # noqa: E402

print(f"{keras.backend.backend()}, Keras {keras.version()}")
for case in CASES:
    worst = max(np.abs(x - y).max() / max(1, np.abs(y).max()) for _, x, y in compare_stages(case))
    print(f"{case:28} {worst:.1e}")
