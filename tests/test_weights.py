"""Loading is total: what does not fit is refused and named, and nothing is assigned."""

import argparse
import json
import re
import sys

import h5py
import ml_dtypes
import numpy as np
import pytest
from helpers import CASES, REFERENCE, TIMM_TNT, TIMM_VIT, forward, numpy, weights_file
from safetensors.numpy import load_file, save_file

from keras_vitnt import TNT, ViT, from_checkpoint, load_weights, save_weights


def gives_the_reference(case, source, **overrides):
    """Whether a case's model, loaded from another spelling of its file, gives its logits."""
    builder, options = CASES[case]
    model = builder(**{**options, **overrides})
    report = load_weights(model, source)
    reference = np.load(REFERENCE / f"{case}.npz")
    difference = np.abs(numpy(forward(model, reference["image"])) - reference["logits"]).max()
    assert difference <= 5e-5 * max(1.0, np.abs(reference["logits"]).max())
    return report


def changed(tmp_path, change, case="timm_vit"):
    """The path of a case's file with other arrays."""
    arrays = load_file(weights_file(case))
    arrays = change(arrays) or arrays
    save_file(arrays, tmp_path / "changed.safetensors")
    return tmp_path / "changed.safetensors"


def renamed(*pairs):
    """A change of names, as a function for `changed`."""

    def change(arrays):
        new = {}
        for name, array in arrays.items():
            for pattern, replacement in pairs:
                name = re.sub(pattern, replacement, name)
            new[name] = array
        return new

    return change


# timm's name -> the official release's (tnt_pytorch/tnt.py of Efficient-AI-Backbones).
OFFICIAL = (
    (r"^patch_pos$", "outer_pos"),
    (r"^pixel_embed\.", "patch_embed."),
    (r"\bnorm([12])_proj\.", r"proj_norm\1."),
    (r"\.norm_in\.", ".inner_norm1."),
    (r"\.norm_mlp_in\.", ".inner_norm2."),
    (r"\.attn_in\.", ".inner_attn."),
    (r"\.mlp_in\.", ".inner_mlp."),
    (r"\.norm_out\.", ".outer_norm1."),
    (r"\.norm_mlp\.", ".outer_norm2."),
    (r"\.attn_out\.", ".outer_attn."),
    (r"^(blocks\.\d+)\.mlp\.", r"\1.outer_mlp."),
)


def official_tnt(arrays):
    arrays = renamed(*OFFICIAL)(arrays)
    words = arrays.pop("pixel_pos")  # (1, c, 4, 4) -> (1, 16, c)
    arrays["inner_pos"] = words.reshape(1, words.shape[1], -1).transpose(0, 2, 1).copy()
    arrays["outer_tokens"] = np.zeros((1, 6, 60), "float32")
    return arrays


def test_the_official_tnt_release(tmp_path):
    path = changed(tmp_path, official_tnt, "timm_tnt")
    report = gives_the_reference("timm_tnt", path)
    assert report.scheme == "official TNT"
    assert report.unused == {"outer_tokens": "zeros that the network never reads"}
    model, found = from_checkpoint(
        path, report=True, num_heads=3, inner_num_heads=2, input_shape=(32, 48, 3)
    )
    assert model.count_params() == TNT(**TIMM_TNT).count_params()


@pytest.mark.parametrize(
    ("case", "pairs"),
    [
        ("timm_vit_reg4_layerscale", [(r"\.ls(\d)\.gamma$", r".gamma_\1")]),  # DeiT-3's release
        ("timm_tnt_legacy", [("^", "module.")]),
        ("torchvision_vit", [(r"\.mlp\.0\.", ".mlp.linear_1."), (r"\.mlp\.3\.", ".mlp.linear_2.")]),
    ],
)
def test_other_spellings(case, pairs, tmp_path):
    gives_the_reference(case, changed(tmp_path, renamed(*pairs), case))


def google(change, tmp_path, case):
    arrays = dict(np.load(weights_file(case)))
    np.savez(tmp_path / "changed.npz", **change(arrays))
    return tmp_path / "changed.npz"


def stacked(arrays):
    """big_vision's scan layout: an array of all blocks."""
    new, stacks = {}, {}
    for name, array in sorted(arrays.items()):
        if block := re.search(r"encoderblock_(\d+)", name):
            place = name.replace(block[0], "encoderblock")
            stacks.setdefault(place, []).append(array)
        else:
            new[name] = array
    return new | {name: np.stack(parts) for name, parts in stacks.items()}


