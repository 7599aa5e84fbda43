"""Arrays of a checkpoint whose sizes need not be the model's: positions, channels, grids."""

import numpy as np

from . import positions
from .schemes import TORCH_LEAVES


def prefix_rows(rows, prefix, grid):
    """How many leading rows of a position table belong to prefix tokens, and its patches' grid.

    Old files say neither: a table that is square without its prefix, or at all, tells.
    """
    if grid is not None:
        return rows - grid[0] * grid[1], tuple(grid)
    for leading in (prefix, 0):
        side = int(max(rows - leading, 0) ** 0.5)
        if side and leading + side * side == rows:
            return leading, (side, side)
    return None, None


def source_grid(names):
    """(rows, columns) of the patches, where the configuration says so; else None."""
    config = names.checkpoint.config
    if "grid" in config:
        return tuple(config["grid"]) if config["grid"] else None
    size = config_image_size(config)
    patch = patch_size(names)
    if size is None or patch is None or size[0] % patch or size[1] % patch:
        return None
    return size[0] // patch, size[1] // patch


def config_image_size(config):
    """(height, width) that a checkpoint's configuration states, or None."""
    cfg = config.get("pretrained_cfg", {})
    size = config.get("img_size") or config.get("model_args", {}).get("img_size")
    size = size or cfg.get("input_size", [None])[1:] or config.get("image_size")
    if not size:
        return None
    if isinstance(size, str):
        size = [int(side) for side in size.split("x")]
    size = [size] if isinstance(size, int) else list(size)
    return (size[0], size[-1])


def patch_size(names):
    """A patch's side in pixels, from the arrays."""
    fold, words = names.shape("patches/proj/kernel"), names.shape("pixels/projection/kernel")
    if fold and words:
        return 4 * int((fold[0] // words[-1]) ** 0.5)  # every published TNT: a word each 4 pixels
    kernel = names.shape("encoder/projection/kernel")
    if kernel is None or len(kernel) == 4:
        return kernel and kernel[0]
    return None


def adapted_channels(kernel, channels):
    """A patch projection (rows, columns, C, D) for another number of channels, as timm does.

    One channel gets the sum of the colours' weights; more repeat them, scaled so that the sum
    stays the same.
    """
    old = kernel.shape[2]
    if channels == 1:
        return kernel.sum(axis=2, keepdims=True)
    repeated = np.tile(kernel, (1, 1, -(-channels // old), 1))[:, :, :channels]
    return repeated * (old / channels)


def fit_projection(names, path, shape, channels, adapt):
    """How a patch projection's array becomes the model's: (action, its shape then, change)."""
    found = names.shape(path)
    action, change = "transposed" if names.scheme.leaves is TORCH_LEAVES else "loaded", None
    if adapt and found[2] != channels:
        action = f"adapted from {found[2]} to {channels} channels"
        found = (*found[:2], channels, found[3])

        def change(kernel):
            return adapted_channels(kernel, channels)

    return action, found if len(shape) == 4 else (int(np.prod(found[:3])), found[3]), change


def fit_positions(names, path, encoder, method):
    """How a position table becomes the model's: (action, its shape then, change)."""
    rows, dim = names.shape(path)
    leading = encoder.num_prefix_tokens if encoder.prefix_positions else 0
    grid = source_grid(names)
    if grid is None and names.scheme.leaves is None and rows == leading + encoder.num_patches:
        grid = encoder.grid
    before, grid = prefix_rows(rows, leading, grid)
    if before != leading or encoder.grid is None or grid == encoder.grid:
        return "loaded", (rows, dim), None

    def change(table):
        return positions.resize(table, grid, encoder.grid, leading, method)

    action = "resized from {} x {} to {} x {}".format(*grid, *encoder.grid)
    return action, (leading + encoder.num_patches, dim), change


def fit_factor(names, path, length, method):
    """As `fit_positions`, of the table of rows or that of columns."""
    rows, dim = names.shape(path)
    if rows == length:
        return "loaded", (rows, dim), None

    def change(table):
        return positions.resize(table, (rows, 1), (length, 1), method=method)

    return f"resized from {rows} to {length}", (length, dim), change


def fit(model, names, path, shape, adapt_channels, method):
    """How an array becomes a variable's: (action, its shape then, change or None)."""
    found = names.shape(path)
    if path.endswith("projection/kernel") and len(found) == 4:
        return fit_projection(names, path, shape, model.input_shape[-1], adapt_channels)
    if path == "encoder/position_embedding":
        return fit_positions(names, path, model.get_layer("encoder"), method)
    if path in ("encoder/row_embedding", "encoder/column_embedding"):
        return fit_factor(names, path, shape[0], method)
    turned = names.scheme.leaves is TORCH_LEAVES and path.endswith("/kernel")
    return "transposed" if turned else "loaded", found, None
