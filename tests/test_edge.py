"""The lean graph computes what its model does, and so do the files made of it."""

import numpy as np
import pytest
from helpers import converted, forward, numpy
from test_models import OPTIONS, TNT, VIT, settle

from keras_vitnt import edge, edge_tnt, edge_vit, images, models
from keras_vitnt.export import real_photos

CASES = dict(
    OPTIONS,
    tokens=(models.ViT, dict(VIT, include_top=False)),
    pooled=(models.TNT, dict(TNT, include_top=False, pooling="avg")),
    deit_pre_logits=(models.DeiT, dict(VIT, distilled=True, representation_size=8)),
)


@pytest.fixture
def small_panels(monkeypatch):
    """Panels of the tests' narrow models."""
    monkeypatch.setattr(edge_vit, "CACHED", 1)
    monkeypatch.setattr(edge_vit, "PANEL", 8)
    monkeypatch.setattr(edge_vit, "LANES", 4)


@pytest.mark.parametrize("panels", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_the_lean_graph_computes_the_same(case, panels, small_panels):
    import tensorflow as tf

    builder, options = CASES[case]
    model = settle(builder(**options))
    assert edge.has_panels(model)
    pixels = np.random.default_rng(0).integers(0, 256, (3, 8, 12, 3), dtype="uint8")
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
    x = images.normalize(pixels, images.Preprocessing((8, 12), mean, std))
    expected = numpy(forward(model, x))
    close = dict(rtol=0, atol=1e-5 * max(1, np.abs(expected).max()))
    one = edge.lean(model, panels=panels)
    np.testing.assert_allclose(one(tf.constant(x[:1])), expected[:1], **close)
    np.testing.assert_allclose(edge.lean(model, None, panels)(tf.constant(x)), expected, **close)
    from_pixels = edge.lean(model, (mean, std), panels)
    np.testing.assert_allclose(from_pixels(tf.constant(pixels)), expected, **close)


@pytest.mark.parametrize(
    "builder, size, heads, count",
    [
        (models.ViT, "Ti/8", True, 3),
        (models.ViT, "S/8", True, 6),
        (models.TNT, "B/8", True, 10),
        (models.ViT, "Nano/8", True, 1),
        (models.TNT, "Nano/8", False, 1),
    ],
)
def test_wide_products_have_panels(builder, size, heads, count):
    """Of 256 hidden columns or some more; heads of 32 or 64 are panels, those of 48 are not."""
    model = builder(size, depth=2, input_shape=(16, 16, 3))
    block = model.get_layer("block00")
    block = getattr(block, "outer", block)
    assert edge_vit.heads_are_panels(block.attention) == heads
    assert edge_vit.panel_count(block.mlp) == count
    assert edge.has_panels(model) == heads


@pytest.mark.parametrize(
    "patch, stride, layout",
    [
        (4, 1, "official"),
        (5, 3, "official"),
        (8, 4, "official"),
        (4, 8, "official"),
        (6, 3, "legacy"),
        (8, 8, "legacy"),
    ],
)
def test_words_of_any_stride(patch, stride, layout):
    import tensorflow as tf

    shape = (2 * patch, 3 * patch, 3)
    options = dict(patch_size=patch, pixel_stride=stride, layout=layout, input_shape=shape)
    model = settle(models.TNT(**dict(TNT, **options)))
    pixels = np.random.default_rng(0).integers(0, 256, (2, *shape), dtype="uint8")
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
    x = images.normalize(pixels, images.Preprocessing(shape[:2], mean, std))
    expected = numpy(forward(model, x))
    close = dict(rtol=0, atol=1e-5 * max(1, np.abs(expected).max()))
    np.testing.assert_allclose(edge.lean(model)(tf.constant(x)), expected, **close)
    from_pixels = edge.lean(model, (mean, std))
    np.testing.assert_allclose(from_pixels(tf.constant(pixels)), expected, **close)


def test_blocks_are_in_the_model_s_order():
    """Not in that of their names: block100 comes after block99."""
    import tensorflow as tf

    model = settle(models.ViT(**dict(VIT, depth=101)))
    x = np.random.default_rng(0).normal(size=(1, 8, 12, 3)).astype("float32")
    expected = numpy(forward(model, x))
    found = edge.lean(model)(tf.constant(x))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * max(1, np.abs(expected).max()))


def test_no_score_is_larger_than_what_decides_for_exponentials():
    """Of rows of length sqrt(c); those along the products' first singular vectors reach it."""
    random = np.random.default_rng(0)
    query, key = random.normal(size=(2, 12, 6))
    bias = random.normal(size=6)
    rows = random.normal(size=(1000, 12))
    rows *= np.sqrt(12 / np.square(rows).sum(1, keepdims=True))
    largest = edge_tnt.largest_score(query, bias, key, 2)
    for head in (slice(0, 3), slice(3, 6)):
        left, _, right = np.linalg.svd(query[:, head] @ key[:, head].T)
        extreme = np.sqrt(12) * np.array([left[:, 0], right[0]])
        exact = (extreme[0] @ query[:, head]) @ (extreme[1] @ key[:, head])
        assert exact <= edge_tnt.largest_score(query, 0 * bias, key, 2) + 1e-9
        one_head = edge_tnt.largest_score(query[:, head], np.zeros(3), key[:, head], 1)
        np.testing.assert_allclose(exact, one_head)
        products = (rows @ query[:, head] + bias[head]) @ (rows @ key[:, head]).T
        assert 0.3 * largest < np.abs(products).max() <= largest


