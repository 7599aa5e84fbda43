"""Names and layouts of public checkpoints: a table for each implementation, read both ways."""

import re
from typing import NamedTuple

# Our layer (or variable) -> theirs; # is a block's number. A fused projection of ours lists the
# parts that it holds side by side.
TIMM_VIT = {
    "encoder/projection": "patch_embed.proj",
    "encoder/class_token": "cls_token",
    "encoder/distillation_token": "dist_token",
    "encoder/register_tokens": "reg_token",
    "encoder/position_embedding": "pos_embed",
    "block#/norm1": "blocks.#.norm1",
    "block#/attention/qkv": "blocks.#.attn.qkv",
    "block#/attention/proj": "blocks.#.attn.proj",
    "block#/scale1/gamma": "blocks.#.ls1.gamma",
    "block#/norm2": "blocks.#.norm2",
    "block#/mlp/fc1": "blocks.#.mlp.fc1",
    "block#/mlp/fc2": "blocks.#.mlp.fc2",
    "block#/scale2/gamma": "blocks.#.ls2.gamma",
    "norm": "norm",
    "pool/query_token": "attn_pool.latent",
    "pool/query": "attn_pool.q",
    "pool/key_value": "attn_pool.kv",
    "pool/proj": "attn_pool.proj",
    "pool/norm": "attn_pool.norm",
    "pool/mlp/fc1": "attn_pool.mlp.fc1",
    "pool/mlp/fc2": "attn_pool.mlp.fc2",
    "fc_norm": "fc_norm",
    "head": "head",
    "head_distillation": "head_dist",
}
TIMM_TNT = {
    "pixels/projection": "pixel_embed.proj",
    "pixels/position_embedding": "pixel_pos",
    "patches/norm1": "norm1_proj",
    "patches/proj": "proj",
    "patches/norm2": "norm2_proj",
    "encoder/class_token": "cls_token",
    "encoder/position_embedding": "patch_pos",
    "block#/inner/norm1": "blocks.#.norm_in",
    "block#/inner/attention/qkv": ("blocks.#.attn_in.qk", "blocks.#.attn_in.v"),
    "block#/inner/attention/proj": "blocks.#.attn_in.proj",
    "block#/inner/norm2": "blocks.#.norm_mlp_in",
    "block#/inner/mlp/fc1": "blocks.#.mlp_in.fc1",
    "block#/inner/mlp/fc2": "blocks.#.mlp_in.fc2",
    "block#/fold/norm1": "blocks.#.norm1_proj",
    "block#/fold/proj": "blocks.#.proj",
    "block#/fold/norm2": "blocks.#.norm2_proj",
    "block#/outer/norm1": "blocks.#.norm_out",
    "block#/outer/attention/qkv": ("blocks.#.attn_out.qk", "blocks.#.attn_out.v"),
    "block#/outer/attention/proj": "blocks.#.attn_out.proj",
    "block#/outer/norm2": "blocks.#.norm_mlp",
    "block#/outer/mlp/fc1": "blocks.#.mlp.fc1",
    "block#/outer/mlp/fc2": "blocks.#.mlp.fc2",
    "norm": "norm",
    "head": "head",
}
# As transformers writes them; a headless model's names come without the first word.
HUGGING_FACE = {
    "encoder/projection": "embeddings.patch_embeddings.projection",
    "encoder/class_token": "embeddings.cls_token",
    "encoder/distillation_token": "embeddings.distillation_token",
    "encoder/position_embedding": "embeddings.position_embeddings",
    "block#/norm1": "encoder.layer.#.layernorm_before",
    "block#/attention/qkv": (
        "encoder.layer.#.attention.attention.query",
        "encoder.layer.#.attention.attention.key",
        "encoder.layer.#.attention.attention.value",
    ),
    "block#/attention/proj": "encoder.layer.#.attention.output.dense",
    "block#/norm2": "encoder.layer.#.layernorm_after",
    "block#/mlp/fc1": "encoder.layer.#.intermediate.dense",
    "block#/mlp/fc2": "encoder.layer.#.output.dense",
    "norm": "layernorm",
    "pre_logits": "pooler.dense",
    "head": "classifier",
    "head_distillation": "distillation_classifier",
}
TORCHVISION = {
    "encoder/projection": "conv_proj",
    "encoder/class_token": "class_token",
    "encoder/position_embedding": "encoder.pos_embedding",
    "block#/norm1": "encoder.layers.encoder_layer_#.ln_1",
    "block#/attention/qkv/kernel": "encoder.layers.encoder_layer_#.self_attention.in_proj_weight",
    "block#/attention/qkv/bias": "encoder.layers.encoder_layer_#.self_attention.in_proj_bias",
    "block#/attention/proj": "encoder.layers.encoder_layer_#.self_attention.out_proj",
    "block#/norm2": "encoder.layers.encoder_layer_#.ln_2",
    "block#/mlp/fc1": "encoder.layers.encoder_layer_#.mlp.0",
    "block#/mlp/fc2": "encoder.layers.encoder_layer_#.mlp.3",
    "norm": "encoder.ln",
    "pre_logits": "heads.pre_logits",
    "head": "heads.head",
}
GOOGLE_ATTENTION = "Transformer/encoderblock_#/MultiHeadDotProductAttention_1"
GOOGLE_POOL = "MAPHead_0/MultiHeadDotProductAttention_0"
GOOGLE = {
    "encoder/projection": "embedding",
    "encoder/class_token": "cls",
    "encoder/position_embedding": "pos_embedding",
    "block#/norm1": "Transformer/encoderblock_#/LayerNorm_0",
    "block#/attention/qkv": tuple(f"{GOOGLE_ATTENTION}/{x}" for x in ("query", "key", "value")),
    "block#/attention/proj": f"{GOOGLE_ATTENTION}/out",
    "block#/norm2": "Transformer/encoderblock_#/LayerNorm_2",
    "block#/mlp/fc1": "Transformer/encoderblock_#/MlpBlock_3/Dense_0",
    "block#/mlp/fc2": "Transformer/encoderblock_#/MlpBlock_3/Dense_1",
    "norm": "Transformer/encoder_norm",
    "pool/query_token": "MAPHead_0/probe",
    "pool/query": f"{GOOGLE_POOL}/query",
    "pool/key_value": (f"{GOOGLE_POOL}/key", f"{GOOGLE_POOL}/value"),
    "pool/proj": f"{GOOGLE_POOL}/out",
    "pool/norm": "MAPHead_0/LayerNorm_0",
    "pool/mlp/fc1": "MAPHead_0/MlpBlock_0/Dense_0",
    "pool/mlp/fc2": "MAPHead_0/MlpBlock_0/Dense_1",
    "pre_logits": "pre_logits",
    "head": "head",
}
TORCH_LEAVES = dict(kernel=".weight", bias=".bias", gamma=".weight", beta=".bias")
FLAX_LEAVES = dict(kernel="/kernel", bias="/bias", gamma="/scale", beta="/bias")


