"""Draws the errors of layers as a picture."""

from pathlib import Path

from mf_qwen3_bridge.errors import BridgeError
from mf_qwen3_bridge.verify.layer_errors import LayerErrors
from mf_qwen3_bridge.verify.reference import LOGITS, Stage

_LEAST = 1e-9  # errors below are drawn there: a logarithmic axis knows no zero
_MOST = 1e2


def draw(found: LayerErrors, title: str, path: Path) -> None:
    """Writes a picture, a curve for each stage over the layers, in the format that the file's name ends with.

    Raises BridgeError if it can't be, and ModuleNotFoundError if matplotlib is not installed.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    layers = range(found.num_layers)
    for name in found.stages:
        errors = [min(max(found.errors[Stage(number, name)], _LEAST), _MOST) for number in layers]
        axes.plot(layers, errors, marker="o", markersize=4, linewidth=1.2, label=name)
    axes.plot([found.num_layers], [min(max(found.errors[LOGITS], _LEAST), _MOST)], "k*", markersize=9, label="logits")
    axes.axhline(found.tolerance, color="black", linestyle=":", linewidth=1)
    axes.annotate("wrong above", (0, found.tolerance), textcoords="offset points", xytext=(2, 3), fontsize=8)
    if found.begin and found.begin.layer is not None:
        axes.axvline(found.begin.layer, color="red", alpha=0.3, linewidth=6)
    axes.set(yscale="log", ylim=(_LEAST, _MOST), xlabel="layer", ylabel="error, relative to the largest value")
    axes.set_title(f"{title}: {found.summary}", fontsize=10)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize=8)
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:  # ValueError: an ending that matplotlib doesn't know
        raise BridgeError(f"{path} can't be written: {error}") from error
