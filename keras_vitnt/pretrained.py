"""A checkpoint -> the model it was made for, its preprocessing and its classes' names."""

import json
import re
from functools import partial
from importlib.resources import files

import numpy as np

from . import fitting, images, models, schemes, weights
from .checkpoints import open_checkpoint
from .names import parse_name
from .variants import VARIANTS

# Published preprocessing where a checkpoint's configuration says nothing (timm's values; for
# torchvision its own): mean and std, crop, interpolation.
HALF = (0.5, 0.5, 0.5)
IMAGENET = dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
FAMILY_PREPROCESSING = {
    "ViT": dict(mean=HALF, std=HALF, crop=0.9),
    "DeiT": dict(**IMAGENET, crop=0.9),
    "TNT": dict(mean=HALF, std=HALF, crop=0.9),
}
SCHEME_PREPROCESSING = {
    "torchvision ViT": dict(**IMAGENET, crop=0.875, interpolation="bilinear"),
    "torchvision ViT, 384 or larger": dict(**IMAGENET),  # its SWAG weights
    "Hugging Face ViT or DeiT": dict(mean=HALF, std=HALF, interpolation="bilinear", squash=True),
}
# Words in timm's names of networks that share ViT's names and compute something else.
OTHER_NETWORKS = r"rope|dinov3|eva0?2?|_rpn_|samvit|beit"
PIL_FILTERS = {2: "bilinear", 3: "bicubic"}  # preprocessor_config.json counts as PIL does


def family(names):
    """ "ViT", "DeiT" or "TNT": from the arrays, or the architecture's name beside them."""
    if names.shape("pixels/projection/kernel"):
        return "TNT"
    config = names.checkpoint.config
    file = re.split(r"[/:]", names.checkpoint.source.rstrip("/"))[-1]
    word = str(config.get("architecture") or config.get("model_type") or file)
    distilled = names.shape("encoder/distillation_token")
    return "DeiT" if word.startswith("deit") or distilled else "ViT"


def named_variant(names):
    """The table's numbers of the architecture that the configuration names; {} without."""
    try:
        builder, variant, _ = parse_name(names.checkpoint.config.get("architecture"))
    except ValueError:
        return {}
    return VARIANTS[builder.__name__][variant.split("/")[0]]


def head_count(names, path, kind, dim, overrides):
    """(heads, where the number comes from): no array of PyTorch's tells it."""
    option = {"outer": "num_heads", "inner": "inner_num_heads"}[kind]
    if option in overrides:
        return overrides[option], "asked for"
    kernel = names.shapes.get((names.sources(f"{path}/qkv/kernel") or ("",))[0], ())
    if len(kernel) == 3:  # Flax keeps the heads apart
        return kernel[1], "the arrays"
    config = names.checkpoint.config
    keys = {"outer": ("num_heads", "num_heads_outer", "num_attention_heads")}
    for key in keys.get(kind, ("num_heads_inner",)):
        for place in (config, config.get("model_args", {})):
            if key in place:
                return int(place[key]), f"the configuration's {key}"
    if option in named_variant(names):
        return named_variant(names)[option], f"the architecture {config['architecture']!r}"
    width = {"outer": "dim", "inner": "inner_dim"}[kind]
    group = "TNT" if family(names) == "TNT" else "ViT"
    for size in VARIANTS[group].values():
        if size[width] == dim:
            return size[option], f"the rule of {group} for a width of {dim}"
    if group == "ViT" and dim % 64 == 0:
        return dim // 64, "the rule of ViT, heads of 64"
    raise ValueError(
        f"{names.checkpoint.source} does not say how many heads share the width of {dim}: "
        f"pass {option}=..."
    )