class Scheme(NamedTuple):
    """The names and layouts of one implementation.

    Attributes:
        name: of the implementation.
        mark: a pattern that only its names match.
        table: our layers and variables -> theirs.
        leaves: a layer's variable -> the end of their name; None where the names are ours.
        aliases: (pattern, replacement) that bring other spellings to the table's.
        unused: names that no model of ours has -> why.
    """

    name: str
    mark: str
    table: dict
    leaves: dict | None
    aliases: tuple = ()
    unused: tuple = ()


WRAPPED = (r"^((module|_orig_mod)\.)+", "")
SCHEMES = (
    Scheme(
        "official TNT",
        r"^((module|_orig_mod)\.)*inner_pos$",
        TIMM_TNT,
        TORCH_LEAVES,
        (
            WRAPPED,
            (r"^outer_pos$", "patch_pos"),
            (r"^inner_pos$", "pixel_pos"),
            (r"^patch_embed\.", "pixel_embed."),
            (r"\bproj_norm([12])\.", r"norm\1_proj."),
            (r"\.inner_norm1\.", ".norm_in."),
            (r"\.inner_norm2\.", ".norm_mlp_in."),
            (r"\.inner_attn\.", ".attn_in."),
            (r"\.inner_mlp\.", ".mlp_in."),
            (r"\.outer_norm1\.", ".norm_out."),
            (r"\.outer_norm2\.", ".norm_mlp."),
            (r"\.outer_attn\.", ".attn_out."),
            (r"\.outer_mlp\.", ".mlp."),
        ),
        ((r"^outer_tokens$", "zeros that the network never reads"),),
    ),
    Scheme(
        "timm TNT", r"^((module|_orig_mod)\.)*pixel_embed\.", TIMM_TNT, TORCH_LEAVES, (WRAPPED,)
    ),
    Scheme(
        "timm ViT or DeiT",
        r"^((module|_orig_mod)\.)*patch_embed\.",
        TIMM_VIT,
        TORCH_LEAVES,
        (WRAPPED, (r"\.gamma_([12])$", r".ls\1.gamma")),  # DeiT-3's own release: gamma_1
    ),
    Scheme(
        "Hugging Face ViT or DeiT",
        r"(^|\.)embeddings\.patch_embeddings\.",
        HUGGING_FACE,
        TORCH_LEAVES,
        (
            WRAPPED,
            (r"^(vit|deit)\.", ""),
            (r"^layers\.", "encoder.layer."),  # transformers 5 in memory
            (r"\.attention\.([qkv])_proj\.", r".attention.attention.\1_proj."),
            (r"\.q_proj\.", ".query."),
            (r"\.k_proj\.", ".key."),
            (r"\.v_proj\.", ".value."),
            (r"\.attention\.o_proj\.", ".attention.output.dense."),
            (r"\.mlp\.fc1\.", ".intermediate.dense."),
            (r"\.mlp\.fc2\.", ".output.dense."),
            (r"^cls_classifier\.", "classifier."),
        ),
        ((r"^embeddings\.mask_token$", "for pre-training with masks"),),
    ),
    Scheme(
        "torchvision ViT",
        r"^((module|_orig_mod)\.)*conv_proj\.",
        TORCHVISION,
        TORCH_LEAVES,
        (WRAPPED, (r"\.mlp\.linear_1\.", ".mlp.0."), (r"\.mlp\.linear_2\.", ".mlp.3.")),
    ),
    Scheme(
        "Google ViT",
        r"^(opt/target/|params/)?(img/)?embedding/",
        GOOGLE,
        FLAX_LEAVES,
        (
            (r"^(opt/target/|params/)?(img/)?", ""),
            (r"/encoderblock/(.*)\[(\d+)\]$", r"/encoderblock_\2/\1"),  # of a scan
            (r"^Transformer/(posembed_input/)?pos_embedding$", "pos_embedding"),
            # big_vision counts each kind of layer apart, vision_transformer all together.
            (r"(encoderblock_\d+)/LayerNorm_1/", r"\1/LayerNorm_2/"),
            (
                r"(encoderblock_\d+)/MultiHeadDotProductAttention_0/",
                r"\1/MultiHeadDotProductAttention_1/",
            ),
            (r"(encoderblock_\d+)/MlpBlock_0/", r"\1/MlpBlock_3/"),
        ),
    ),
    Scheme("keras_vitnt", r"^block\d+/(\w+/)*norm1/gamma$", {}, None),
)
ADDED_TOKENS = re.compile(r"(_tokens?|(position|row|column)_embedding)$")


