"""Variants, options, gradients, symmetries, round trips and training of whole models."""

import os
import subprocess
import sys

import keras
import numpy as np
import pytest
from helpers import REFERENCE, forward, numpy

from keras_vitnt import benchmark, models, names, positions, variants

# Exact counts: Google's models_test.py and timm (ViT, DeiT, TNT S and B), the papers' arithmetic
# (TNT Ti, legacy Ti and B); ours (Nano: 32 x 32 pixels, 10 classes).
PARAMETERS = {
    ("ViT", "Nano/4"): 683_242,
    ("ViT", "Nano/8"): 692_458,
    ("ViT", "Ti/16"): 5_717_416,
    ("ViT", "S/8"): 22_055_272,
    ("ViT", "S/16"): 22_050_664,
    ("ViT", "S/32"): 22_878_952,
    ("ViT", "B/8"): 86_576_872,
    ("ViT", "B/16"): 86_567_656,
    ("ViT", "B/32"): 88_224_232,
    ("ViT", "L/14"): 304_203_752,
    ("ViT", "L/16"): 304_326_632,
    ("ViT", "L/32"): 306_535_400,
    ("ViT", "H/14"): 632_045_800,
    ("ViT", "g/14"): 1_012_611_432,
    ("ViT", "G/14"): 1_844_440_680,
    ("DeiT", "Ti/16"): 5_717_416,
    ("DeiT", "Ti/16", ("distilled", True)): 5_910_800,
    ("DeiT", "S/16"): 22_050_664,
    ("DeiT", "S/16", ("distilled", True)): 22_436_432,
    ("DeiT", "B/16"): 86_567_656,
    ("DeiT", "B/16", ("distilled", True)): 87_338_192,
    ("TNT", "Nano/8"): 565_882,
    ("TNT", "Nano/8", ("layout", "legacy")): 565_306,
    ("TNT", "Ti/16"): 6_076_408,
    ("TNT", "Ti/16", ("layout", "legacy")): 6_069_784,
    ("TNT", "S/16"): 23_768_584,
    ("TNT", "S/16", ("layout", "legacy")): 23_755_336,
    ("TNT", "B/16"): 65_428_680,
    ("TNT", "B/16", ("layout", "legacy")): 65_406_600,
}
# Multiply-adds in billions, timm's and the paper's.
COSTS = {
    ("ViT", "B/16"): 17.58,
    ("ViT", "S/16"): 4.61,
    ("TNT", "S/16"): 5.24,
    ("TNT", "B/16"): 14.1,
}

VIT = dict(patch_size=4, dim=16, depth=2, num_heads=2, input_shape=(8, 12, 3), classes=3)
TNT = dict(VIT, inner_dim=6, inner_num_heads=2, pixel_stride=2)
# Every option that changes the graph, once.
OPTIONS = {
    "vit": (models.ViT, VIT),
    "vit-avg-sincos": (
        models.ViT,
        dict(VIT, pooling="avg", positions="sincos2d", class_token=False, gelu="tanh"),
    ),
    "vit-map-factorized": (models.ViT, dict(VIT, pooling="map", positions="factorized2d")),
    "vit-fc_norm-registers": (
        models.ViT,
        dict(VIT, pooling="avg", fc_norm=True, register_tokens=2, prefix_positions=False),
    ),
    "vit-regularised": (
        models.ViT,
        dict(VIT, drop_path=0.3, dropout=0.1, attention_dropout=0.1, layer_scale=0.1),
    ),
    "vit-none-pre_logits": (
        models.ViT,
        dict(VIT, positions="none", representation_size=8, qkv_bias=False),
    ),
    "vit-softmax": (models.ViT, dict(VIT, classifier_activation="softmax")),
    "deit": (models.DeiT, dict(VIT, distilled=True)),
    "tnt": (models.TNT, TNT),
    "tnt-legacy": (models.TNT, dict(TNT, layout="legacy", drop_path=0.3)),
    "tnt-avg-sincos": (models.TNT, dict(TNT, pooling="avg", positions="sincos2d")),
    "tnt-none-bias": (models.TNT, dict(TNT, positions="none", qkv_bias=True, layer_scale=0.1)),
}


