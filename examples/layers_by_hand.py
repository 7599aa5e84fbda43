"""The layers composed by hand into a small ViT, as a functional Keras model.

    python examples/layers_by_hand.py

Prints the model's summary and one prediction's shape; a few seconds.
"""

import keras
import numpy as np

from keras_vitnt import PatchEncoder, Patches, TransformerBlock

images = keras.Input((72, 48, 3))
x = Patches(patch_size=6)(images)  # (B, 96, 108): 12 x 8 patches of 6 * 6 * 3 numbers
x = PatchEncoder(num_patches=96, projection_dim=64)(x)  # (B, 97, 64): a class token in front
for _ in range(4):
    x = TransformerBlock(num_heads=4, mlp_dim=128, drop_path=0.1)(x)
x = keras.layers.LayerNormalization(epsilon=1e-6)(x)
logits = keras.layers.Dense(10)(x[:, 0])  # the class token
model = keras.Model(images, logits)

model.summary()
print("logits", model.predict(np.zeros((2, 72, 48, 3)), verbose=0).shape)
