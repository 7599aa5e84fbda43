"""A public checkpoint -> a classifier of the embedded hand signs -> a LiteRT file.

    python examples/fine_tune.py hf:timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k

SOURCE is a public checkpoint: a file, a folder, or hf:OWNER/NAME (with the extra `hub`). The model
comes from it: positions are resampled to 64 x 64 pixels, the head is new.

Tried without network, with a random ViT-Ti: 7 s until training begins, an epoch takes 80 s on two
slow and busy cores, 26 % of the validation photos after five epochs; the LiteRT file differs by
2e-6. Public weights start far ahead of random ones.
"""

import sys

import numpy as np

import keras_vitnt as kv
from keras_vitnt import datasets, training

source, size, epochs = sys.argv[1], (64, 64), 5
train, validation, classes = kv.load_dataset("embedded")
model, report = kv.from_checkpoint(
    source, report=True, input_shape=(*size, 3), classes=len(classes), drop_path=0.1
)
print(report)

preprocessing = kv.preprocessing(source, size)
train, _ = datasets.decode_all(train, preprocessing)
validation, _ = datasets.decode_all(validation, preprocessing)
batches = datasets.Batches(train, preprocessing, batch_size=32, augment=training.augment)
held_out = datasets.Batches(validation, preprocessing, batch_size=128)

training.compile_model(model, epochs * len(batches), lr=1e-4)
model.fit(batches, validation_data=held_out, epochs=epochs)

photos = np.stack([held_out.pixels(i) for i in range(len(validation.labels))])
labelled = dict(photos=photos, labels=validation.labels, names=classes)
print(kv.export(model, "fine_tuned.tflite", preprocessing=preprocessing, **labelled).comparison)
