"""Loading is total: what does not fit is refused and named, and nothing is assigned."""

import numpy as np
import pytest
from helpers import TIMM_VIT, numpy, weights_file
from safetensors.numpy import load_file, save_file

from keras_vitnt import ViT, load_weights


def damaged(tmp_path, change):
    arrays = load_file(weights_file("timm_vit"))
    change(arrays)
    save_file(arrays, tmp_path / "damaged.safetensors")
    return tmp_path / "damaged.safetensors"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.pop("norm.bias"), "nothing for norm/beta"),
        (lambda a: a.update({"blocks.2.norm1.bias": np.ones(36, "f4")}), "no block02/norm1/beta"),
        (lambda a: a.update({"head.weight": np.ones((9, 36), "f4")}), r"head/kernel is \(36, 7\)"),
    ],
)
def test_a_checkpoint_that_does_not_fit_changes_nothing(tmp_path, change, message):
    model = ViT(**TIMM_VIT)
    before = [numpy(v) for v in model.weights]
    with pytest.raises(ValueError, match=message):
        load_weights(model, damaged(tmp_path, change))
    for variable, value in zip(model.weights, before):
        np.testing.assert_array_equal(numpy(variable), value)


def test_unreadable_files_are_named(tmp_path):
    model = ViT(**TIMM_VIT)
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        load_weights(model, tmp_path / "absent.npz")
    (tmp_path / "cut.safetensors").write_bytes(weights_file("timm_vit").read_bytes()[:5000])
    with pytest.raises(ValueError, match="cut.safetensors cannot be read"):
        load_weights(model, tmp_path / "cut.safetensors")
    np.savez(tmp_path / "other.npz", a=np.ones(3))
    with pytest.raises(ValueError, match="no checkpoint that is known"):
        load_weights(model, tmp_path / "other.npz")


def test_a_new_head_is_kept_only_when_asked(tmp_path):
    model = ViT(**{**TIMM_VIT, "classes": 3})
    report = load_weights(model, weights_file("timm_vit"), new_head=True)
    new = [row.variable for row in report.rows if row.action == "re-initialised"]
    assert new == ["head/kernel", "head/bias"]
    assert len(report.rows) == len(model.weights)
    assert "block00/attention/qkv/kernel" in str(report)
