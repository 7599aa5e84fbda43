"""What Keras says: python reference.py MODEL_FOLDER NEW_FOLDER PHOTO... -> JSON {path: logits}.

Beside the given photos come embedded validation photos and edited ones, written to NEW_FOLDER; so
is a file of the model that takes pixels, `uint8/model.tflite`.
"""

import io
import json
import sys
from pathlib import Path

import keras
import numpy as np
import PIL
from PIL import ExifTags, Image

import keras_vitnt as kv
from keras_vitnt.images import Preprocessing, load

model_folder, new_folder, *photos = sys.argv[1:]
sources = kv.load_dataset("embedded")[1].sources
for i in range(0, 300, 50):
    photos.append(f"{new_folder}/validation{i}.webp")
    Path(photos[-1]).write_bytes(sources[i])

image = Image.open(io.BytesIO(sources[7])).convert("RGB")
sizes = [(13, 9), (9, 14), (1, 1), (901, 640), (480, 800)]  # smaller and larger than the model's
if int(PIL.__version__.split(".")[0]) >= 13:  # before, PIL rounded tall photos in another order
    sizes.append((333, 1024))
for width, height in sizes:
    photos.append(f"{new_folder}/{width}x{height}.png")
    image.resize((width, height), Image.Resampling.BICUBIC).save(photos[-1])

photos.append(f"{new_folder}/turned.jpg")  # its EXIF data says: turn it by 90 degrees
exif = Image.Exif()
exif[ExifTags.Base.Orientation] = 6
image.resize((80, 64)).save(photos[-1], quality=90, exif=exif)

record = json.loads(Path(model_folder, "metrics.json").read_text())
preprocessing = Preprocessing(**record["preprocessing"])
model = keras.saving.load_model(Path(model_folder, "model.keras"))
logits = model.predict(np.stack([load(photo, preprocessing) for photo in photos]), verbose=0)
kv.export(model_folder, f"{new_folder}/uint8/model.tflite", input="uint8")
print(json.dumps(dict(zip(photos, logits.tolist()))))
