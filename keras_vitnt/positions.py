"""Position tables and their resampling, in NumPy: the same numbers on every backend.

N patches on a grid of rows x columns, D width. Tables list the grid row by row.
"""

import numpy as np


def sincos2d(rows, columns, dim):
    """The fixed sine-cosine table of MoCo v3 and big_vision, shape (rows * columns, dim).

    The width is four equal parts: sine and cosine of the column index, then of the row
    index, at dim / 4 frequencies from 1 down to 1 / 10000. (timm's function of a
    similar name divides the frequencies otherwise: the tables are not interchangeable.)

    Raises:
        ValueError: if `dim` is not a multiple of 4, or is below 8.
    """
    if dim % 4 or dim < 8:
        raise ValueError(
            f'positions="sincos2d" needs a width that is a multiple of 4 and at least 8; '
            f"got dim={dim}."
        )
    quarter = dim // 4
    omega = 10000.0 ** -(np.arange(quarter) / (quarter - 1))
    row, column = np.mgrid[:rows, :columns]
    x = column.reshape(-1, 1) * omega  # (N, D/4)
    y = row.reshape(-1, 1) * omega
    table = [np.sin(x), np.cos(x), np.sin(y), np.cos(y)]
    return np.concatenate(table, axis=1).astype("float32")


def _cubic(x, a):
    """The cubic convolution kernel of Keys (1981), zero beyond 2."""
    x = np.abs(x)
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = a * (((x - 5) * x + 8) * x - 4)
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


# Matrices (new, old) of a resize along one axis.


def _bicubic_antialias(old, new):
    step = old / new
    widen = max(step, 1.0)  # when shrinking, the kernel covers all that it averages
    centres = (np.arange(new) + 0.5) * step
    distance = (np.arange(old)[None, :] + 0.5 - centres[:, None]) / widen
    matrix = _cubic(distance, -0.5)
    return matrix / matrix.sum(axis=1, keepdims=True)


def _bicubic(old, new):
    centres = (np.arange(new) + 0.5) * old / new - 0.5
    taps = np.floor(centres).astype(int)[:, None] + np.arange(-1, 3)
    weights = _cubic(taps - centres[:, None], -0.75)
    matrix = np.zeros((new, old))  # beyond the border the last value goes on
    np.add.at(matrix, (np.arange(new)[:, None], taps.clip(0, old - 1)), weights)
    return matrix


def _bilinear_corners(old, new):
    places = np.linspace(0, old - 1, new)
    return np.maximum(0, 1 - np.abs(places[:, None] - np.arange(old)))


METHODS = {"timm": _bicubic_antialias, "google": _bilinear_corners, "deit": _bicubic}


def resize(table, old_grid, new_grid, prefix=0, method="timm"):
    """Resample a position table to another grid.

    Args:
        table: array (..., prefix + old_rows * old_columns, D).
        old_grid, new_grid: (rows, columns).
        prefix: leading tokens (class, distillation, registers) kept untouched.
        method: as whose code does it: "timm" (bicubic, antialiased), "google" (bilinear
            between the corners, as scipy's zoom of order 1), "deit" (bicubic as PyTorch's,
            without antialiasing). The three differ visibly.

    Returns:
        Array (..., prefix + new_rows * new_columns, D) in the table's dtype; the table
        itself where the grids are equal.

    Raises:
        ValueError: if the table does not hold `prefix` tokens and the old grid, or for an
            unknown method.
    """
    if method not in METHODS:
        raise ValueError(f"`method` must be one of {', '.join(METHODS)}; got {method!r}.")
    table = np.asarray(table)
    rows, columns = old_grid
    if table.shape[-2] != prefix + rows * columns:
        raise ValueError(
            f"A position table for {prefix} prefix tokens and {rows} x {columns} patches has "
            f"{prefix + rows * columns} rows; got one of shape {table.shape}."
        )
    if tuple(old_grid) == tuple(new_grid):
        return table
    grid = table[..., prefix:, :]
    grid = grid.reshape(*table.shape[:-2], rows, columns, table.shape[-1]).astype("float64")
    vertical = METHODS[method](rows, new_grid[0])
    horizontal = METHODS[method](columns, new_grid[1])
    grid = np.einsum("ri,cj,...ijd->...rcd", vertical, horizontal, grid)
    grid = grid.reshape(*table.shape[:-2], -1, table.shape[-1]).astype(table.dtype)
    return np.concatenate([table[..., :prefix, :], grid], axis=-2)
