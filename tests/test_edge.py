"""The lean graph computes what its model does."""

import numpy as np
import pytest
from helpers import forward, numpy
from test_models import OPTIONS, TNT, VIT, settle

from keras_vitnt import edge, images, models

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