def photos(batch, shape=(8, 12, 3), seed=0):
    return np.random.default_rng(seed).normal(size=(batch, *shape)).astype("float32")


def settle(model, seed=0):
    """Random numbers in every weight, so that nothing hides behind zeros and ones."""
    rng = np.random.default_rng(seed)
    for weight in model.trainable_variables:
        weight.assign(numpy(weight) + 0.2 * rng.normal(size=weight.shape))
    return model


def test_parameter_counts_are_exact_and_complete():
    counts = {}
    for name in names.listed():
        builder, variant, options = names.parse_name(name)
        shape = dict(input_shape=(32, 32, 3), classes=10) if "Nano" in variant else {}
        model = models.blueprint(builder, variant, **options, **shape)
        counts[(builder.__name__, variant, *options.items())] = model.count_params()
        cost = COSTS.get((builder.__name__, variant)) if not options else None
        if cost:
            assert benchmark.multiply_adds(model) / 1e9 == pytest.approx(cost, rel=0.01)
    assert counts == PARAMETERS
    named = {(family, size) for family, sizes in variants.VARIANTS.items() for size in sizes}
    assert {(key[0], key[1].split("/")[0]) for key in PARAMETERS} == named


@pytest.mark.parametrize("name", names.timm_names())
def test_timm_names(name):
    builder, variant, options = names.parse_name(name)
    kind = [(key, value) for key, value in options.items() if key != "input_shape"]
    assert (builder.__name__, variant, *kind) in PARAMETERS
    assert options["input_shape"] == (224, 224, 3)


def gradients(model, images):
    """Gradients of the first logit for the images and every trainable weight, in float32."""
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        x = tf.convert_to_tensor(images)
        variables = [v.value for v in model.trainable_variables]
        with tf.GradientTape() as tape:
            tape.watch([x])
            y = model(x)[:, 0]
        return [tf.convert_to_tensor(g).numpy() for g in tape.gradient(y, [x, *variables])]
    if keras.backend.backend() == "jax":
        import jax

        def logit(trainable, x):
            fixed = [v.value for v in model.non_trainable_variables]
            return model.stateless_call(trainable, fixed, x)[0][:, 0].sum()

        trainable = [v.value for v in model.trainable_variables]
        weights, x = jax.jit(jax.grad(logit, argnums=(0, 1)))(trainable, images)
        return [np.asarray(x), *map(np.asarray, weights)]
    import torch

    x = torch.tensor(images, requires_grad=True)
    model(x)[:, 0].sum().backward()
    return [x.grad.numpy(), *[v.value.grad.numpy() for v in model.trainable_variables]]


