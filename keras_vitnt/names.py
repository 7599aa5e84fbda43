"""A model's name -> the function that builds it: ours, such as "tnt:S/16", and timm's."""

import difflib
import re

from .models import TNT, DeiT, ViT
from .variants import VARIANTS

FAMILIES = {"vit": ViT, "deit": DeiT, "tnt": TNT}
# Behind a name: what a family comes as, too.
FORMS = {
    "vit": {},
    "deit": {"distilled": {"distilled": True}},
    "tnt": {"legacy": {"layout": "legacy"}},
}

# timm's words for the sizes of each family.
TIMM_SIZES = {
    "vit": dict(tiny="Ti", small="S", base="B", large="L", huge="H", giant="g", gigantic="G"),
    "deit": dict(tiny="Ti", small="S", base="B"),
    "tnt": dict(ti="Ti", s="S", b="B"),
}


def timm_names():
    """The names of timm's models that `create_model` knows, with their patch and image size."""
    names = [f"vit_{size}_patch16_224" for size in ("tiny", "small", "base", "large")]
    names += ["vit_small_patch32_224", "vit_base_patch32_224", "vit_base_patch8_224"]
    names += ["vit_large_patch14_224", "vit_huge_patch14_224"]
    names += ["vit_giant_patch14_224", "vit_gigantic_patch14_224"]
    for size in TIMM_SIZES["deit"]:
        names += [f"deit_{size}_patch16_224", f"deit_{size}_distilled_patch16_224"]
    return names + ["tnt_s_patch16_224", "tnt_s_legacy_patch16_224", "tnt_b_patch16_224"]


def parse_name(name):
    """A model's name -> (builder, variant, options).

    Names are "vit:B/16" (family and variant), with a form behind it "deit:S/16-distilled" or
    "tnt:S/16-legacy", or timm's, such as "deit_small_distilled_patch16_224", whose patch and image
    size may be any.
    """
    own = re.fullmatch(r"(\w+):([^-]+)(?:-(\w+))?", str(name))
    timm = re.fullmatch(
        r"(vit|deit|tnt)_([a-z]+)(?:_(distilled|legacy))?_patch(\d+)_(\d+)(\.\w+)?", str(name)
    )
    if own and own[1].lower() in FAMILIES:
        family, variant, form = own[1].lower(), own[2], own[3]
        options = {}
    elif timm and timm[2] in TIMM_SIZES[timm[1]]:
        family, size, form, patch, side = timm.groups()[:5]
        variant = f"{TIMM_SIZES[family][size]}/{patch}"
        options = {"input_shape": (int(side), int(side), 3)}
    else:
        close = difflib.get_close_matches(str(name), timm_names(), 3, 0.5)
        hint = f" Did you mean {', '.join(close)}?" if close else ""
        raise ValueError(
            f"Unknown model {name!r}: expected FAMILY:SIZE/PATCH, such as vit:B/16, deit:S/16 or "
            f"tnt:S/16, or timm's name, such as tnt_s_patch16_224.{hint}"
        )
    if form and form not in FORMS[family]:
        raise ValueError(f"Unknown model {name!r}: {family} has no {form} form.")
    return FAMILIES[family], variant, options | (FORMS[family][form] if form else {})


def create_model(name, **overrides):
    """Build a model by its name: "vit:B/16", or timm's "vit_base_patch16_224".

    Args:
        name: see above.
        **overrides: keyword arguments of `ViT`, `DeiT` or `TNT`.

    Raises:
        ValueError: for an unknown name.

    Example:
        >>> create_model("tnt_s_patch16_224", classes=10, input_shape=(64, 64, 3)).name
        'tnt'
    """
    builder, variant, options = parse_name(name)
    return builder(variant, **{**options, **overrides})


def listed():
    """The names of every variant of the tables, at its published patch sizes."""
    patches = {"vit": dict(Nano=(4, 8), B=(8, 16, 32), S=(8, 16, 32), L=(14, 16, 32))}
    patches["vit"] |= dict(H=(14,), g=(14,), G=(14,))
    patches |= {"deit": {}, "tnt": {"Nano": (8,)}}
    return [
        f"{family}:{size}/{patch}{form}"
        for family, builder in FAMILIES.items()
        for size in VARIANTS[builder.__name__]
        for patch in patches[family].get(size, (16,))
        for form in ["", *(f"-{form}" for form in FORMS[family])]
    ]
