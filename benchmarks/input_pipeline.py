"""What the input pipeline costs a training step on TensorFlow, on the embedded photos.

    python benchmarks/input_pipeline.py

Trains the same model on the same batches, given as a `PyDataset` (Keras makes it a
`Dataset.from_generator`) and as `Batches.tf_dataset()`; each in processes of its own, in turn,
because what the first does to the memory allocator stays: it gives memory back after every step,
and each page that is asked for anew is a fault, which machines take dear or cheap. Two minutes.
"""

import os
import subprocess
import sys

import numpy as np

ONE = """
import resource, sys, time
import keras
from keras_vitnt import TNT, datasets, images, load_dataset, training
preprocessing = images.Preprocessing((32, 32))
photos, _ = datasets.decode_all(load_dataset("embedded")[0], preprocessing)
batches = datasets.Batches(photos, preprocessing, 32, training.augment)
model = TNT("Nano/8", input_shape=(32, 32, 3), classes=10)
training.compile_model(model, 1000)
given = batches.tf_dataset() if sys.argv[1] == "tf_dataset" else batches
model.fit(given, verbose=0)
faults, start = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, time.perf_counter()
model.fit(given, verbose=0, epochs=2)
seconds, steps = time.perf_counter() - start, 2 * len(batches)
faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
print(1e3 * seconds / steps, faults / steps)
"""
WAYS = ("PyDataset", "tf_dataset")

times = {way: [] for way in WAYS}
environment = dict(os.environ, KERAS_BACKEND="tensorflow", TF_CPP_MIN_LOG_LEVEL="3")
for _ in range(2):
    for way in WAYS:
        done = subprocess.run(
            [sys.executable, "-c", ONE, way],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        times[way].append([float(figure) for figure in done.stdout.split()[-2:]])
for way in WAYS:
    milliseconds, faults = np.median(times[way], axis=0)
    print(f"{way:12} {milliseconds:6.0f} ms and {faults:5.0f} page faults per step")
