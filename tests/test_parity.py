"""Equality with the public implementations, stage by stage, on the active backend."""

import keras
import numpy as np
import pytest
from helpers import CASES, REFERENCE, forward, numpy, weights_file

from keras_vitnt import load_weights
from keras_vitnt.tnt import blocks


def stages(model):
    """The model's tensors under the names that the reference files give to them."""
    found = {"logits": model.output}
    for i, block in enumerate(blocks(model)):
        if isinstance(block.output, list | tuple):
            found |= {f"block{i}.0": block.output[0], f"block{i}.1": block.output[1]}
        else:
            found[f"block{i}"] = block.output
    # timm moves the norm behind the pooling for "avg": its `norm` is then the identity.
    names = [layer.name for layer in model.layers]
    found["norm"] = model.get_layer("norm").output if "norm" in names else blocks(model)[-1].output
    found["encoded"] = found["norm"]
    return found


def compare_stages(case):
    """(name, our numbers, the reference's) of every stage that a case's file gives."""
    builder, options = CASES[case]
    model = builder(**options)
    load_weights(model, weights_file(case))
    expected = dict(np.load(REFERENCE / f"{case}.npz"))
    image = expected.pop("image")
    ours = stages(model)
    staged = keras.Model(model.input, {name: ours[name] for name in expected})
    values = forward(staged, image)
    for name, reference in expected.items():
        yield name, numpy(values[name]).reshape(reference.shape), reference


@pytest.mark.parametrize("case", CASES)
def test_parity_stage_by_stage(case):
    for name, actual, reference in compare_stages(case):
        tolerance = 5e-5 * max(1.0, np.abs(reference).max())
        np.testing.assert_allclose(actual, reference, rtol=0, atol=tolerance, err_msg=name)


def test_every_reference_file_is_a_case():
    files = {path.name.split(".")[0] for path in REFERENCE.iterdir()}
    assert files - {"timm_position_resize"} == set(CASES)
