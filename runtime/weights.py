"""The model's weights on the devices: found again from an earlier start, or converted and kept for the next."""

import functools
import hashlib
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from converters.checkpoint import Checkpoint
from converters.load import load_weights
from models.interface import abstract
from pallas_kernels import panels
from runtime import huge_pages, kept_weights, malloc, mesh
from runtime.config import EnginePlan
from runtime.quantise import ROUNDINGS

log = logging.getLogger(__name__)

GROUPS = ("_scale", "_offset")  # of those in panels only int4 weights have any


def on_devices(
    checkpoint: Checkpoint,
    config: Any,
    tensor: mesh.Tensor | None,
    shapes: Mapping[str, jax.ShapeDtypeStruct],
    in_panels: frozenset[str],
    wheres: Mapping[str, Any],
    plan: EnginePlan,
    cache_dir: Path | None,
    progress: Callable[[str, int, int], None],
    agree: Callable[[set[str]], set[str]] = lambda names: names,
) -> dict[str, jax.Array]:
    """The weights as `shapes` says and where `wheres` says, in the order of `shapes`.

    What one host keeps does not depend on the mesh: it is restored onto any other. What several keep does.

    Args:
        config: the model's as the devices want it: with kv heads repeated where there are fewer than devices.
        tensor: the mesh; None for one device.
        in_panels: names of those that a CPU wants in panels.
        wheres: {name: sharding or format}.
        agree: gives, of these names, those that every host of the model gives.
    """
    stored, places = stored_shapes(checkpoint, config, plan, shapes), wheres
    repeated = [name for name in shapes if shapes[name].shape != stored[name].shape]
    if repeated:
        before = tensor.before_repeating(checkpoint.config.num_kv_heads)
        places = dict(wheres) | {name: before(wheres[name]) for name in repeated}
    step = lambda done, total: progress("weights", done, total)
    whole = cache_dir and cache_dir / "weights" / _identity(checkpoint, plan)
    own = whole and kept_weights.of_this_process(whole, stored, places)
    # Two of int4 share a byte only on the device, and their scales move once more: what they left would stay.
    moves = {name for name in in_panels if name.endswith(GROUPS)}
    roomy = {name: shape for name, shape in stored.items() if shape.dtype != jnp.int4 and name not in moves}
    rooms = huge_pages.rooms(roomy) if plan.platform == "cpu" and tensor is None else None
    restore = functools.partial(kept_weights.restore, shapes=stored, wheres=places, progress=step, rooms=rooms)
    with malloc.nothing_large_kept():
        found = _restored({"own": own, "whole": whole} if own and whole else {}, restore, agree)
        if found is None:
            found = load_weights(checkpoint, stored, wheres=places, roundings=ROUNDINGS, progress=step, rooms=rooms)
            if own and not kept_weights.exists(own):
                kept_weights.keep(own, found)
    for name in repeated:
        found[name] = mesh.repeat_kv_heads(found[name], shapes[name].shape, wheres[name])
    for name in in_panels:
        found[name] = _in_panels(name, found[name], (rooms or {}).get(name))
    return found


def _restored(folders, restore, agree):
    """The weights of an entry that every host has and can trust; None where all must convert, so that none are mixed.

    Args:
        folders: {name: entry}, the better one by name first.
        restore: restore(folder) gives the weights or None.
    """
    have = {name for name, folder in folders.items() if kept_weights.exists(folder)}
    common = agree(have)
    if have and not common:
        log.info("the weights that are kept here are not used: another host has none, so that all convert")
    if not common:
        return None
    found = restore(folders[min(common)])
    if agree({"sound"} if found is not None else set()):
        return found
    if found is not None:
        log.warning("the weights that are kept here are not used: another host's are damaged, so that all convert")
    return None


def _in_panels(name, array, room):
    """A CPU's weight in panels; where it stands when there is a room for it, which is where it lies."""
    if name.endswith(GROUPS):
        return panels.pack(array, width=1)
    if room is None:
        return panels.pack(array)
    panels.pack_in_place(room)
    return jax.device_put(room, array.sharding, may_alias=True)


def stored_shapes(checkpoint: Checkpoint, config: Any, plan: EnginePlan, shapes: Mapping) -> Mapping:
    """The shapes of what is converted and kept: the checkpoint's own, before kv heads are repeated for a mesh."""
    if config == checkpoint.config:
        return shapes
    options = {"stacked": plan.stacked, "quantization": plan.quantization}
    return abstract(checkpoint.model_class, checkpoint.config, jnp.dtype(plan.dtype), **options)[1]


def _identity(checkpoint, plan) -> str:
    """Names what the weights are made from: the checkpoint's content, what is done to it, and the code that does."""
    facts = [checkpoint.fingerprint(), str(checkpoint.config), plan.dtype, str(plan.quantization), str(plan.stacked)]
    return hashlib.sha256("\0".join([*facts, _converter_digest()]).encode()).hexdigest()[:32]


@functools.cache
def _converter_digest() -> str:
    root = Path(__file__).resolve().parent.parent
    sources = [*(root / "converters").rglob("*.py"), *(root / "models").rglob("*.py")]
    sources.append(root / "pallas_kernels" / "rotation.py")
    sources += [root / "runtime" / name for name in ("quantise.py", "kept_weights.py", "weights.py")]
    digest = hashlib.sha256()
    for path in sorted(sources):
        digest.update(path.read_bytes())
    return digest.hexdigest()
