"""What several test files share: the reference cases, tiny models, a complete layer test."""

from pathlib import Path

import keras
import numpy as np

from keras_vitnt import conversion, models

REFERENCE = Path(__file__).parent / "reference"
TIMM_VIT = dict(
    patch_size=8, dim=36, depth=2, num_heads=3, mlp_dim=108, input_shape=(32, 48, 3), classes=7
)
TIMM_TNT = dict(
    patch_size=16,
    dim=60,
    depth=2,
    num_heads=3,
    inner_dim=10,
    inner_num_heads=2,
    input_shape=(32, 48, 3),
    classes=7,
)
BIG_VISION = dict(prefix_positions=False, gelu="tanh", **TIMM_VIT)

SQUARE = dict(TIMM_VIT, input_shape=(32, 32, 3))

# Every case of tests/reference: weights and outputs of timm 1.0.31, vision_transformer,
# big_vision, transformers 5.23.0 and torchvision 0.28.0, and the model of ours that must give
# the same.
CASES = {
    "timm_vit": (models.ViT, TIMM_VIT),
    "timm_vit_avg_noqkvbias": (
        models.ViT,
        dict(pooling="avg", fc_norm=True, qkv_bias=False, **TIMM_VIT),
    ),
    "timm_vit_reg4_layerscale": (
        models.ViT,
        dict(register_tokens=4, layer_scale=0.1, prefix_positions=False, **TIMM_VIT),
    ),
    "timm_deit_distilled": (models.DeiT, dict(distilled=True, **TIMM_VIT)),
    "timm_tnt": (models.TNT, TIMM_TNT),
    "timm_tnt_legacy": (models.TNT, dict(layout="legacy", **TIMM_TNT)),
    "timm_vit_map": (models.ViT, dict(class_token=False, pooling="map", **SQUARE)),
    "hf_vit": (models.ViT, dict(layer_norm_epsilon=1e-12, **TIMM_VIT)),
    # The distillation token without a head of its own is a register.
    "hf_deit": (models.ViT, dict(layer_norm_epsilon=1e-12, register_tokens=1, **TIMM_VIT)),
    "hf_deit_distilled": (
        models.DeiT,
        dict(layer_norm_epsilon=1e-12, distilled=True, **TIMM_VIT),
    ),
    "torchvision_vit": (models.ViT, SQUARE),
    "google_vit": (models.ViT, dict(gelu="tanh", **TIMM_VIT)),
    "big_vision_tok": (models.ViT, BIG_VISION),
    "big_vision_map": (models.ViT, dict(class_token=False, pooling="map", **BIG_VISION)),
    "big_vision_gap_sincos": (
        models.ViT,
        dict(
            class_token=False,
            pooling="avg",
            positions="sincos2d",
            representation_size=36,
            **BIG_VISION,
        ),
    ),
}


def weights_file(case):
    """A file, or transformers' folder."""
    names = (f"{case}{end}" for end in (".safetensors", ".weights.npz", ""))
    return next(path for path in map(REFERENCE.joinpath, names) if path.exists())


def forward(model, x):
    """The model's outputs; compiled on JAX, which otherwise compiles each operation by itself."""
    if keras.backend.backend() != "jax":
        return model(x)
    import jax

    weights = [[v.value for v in model.trainable_variables]]
    weights.append([v.value for v in model.non_trainable_variables])
    return jax.jit(lambda *w: model.stateless_call(*w, x)[0])(*weights)


def numpy(x):
    return np.asarray(keras.ops.convert_to_numpy(x))


def converted(model, kinds, folder, photos, calibration=None, **job):
    """The conversion process' work, done in this one: [report as a dict], for LiteRT files."""
    size = model.input_shape[1:3]
    job = {"graph": "lean", "batch_size": 1, "input": "float"} | job
    job = {"preprocessing": [size, [0.5] * 3, [0.5] * 3]} | job
    job["files"] = [{"path": str(folder / f"{kind}.tflite"), "quantize": kind} for kind in kinds]
    arrays = {"photos": photos, "calibration": calibration}
    return conversion.write_all(model, job, arrays, folder)
