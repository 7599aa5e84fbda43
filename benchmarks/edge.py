"""ViT-S/16 and TNT-S/16 at 224 x 224, batch 1, two threads: our files beside timm's model.

    pip install timm onnx onnxscript onnxruntime openvino "keras-vitnt[torch]"
    KERAS_BACKEND=tensorflow python benchmarks/edge.py

All have the same weights (timm's, random; zeros and ones, as which biases and norms begin, would
be left out by converters, and are made random, too) and are checked on the same photo first:
float32 within 1e-3 of the largest logit, the others by the cosine of their logits. They take turns
in this process, in another order each round, and each timed call follows an untimed one: some
runtimes' threads go on spinning for a while after a call and would slow down the next. Medians
count; the 20th percentile ("fastest fifth") says more of small differences on a machine with loud
neighbours.
`--rewrites float32` or `int8` undoes each rewrite of the lean graph alone instead.
"""

import argparse
import json
import os
import random
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from unittest import mock

import numpy as np

import keras_vitnt as kv
from keras_vitnt import edge, edge_tnt, edge_vit, quantize
from keras_vitnt.export import real_photos
from keras_vitnt.gate import open_litert, structure

THREADS = 2
HEAD = 64  # columns of each of the two models' heads
MODELS = {"ViT-S/16": "vit_small_patch16_224", "TNT-S/16": "tnt_s_patch16_224"}


def litert(model, path, kind=None):
    """A lean LiteRT file, converted here, so that a rewrite can be undone."""
    import tensorflow as tf

    spec = tf.TensorSpec((1, *model.input_shape[1:]), tf.float32, name="images")
    run = tf.function(edge.lean(model, panels=not kind), input_signature=[spec])
    with tempfile.TemporaryDirectory() as folder:
        signatures = {"serving_default": run.get_concrete_function()}
        tf.saved_model.save(tf.Module(), folder, signatures)
        path.write_bytes(tf.lite.TFLiteConverter.from_saved_model(folder).convert())
    if kind:
        path.write_bytes(quantize.quantize(path, kind, quantize.float_by_default(path)))
    return path


def onnx_runtime(file, x):
    """A function of nothing."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = THREADS
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    given = {session.get_inputs()[0].name: x}
    return lambda: session.run(None, given)[0]


def open_vino(file, x, precision=None):
    """A function of nothing, and its precision, which OpenVINO chooses for None."""
    import openvino

    config = {"INFERENCE_NUM_THREADS": THREADS, "PERFORMANCE_HINT": "LATENCY"}
    if precision:
        config["INFERENCE_PRECISION_HINT"] = precision
    compiled = openvino.Core().compile_model(file, "CPU", config)
    precision = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
    return lambda: compiled(x)[compiled.output(0)], precision


def peers(name, theirs, x, folder):
    """timm's model in each runtime: {name: function of nothing}."""
    import torch
    from onnxruntime.quantization import quantize_dynamic

    torch.set_num_threads(THREADS)
    pixels = x.transpose(0, 3, 1, 2).copy()
    photo = torch.from_numpy(pixels)
    file = folder / f"{name}.onnx"
    torch.onnx.export(theirs, (photo,), str(file), dynamo=True, verbose=False)
    small = folder / f"{name}_int8.onnx"
    quantize_dynamic(file, small)
    by_default, precision = open_vino(file, pixels)
    compiled = torch.compile(theirs)

    def eager(model):
        def call():
            with torch.inference_mode():
                return model(photo).numpy()

        return call

    return {
        "timm, torch eager": eager(theirs),
        "timm, torch.compile": eager(compiled),
        "timm, ONNX Runtime": onnx_runtime(file, pixels),
        "timm, ONNX Runtime int8": onnx_runtime(small, pixels),
        "timm, OpenVINO f32": open_vino(file, pixels, "f32")[0],
        f"timm, OpenVINO default ({precision})": by_default,
    }


def ours(name, model, x, folder):
    """Our files: {name: function of nothing}, {name: bytes}."""
    files = {}
    for graph in ("lean", "plain"):
        for kind in (None, "int8"):
            label = f"{graph}, {kind or 'float32'}"
            files[label] = folder / f"{name} {label}.tflite".replace("/", "_")
            kv.export(model, files[label], kind, graph=graph)
    opened = {label: open_litert(file)[0] for label, file in files.items()}
    runs = {label: (lambda run=run: run(x)) for label, run in opened.items()}
    onnx = folder / f"{name} lean.onnx".replace("/", "_")
    kv.export(model, onnx)
    runs["lean .onnx, ONNX Runtime"] = onnx_runtime(onnx, x)
    runs["lean .onnx, OpenVINO f32"] = open_vino(onnx, x, "f32")[0]
    return runs, {label: file.stat().st_size for label, file in files.items()}


