"""Memory and time of loading ViT-L/16, against reading the file and assigning random arrays.

    python benchmarks/load_weights.py [--model vit:L/16] [--rounds 5]

Writes the model's 1.2 GB under timm's names to a temporary file; loads it `rounds` times, in turn
with reading the file's bytes and assigning ready arrays to all variables. About two minutes.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import keras
import numpy as np

import keras_vitnt as kv


def memory(field):
    """A field of /proc/self/status in bytes: VmRSS now, VmHWM at its highest."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def timed(action):
    """(seconds, the highest resident memory meanwhile above that before) of an action."""
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    before, start = memory("VmRSS"), time.perf_counter()
    action()
    return time.perf_counter() - start, memory("VmHWM") - before


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="vit:L/16")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    model = kv.create_model(arguments.model)
    rng = np.random.default_rng(0)
    arrays = [rng.random(v.shape, "float32") for v in model.weights]

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.safetensors"
        kv.save_weights(model, file)
        size = file.stat().st_size
        saved = [keras.ops.convert_to_numpy(v) for v in model.weights[:40]]

        def plain():
            file.read_bytes()
            for variable, array in zip(model.weights, arrays):
                variable.assign(array)

        rows = [
            (timed(plain), timed(lambda: kv.load_weights(model, file)))
            for _ in range(arguments.rounds)
        ]
        for variable, array in zip(model.weights, saved):
            np.testing.assert_array_equal(keras.ops.convert_to_numpy(variable), array)

    reading, loading = (statistics.median(row[i][0] for row in rows) for i in (0, 1))
    peak = max(row[1][1] for row in rows)
    print(f"{arguments.model} on {keras.backend.backend()}: file {size / 1e9:.2f} GB")
    print(
        f"read and assign {reading:.2f} s, load_weights {loading:.2f} s: {loading / reading:.2f} x"
    )
    print(f"peak over the built model {peak / 1e9:.2f} GB: {peak / size:.2f} x the file")
    print(json.dumps({"time_ratio": loading / reading, "memory_ratio": peak / size}))


if __name__ == "__main__":
    main()
