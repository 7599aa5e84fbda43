"""A TNT as the backbone of a dense task: maps of chosen blocks, and a head for each pixel.

    python examples/dense_features.py

Prints the shapes of the maps and of the per-pixel logits; a few seconds.
"""

import keras
import numpy as np

import keras_vitnt as kv

backbone = kv.features(kv.TNT("Ti/16", input_shape=(128, 192, 3)), indices=(3, 7, 11))
images = keras.Input((128, 192, 3))
maps = backbone(images)  # 3 x (B, 8, 12, 192)
x = keras.layers.Concatenate()(maps)  # (B, 8, 12, 576)
x = keras.layers.Conv2D(21, 1)(x)
segmenter = keras.Model(images, keras.layers.UpSampling2D(16, interpolation="bilinear")(x))

photos = np.zeros((2, 128, 192, 3), "float32")
print("maps", [tuple(m.shape) for m in backbone(photos)])
print("logits", segmenter(photos).shape)