@pytest.mark.parametrize("name", OPTIONS)
def test_no_blind_model(name):
    """The image and every weight reach the logit."""
    builder, options = OPTIONS[name]
    model = settle(builder(**options))
    image, *weights = gradients(model, photos(2))
    per_pixel = np.abs(image).max(axis=-1)
    assert (per_pixel > 0).mean() > 0.99
    for variable, gradient in zip(model.trainable_variables, weights):
        reached = np.abs(gradient) > 1e-12
        if variable.path.endswith("qkv/bias"):  # softmax cancels a key's bias
            third = len(gradient) // 3
            reached = np.delete(reached, np.s_[third : 2 * third])
        if variable.path.endswith("key_value/bias"):
            reached = reached[len(gradient) // 2 :]
        if variable.path.startswith("head"):  # the other logits' weights
            reached = reached[..., 0]
        assert reached.any(), variable.path


def swap_patches(images):
    """Exchange the first and the last patch of 4 x 4 pixels."""
    swapped = images.copy()
    swapped[:, :4, :4], swapped[:, -4:, -4:] = images[:, -4:, -4:], images[:, :4, :4]
    return swapped


@pytest.mark.parametrize("builder, options", [(models.ViT, VIT), (models.TNT, TNT)])
def test_patch_order_matters_only_through_positions(builder, options):
    images = photos(2)
    model = settle(builder(**options))
    answer, swapped = (numpy(forward(model, x)) for x in (images, swap_patches(images)))
    assert np.abs(answer - swapped).max() > 1e-3
    model = settle(builder(**options, positions="none"))
    answer, swapped = (numpy(forward(model, x)) for x in (images, swap_patches(images)))
    np.testing.assert_allclose(answer, swapped, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("policy", "jit", "count"),
    [
        # One worker for all: JAX compiles each operation of a shape once in a process.
        pytest.param("float32", False, 1, marks=pytest.mark.xdist_group("eager")),
        ("mixed_bfloat16", True, 3),
    ],
)
@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_trains(name, policy, jit, count):
    """Finite losses of one photo alone, and of a whole batch and a ragged last one."""
    jit = jit and keras.backend.backend() != "torch"  # see the next test
    builder, options = OPTIONS[name]
    depth = 2 if "drop_path" in options else 1  # the first block drops no path
    model = builder(**dict(options, depth=depth), dtype=policy)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=name != "vit-softmax")
    model.compile("sgd", loss, jit_compile=jit)
    history = model.fit(photos(count), np.arange(count), batch_size=2, verbose=0).history
    assert np.isfinite(history["loss"]).all()


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_trains_compiled(name):
    """On torch, minutes of compilation for a tiny model: not in the default run."""
    builder, options = OPTIONS[name]
    model = builder(**dict(options, depth=2 if "drop_path" in options else 1))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=name != "vit-softmax")
    model.compile("sgd", loss, jit_compile=True)
    history = model.fit(photos(3), np.array([0, 1, 2]), batch_size=2, verbose=0).history
    assert np.isfinite(history["loss"]).all()


# Loads what this backend wrote, saves it anew and loads that: every case of ROUND_TRIPS.
ROUND_TRIPS = {"tnt": "float32", "vit": "mixed_bfloat16", "tnt-legacy": "mixed_bfloat16"}
OTHER = """
import sys, keras, numpy as np
import keras_vitnt
from pathlib import Path
own = Path(sys.argv[1])
for folder in own.parent.glob("case-*"):
    x, expected, policy = np.load(folder / "x.npy"), np.load(folder / "y.npy"), folder.name[5:]
    written, copies = folder / "model", own / folder.name
    copies.mkdir()
    for file in (written, copies / "again"):
        model = keras.models.load_model(f"{file}.keras")
        assert model.get_layer("block00").dtype_policy.name == policy.split("-")[0]
        model.set_weights([np.zeros_like(w) for w in model.get_weights()])
        model.load_weights(f"{file}.weights.h5")
        difference = np.abs(keras.ops.convert_to_numpy(model(x)) - expected).max()
        tolerance = 1e-5 if policy.startswith("float32") else 5e-2
        assert difference <= tolerance * max(1, np.abs(expected).max()), (file, difference)
        model.save(copies / "again.keras")
        model.save_weights(copies / "again.weights.h5")
"""


def test_files_cross_backends(tmp_path):
    """`.keras` and `.weights.h5`, written here, load under the other backends, twice."""
    x = photos(4)
    for name, policy in ROUND_TRIPS.items():
        folder = tmp_path / f"case-{policy}-{name}"
        folder.mkdir()
        builder, options = OPTIONS[name]
        model = settle(builder(**options, dtype=policy))
        np.save(folder / "x.npy", x)
        np.save(folder / "y.npy", numpy(forward(model, x)))
        model.save(folder / "model.keras")
        model.save_weights(folder / "model.weights.h5")
    others = {}
    for backend in installed_backends() - {keras.backend.backend()}:
        (tmp_path / backend).mkdir()
        others[backend] = subprocess.Popen(
            [sys.executable, "-c", OTHER, str(tmp_path / backend)],
            env=dict(os.environ, KERAS_BACKEND=backend),
            stderr=subprocess.PIPE,
            text=True,
        )
    for backend, process in others.items():
        errors = process.communicate()[1]
        assert process.returncode == 0, f"{backend}: {errors[-2000:]}"


