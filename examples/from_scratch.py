"""Train a small ViT on the embedded photos of hand signs with `model.fit`.

    python examples/from_scratch.py

Any Keras backend (KERAS_BACKEND=jax, torch or tensorflow); five epochs, 72 s on two slow
cores, 59 % of the augmented training photos. The command `keras-vitnt train`
does this for longer, and exports.
"""

import keras_vitnt as kv
from keras_vitnt import datasets, training

size, epochs = (32, 32), 5
preprocessing = kv.images.Preprocessing(size)
train, validation, classes = kv.load_dataset("embedded")
train, _ = datasets.decode_all(train, preprocessing)
validation, _ = datasets.decode_all(validation, preprocessing)

batches = datasets.Batches(train, preprocessing, batch_size=32, augment=training.augment)
held_out = datasets.Batches(validation, preprocessing, batch_size=128)

model = kv.ViT("Nano/8", input_shape=(*size, 3), classes=len(classes), positions="sincos2d")
training.compile_model(model, steps=epochs * len(batches))
model.fit(batches, validation_data=held_out, epochs=epochs)
