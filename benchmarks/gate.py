"""Every published size through the gate, with random weights and biases: float32, fp16 and int8.

    python benchmarks/gate.py [MODEL ...]

MODEL is FAMILY:SIZE/PATCH, as in `keras-vitnt models`; without any, all up to B/16 (a minute or two
each). A file that breaks a rule stops the run with the rule.
"""

import sys
import tempfile
from pathlib import Path

import keras

import keras_vitnt as kv
from keras_vitnt.export import export_all

MODELS = ["vit:Ti/16", "vit:S/16", "vit:B/16", "deit:S/16", "tnt:Ti/16", "tnt:S/16", "tnt:B/16"]

print("| model | file | partitions | difference | largest logit | cosine | of float32's size |")
print("| --- | --- | ---: | ---: | ---: | ---: | ---: |")
for name in sys.argv[1:] or MODELS:
    keras.utils.set_random_seed(0)
    model = kv.create_model(name, **({"distilled": True} if "deit" in name else {}))
    for weight in model.trainable_variables:  # biases too, which begin as zeros
        weight.assign_add(keras.random.normal(weight.shape, stddev=0.02))
    with tempfile.TemporaryDirectory() as folder:
        kinds = {Path(folder) / f"{kind}.tflite": kind for kind in (None, "fp16", "int8")}
        found = export_all(model, kinds)
    for file in found:
        compared = file.comparison
        print(
            f"| `{name}` | {file.quantize or 'float32'} | {file.structure['partitions']} "
            f"| {compared.max_difference:.1e} | {compared.largest_logit:.1f} "
            f"| {compared.cosine:.5f} | {file.bytes / found[0].bytes:.3f} |",
            flush=True,
        )
