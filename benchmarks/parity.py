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

from helpers import CASES, REFERENCE, numpy, weights_file  # noqa: E402
from test_parity import stages  # noqa: E402

from keras_vitnt import load_weights  # noqa: E402

print(f"{keras.backend.backend()}, Keras {keras.version()}")
for case, (builder, options) in CASES.items():
    model = builder(**options)
    load_weights(model, weights_file(case))
    expected = dict(np.load(REFERENCE / f"{case}.npz"))
    image = expected.pop("image")
    found = stages(model, case)
    values = keras.Model(model.input, {name: found[name] for name in expected})(image)
    worst = max(
        np.abs(numpy(values[name]).reshape(y.shape) - y).max() / max(1, np.abs(y).max())
        for name, y in expected.items()
    )
    print(f"{case:28} {worst:.1e}")