def architecture(names, overrides):
    """The builder and the options that make a checkpoint's model, and notes on what was assumed.

    Raises:
        ValueError: if arrays and configuration leave a number open.
    """
    config = names.checkpoint.config
    if names.scheme.leaves is None:
        raise ValueError(
            f"{names.checkpoint.source} is a model of ours: it says itself what it is. Open a "
            ".keras file with keras.models.load_model, or build the model and use load_weights."
        )
    other = re.search(OTHER_NETWORKS, str(config.get("architecture", "")))
    if other:
        raise ValueError(
            f"{names.checkpoint.source} is a {config['architecture']}: its {other[0]!r} is another "
            "network under the same names."
        )

    def shape(path, needed=False):
        found = names.shape(path)
        if needed and found is None:
            raise ValueError(
                f"{names.checkpoint.source} ({names.scheme.name}) has nothing for {path}."
            )
        return found

    name = family(names)
    prefix = "block{:02}/outer" if name == "TNT" else "block{:02}"
    first = prefix.format(0)
    dim = shape(f"{first}/norm1/gamma", needed=True)
    depth = 0
    while shape(prefix.format(depth) + "/norm1/gamma"):
        depth += 1
    options = {
        "dim": dim[0],
        "depth": depth,
        "mlp_dim": shape(f"{first}/mlp/fc1/bias", needed=True)[0],
        "qkv_bias": shape(f"{first}/attention/qkv/bias") is not None,
        "class_token": shape("encoder/class_token") is not None,
        "register_tokens": (shape("encoder/register_tokens") or (0,))[0],
        "layer_norm_epsilon": epsilon(names),
    }
    options["num_heads"], why = head_count(names, f"{first}/attention", "outer", dim[0], overrides)
    notes = [f"num_heads={options['num_heads']}: {why}"]
    if name == "TNT":
        inner = shape("pixels/projection/kernel", needed=True)[3]
        options |= {
            "inner_dim": inner,
            "inner_mlp_dim": shape("block00/inner/mlp/fc1/bias", needed=True)[0],
            "layout": "official" if shape("block00/fold/norm2/gamma") else "legacy",
        }
        options["inner_num_heads"], why = head_count(
            names, "block00/inner/attention", "inner", inner, overrides
        )
        notes.append(f"inner_num_heads={options['inner_num_heads']}: {why}")
    else:
        options |= {
            "distilled": shape("encoder/distillation_token") is not None,
            "layer_scale": 1e-5 if shape("block00/scale1/gamma") else None,
            "fc_norm": shape("fc_norm/gamma") is not None,
            "representation_size": (shape("pre_logits/bias") or (None,))[0],
        }
        options["gelu"], why = gelu(names, overrides)
        notes.append(f"gelu={options['gelu']!r}: {why}")
    options["pooling"] = pooling(names, options)
    options["patch_size"] = fitting.patch_size(names)
    grid = positions(names, options, overrides, notes)
    kernel = shape("pixels/projection/kernel") or shape("encoder/projection/kernel")
    options["input_shape"] = (*(side * options["patch_size"] for side in grid), kernel[2])
    classes = shape("head/bias")
    options |= {"classes": classes[0]} if classes else {"include_top": False}
    builder = {"ViT": models.ViT, "DeiT": models.DeiT, "TNT": models.TNT}[name]
    if classes is None:
        notes.append("no head in the checkpoint: the model gives pooled features")
    if not config_preprocessing(config):
        notes.append(f"preprocessing: the published one of {name} in {names.scheme.name}")
    return builder, options, notes


def epsilon(names):
    config = names.checkpoint.config
    stated = config.get("layer_norm_epsilon") or config.get("layer_norm_eps")
    rule = 1e-12 if names.scheme.name == "Hugging Face ViT or DeiT" else 1e-6
    return float(stated or (1e-5 if family(names) == "TNT" else rule))