SUM = np.log(6e4)  # of exponentials that float16 holds, as a logarithm
LEAST = -np.log(6.2e-5)  # how far below zero a score may be


@pytest.mark.parametrize(
    "factor, largest, most, bounded",
    [
        (1, None, SUM, True),
        (100, None, SUM, False),
        (1, SUM - np.log(4) - 1e-6, SUM, True),  # of 4 words
        (1, SUM - np.log(4) + 1e-6, SUM, False),
        (1, LEAST - 1e-6, 2 * SUM, True),
        (1, LEAST + 1e-6, 2 * SUM, False),
    ],
)
def test_scores_lose_their_largest_where_it_may_be_large(
    factor, largest, most, bounded, monkeypatch
):
    """Or as far below zero: by the weights, or just within and beyond what float16 holds."""
    import tensorflow as tf

    monkeypatch.setattr(edge_tnt, "LARGEST", most)
    if largest:
        monkeypatch.setattr(edge_tnt, "largest_score", lambda *numbers: largest)
    model = settle(models.TNT(**TNT))
    for i in range(2):
        qkv = model.get_layer(f"block{i:02d}").inner.attention.qkv
        qkv.kernel.assign(factor * numpy(qkv.kernel))
    x = np.random.default_rng(0).normal(size=(2, 8, 12, 3)).astype("float32")
    expected = numpy(forward(model, x))
    lean = tf.function(edge.lean(model), input_signature=[tf.TensorSpec(x.shape)])
    operations = lean.get_concrete_function().graph.get_operations()
    inner = [o.type for o in operations if "/inner/attention/" in o.name]
    assert inner.count("Exp") == 2 and inner.count("Max") == (0 if bounded else 2)
    np.testing.assert_allclose(lean(x), expected, atol=1e-4 * max(1, np.abs(expected).max()))


@pytest.mark.parametrize("factor", [0, 1, 1000])
def test_values_are_divided_where_they_may_exceed_one(factor, monkeypatch):
    """By the weights; those of zero give no logarithm of zero."""
    import tensorflow as tf

    largest = []

    def recorded(y, heads):
        largest.append(np.abs(numpy(y)).max())
        return columns(y, heads)

    columns = edge_tnt.columns_of_heads
    monkeypatch.setattr(edge_tnt, "columns_of_heads", recorded)
    model = settle(models.TNT(**TNT))
    for i in range(2):
        qkv = model.get_layer(f"block{i:02d}").inner.attention.qkv
        kernel = numpy(qkv.kernel).copy()
        kernel[:, 2 * kernel.shape[1] // 3 :] *= factor
        qkv.kernel.assign(kernel)
    x = np.random.default_rng(0).normal(size=(1, 8, 12, 3)).astype("float32")
    expected = numpy(forward(model, x))
    found = edge.lean(model)(tf.constant(x))
    np.testing.assert_allclose(found, expected, atol=1e-4 * max(1, np.abs(expected).max()))
    assert len(largest) == 4 and max(largest[1::2]) <= 1  # queries' and values', by turns


QUICK = ("vit-map-factorized", "vit-fc_norm-registers", "deit_pre_logits", "tnt", "tnt-legacy")


def product():
    """Every family, layout, pooling and position option with each other: (builder, options)."""
    for positions in ("learned", "sincos2d", "factorized2d", "none"):
        yield models.DeiT, dict(VIT, distilled=True, positions=positions)
        for pooling in ("token", "avg", "map"):
            both = dict(pooling=pooling, positions=positions)
            yield models.ViT, dict(VIT, **both)
            for layout in ("official", "legacy"):
                yield models.TNT, dict(TNT, layout=layout, **both)


@pytest.mark.conversion
@pytest.mark.parametrize(
    "builder, options",
    [
        *(pytest.param(*CASES[name], id=name) for name in QUICK),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [*(CASES[name] for name in CASES if name not in QUICK), *product()]
        ),
    ],
)
def test_every_option_passes_the_gate(builder, options, tmp_path, small_panels):
    """Float32, fp16 and int8 files of pixels; float32 alone has panels."""
    model = settle(builder(**options))
    kinds = {None: 1e-5, "fp16": 5e-3, "int8": 0.1}
    preprocessing = [[8, 12], [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]]
    photos = real_photos((8, 12, 3))
    reports = converted(model, kinds, tmp_path, photos, input="uint8", preprocessing=preprocessing)
    layers = [report["structure"]["operators"]["FULLY_CONNECTED"] for report in reports]
    assert layers[0] < layers[1] == layers[2]
    for report in reports:
        found = report["comparison"]
        assert report["structure"]["partitions"] == 1
        limit = kinds[report["quantize"]] * max(1, found["largest_logit"])
        assert found["max_difference"] <= limit, report["quantize"]
