"""Pictures of a training run, tables of files."""

import numpy as np


def confusion(labels, predicted, classes):
    """Count matrix (classes, classes): row the true class, column the predicted one."""
    matrix = np.zeros((classes, classes), int)
    np.add.at(matrix, (labels, predicted), 1)
    return matrix


def picture_curves(history):
    """Loss and accuracy by epoch: a matplotlib figure. `history`: {name: list of numbers}."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    for axis, name in zip(figure.subplots(1, 2), ("loss", "accuracy")):
        epochs = np.arange(1, len(history[name]) + 1)
        axis.plot(epochs, history[name], label="training (augmented)", color="tab:gray")
        axis.plot(epochs, history[f"val_{name}"], label="validation", color="tab:blue")
        axis.set_xlabel("epoch")
        axis.set_ylabel(name)
        axis.grid(alpha=0.3)
        axis.legend()
    last = history["val_accuracy"][-1]
    axis.set_ylim(0, 1)
    axis.set_title(f"validation accuracy {last:.1%} in the end", fontsize=10)
    return figure


def picture_confusion(matrix, names):
    """The confusion matrix, each row as shares of its class: a matplotlib figure."""
    from matplotlib.figure import Figure

    side = max(4.0, 0.45 * len(names) + 1.5)
    figure = Figure(figsize=(side, side), layout="constrained")
    axis = figure.subplots()
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    if len(names) <= 30:
        for (row, column), count in np.ndenumerate(matrix):
            if count:
                color = "white" if shares[row, column] > 0.5 else "black"
                axis.text(column, row, count, ha="center", va="center", color=color, fontsize=8)
        turned = 45 if max(map(len, names)) > 2 else 0
        axis.set_xticks(range(len(names)), names, rotation=turned, parse_math=False)
        axis.set_yticks(range(len(names)), names, parse_math=False)
    axis.set_xlabel("predicted")
    axis.set_ylabel("true")
    right = np.trace(matrix)
    axis.set_title(f"{right} of {matrix.sum()} right ({right / matrix.sum():.1%})", fontsize=10)
    return figure


def print_exports(found, title):
    """A table of `ExportReport`s, a line each."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=escape(title))
    labelled = any(file.comparison and file.comparison.accuracy is not None for file in found)
    columns = ["file", "size", "difference", "agreement"]
    for column in [*columns, *(["accuracy"] if labelled else []), "median"]:
        table.add_column(column, justify="left" if column == "file" else "right")
    for file in found:
        row = [escape(file.path.name), f"{file.bytes / 1e6:.2f} MB"]
        if file.comparison:
            row += [f"{file.comparison.max_difference:.1e}", f"{file.comparison.agreement:.2%}"]
            row += [f"{file.comparison.accuracy:.2%}"] if labelled else []
            row += [f"{file.milliseconds:.2f} ms"]
        table.add_row(*row)
    Console().print(table)


def print_sensitivity(rows, kept):
    """A table of `quantize.Sensitivity`, the most harmful part first."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Each part quantised alone")
    for column in ("part", "saves", "signal to noise", "agreement", ""):
        table.add_column(column, justify="left" if column == "part" else "right")
    for row in rows:
        table.add_row(
            row.part,
            f"{row.saved / 1e3:.0f} kB",
            f"{row.decibels:.1f} dB",
            f"{row.agreement:.2%}",
            "kept in float" if row.part in kept else "",
        )
    Console().print(table)