@pytest.mark.parametrize(
    ("case", "change"),
    [
        ("google_vit", lambda a: {f"opt/target/{name}": x for name, x in a.items()}),
        ("big_vision_map", lambda a: {f"params/{name}": x for name, x in a.items()}),
        ("big_vision_tok", stacked),
        ("big_vision_gap_sincos", stacked),
    ],
)
def test_other_spellings_of_google(case, change, tmp_path):
    gives_the_reference(case, google(change, tmp_path, case))


def test_pre_logits_are_loaded_or_left_out_with_the_head(tmp_path):
    def add(arrays):
        kernel = np.eye(36, dtype="float32")
        return {**arrays, "pre_logits/kernel": kernel, "pre_logits/bias": np.zeros(36, "f4")}

    path = google(add, tmp_path, "google_vit")
    builder, options = CASES["google_vit"]
    report = load_weights(builder(**options, representation_size=36), path)
    assert report.rows[-3].variable == "pre_logits/bias" and report.unused == {}
    with pytest.raises(ValueError, match="no place: pre_logits/bias"):
        load_weights(builder(**options), path)
    report = load_weights(builder(**{**options, "classes": 2}), path, new_head=True)
    assert set(report.unused) == {
        "head/bias",
        "head/kernel",
        "pre_logits/bias",
        "pre_logits/kernel",
    }


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_other_precisions_are_converted(dtype, tmp_path):
    path = changed(tmp_path, lambda a: {name: x.astype(dtype) for name, x in a.items()})
    model = ViT(**TIMM_VIT)
    load_weights(model, path)
    expected = load_file(weights_file("timm_vit"))["norm.bias"].astype(np.dtype(dtype))
    np.testing.assert_array_equal(numpy(model.get_layer("norm").beta), expected.astype("f4"))
    if dtype == "bfloat16":  # np.savez forgets the name of the type
        arrays = {n: x.astype(ml_dtypes.bfloat16) for n, x in np.load(google_file()).items()}
        np.savez(tmp_path / "half.npz", **arrays)
        builder, options = CASES["google_vit"]
        load_weights(builder(**options), tmp_path / "half.npz")


def google_file():
    return weights_file("google_vit")


