"""Weights that lie otherwise than usual on a CPU, as an accelerator's compiler may want them: the last two axes have
changed places in memory."""

import jax
from jax.experimental.layout import Format, Layout

from runtime import formats


def order(num_axes: int) -> tuple[int, ...]:
    """The axes from the slowest to the fastest."""
    axes = range(num_axes)
    return (*axes[:-2], *reversed(axes[-2:]))


def ask(patch) -> None:
    """Leaves the layouts of weights open, to a compiler that wants every one of them turned.

    Args:
        patch: setattr, or a monkeypatch's.
    """
    turned = lambda shape: Format(Layout(order(len(shape.shape))), shape.sharding)
    patch(formats, "left_open", lambda platform, shapes: jax.tree.map(turned, shapes))


def are_turned(weights: dict) -> bool:
    return all(array.format.layout.major_to_minor == order(array.ndim) for array in weights.values())