def gelu(names, overrides):
    config = names.checkpoint.config
    if "gelu" in overrides:
        return overrides["gelu"], "asked for"
    if "siglip" in str(config.get("architecture", "")):
        raise ValueError(
            f"{names.checkpoint.source} is a {config['architecture']}: some of these have the "
            'tanh GELU and nothing here says which: pass gelu="erf" or gelu="tanh".'
        )
    if config.get("gelu"):
        return config["gelu"], "the configuration"
    if config.get("hidden_act"):
        kinds = {"gelu": "erf", "gelu_new": "tanh", "gelu_fast": "tanh"}
        kinds["gelu_pytorch_tanh"] = "tanh"
        if config["hidden_act"] not in kinds:
            raise ValueError(
                f"{names.checkpoint.source} has hidden_act={config['hidden_act']!r}; expected "
                f"one of {', '.join(kinds)}."
            )
        return kinds[config["hidden_act"]], "the configuration's hidden_act"
    if names.scheme.table is schemes.GOOGLE:
        return "tanh", "Google's code"
    return "erf", f"the rule of {names.scheme.name}"


def pooling(names, options):
    stated = names.checkpoint.config.get("global_pool")
    if names.shape("pool/query_token"):
        return "map"
    if stated in ("token", "avg"):
        return stated
    return "avg" if options.get("fc_norm") or not options["class_token"] else "token"