def installed_backends():
    from importlib.util import find_spec

    return {name for name in ("tensorflow", "jax", "torch") if find_spec(name)}


@pytest.mark.parametrize("builder", [models.ViT, models.TNT])
def test_images_are_channels_last_whatever_keras_is_set_to(builder, request):
    request.addfinalizer(lambda: keras.config.set_image_data_format("channels_last"))
    options = dict(input_shape=(16, 24, 3), classes=3, depth=1)
    usual = builder("Nano/8", **options)
    keras.config.set_image_data_format("channels_first")
    other = builder("Nano/8", **options)
    other.set_weights(usual.get_weights())
    x = np.random.default_rng(0).normal(size=(1, 16, 24, 3)).astype("float32")
    found, expected = (numpy(forward(model, x)) for model in (other, usual))
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_features_are_maps_of_the_blocks():
    model = models.TNT(**TNT)
    maps = forward(models.features(model, (0, -1)), photos(2))
    assert [tuple(m.shape) for m in maps] == [(2, 2, 3, 16)] * 2
    tokens = forward(keras.Model(model.input, model.get_layer("block01").output[1]), photos(2))
    np.testing.assert_array_equal(numpy(maps[1]).reshape(2, 6, 16), numpy(tokens)[:, 1:])
    with pytest.raises(ValueError, match="has 2 blocks"):
        models.features(model, (2,))


def test_without_top_the_model_gives_tokens_or_pooled_vectors():
    assert models.ViT(**VIT, include_top=False).output_shape == (None, 7, 16)
    assert models.ViT(**VIT, include_top=False, pooling="avg").output_shape == (None, 16)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: models.ViT("XL/16"), "Unknown ViT variant 'XL/16'.*Ti, S, B"),
        (lambda: models.ViT("B/15"), "224 x 224 .* patches of 15 x 15"),
        (lambda: models.TNT(patch_size=8, dim=16), "missing: depth, num_heads"),
        (lambda: names.create_model("vit_bas_patch16_224"), "Did you mean vit_base_patch16_224"),
        (lambda: names.create_model("vit_base_legacy_patch16_224"), "no legacy form"),
        (lambda: names.create_model("deit:S/16-legacy"), "deit has no legacy form"),
        (lambda: models.ViT(**VIT, pooling="max"), "pooling='max'"),
        (lambda: models.ViT(**VIT, class_token=False, pooling="token"), "class_token=False"),
        (lambda: models.DeiT(**VIT, distilled=True, pooling="avg"), "two tokens"),
        (lambda: models.TokenPooling("max"), 'pooling is "token" or "avg"; got \'max\''),
        (lambda: models.AttentionPooling(5, 9)(np.ones((1, 4, 16))), "does not divide the width"),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_positions_resize_as_timm_does():
    cases = np.load(REFERENCE / "timm_position_resize.npz")
    for name in {key.rsplit(".", 1)[0] for key in cases.files}:
        old, _, new, prefix = name.split("_")
        grids = [tuple(map(int, grid.split("x"))) for grid in (old, new)]
        resized = positions.resize(cases[f"{name}.old"], *grids, int(prefix.removeprefix("prefix")))
        np.testing.assert_allclose(resized, cases[f"{name}.new"], atol=1e-5)
        if old == new:
            np.testing.assert_array_equal(resized, cases[f"{name}.old"])
