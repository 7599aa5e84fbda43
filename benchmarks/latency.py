"""Time one photo through each file of a run, side by side in one process.

    python benchmarks/latency.py saved_models/signs

The files take turns, so that a noisy machine is noisy for all; medians count. Before, every
file must give what `model.keras` gives: float32 within 1e-4 of the largest logit, int8 the
same top-1 answer on most photos.
"""

import argparse
from pathlib import Path

import numpy as np

import keras_vitnt as kv
from keras_vitnt.conversion import size_of
from keras_vitnt.gate import latencies, open_model

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("run", type=Path, help="run folder")
folder = parser.parse_args().run

names = ["model.keras", "saved_model", "model.tflite", "model_int8.tflite"]
files = [folder / name for name in names if (folder / name).exists()]
models = {file.name: open_model(file) for file in files}
shape = models["model.keras"][1]
_, validation, _ = kv.load_dataset("embedded")
preprocessing = kv.images.Preprocessing(shape[:2])
photos = np.stack([kv.images.load(source, preprocessing) for source in validation.sources[::8]])

expected = models["model.keras"][0](photos)
for name, (run, *_) in models.items():
    logits = run(photos)
    if "int8" in name:
        assert (logits.argmax(-1) == expected.argmax(-1)).mean() > 0.9, name
    else:
        assert np.abs(logits - expected).max() <= 1e-4 * max(1, np.abs(expected).max()), name

runs = {name: lambda run=run: run(photos[:1]) for name, (run, *_) in models.items()}
times = latencies(runs, rounds=200, seconds=600)

print("| file | size | median of a photo |")
print("| --- | ---: | ---: |")
for file in files:
    print(f"| `{file.name}` | {size_of(file) / 1e6:.2f} MB | {times[file.name]:.2f} ms |")
