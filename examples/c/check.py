"""Build classify.c and compare its answers with Keras' and with LiteRT's in Python.

    python examples/c/check.py

Needs the installed package and gcc, or the compiler that CC names.
"""

import os
import subprocess
import tempfile
from pathlib import Path

import ai_edge_litert
import keras
import numpy as np
from ai_edge_litert.interpreter import Interpreter

import keras_vitnt as kv
from keras_vitnt import images

HERE = Path(__file__).resolve().parent
RUN = HERE.parents[1] / "saved_models" / "signs"
LIBRARY = Path(ai_edge_litert.__file__).parent / "libLiteRt.so"
TOLERANCE = 1e-3  # of a logit


def build(program):
    flags = ["-O2", "-Wall", "-Wextra", "-Werror", f"-Wl,-rpath,{LIBRARY.parent}"]
    compiler = os.environ.get("CC", "gcc")
    subprocess.run(
        [compiler, *flags, HERE / "classify.c", LIBRARY, "-lm", "-o", program], check=True
    )


def in_python(path, photos):
    """The file's logits of each photo, by LiteRT's Python interpreter."""
    interpreter = Interpreter(str(path), num_threads=2)
    interpreter.allocate_tensors()
    source, target = interpreter.get_input_details()[0], interpreter.get_output_details()[0]
    rows = []
    for photo in photos:
        interpreter.set_tensor(source["index"], photo[None])
        interpreter.invoke()
        rows.append(interpreter.get_tensor(target["index"])[0])
    return np.stack(rows)


def in_c(program, path, files):
    """The file's logits of each PPM, by classify.c; its five best must be theirs."""
    names = (RUN / "labels.txt").read_text().split()
    rows = []
    for file in files:
        words = [program, path, RUN / "labels.txt", file, "--logits"]
        done = subprocess.run(words, capture_output=True, text=True, check=True)
        assert "does not run all" not in done.stderr, done.stderr
        lines = done.stdout.splitlines()
        rows.append(np.array(lines[5:], float))
        shares = np.exp(rows[-1]) / np.exp(rows[-1]).sum()
        best = np.argsort(-shares)[:5]
        assert [line.split()[1] for line in lines[:5]] == [names[i] for i in best], lines
        shown = [float(line.split("%")[0]) for line in lines[:5]]
        np.testing.assert_allclose(shown, 100 * shares[best], atol=0.006)
    return np.stack(rows)


def refusals(program, good, folder):
    """Wrong arguments must end in one line and status 1."""
    (folder / "small.ppm").write_bytes(b"P6 4 4 255\n" + bytes(48))
    (folder / "cut.ppm").write_bytes(good.read_bytes()[:-1])
    (folder / "cut.tflite").write_bytes((RUN / "model.tflite").read_bytes()[:100_000])
    model, labels = RUN / "model.tflite", RUN / "labels.txt"
    for words in (
        (model, labels),
        (folder / "none.tflite", labels, good),
        (labels, labels, good),
        (folder / "cut.tflite", labels, good),
        (model, RUN / "metrics.json", good),
        (model, labels, folder / "none.ppm"),
        (model, labels, labels),
        (model, labels, folder / "small.ppm"),
        (model, labels, folder / "cut.ppm"),
    ):
        done = subprocess.run([program, *words], capture_output=True, text=True)
        assert done.returncode == 1 and done.stderr.count("\n") == 1, (words, done)
        print("refused:", done.stderr.strip().replace(f"{folder}/", "").replace(f"{RUN}/", ""))


def main():
    preprocessing = images.Preprocessing((32, 32))
    sources = kv.load_dataset("embedded")[1].sources[::103]  # 4 photos
    pixels = np.stack([images.fit(images.decode(source), preprocessing) for source in sources])
    photos = pixels / np.float32(127.5) - 1  # to the bit as in C: an int8 file rounds inside, and
    # an input other by 6e-8 (images.normalize) can change its logits by hundredths
    model = keras.models.load_model(RUN / "model.keras", compile=False)
    expected = model.predict(images.normalize(pixels, preprocessing), verbose=0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        program, files = folder / "classify", []
        build(program)
        for i, photo in enumerate(pixels):
            files.append(folder / f"{i}.ppm")
            files[i].write_bytes(b"P6\n32 32\n255\n" + photo.tobytes())
        for file in ("model.tflite", "model_int8.tflite"):
            logits = in_c(program, RUN / file, files)
            to_keras = np.abs(logits - expected).max()
            to_python = np.abs(logits - in_python(RUN / file, photos)).max()
            same = (logits.argmax(1) == expected.argmax(1)).sum()
            print(
                f"{file}: {len(files)} photos, {logits.size} logits up to "
                f"{np.abs(expected).max():.2f}; largest difference to Keras {to_keras:.1e}, to "
                f"LiteRT in Python {to_python:.1e}; the same answer for {same}"
            )
            assert to_python <= TOLERANCE and same == len(files)
            assert to_keras <= TOLERANCE or "int8" in file
        refusals(program, files[0], folder)


if __name__ == "__main__":
    main()
