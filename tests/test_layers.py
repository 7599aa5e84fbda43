"""Each layer: shapes, config, one fit step, mixed precision; then what it must compute."""

import keras
import numpy as np
import pytest
from helpers import forward, numpy

import keras_vitnt as kv
from keras_vitnt.positions import resize, sincos2d

# Whichever compiles faster: JAX without jit compiles every operation by itself.
JIT = keras.backend.backend() == "jax"
# Layer, arguments, input shapes without batch, output shapes without batch.
LAYERS = [
    (kv.Patches, dict(patch_size=4), [(8, 12, 5)], [(6, 80)]),
    (kv.PatchEncoder, dict(num_patches=6, projection_dim=10), [(6, 12)], [(7, 10)]),
    (
        kv.PatchEncoder,
        dict(
            num_patches=(2, 3),
            projection_dim=8,
            positions="factorized2d",
            distillation_token=True,
            register_tokens=2,
            dropout=0.1,
        ),
        [(6, 12)],
        [(10, 8)],
    ),
    (
        kv.PatchEncoder,
        dict(num_patches=(2, 3), positions="sincos2d", class_token=False),
        [(6, 12)],
        [(6, 12)],
    ),
    (kv.Attention, dict(num_heads=2, qkv_bias=False, dropout=0.1), [(5, 6)], [(5, 6)]),
    (kv.MLP, dict(mlp_dim=12, gelu="tanh"), [(5, 6)], [(5, 6)]),
    (kv.LayerScale, dict(init_value=0.1), [(5, 6)], [(5, 6)]),
    (
        kv.TransformerBlock,
        dict(num_heads=2, mlp_dim=9, layer_scale=0.1, drop_path=0.2, dropout=0.1),
        [(5, 6)],
        [(5, 6)],
    ),
    (kv.PixelEmbedding, dict(patch_size=8, inner_dim=5), [(16, 24, 2)], [(6, 4, 5)]),
    (
        kv.PixelEmbedding,
        dict(patch_size=8, inner_dim=5, pixel_stride=2, layout="legacy", positions=False),
        [(16, 24, 2)],
        [(6, 16, 5)],
    ),
    (kv.WordsToPatch, dict(dim=7), [(6, 4, 5)], [(6, 7)]),
    (kv.WordsToPatch, dict(dim=7, layout="legacy"), [(6, 4, 5)], [(6, 7)]),
    (
        kv.TNTBlock,
        dict(num_heads=2, mlp_dim=12, inner_num_heads=1, inner_mlp_dim=8, drop_path=0.2),
        [(6, 4, 5), (7, 8)],
        [(6, 4, 5), (7, 8)],
    ),
    (kv.TokenPooling, dict(pooling="avg", num_prefix_tokens=2), [(5, 6)], [(6,)]),
    (kv.AttentionPooling, dict(num_heads=2, mlp_dim=9, num_prefix_tokens=1), [(5, 6)], [(6,)]),
]


@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16"])
@pytest.mark.parametrize("case", LAYERS, ids=lambda case: case[0].__name__)
def test_layer_contract(case, policy, tmp_path):
    """Symbolic and real shapes, config round trip, a fit step, a saved and loaded file."""
    cls, options, input_shapes, output_shapes = case
    layer = cls(**options, dtype=policy)
    again = cls.from_config(layer.get_config())
    assert again.get_config() == layer.get_config()
    assert again.dtype_policy.name == policy

    inputs = [keras.Input(shape) for shape in input_shapes]
    outputs = again(*inputs)
    outputs = list(outputs) if isinstance(outputs, list | tuple) else [outputs]
    model = keras.Model(inputs, outputs)
    assert [y.shape for y in outputs] == [(None, *shape) for shape in output_shapes]
    batch = 3
    rng = np.random.default_rng(0)
    x = [rng.normal(size=(batch, *shape)).astype("float32") for shape in input_shapes]
    before = keras.tree.flatten(forward(model, x))
    for y, shape in zip(before, output_shapes):
        assert tuple(y.shape) == (batch, *shape)
        assert keras.backend.standardize_dtype(y.dtype) == again.compute_dtype

    model.save(tmp_path / "layer.keras")
    loaded = keras.models.load_model(tmp_path / "layer.keras")
    for y, expected in zip(keras.tree.flatten(forward(loaded, x)), before):
        y, expected = (numpy(value).astype("float32") for value in (y, expected))
        np.testing.assert_allclose(y, expected, atol=1e-6)

    if model.trainable_variables:
        model.compile("sgd", ["mse"] * len(outputs), jit_compile=JIT)
        targets = [np.zeros((batch, *shape), "float32") for shape in output_shapes]
        losses = model.fit(x, targets, batch_size=2, verbose=0).history["loss"]
        assert np.isfinite(losses).all()


