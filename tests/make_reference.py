"""Makes the reference cases hf_*, torchvision_vit and timm_vit_map in tests/reference.

    pip install torch transformers torchvision timm safetensors && python tests/make_reference.py

Small models with random weights, saved as each library saves them, and what it computes with
them, stage by stage. (The other cases of timm, vision_transformer and big_vision came the
same way.)
"""

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

REFERENCE = Path(__file__).parent / "reference"
NUMBERS = dict(
    hidden_size=36,
    num_hidden_layers=2,
    num_attention_heads=3,
    intermediate_size=108,
    patch_size=8,
    num_labels=7,
)


def settle(model):
    """Random numbers in every weight, so that nothing hides behind zeros and ones."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def record(name, model, image, stages):
    """Run a model and save the outputs of its named modules."""
    outputs = {"image": image}

    def keep(stage):
        def hook(module, arguments, output):
            outputs[stage] = output[0] if isinstance(output, tuple) else output

        return hook

    for stage, module in stages.items():
        module.register_forward_hook(keep(stage))
    with torch.no_grad():
        found = model(torch.tensor(image).permute(0, 3, 1, 2))
    outputs["logits"] = getattr(found, "logits", found)
    arrays = {key: np.asarray(value, "float32") for key, value in outputs.items()}
    np.savez_compressed(REFERENCE / f"{name}.npz", **arrays)


def main():
    import timm
    import torchvision
    import transformers

    rng = np.random.default_rng(0)
    for name, kind in (
        ("hf_vit", "ViTForImageClassification"),
        ("hf_deit", "DeiTForImageClassification"),
        ("hf_deit_distilled", "DeiTForImageClassificationWithTeacher"),
    ):
        cls = getattr(transformers, kind)
        model = settle(cls(cls.config_class(**NUMBERS, image_size=(32, 48))))
        model.save_pretrained(REFERENCE / name)
        body = getattr(model, model.config.model_type)
        stages = {f"block{i}": layer for i, layer in enumerate(body.layers)}
        image = rng.normal(size=(2, 32, 48, 3)).astype("float32")
        record(name, model, image, stages | {"norm": body.layernorm})

    model = settle(torchvision.models.VisionTransformer(32, 8, 2, 3, 36, 108, num_classes=7))
    save_file(model.state_dict(), REFERENCE / "torchvision_vit.safetensors")
    stages = {f"block{i}": layer for i, layer in enumerate(model.encoder.layers)}
    image = rng.normal(size=(2, 32, 32, 3)).astype("float32")
    record("torchvision_vit", model, image, stages | {"norm": model.encoder.ln})

    model = settle(
        timm.models.VisionTransformer(
            img_size=32,
            patch_size=8,
            num_classes=7,
            global_pool="map",
            embed_dim=36,
            depth=2,
            num_heads=3,
            mlp_ratio=3,
            class_token=False,
        )
    )
    save_file(model.state_dict(), REFERENCE / "timm_vit_map.safetensors")
    stages = {f"block{i}": layer for i, layer in enumerate(model.blocks)}
    record("timm_vit_map", model, image, stages | {"norm": model.norm})


if __name__ == "__main__":
    main()
