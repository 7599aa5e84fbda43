"""The lean graph computes what its model does; the gate refuses files that phones cannot run."""

import keras
import numpy as np
import pytest
from helpers import forward, numpy
from test_models import OPTIONS, TNT, VIT, settle

from keras_vitnt import edge, models
from keras_vitnt.export import export, faults, gate, open_model, real_photos

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
    x = np.random.default_rng(0).normal(size=(1, 8, 12, 3)).astype("float32")
    expected = numpy(forward(model, x))
    found = edge.lean(model)(tf.constant(x)).numpy()
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * max(1, np.abs(expected).max()))


def test_a_model_by_hand_has_no_lean_graph(tmp_path):
    images = keras.Input((8, 12, 3))
    model = keras.Model(images, models.ViT(**VIT)(images))
    with pytest.raises(ValueError, match='pass graph="plain"'):
        export(model, tmp_path / "model.tflite")
    with pytest.raises(ValueError, match="graph.*got 'fast'"):
        export(model, tmp_path / "model.tflite", graph="fast")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("graph", ["lean", "plain"])
def test_exported_files_pass_the_gate(graph, tmp_path):
    model = settle(models.TNT(**TNT))
    photos = real_photos((8, 12, 3))
    export(model, tmp_path / "model.tflite", graph=graph)
    run, shape = open_model(tmp_path / "model.tflite")
    np.testing.assert_allclose(run(photos), numpy(forward(model, photos)), atol=1e-5)
    assert shape == (8, 12, 3)
    assert faults(tmp_path / "model.tflite", 1 if graph == "lean" else None) == []


def litert(path, function, shape, flex=False):
    """A LiteRT file of any function."""
    import tensorflow as tf

    run = tf.function(function, [tf.TensorSpec(shape, tf.float32)])
    converter = tf.lite.TFLiteConverter.from_concrete_functions([run.get_concrete_function()])
    if flex:
        converter.target_spec.supported_ops = [tf.lite.OpsSet.SELECT_TF_OPS]
    path.write_bytes(converter.convert())
    return path


def test_the_gate_refuses_planted_faults(tmp_path):
    import tensorflow as tf

    square = np.eye(4, dtype="float32")
    path = litert(tmp_path / "flex.tflite", tf.math.erf, (1, 4), flex=True)
    assert "Flex" in faults(path)[0]
    path = litert(tmp_path / "dynamic.tflite", lambda x: x @ square, (None, 4))
    assert "dynamic tensors" in " ".join(faults(path))
    high = litert(
        tmp_path / "high.tflite",
        lambda x: tf.transpose(tf.reshape(x, (2, 2, 2, 2, 2)), (4, 3, 2, 1, 0)),
        (1, 32),
    )
    assert "rank 5" in " ".join(faults(high, None))
    parted = litert(
        tmp_path / "parted.tflite",
        lambda x: tf.nn.softmax(tf.cumsum(tf.nn.softmax(x @ square), 1) @ square) @ square,
        (1, 4),
    )
    assert "2 XNNPACK partitions, not 1" in faults(parted)


def test_the_gate_refuses_another_models_file(tmp_path):
    if keras.backend.backend() != "tensorflow":  # where files are written, and gated
        return
    model = settle(models.ViT(**VIT))
    export(model, tmp_path / "model.tflite")
    gate(model, tmp_path / "model.tflite", None, "lean")
    bias = model.get_layer("block00").mlp.fc2.bias
    bias.assign(numpy(bias) + np.eye(1, 16, dtype="float32")[0])
    with pytest.raises(RuntimeError, match="model.tflite is refused: it differs from Keras by"):
        gate(model, tmp_path / "model.tflite", None, "lean")