def test_patches_and_projection_equal_a_strided_convolution():
    images = np.random.default_rng(0).normal(size=(2, 24, 16, 4)).astype("float32")
    patches = kv.Patches(8)(images)
    conv = keras.layers.Conv2D(6, 8, strides=8)
    expected = numpy(conv(images)).reshape(2, 6, 6)
    kernel = numpy(conv.kernel).reshape(-1, 6)
    np.testing.assert_allclose(numpy(patches) @ kernel, expected, atol=1e-5)


def test_patches_lose_nothing_and_keep_their_order():
    images = np.arange(2 * 4 * 6 * 3, dtype="float32").reshape(2, 4, 6, 3)
    patches = numpy(kv.Patches(2)(images))
    for row in range(2):
        for column in range(3):
            square = images[:, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
            np.testing.assert_array_equal(patches[:, 3 * row + column], square.reshape(2, -1))


@pytest.mark.parametrize("tokens", [17, 128, 256])
def test_attention_is_not_causal(tokens):
    x = np.random.default_rng(0).normal(size=(1, tokens, 16)).astype("float32")
    changed = x.copy()
    changed[:, -1] += 1.0
    layer = kv.Attention(2)
    assert np.abs(numpy(layer(x)) - numpy(layer(changed)))[0, 0].max() > 1e-5


@pytest.mark.parametrize("tokens", [5, 80])
def test_attention_equals_its_scores_times_values(tokens):
    x = keras.random.normal((2, tokens, 12), seed=0)
    layer = kv.Attention(3)
    layer.build(x.shape)
    scores = numpy(layer.scores(x))
    np.testing.assert_allclose(scores.sum(-1), 1, atol=1e-5)
    value = numpy(layer.heads(x)[2]).transpose(0, 2, 1, 3)
    y = (scores @ value).transpose(0, 2, 1, 3).reshape(2, tokens, 12)
    expected = numpy(layer.proj(keras.ops.convert_to_tensor(y)))
    np.testing.assert_allclose(numpy(layer(x)), expected, atol=1e-5)


def test_drop_path_drops_whole_samples_and_whole_patches_of_tnt():
    x = np.random.default_rng(0).normal(size=(64, 5, 6)).astype("float32")
    block = kv.TransformerBlock(2, 12, drop_path=0.5)
    changed = np.abs(numpy(block(x, training=True)) - x).reshape(64, -1).max(axis=1) > 0
    assert 0 < changed.sum() < 64
    tnt = kv.TNTBlock(2, 12, 1, 8, drop_path=0.5)
    pixels = np.random.default_rng(0).normal(size=(4, 32, 4, 6)).astype("float32")
    new, _ = tnt(pixels, np.ones((4, 33, 8), "float32"), training=True)
    per_patch = np.abs(numpy(new) - pixels).reshape(4, 32, -1).max(axis=2) > 0
    assert all(0 < image.sum() < 32 for image in per_patch)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: kv.Patches(5)(np.ones((1, 8, 10, 3))), "8 x 10 .* patches of 5 x 5"),
        (lambda: kv.Attention(4)(np.ones((1, 3, 6))), "num_heads=4 does not divide"),
        (lambda: kv.MLP(4, gelu="relu"), "gelu='relu'"),
        (lambda: kv.PatchEncoder(4, 8, positions="rope"), "positions='rope'"),
        (lambda: kv.PatchEncoder(4, 8, positions="sincos2d"), "needs the grid"),
        (lambda: kv.PatchEncoder(4, 8)(np.ones((1, 5, 3))), "for 4 patches and got 5"),
        (lambda: kv.WordsToPatch(4, layout="new"), "layout='new'"),
        (lambda: sincos2d(2, 2, 6), "multiple of 4"),
        (lambda: resize(np.ones((7, 4)), (2, 2), (3, 3)), "has 4 rows"),
    ],
)
def test_errors_say_what_was_passed_and_what_was_expected(make, message):
    with pytest.raises(ValueError, match=message):
        make()
