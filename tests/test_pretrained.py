"""A checkpoint alone says which model it is; what it does not say is asked for or reported."""

import json

import keras
import numpy as np
import pytest
from helpers import CASES, REFERENCE, forward, numpy, weights_file
from safetensors.numpy import load_file, save_file

import keras_vitnt as kv
from keras_vitnt import from_checkpoint, images, inspect, preprocessing

# What these small models' files do not say: published ones follow their family's rule.
UNSAID = {
    "timm_vit_map": dict(num_heads=3),
    "torchvision_vit": dict(num_heads=3),
    "big_vision_gap_sincos": dict(input_shape=(32, 48, 3)),
    "big_vision_tok": dict(input_shape=(32, 48, 3)),
    "big_vision_map": dict(input_shape=(32, 48, 3)),
    "google_vit": dict(input_shape=(32, 48, 3)),
}


@pytest.mark.parametrize("case", CASES)
def test_a_checkpoint_builds_its_own_model(case):
    model, report = from_checkpoint(weights_file(case), report=True, **UNSAID.get(case, {}))
    reference = np.load(REFERENCE / f"{case}.npz")
    logits = reference["logits"]
    difference = np.abs(numpy(forward(model, reference["image"])) - logits).max()
    assert difference <= 5e-5 * max(1.0, np.abs(logits).max())
    builder, options = CASES[case]
    assert model.count_params() == builder(**options).count_params()
    assert len(report.rows) == len([w for w in model.weights if "seed" not in w.path])
    assert "num_heads=3: " in str(report)


def test_what_the_arrays_leave_open_must_be_given(tmp_path):
    arrays = load_file(weights_file("timm_vit"))
    save_file(arrays, tmp_path / "bare.safetensors")  # without the metadata
    with pytest.raises(ValueError, match="how many heads share the width of 36: pass num_heads"):
        from_checkpoint(tmp_path / "bare.safetensors")
    arrays = load_file(weights_file("timm_deit_distilled"))
    save_file(arrays, tmp_path / "bare.safetensors")
    with pytest.raises(ValueError, match="26 positions, no square.*pass its input_shape"):
        from_checkpoint(tmp_path / "bare.safetensors", num_heads=3)
    model = from_checkpoint(tmp_path / "bare.safetensors", num_heads=3, input_shape=(32, 48, 3))
    assert model.output_shape == (None, 7)


def test_another_size_classes_and_channels(tmp_path):
    source = weights_file("timm_vit")
    model, report = from_checkpoint(source, report=True, input_shape=(48, 32, 1), classes=2)
    actions = {row.variable: row.action for row in report.rows}
    assert actions["encoder/position_embedding"] == "resized from 4 x 6 to 6 x 4"
    assert actions["encoder/projection/kernel"] == "adapted from 3 to 1 channels"
    assert actions["head/kernel"] == actions["head/bias"] == "re-initialised"
    assert set(report.unused) == {"head.weight", "head.bias"}
    table = load_file(source)["pos_embed"][0]
    ours = numpy(model.get_layer("encoder").position_embedding)
    np.testing.assert_array_equal(ours[0], table[0])
    expected = kv.positions.resize(table, (4, 6), (6, 4), prefix=1)
    np.testing.assert_array_equal(ours, expected)
    grey = np.random.default_rng(0).normal(size=(1, 48, 32, 1)).astype("float32")
    colour = from_checkpoint(source, input_shape=(48, 32, 3), include_top=False)
    top = keras.Model(model.input, model.get_layer("norm").output)
    np.testing.assert_allclose(
        numpy(forward(top, grey)),
        numpy(forward(colour, np.repeat(grey, 3, axis=-1))),
        atol=1e-5,
    )


def test_four_channels_are_adapted_as_timm_does():
    kernel = np.random.default_rng(0).normal(size=(2, 2, 3, 5)).astype("float32")
    adapted = kv.fitting.adapted_channels(kernel, 4)
    expected = np.concatenate([kernel, kernel[:, :, :1]], axis=2) * 0.75
    np.testing.assert_allclose(adapted, expected, rtol=1e-6)


def test_inspect_tells_without_reading_arrays(monkeypatch):
    facts, report = inspect(weights_file("timm_tnt_legacy"))
    assert (facts["family"], facts["layout"], facts["dim"]) == ("TNT", "legacy", 60)
    assert facts["inner_num_heads"] == 2 and facts["input_shape"] == (32, 48, 3)
    assert "inner_num_heads=2: the configuration's num_heads_inner" in str(report)


def test_inspect_leaves_the_session_alone():
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        inspect(weights_file("timm_tnt_legacy"))
        assert keras.config.dtype_policy().name == "mixed_bfloat16"
        assert keras.layers.Dense(1, name=None).dtype_policy.name == "mixed_bfloat16"
    finally:
        keras.config.set_dtype_policy("float32")