def positions(names, options, overrides, notes):
    """Fill in the positions' options; returns the grid (rows, columns) of the patches."""
    table = names.shape("encoder/position_embedding")
    prefix = options["class_token"] + options.get("distilled", False) + options["register_tokens"]
    stated = fitting.source_grid(names)
    if table is None:
        google = names.scheme.table is schemes.GOOGLE
        kind = overrides.get("positions") or names.checkpoint.config.get("positions")
        if not google and kind is None:
            raise ValueError(
                f"{names.checkpoint.source} ({names.scheme.name}) has no position table, and "
                'nothing says what stands for it: pass positions="none" if nothing does.'
            )
        options["positions"] = kind or "sincos2d"
        side = stated or (224 // options["patch_size"],) * 2
        notes.append(f"positions={options['positions']!r}: the checkpoint has no table")
        if stated is None and "input_shape" not in overrides:
            notes.append("input_shape: 224 x 224, which nothing in the checkpoint says")
        return side
    asked = overrides.get("input_shape")
    if stated is None and asked:
        asked = tuple(side // options["patch_size"] for side in asked[:2])
        # The size that was asked for, if the table is just of that size.
        stated = asked if table[0] - asked[0] * asked[1] in (0, prefix) else None
    leading, grid = fitting.prefix_rows(table[0], prefix, stated)
    if grid is None:
        raise ValueError(
            f"{names.checkpoint.source} has {table[0]} positions, no square of patches, and no "
            "image size beside it: pass its input_shape=(height, width, channels)."
        )
    if stated is None:
        notes.append(f"input_shape: {grid[0]} x {grid[1]} patches, a square of positions")
    options["prefix_positions"] = leading == prefix
    return grid


def normalization(name):
    """(mean, std) that a family's public checkpoints were trained with."""
    return FAMILY_PREPROCESSING[name]["mean"], FAMILY_PREPROCESSING[name]["std"]


def config_preprocessing(config):
    """What a configuration of timm's, transformers' or ours says of the images; {} if nothing."""
    if "preprocessing" in config:
        found = json.loads(config["preprocessing"])
        found.pop("size")
        return {k: tuple(v) if isinstance(v, list) else v for k, v in found.items()}
    timm = config.get("pretrained_cfg", {})
    if "mean" in timm:
        return dict(
            mean=tuple(timm["mean"]),
            std=tuple(timm["std"]),
            crop=timm.get("crop_pct") or 0.875,
            interpolation=timm.get("interpolation") or "bicubic",
            squash=timm.get("crop_mode") == "squash",
        )
    if "image_mean" not in config:
        return {}
    size, cut = config.get("size"), config.get("crop_size")
    found = dict(mean=tuple(config["image_mean"]), std=tuple(config["image_std"]))
    found["interpolation"] = PIL_FILTERS.get(config.get("resample"), "bilinear")
    shortest = size.get("shortest_edge") if isinstance(size, dict) else None
    if config.get("do_center_crop"):
        sides = [s if isinstance(s, int) else s.get("height") for s in (cut, shortest or size)]
        return dict(**found, crop=sides[0] / sides[1], squash=not shortest)
    return dict(**found, squash=not shortest)


def preprocessing_of(names, shape):
    """The `images.Preprocessing` of a checkpoint for images of a shape (H, W, C)."""
    *size, channels = shape
    found = dict(FAMILY_PREPROCESSING[family(names)])
    large = f"{names.scheme.name}, 384 or larger"
    kind = large if large in SCHEME_PREPROCESSING and max(size) >= 384 else names.scheme.name
    if kind in SCHEME_PREPROCESSING and family(names) != "DeiT":
        found = dict(SCHEME_PREPROCESSING[kind])
    stated = config_preprocessing(names.checkpoint.config)
    if not stated and max(size) >= 384 and found.get("crop") == 0.9:
        found["crop"] = 1.0
    found = images.Preprocessing(tuple(size), **(stated or found))
    if channels == 1 and len(found.mean) == 3:  # as the kernels of the colours are summed
        found = found._replace(mean=(sum(found.mean) / 3,), std=(sum(found.std) / 3,))
    return found


def preprocessing(source, size=None):
    """What a checkpoint's model expects of its images.

    Args:
        source: a public checkpoint, see `from_checkpoint`.
        size: (height, width) in place of the checkpoint's.

    Returns:
        An `images.Preprocessing`: from the configuration beside the checkpoint, else its
        family's published one.

    Example:
        >>> x = images.load("photo.jpg", preprocessing("hf:timm/tnt_s_patch16_224.in1k"))
    """
    names = weights.recognise(open_checkpoint(source))
    asked = {"input_shape": (*size, 3)} if size else {}
    # What the arrays may leave open does not matter here.
    _, options, _ = architecture(names, dict(asked, num_heads=1, inner_num_heads=1, gelu="erf"))
    *own, channels = options["input_shape"]
    return preprocessing_of(names, (*(size or own), channels))


def class_names(names, classes):
    """The names of a checkpoint's classes: transformers' labels, ImageNet's, or None."""
    labels = names.checkpoint.config.get("id2label")
    if labels and len(labels) == classes:
        ordered = [labels[key] for key in sorted(labels, key=int)]
        if ordered != [f"LABEL_{i}" for i in range(classes)]:
            return ordered
    return imagenet_classes() if classes == 1000 else None


def imagenet_classes():
    """The 1,000 classes of ImageNet-1k (ILSVRC 2012) in their usual order."""
    text = (files("keras_vitnt") / "assets" / "imagenet_classes.txt").read_text()
    return text.splitlines()


def decode_predictions(logits, top=5, names=None):
    """The most probable classes of each image.

    Args:
        logits: array (B, classes), or probabilities that sum to one, which are taken as they are.
        top: how many.
        names: of the classes; None for ImageNet's 1,000.

    Returns:
        For each image a list of (name, probability), most probable first.

    Raises:
        ValueError: if there are not as many names as classes.

    Example:
        >>> decode_predictions(model.predict(images), top=1)
        [[('tabby', 0.83)]]
    """
    logits = np.asarray(logits, "float64")
    names = imagenet_classes() if names is None else names
    if logits.ndim != 2 or logits.shape[1] != len(names):
        raise ValueError(
            f"`logits` must be (images, {len(names)}), a column for each class name; got "
            f"{logits.shape}. Pass `names` for other classes."
        )
    shares = logits
    if logits.min() < 0 or not np.allclose(logits.sum(axis=1), 1, atol=1e-3):
        shares = np.exp(logits - logits.max(axis=1, keepdims=True))
        shares /= shares.sum(axis=1, keepdims=True)
    order = np.argsort(-shares, axis=1)[:, :top]
    return [[(names[i], float(row[i])) for i in best] for row, best in zip(shares, order)]


def resolve(source, overrides):
    """Names, builder, options (the checkpoint's, then the overrides) and loading's switches."""
    names = weights.recognise(open_checkpoint(source))
    builder, options, notes = architecture(names, overrides)
    switches = {
        # A number of classes or channels that was asked for, and is another, is asked for.
        "new_head": overrides.get("classes", options.get("classes")) != options.get("classes"),
        "adapt_channels": "input_shape" in overrides,
        "method": overrides.pop("method", "timm"),
    }
    if "classes" in overrides:
        options.pop("include_top", None)
    if overrides.get("include_top") is False and options["pooling"] != "map":
        if not options.get("fc_norm"):
            options.pop("pooling")  # tokens, unless asked for
    if overrides.get("include_top", options.get("include_top", True)) is False:
        overrides = {key: value for key, value in overrides.items() if key != "classes"}
    if switches["new_head"] and "representation_size" not in overrides:
        options.pop("representation_size", None)
    return names, partial(builder, **{**options, **overrides}), switches, notes


def facts_of(names, build, model):
    """What `inspect` and `load` tell of a checkpoint's model."""
    return {
        "family": family(names),
        **build.keywords,
        "parameters": model.count_params(),
        "preprocessing": preprocessing_of(names, build.keywords["input_shape"])._asdict(),
        "names": class_names(names, build.keywords.get("classes")),
    }


def load(source, **overrides):
    """As `from_checkpoint`: (model, facts as of `inspect`, `LoadReport`)."""
    names, build, switches, notes = resolve(source, overrides)
    model = build()
    found, changes = weights.plan(model, names, **switches)
    weights.assign(model, names, found, changes)
    return model, facts_of(names, build, model), found._replace(notes=notes)


def from_checkpoint(source, report=False, **overrides):
    """Build the model that a public checkpoint was made for, and load it.

    Family, layout, width, depth, patch, classes, image size and positions come from the
    arrays; what they do not tell (heads, epsilon, GELU) from config.json or the file's
    metadata, else from the family's rule, and the report says so.

    Args:
        source: a path, or "hf:owner/name[@revision]", of what `load_weights` reads but for our own
            `.keras` and `.weights.h5`, which say nothing of this.
        report: whether to return the `LoadReport` too.
        **overrides: keyword arguments of the builder (`ViT`, `DeiT`, `TNT`). Another
            `input_shape` resamples positions (`method`, see `positions.resize`) and adapts the
            projection to its channels; another number of `classes` gets a new head.

    Returns:
        A functional `keras.Model`, or (model, `LoadReport`).

    Raises:
        FileNotFoundError, ValueError: see `load_weights`.
        ImportError, ConnectionError: if "hf:" needs a package, or has no connection.

    Example:
        >>> model = from_checkpoint("hf:timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k")
        >>> small = from_checkpoint("tnt_s.safetensors", input_shape=(96, 128, 3), classes=6)
    """
    model, _, found = load(source, **overrides)
    return (model, found) if report else model


def inspect(source, **overrides):
    """What `from_checkpoint` would do, without reading the arrays.

    Args:
        source, **overrides: as in `from_checkpoint`.

    Returns:
        (facts, `LoadReport`): a dict of the builder's keyword arguments, with "family",
        "parameters", "preprocessing" (a dict, see `images.Preprocessing`) and "names" (of the
        classes, or None) beside them; and what would go where.

    Raises:
        As `from_checkpoint`.
    """
    names, build, switches, notes = resolve(source, overrides)
    model = models.blueprint(build)
    found, _ = weights.plan(model, names, **switches)
    return facts_of(names, build, model), found._replace(notes=notes)
