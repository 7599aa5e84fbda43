"""The lean graph computes what its model does, and so do the files made of it."""

import numpy as np
import pytest
from helpers import converted, forward, numpy
from test_models import OPTIONS, TNT, VIT, settle

from keras_vitnt import edge, images, models
from keras_vitnt.export import real_photos

CASES = dict(
    OPTIONS,
    tokens=(models.ViT, dict(VIT, include_top=False)),
    pooled=(models.TNT, dict(TNT, include_top=False, pooling="avg")),
    deit_pre_logits=(models.DeiT, dict(VIT, distilled=True, representation_size=8)),
)


@pytest.mark.parametrize("case", CASES)
def test_the_lean_graph_computes_the_same(case):
    import tensorflow as tf

    builder, options = CASES[case]
    model = settle(builder(**options))
    pixels = np.random.default_rng(0).integers(0, 256, (3, 8, 12, 3), dtype="uint8")
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
    x = images.normalize(pixels, images.Preprocessing((8, 12), mean, std))
    expected = numpy(forward(model, x))
    close = dict(rtol=0, atol=1e-5 * max(1, np.abs(expected).max()))
    np.testing.assert_allclose(edge.lean(model)(tf.constant(x[:1])), expected[:1], **close)
    np.testing.assert_allclose(edge.lean(model, 3)(tf.constant(x)), expected, **close)
    from_pixels = edge.lean(model, 3, (mean, std))
    np.testing.assert_allclose(from_pixels(tf.constant(pixels)), expected, **close)


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
def test_every_option_passes_the_gate(builder, options, tmp_path):
    """Float32, fp16 and int8 files of pixels."""
    model = settle(builder(**options))
    kinds = {None: 1e-5, "fp16": 5e-3, "int8": 0.1}
    preprocessing = [[8, 12], [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]]
    photos = real_photos((8, 12, 3))
    for report in converted(
        model, kinds, tmp_path, photos, input="uint8", preprocessing=preprocessing
    ):
        found = report["comparison"]
        assert report["structure"]["partitions"] == 1
        limit = kinds[report["quantize"]] * max(1, found["largest_logit"])
        assert found["max_difference"] <= limit, report["quantize"]