def theirs(scheme, path):
    """The scheme's names for a variable of ours, () if it has no place for it."""
    if scheme.leaves is None:
        return (path,)
    number = re.match(r"block(\d+)/", path)
    general = re.sub(r"^block\d+/", "block#/", path)
    layer, _, leaf = general.rpartition("/")
    end = ""
    if general not in scheme.table:
        general, end = layer, scheme.leaves.get(leaf, "?")
    found = scheme.table.get(general)
    if found is None:
        return ()
    parts = found if isinstance(found, tuple) else (found,)
    return tuple(
        (part + end).replace("#", str(int(number[1])) if number else "#") for part in parts
    )


def to_ours(scheme, path, array):
    """An array of a checkpoint in our layout: kernels (in, out), images channels last.

    The kernel of a patch's projection keeps its four axes (rows, columns, channels, width).
    """
    if scheme.leaves is None:
        return array
    if scheme.leaves is FLAX_LEAVES:
        if path.endswith("projection/kernel"):  # (P, P, C, D)
            return array
        if path.endswith("proj/kernel"):  # (h, d, D)
            return array.reshape(-1, array.shape[-1])
        if path.endswith("/kernel"):  # (D, h, d)
            return array.reshape(array.shape[0], -1)
        return array[0] if ADDED_TOKENS.search(path) else array.reshape(-1)
    if path == "pixels/position_embedding":  # (1, c, m, m); the official release: (1, M, c)
        return (
            array[0] if array.ndim == 3 else array[0].transpose(1, 2, 0).reshape(-1, array.shape[1])
        )
    if path.endswith("projection/kernel"):  # (D, C, P, P)
        return array.transpose(2, 3, 1, 0)
    if path.endswith("/kernel"):
        return array.T
    return array[0] if ADDED_TOKENS.search(path) else array


def to_torch(path, array, channels):
    """The way back: an array of ours in PyTorch's layout."""
    if path == "pixels/position_embedding":
        side = int(len(array) ** 0.5)
        return array.reshape(side, side, -1).transpose(2, 0, 1)[None]
    if path.endswith("projection/kernel"):
        if array.ndim == 2:  # of ViT: (P * P * C, D)
            side = int((len(array) // channels) ** 0.5)
            array = array.reshape(side, side, channels, -1)
        return array.transpose(3, 2, 0, 1)
    if path.endswith("/kernel"):
        return array.T
    return array[None] if ADDED_TOKENS.search(path) else array