def test_grey_checkpoints_get_grey_photos(tmp_path):
    model = kv.ViT(dim=36, num_heads=3, **{**TINY, "input_shape": (32, 32, 1)})
    kv.save_weights(model, tmp_path / "grey.safetensors")
    found = preprocessing(tmp_path / "grey.safetensors")
    assert (found.mean, found.std, found.size) == ((0.5,), (0.5,), (32, 32))
    again, facts, _ = kv.pretrained.load(tmp_path / "grey.safetensors")
    assert again.input_shape == (None, 32, 32, 1) and facts["preprocessing"]["mean"] == (0.5,)


def test_preprocessing_comes_with_the_checkpoint(tmp_path):
    half, imagenet = (0.5, 0.5, 0.5), (0.485, 0.456, 0.406)
    assert preprocessing(weights_file("timm_vit")).mean == half
    assert preprocessing(weights_file("timm_deit_distilled")).mean == imagenet
    found = preprocessing(weights_file("hf_vit"))
    assert found == images.Preprocessing((32, 48), interpolation="bilinear", squash=True)
    arrays = load_file(weights_file("timm_vit"))
    save_file(arrays, tmp_path / "model.safetensors")
    timm = dict(mean=[0.1, 0.2, 0.3], std=[0.4, 0.5, 0.6], crop_pct=0.95, input_size=[3, 32, 48])
    timm |= dict(interpolation="bilinear", crop_mode="squash")
    config = dict(architecture="vit_small_patch16_224", pretrained_cfg=timm)
    config["model_args"] = dict(num_heads=3)
    (tmp_path / "config.json").write_text(json.dumps(config))
    expected = ((32, 48), (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), 0.95, "bilinear", True)
    assert preprocessing(tmp_path) == expected
    facts, _ = inspect(tmp_path)
    assert facts["num_heads"] == 3


def test_predictions_are_named():
    logits = np.full((2, 1000), -9.0)
    logits[0, 281] = logits[1, 517] = 3
    (cat, *_), (crane, *_) = kv.decode_predictions(logits, top=2)
    assert cat[0] == "tabby" and crane[0] == "crane (machine)"
    assert cat[1] == pytest.approx(1 / (1 + 999 * np.exp(-12)))
    assert len(set(kv.pretrained.imagenet_classes())) == 1000
    shares = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    assert kv.decode_predictions(shares, top=1)[0] == [("tabby", pytest.approx(cat[1]))]
    with pytest.raises(ValueError, match=r"\(images, 1000\)"):
        kv.decode_predictions(np.zeros((1, 10)))


def hub_folder(tmp_path, model, **config):
    """A folder as timm's hub repositories are: weights without metadata, config.json."""
    kv.save_weights(model, tmp_path / "model.safetensors")
    save_file(load_file(tmp_path / "model.safetensors"), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


TINY = dict(patch_size=8, depth=1, input_shape=(32, 32, 3), classes=7)


def test_heads_follow_the_rule_of_the_width(tmp_path):
    model = kv.ViT(dim=1024, num_heads=16, layer_scale=0.1, prefix_positions=False, **TINY)
    source = hub_folder(tmp_path, model, architecture="deit3_large_patch16_224")
    facts, report = inspect(source)
    assert (facts["num_heads"], facts["family"]) == (16, "DeiT")
    assert facts["preprocessing"]["mean"] == (0.485, 0.456, 0.406)
    assert "num_heads=16: the rule of ViT for a width of 1024" in report.notes


@pytest.mark.parametrize(
    ("architecture", "options", "message"),
    [
        ("vit_base_patch16_rope_224", {}, "'rope' is another network"),
        ("vit_small_patch16_dinov3", {}, "'dinov3' is another network"),
        ("vit_base_patch16_siglip_224", {}, 'pass gelu="erf" or gelu="tanh"'),
        ("vit_tiny_patch8_32", dict(positions="none"), "no position table"),
    ],
)
def test_networks_that_only_look_like_a_vit_are_refused(architecture, options, message, tmp_path):
    model = kv.ViT(dim=36, num_heads=3, **options, **TINY)
    source = hub_folder(tmp_path, model, architecture=architecture)
    with pytest.raises(ValueError, match=message):
        from_checkpoint(source, num_heads=3)


def test_without_its_config_a_hugging_face_file_keeps_its_epsilon(tmp_path):
    source = tmp_path / "vit.safetensors"
    source.write_bytes((weights_file("hf_vit") / "model.safetensors").read_bytes())
    facts, _ = inspect(source, num_heads=3, input_shape=(32, 48, 3))
    assert facts["layer_norm_epsilon"] == 1e-12


def test_pooled_features_of_an_attention_pooled_checkpoint():
    model = from_checkpoint(
        weights_file("big_vision_map"), include_top=False, input_shape=(32, 48, 3)
    )
    assert model.output_shape == (None, 36)


def test_our_own_files_are_no_public_checkpoints(tmp_path):
    kv.ViT(dim=36, num_heads=3, **TINY).save(tmp_path / "model.keras")
    with pytest.raises(ValueError, match="a model of ours"):
        preprocessing(tmp_path / "model.keras")
