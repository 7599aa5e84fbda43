"""Position tables and their resampling, in NumPy: the same numbers on every backend.

N patches on a grid of rows x columns, D width. Tables list the grid row by row.
"""

import numpy as np


def sincos2d(rows, columns, dim, temperature=10000.0):
    """The fixed sine-cosine table of MoCo v3 and big_vision, shape (rows * columns, dim).

    The width is four equal parts: sine and cosine of the column index, then of the row
    index, at dim / 4 frequencies from 1 down to 1 / temperature. (timm's function of a
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
    omega = temperature ** -(np.arange(quarter) / (quarter - 1))
    row, column = np.mgrid[:rows, :columns]
    x = column.reshape(-1, 1) * omega  # (N, D/4)
    y = row.reshape(-1, 1) * omega
    table = [np.sin(x), np.cos(x), np.sin(y), np.cos(y)]
    return np.concatenate(table, axis=1).astype("float32")


def _cubic(x):
    """The cubic convolution kernel of Keys (1981) with a = -0.5, zero beyond 2."""
    x = np.abs(x)
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


def _bicubic_antialias(old, new):
    """The (new, old) matrix of a bicubic, antialiased resize along one axis."""
    step = old / new
    widen = max(step, 1.0)  # when shrinking, the kernel covers all that it averages
    centres = (np.arange(new) + 0.5) * step
    distance = (np.arange(old)[None, :] + 0.5 - centres[:, None]) / widen
    matrix = _cubic(distance)
    return matrix / matrix.sum(axis=1, keepdims=True)


def resize(table, old_grid, new_grid, prefix=0):
    """Resample a position table to another grid, as timm does: bicubic with antialias.

    Args:
        table: array (..., prefix + old_rows * old_columns, D).
        old_grid, new_grid: (rows, columns).
        prefix: leading tokens (class, distillation, registers) kept untouched.

    Returns:
        Array (..., prefix + new_rows * new_columns, D) in the table's dtype; the table
        itself where the grids are equal.

    Raises:
        ValueError: if the table does not hold `prefix` tokens and the old grid.
    """
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
    vertical = _bicubic_antialias(rows, new_grid[0])
    horizontal = _bicubic_antialias(columns, new_grid[1])
    grid = np.einsum("ri,cj,...ijd->...rcd", vertical, horizontal, grid)
    grid = grid.reshape(*table.shape[:-2], -1, table.shape[-1]).astype(table.dtype)
    return np.concatenate([table[..., :prefix, :], grid], axis=-2)