def test_shards(tmp_path):
    arrays = load_file(weights_file("timm_vit"))
    names = sorted(arrays)
    shards = {f"model-0000{i + 1}-of-00002.safetensors": names[i::2] for i in range(2)}
    for shard, held in shards.items():
        save_file({name: arrays[name] for name in held}, tmp_path / shard)
    index = {"weight_map": {name: shard for shard, held in shards.items() for name in held}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    gives_the_reference("timm_vit", tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="model-00002-of-00002.*not beside it"):
        load_weights(ViT(**TIMM_VIT), tmp_path)


@pytest.mark.parametrize("wrapper", [None, "model", "state_dict"])
def test_torch_files(wrapper, tmp_path):
    torch = pytest.importorskip("torch")
    arrays = {n: torch.tensor(x) for n, x in load_file(weights_file("timm_vit")).items()}
    content = {wrapper: arrays, "epoch": 3} if wrapper else arrays
    torch.save(content, tmp_path / "model.pth.tar")
    gives_the_reference("timm_vit", tmp_path / "model.pth.tar")


class Code:
    """A pickle that runs code when it is read."""

    def __reduce__(self):
        import os

        return os.mkdir, ("ran",)


def test_pickles_run_no_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.savez("objects.npz", **{"embedding/kernel": np.array([Code()], dtype=object)})
    with pytest.raises(ValueError, match="embedding/kernel holds pickled objects"):
        load_weights(ViT(**TIMM_VIT), "objects.npz")
    torch = pytest.importorskip("torch")
    torch.save({"patch_embed.proj.weight": torch.ones(3), "args": Code()}, "code.pth")
    with pytest.raises(ValueError, match=r"more than arrays.*(os|posix|nt)\.mkdir"):
        load_weights(ViT(**TIMM_VIT), "code.pth")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["code.pth", "objects.npz"]


def double(name):
    """A change that makes an array twice as tall."""
    return lambda arrays: arrays.update({name: np.concatenate([arrays[name]] * 2)})


def turned(name):
    return lambda arrays: arrays.update({name: np.ascontiguousarray(arrays[name].T)})


FAULTS = {
    "missing": ("timm_vit", lambda a: a.pop("norm.bias"), r"nothing: norm/beta \(36,\)"),
    "extra": (
        "timm_vit",
        lambda a: a.update({"blocks.2.norm1.bias": np.ones(36, "f4")}),
        r"no place: blocks.2.norm1.bias \(36,\)",
    ),
    "classes": (
        "timm_vit",
        lambda a: a.update({"head.weight": np.ones((9, 36), "f4")}),
        r"head/kernel is \(36, 7\), the file has \(36, 9\).*new_head=True",
    ),
    "transposed": (
        "timm_vit",
        turned("blocks.1.mlp.fc1.weight"),
        r"block01/mlp/fc1/kernel is \(36, 108\), the file has \(108, 36\)",
    ),
    "queries": (
        "timm_tnt",
        double("blocks.1.attn_out.qk.weight"),
        r"block01/outer/attention/qkv/kernel takes queries, keys and values of one size",
    ),
    "channels": (
        "timm_vit",
        lambda a: a.update({"patch_embed.proj.weight": np.ones((36, 1, 8, 8), "f4")}),
        r"encoder/projection/kernel is \(192, 36\), the file has \(64, 36\).*adapt_channels",
    ),
    "integers": (
        "timm_vit",
        lambda a: a.update({"norm.bias": np.ones(36, "i4")}),
        "norm.bias is I32, expected floating point",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_checkpoint_that_does_not_fit_changes_nothing(fault, tmp_path):
    case, change, message = FAULTS[fault]
    builder, options = CASES[case]
    model = builder(**options)
    before = [numpy(v) for v in model.weights]

    def planted(arrays):
        change(arrays)

    with pytest.raises(ValueError, match=message):
        load_weights(model, changed(tmp_path, planted, case))
    for variable, value in zip(model.weights, before):
        np.testing.assert_array_equal(numpy(variable), value)


def test_legacy_tnt_is_no_official_one():
    message = "block00/fold/norm2/gamma.*block00/fold/norm1/gamma is.*other layout"
    with pytest.raises(ValueError, match=message):
        load_weights(TNT(**TIMM_TNT), weights_file("timm_tnt_legacy"))


def test_unreadable_files_are_named(tmp_path):
    model = ViT(**TIMM_VIT)
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        load_weights(model, tmp_path / "absent.npz")
    (tmp_path / "cut.safetensors").write_bytes(weights_file("timm_vit").read_bytes()[:5000])
    with pytest.raises(ValueError, match="cut.safetensors cannot be read"):
        load_weights(model, tmp_path / "cut.safetensors")
    (tmp_path / "cut.npz").write_bytes(google_file().read_bytes()[:5000])
    with pytest.raises(ValueError, match="cut.npz cannot be read"):
        load_weights(model, tmp_path / "cut.npz")
    np.savez(tmp_path / "other.npz", a=np.ones(3))
    with pytest.raises(ValueError, match="no checkpoint that is known"):
        load_weights(model, tmp_path / "other.npz")
    with pytest.raises(ValueError, match="holds none of|expected a checkpoint named"):
        load_weights(model, __file__)


def test_a_missing_torch_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    (tmp_path / "model.pth").write_bytes(b"x")
    with pytest.raises(ImportError, match=r"keras-vitnt\[torch\]"):
        from keras_vitnt.checkpoints import open_checkpoint

        open_checkpoint(tmp_path / "model.pth")


def test_a_new_head_is_kept_only_when_asked():
    model = ViT(**{**TIMM_VIT, "classes": 3})
    report = load_weights(model, weights_file("timm_vit"), new_head=True)
    new = [row.variable for row in report.rows if row.action == "re-initialised"]
    assert new == ["head/kernel", "head/bias"]
    assert set(report.unused) == {"head.weight", "head.bias"}
    assert len(report.rows) == len(model.weights)
    assert "block00/attention/qkv/kernel" in str(report)


@pytest.mark.parametrize("suffix", [".keras", ".weights.h5"])
@pytest.mark.parametrize(("builder", "options"), [(ViT, TIMM_VIT), (TNT, TIMM_TNT)])
def test_own_files_fit_another_size(builder, options, suffix, tmp_path):
    """The table of a square of patches, in a model that is wider than high, and one as it was."""
    options = dict(options, input_shape=(64, 64, 3))
    model = builder(**options)
    path = tmp_path / f"model{suffix}"
    model.save(path) if suffix == ".keras" else model.save_weights(path)
    same = builder(**options)
    report = load_weights(same, path)
    assert {row.action for row in report.rows} == {"loaded"}
    for ours, theirs in zip(same.weights, model.weights):
        np.testing.assert_array_equal(numpy(ours), numpy(theirs))
    wide = builder(**dict(options, input_shape=(32, 96, 3)))
    report = load_weights(wide, path)
    resized = [row.action for row in report.rows if row.action != "loaded"]
    patch = options["patch_size"]
    assert resized == [
        f"resized from {64 // patch} x {64 // patch} to {32 // patch} x {96 // patch}"
    ]


@pytest.mark.parametrize("case", [c for c in CASES if c.startswith("timm_")])
def test_timm_names_come_back_bitwise(case, tmp_path):
    builder, options = CASES[case]
    model = builder(**options)
    load_weights(model, weights_file(case))
    written = save_weights(model, tmp_path / "again.safetensors")
    (tmp_path / "other").touch()
    modes = {path.stat().st_mode for path in (tmp_path / "again.safetensors", tmp_path / "other")}
    assert len(modes) == 1  # readable for whom other new files are
    source, again = load_file(weights_file(case)), load_file(tmp_path / "again.safetensors")
    assert source.keys() == again.keys() == written.keys()
    for name in source:
        np.testing.assert_array_equal(source[name], again[name])
    found = from_checkpoint(tmp_path / "again.safetensors")  # its metadata says the rest
    for ours, theirs in zip(found.weights, model.weights):
        np.testing.assert_array_equal(numpy(ours), numpy(theirs))


@pytest.mark.parametrize("case", ["hf_vit", "hf_deit", "hf_deit_distilled"])
def test_hugging_face_names_come_back_bitwise(case, tmp_path):
    model = from_checkpoint(weights_file(case))
    if case == "hf_deit":
        with pytest.raises(ValueError, match="no place for encoder/register_tokens"):
            save_weights(model, tmp_path / "model.safetensors", names="huggingface")
        return
    save_weights(model, tmp_path / "model.safetensors", names="huggingface")
    source = load_file(weights_file(case) / "model.safetensors")
    again = load_file(tmp_path / "model.safetensors")
    assert source.keys() == again.keys()
    for name in source:
        np.testing.assert_array_equal(source[name], again[name])


def test_what_cannot_be_written_is_named(tmp_path):
    model = ViT(**TIMM_VIT, representation_size=5)
    with pytest.raises(ValueError, match="timm has no place for pre_logits/kernel"):
        save_weights(model, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="names.*got 'google'"):
        save_weights(model, tmp_path / "model.safetensors", names="google")
    with pytest.raises(ValueError, match="as .safetensors"):
        save_weights(model, tmp_path / "model.pth")
    assert not list(tmp_path.iterdir())


def test_fixed_positions_are_written_as_a_table(tmp_path):
    options = dict(TIMM_VIT, positions="sincos2d")
    model = ViT(**options)
    save_weights(model, tmp_path / "model.safetensors")
    learned = ViT(**dict(options, positions="learned", prefix_positions=False))
    load_weights(learned, tmp_path / "model.safetensors")
    x = np.random.default_rng(0).normal(size=(2, 32, 48, 3)).astype("float32")
    np.testing.assert_allclose(numpy(forward(model, x)), numpy(forward(learned, x)), atol=1e-5)


def timm_model(case):
    """timm's own model of a case."""
    try:
        import timm
    except (ImportError, RuntimeError) as error:  # torchvision's operators may not fit torch
        pytest.skip(f"timm cannot be imported: {error}")
    numbers = dict(img_size=(32, 48), num_classes=7)
    if "tnt" in case:
        numbers |= dict(embed_dim=60, inner_dim=10, depth=2, num_heads_inner=2, num_heads_outer=3)
        return timm.models.tnt.TNT(**numbers, legacy="legacy" in case)
    numbers |= dict(patch_size=8, embed_dim=36, depth=2, num_heads=3, mlp_ratio=3)
    if "deit" in case:
        return timm.models.deit.VisionTransformerDistilled(**numbers)
    return timm.models.VisionTransformer(**numbers)


@pytest.mark.parametrize("case", ["timm_vit", "timm_deit_distilled", "timm_tnt", "timm_tnt_legacy"])
def test_written_weights_load_strictly_into_timm(case, tmp_path):
    other = timm_model(case)
    import torch

    builder, options = CASES[case]
    model = builder(**options)
    rng = np.random.default_rng(0)
    model.set_weights([0.2 * rng.normal(size=w.shape) for w in model.get_weights()])
    save_weights(model, tmp_path / "model.safetensors")
    arrays = load_file(tmp_path / "model.safetensors")
    other.load_state_dict({n: torch.tensor(x) for n, x in arrays.items()}, strict=True)
    x = rng.normal(size=(2, 32, 48, 3)).astype("float32")
    with torch.no_grad():
        expected = other.eval()(torch.tensor(x).permute(0, 3, 1, 2)).numpy()
    np.testing.assert_allclose(numpy(forward(model, x)), expected, atol=1e-4, rtol=0)


def test_damaged_data_is_found_before_anything_is_assigned(tmp_path):
    content = bytearray(google_file().read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "damaged.npz").write_bytes(content)
    builder, options = CASES["google_vit"]
    model = builder(**options)
    before = [numpy(v) for v in model.weights]
    with pytest.raises(ValueError, match="damaged.npz cannot be read.*is damaged"):
        load_weights(model, tmp_path / "damaged.npz")
    for variable, value in zip(model.weights, before):
        np.testing.assert_array_equal(numpy(variable), value)


def test_a_scan_is_read_once(tmp_path, monkeypatch):
    path = google(stacked, tmp_path, "big_vision_tok")
    reads = []
    read = np.lib.npyio.NpzFile.__getitem__
    monkeypatch.setattr(
        np.lib.npyio.NpzFile, "__getitem__", lambda self, key: reads.append(key) or read(self, key)
    )
    report = gives_the_reference("big_vision_tok", path)
    blocks = [name for name in reads if name.startswith("Transformer/encoderblock/")]
    assert len(blocks) == len(set(blocks)) == 16
    names = {name for row in report.rows for name in row.sources}
    assert "Transformer/encoderblock/LayerNorm_0/scale[1]" in names


def test_another_number_of_heads_is_no_fit():
    builder, options = CASES["google_vit"]
    with pytest.raises(
        ValueError, match="block00/attention/qkv/kernel has 2 heads, the file has 3"
    ):
        load_weights(builder(**{**options, "num_heads": 2}), google_file())


def test_a_table_of_several_images_is_no_fit(tmp_path):
    path = changed(tmp_path, lambda a: a.update(pos_embed=np.ones((4, 25, 36), "f4")))
    with pytest.raises(ValueError, match=r"pos_embed has the shape \(4, 25, 36\)"):
        load_weights(ViT(**TIMM_VIT), path)


def test_training_checkpoints_give_their_averaged_weights(tmp_path):
    torch = pytest.importorskip("torch")
    arrays = {n: torch.tensor(x) for n, x in load_file(weights_file("timm_vit")).items()}
    content = {"args": argparse.Namespace(lr=1), "state_dict": {}, "state_dict_ema": arrays}
    torch.save(content, tmp_path / "last.pth.tar")
    report = gives_the_reference("timm_vit", tmp_path / "last.pth.tar")
    assert set(report.unused) == {"args", "state_dict"}
    (tmp_path / "page.bin").write_text("<html>")
    with pytest.raises(ValueError, match="page.bin.*no file of torch.save"):
        load_weights(ViT(**TIMM_VIT), tmp_path / "page.bin")


def test_h5_data_of_another_file_is_refused(tmp_path):
    (tmp_path / "secret").write_bytes(bytes(400))
    with h5py.File(tmp_path / "x.weights.h5", "w") as file:
        outside = [(str(tmp_path / "secret"), 0, 400)]
        file.create_dataset("layers/dense/vars/0", (100,), "f4", external=outside)
    with pytest.raises(ValueError, match="vars/0 stands in another file; refused"):
        load_weights(ViT(**TIMM_VIT), tmp_path / "x.weights.h5")


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd"])
def test_an_index_names_only_files_beside_it(name, tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"head.bias": name}}))
    with pytest.raises(ValueError, match="passwd, which is not a file beside it"):
        load_weights(ViT(**TIMM_VIT), tmp_path)


def test_transformers_has_no_place_for_every_model(tmp_path):
    for options, message in (
        (dict(prefix_positions=False), "a position of its own"),
        (dict(representation_size=5), "no place for pre_logits/kernel"),
    ):
        with pytest.raises(ValueError, match=message):
            model = ViT(**TIMM_VIT, **options)
            save_weights(model, tmp_path / "model.safetensors", names="huggingface")
    assert not list(tmp_path.iterdir())