def undone():
    """{rewrite: replacements in `edge`, `edge_vit` and `edge_tnt` that undo it}."""
    import tensorflow as tf

    normed, exponentials = edge_vit.normed, edge_tnt.exponentials
    apart = []

    def with_mean(x, norm, axes=-1):
        x = x - tf.reduce_mean(x, axes, keepdims=True)
        return x * tf.math.rsqrt(tf.reduce_mean(x * x, axes, keepdims=True) + norm.epsilon)

    def by_squared_difference(x, norm):
        mean = tf.reduce_mean(x, -1, keepdims=True)
        variance = tf.reduce_mean(tf.math.squared_difference(x, mean), -1, keepdims=True)
        return (x - mean) * tf.math.rsqrt(variance + norm.epsilon)

    def not_folded(norm, kernel, bias):
        count = len(kernel) // norm.gamma.shape[0]
        numbers = [np.tile(edge_vit.number(v), count) for v in (norm.gamma, norm.beta)]
        apart.append((norm, [edge_vit.constant(v) for v in numbers]))
        return kernel, np.zeros(kernel.shape[1]) if bias is None else bias

    def with_scale(y, norm, axes=-1):
        for other, numbers in apart:
            if other is norm:
                gamma, beta = (v.reshape(y.shape[1:] if axes != -1 else -1) for v in numbers)
                return y * gamma + beta
        return y

    def scale_apart(q, k):
        products = tf.linalg.matmul(q, k, transpose_b=True)
        return tf.nn.softmax(products * HEAD**-0.5)

    def with_keys(layer, norm, scale, rows):
        heads = layer.num_heads
        query, key, value, after = edge_vit.attention_numbers(layer, norm, scale)
        query, key, value = edge_vit.dense(*query), edge_vit.dense(key), edge_vit.dense(value)
        proj = edge_vit.dense(*edge_vit.centred(*after))

        def call(x):
            x = edge_vit.normed(x, norm)
            q = query(edge_vit.leading(x, rows))
            q, k, v = (edge_vit.rows_of_heads(y, heads) for y in (q, key(x), value(x)))
            y = tf.linalg.matmul(edge_vit.scores(q, k), v)
            return proj(tf.reshape(tf.transpose(y, (1, 0, 2)), (1, -1, heads * HEAD)))

        return call

    def by_heads(y, heads, order):
        return tf.transpose(tf.reshape(y, (*y.shape[:2], heads, y.shape[2] // heads)), order)

    def squares_of_pixels(kernel, bias):
        kernel = edge_vit.constant(kernel)

        def call(x):
            y = tf.nn.conv2d(x, kernel, len(kernel), "VALID") + edge_vit.constant(bias)
            return tf.reshape(y, (1, -1, kernel.shape[-1]))

        return call

    def of_pixels(kernel, stride):
        kernel, margin = edge_vit.constant(kernel), (edge_tnt.MARGIN, edge_tnt.MARGIN)

        def call(x):
            return tf.nn.conv2d(
                tf.pad(x, ((0, 0), margin, margin, (0, 0))), kernel, stride, "VALID"
            )

        return call

    as_is = {
        "centred": lambda kernel, bias=None: (kernel, bias),
        "central": lambda x: x,
    }
    return {
        "none: the lean graph": {},
        "pixels in squares": {"of_squares": squares_of_pixels, "convolution": of_pixels},
        "streams centred by their writers": as_is | {"normed": with_mean},
        "the same, and mean(square) for squared difference": as_is
        | {"normed": by_squared_difference},
        "norms' scale and shift folded": {
            "after_norm": not_folded,
            "normed": lambda x, norm: with_scale(normed(x, norm), norm),
            "normed_words": lambda x, norm, axes=-1: with_scale(
                with_mean(x, norm, axes), norm, axes
            ),
        },
        "attention scale in the query": {
            "scaled": lambda query, size: query,
            "scores": scale_apart,
            "exponentials": lambda k, q, bounded: exponentials(k, q * q.shape[1] ** -0.5, bounded),
        },
        "words' mean taken off by the reader": {"normed_words": with_mean},
        "heads told apart by a reshape": {
            "rows_of_heads": lambda y, heads: by_heads(y, heads, (0, 2, 1, 3)),
            "columns_of_heads": lambda y, heads: by_heads(y, heads, (0, 2, 3, 1)),
        },
        "words' largest scores not taken off": {"LARGEST": -np.inf},
        "products in panels": {
            "heads_are_panels": lambda layer: False,
            "panel_count": lambda layer: 1,
        },
        "last block: no keys and values": {"attention_of_few": with_keys},
        "the same, and all rows": {"rows_read": lambda layers: None},
    }


def rewrites(model, x, folder, kind):
    """The lean graph and that with each rewrite undone: {name: function of nothing}."""
    runs = {}
    for label, patches in undone().items():
        with ExitStack() as stack:
            for key, value in patches.items():
                users = [m for m in (edge, edge_vit, edge_tnt) if hasattr(m, key)]
                assert users, key
                for module in users:
                    stack.enter_context(mock.patch.object(module, key, value))
            # Another name each time: open files are mapped, not read.
            file = litert(model, folder / f"{len(runs)}.tflite", kind)
        assert structure(file)["faults"] == [], label
        run = open_litert(file)[0]
        runs[f"{label}, {kind}" if kind else label] = lambda run=run: run(x)
    return runs


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=40, help="default: %(default)s")
    parser.add_argument(
        "--rewrites",
        choices=["float32", "int8"],
        help="undo each rewrite alone instead, in such files",
    )
    parser.add_argument("--output", type=Path, help="append a JSON line for each model here")
    arguments = parser.parse_args()
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    import timm
    import torch
    from safetensors.torch import save_file

    for title, name in MODELS.items():
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            torch.manual_seed(0)
            theirs = timm.create_model(name, pretrained=False).eval()
            for vector in (p for p in theirs.parameters() if p.ndim == 1):
                vector.data += 0.02 * torch.randn_like(vector)
            save_file(theirs.state_dict(), folder / "timm.safetensors")
            model = kv.create_model(name)
            kv.load_weights(model, folder / "timm.safetensors")
            x = kv.images.normalize(
                real_photos(model.input_shape[1:], 1), kv.images.Preprocessing((224, 224))
            )
            if arguments.rewrites:
                kind = None if arguments.rewrites == "float32" else arguments.rewrites
                runs, sizes = rewrites(model, x, folder, kind), {}
            else:
                runs, sizes = ours(title, model, x, folder)
                runs |= peers(name, theirs, x, folder)
            with torch.inference_mode():
                expected = theirs(torch.from_numpy(x.transpose(0, 3, 1, 2).copy())).numpy()
            check(runs, expected)
            times = {label: [] for label in runs}
            shuffle = random.Random(0)
            for _ in range(arguments.rounds):
                for label, run in shuffle.sample(list(runs.items()), len(runs)):
                    run()
                    start = time.perf_counter()
                    run()
                    times[label].append(1e3 * (time.perf_counter() - start))
        medians = {label: float(np.median(found)) for label, found in times.items()}
        fifths = {label: float(np.quantile(found, 0.2)) for label, found in times.items()}
        first = next(iter(medians))
        print(f"\n| {title} | median | of `{first}` | fastest fifth | of `{first}` | size |")
        print("| --- | ---: | ---: | ---: | ---: | ---: |")
        for label, median in medians.items():
            size = f"{sizes[label] / 1e6:.1f} MB" if label in sizes else ""
            row = [label, f"{median:.1f} ms", f"{median / medians[first]:.2f} x"]
            row += [f"{fifths[label]:.1f} ms", f"{fifths[label] / fifths[first]:.2f} x", size]
            print(f"| {' | '.join(row)} |")
        line = {"model": title, "rounds": arguments.rounds, "milliseconds": medians, "bytes": sizes}
        line["fastest_fifth"] = fifths
        print(json.dumps(line))
        if arguments.output:
            with open(arguments.output, "a") as file:
                file.write(json.dumps(line) + "\n")


def check(runs, expected):
    """Every float32 run gives timm's logits; the others nearly."""
    for label, run in runs.items():
        found = run()
        if "int8" in label or "default" in label:
            cosine = (found * expected).sum() / np.linalg.norm(found) / np.linalg.norm(expected)
            assert cosine > 0.99, f"{label}: cosine {cosine:.4f}"
        else:
            difference = np.abs(found - expected).max()
            assert difference <= 1e-3 * max(1, np.abs(expected).max()), f"{label}: {difference:.1e}"


if __name__ == "__main__":
    main()
