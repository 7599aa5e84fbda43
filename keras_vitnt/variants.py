"""The published sizes, and the numbers of a variant such as "S/16"."""

import re

from .vit import require

# ViT: Table 1 of arXiv:2010.11929 (B, L, H), Table 1 of arXiv:2106.10270 (Ti, S), Table 2 of
# arXiv:2106.04560 (g, G). DeiT: Table 1 of arXiv:2012.12877. TNT: Table 1 of arXiv:2103.00112.
# "Nano" rows are ours, for small photos and for learning; TNT's is wide rather than deep, because
# what a block costs a small file and an edge runtime is mostly its operators.
VARIANTS = {
    "ViT": {
        "Nano": dict(dim=96, depth=6, num_heads=3, mlp_dim=384),
        "Ti": dict(dim=192, depth=12, num_heads=3, mlp_dim=768),
        "S": dict(dim=384, depth=12, num_heads=6, mlp_dim=1536),
        "B": dict(dim=768, depth=12, num_heads=12, mlp_dim=3072),
        "L": dict(dim=1024, depth=24, num_heads=16, mlp_dim=4096),
        "H": dict(dim=1280, depth=32, num_heads=16, mlp_dim=5120),
        "g": dict(dim=1408, depth=40, num_heads=16, mlp_dim=6144),
        "G": dict(dim=1664, depth=48, num_heads=16, mlp_dim=8192),
    },
    "DeiT": {
        "Ti": dict(dim=192, depth=12, num_heads=3, mlp_dim=768),
        "S": dict(dim=384, depth=12, num_heads=6, mlp_dim=1536),
        "B": dict(dim=768, depth=12, num_heads=12, mlp_dim=3072),
    },
    "TNT": {
        "Nano": dict(dim=144, depth=2, num_heads=3, inner_dim=24, inner_num_heads=4),
        "Ti": dict(dim=192, depth=12, num_heads=3, inner_dim=12, inner_num_heads=2),
        "S": dict(dim=384, depth=12, num_heads=6, inner_dim=24, inner_num_heads=4),
        "B": dict(dim=640, depth=12, num_heads=10, inner_dim=40, inner_num_heads=4),
    },
}


def decode_variant(family, variant, given):
    """The numbers of a variant such as "S/16", with those given by keyword in their place.

    Widths follow from others where nobody says: MLPs are four times their stream's width.
    """
    sizes = VARIANTS[family]
    size = {}
    if variant is not None:
        match = re.fullmatch(r"(\w+)/(\d+)", str(variant))
        require(
            match and match[1] in sizes and int(match[2]) > 0,
            f"Unknown {family} variant {variant!r}: expected SIZE/PATCH with a size of "
            f"{', '.join(sizes)} and a patch side in pixels, for example S/16.",
        )
        size = dict(sizes[match[1]], patch_size=int(match[2]))
    size |= {name: value for name, value in given.items() if value is not None}
    needed = ["patch_size", *next(iter(sizes.values()))]
    missing = [name for name in needed if name not in size and name != "mlp_dim"]
    require(
        not missing,
        f"{family} without a variant needs all its numbers; missing: {', '.join(missing)}.",
    )
    defaults = {"mlp_dim": 4 * size["dim"]}
    if family == "TNT":
        defaults["inner_mlp_dim"] = 4 * size["inner_dim"]
    return defaults | size
