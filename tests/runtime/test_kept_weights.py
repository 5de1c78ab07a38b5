"""Kept weights come back as they were or not at all, and what goes wrong with them costs a start time only."""

import fcntl
import logging
import os
import resource
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from runtime import entries, kept_steps, kept_weights
from runtime.kept_weights import COMPLETE, keep, restore

HERE = jax.sharding.SingleDeviceSharding(jax.devices()[0])


def some_weights(seed=0):
    rng = np.random.default_rng(seed)
    return {
        "layers.0.attn.qkv.kernel": jnp.asarray(rng.normal(size=(2, 4, 3, 8)), jnp.bfloat16),
        "embed.table": jnp.asarray(rng.integers(-127, 128, (50, 8)), jnp.int8),
        "embed.table_scale": jnp.asarray(rng.normal(size=50), jnp.float32),
        "norm.scale": jnp.asarray(rng.normal(size=8), jnp.float16),
    }


def read(folder, weights):
    shapes = {name: jax.ShapeDtypeStruct(array.shape, array.dtype) for name, array in weights.items()}
    return restore(folder, shapes, dict.fromkeys(weights, HERE))


def assert_same(found, weights):
    assert list(found) == list(weights)
    for name, array in weights.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array, err_msg=name)


def leftovers(folder):
    return [path.name for path in folder.iterdir() if path.name.endswith(entries.UNFINISHED)]


@pytest.fixture
def entry(tmp_path):
    keep(tmp_path / "entry", some_weights())
    return tmp_path / "entry"


@pytest.mark.parametrize("batch_bytes", [10**9, 500, 1])
def test_weights_come_back_as_they_were(batch_bytes, tmp_path):
    weights = some_weights()
    keep(tmp_path / "entry", weights, batch_bytes=batch_bytes)
    assert_same(read(tmp_path / "entry", weights), weights)
    assert not leftovers(tmp_path) and len(list((tmp_path / "entry").iterdir())) >= (5 if batch_bytes == 1 else 2)


def test_arrays_larger_than_a_batch_are_kept_in_slabs(tmp_path, monkeypatch):
    """Where the devices have memory of their own."""
    monkeypatch.setattr(
        kept_weights, "_slabs", lambda array, _: [(i, array[i : i + 3]) for i in range(0, len(array), 3)]
    )
    keep(tmp_path / "entry", some_weights())
    assert_same(read(tmp_path / "entry", some_weights()), some_weights())


@pytest.mark.parametrize("chunk_bytes", [8_000_000, 40])
@pytest.mark.parametrize("is_cut", [False, True])
def test_what_one_of_several_processes_holds_comes_back_as_it_was(is_cut, chunk_bytes, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(kept_weights, "CHUNK_BYTES", chunk_bytes)
    if is_cut:
        monkeypatch.setattr(
            kept_weights, "_slabs", lambda part, _: [(i, part[i : i + 3]) for i in range(0, len(part), 3)]
        )
    weights = some_weights() | {"mlp.up.kernel": jnp.asarray(np.arange(-8, 8).reshape(4, 4), jnp.int4)}
    shapes = {name: jax.ShapeDtypeStruct(array.shape, array.dtype) for name, array in weights.items()}
    folder = kept_weights.of_this_process(tmp_path / "entry", shapes, dict.fromkeys(shapes, HERE))
    assert folder.name.startswith("entry-")
    keep(folder, weights)
    assert_same(read(folder, weights), weights)
    assert len(files(folder)) > 30 if chunk_bytes == 40 else is_cut or len(files(folder)) == 2 * len(weights) + 1
    write = kept_weights._write_parts
    monkeypatch.setattr(kept_weights, "_write_parts", lambda *args: _without_a_part(write(*args)))
    keep(tmp_path / "less", weights)
    assert read(tmp_path / "less", weights) is None and "of embed.table a part is missing" in caplog.text


class Halves:
    """A sharding that gives this process's devices these halves of the rows."""

    def __init__(self, *halves):
        self.halves = halves

    def addressable_devices_indices_map(self, shape):
        size = shape[0] // 2
        return {f"device {i}": (slice(half * size, (half + 1) * size),) for i, half in enumerate(self.halves)}


def test_an_entry_of_one_of_several_hosts_is_named_by_what_it_holds(tmp_path, monkeypatch):
    shapes = {"norm.scale": jax.ShapeDtypeStruct((8,), jnp.float16)}
    named = lambda *halves: kept_weights.of_this_process(tmp_path / "entry", shapes, {"norm.scale": Halves(*halves)})
    assert named(0) == named(1) == tmp_path / "entry"  # a host alone keeps all, whatever its mesh
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert len({tmp_path / "entry", named(0), named(1), named(0, 1)}) == 4
    assert named(1, 0) == named(0, 1) == named(0, 1, 0)  # which device has which does not matter


def _without_a_part(arrays):
    arrays["embed.table"]["parts"].pop()
    return arrays


def test_what_is_kept_is_a_checkpoint_of_orbax(entry):
    import orbax.checkpoint as ocp

    targets = {
        f"{name}@0": jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=HERE)
        for name, array in some_weights().items()
    }
    with ocp.StandardCheckpointer() as reader:
        found = reader.restore(entry / "0000", targets)
    for name, array in some_weights().items():
        np.testing.assert_array_equal(found[f"{name}@0"], array)


def test_where_nothing_is_kept_nothing_is_said(tmp_path, caplog):
    assert read(tmp_path / "entry", some_weights()) is None
    (tmp_path / "entry").mkdir()  # what a server left that was stopped in the middle
    assert read(tmp_path / "entry", some_weights()) is None and not caplog.text


def files(entry):
    return sorted(path for path in entry.rglob("*") if path.is_file())


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "a changed bit": flip_a_bit,
    "cut short": lambda path: os.truncate(path, path.stat().st_size // 2),
    "empty": lambda path: path.write_bytes(b""),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "gone": Path.unlink,
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_file_is_never_trusted_and_the_entry_is_made_anew(case, tmp_path, caplog):
    """Each file in turn."""
    weights, number = some_weights(), 0
    while True:
        keep(tmp_path / "entry", weights)
        found = files(tmp_path / "entry")
        if number == len(found):
            break
        victim = found[number]
        DAMAGE[case](victim)
        caplog.clear()
        assert read(tmp_path / "entry", weights) is None, victim
        if not (case == "gone" and victim.name == COMPLETE):  # then there never was an entry
            assert "kept weights entry are not used" in caplog.text and "converting again" in caplog.text
        keep(tmp_path / "entry", weights)
        if case == "gone" and victim.name == COMPLETE:
            entries.discard(tmp_path / "entry")
            keep(tmp_path / "entry", weights)
        assert_same(read(tmp_path / "entry", weights), weights)
        number += 1
    assert number > len(weights) and not leftovers(tmp_path)


def test_weights_of_another_shape_are_not_used(entry, caplog):
    wanted = some_weights()
    wanted["norm.scale"] = jnp.zeros(9, jnp.float16)
    assert read(entry, wanted) is None
    assert "norm.scale is float16[8], and float16[9] is wanted" in caplog.text


def test_a_write_that_is_interrupted_leaves_nothing_that_is_trusted(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(kept_weights, "_write_index", lambda work, arrays: 1 / 0)
    keep(tmp_path / "entry", some_weights())
    assert "not kept" in caplog.text and not list(tmp_path.iterdir())


def test_what_a_killed_server_left_is_swept_and_what_another_writes_is_not(tmp_path):
    left = tmp_path / f"entry.a{entries.UNFINISHED}"
    (left / "0000").mkdir(parents=True)
    with entries.workspace(tmp_path / "entry") as busy:
        keep(tmp_path / "entry", some_weights())
        assert busy.exists() and not left.exists()
    assert_same(read(tmp_path / "entry", some_weights()), some_weights())


@pytest.mark.parametrize("before", ["open", "flock"])
def test_a_workspace_swept_before_it_is_locked_is_made_again(before, tmp_path, monkeypatch):
    """As by another server that starts in that very moment."""
    module = {"open": os, "flock": fcntl}[before]
    usual, swept = getattr(module, before), []

    def sweep_first(*args, **options):
        if not swept:
            swept.extend(tmp_path.iterdir())
            with monkeypatch.context() as beside:
                beside.setattr(module, before, usual)
                entries.sweep(tmp_path)
        return usual(*args, **options)

    monkeypatch.setattr(module, before, sweep_first)
    with entries.workspace(tmp_path / "entry") as work:
        assert swept and not any(path.exists() for path in swept)
        entries.sweep(tmp_path)
        assert work.exists()
    assert not leftovers(tmp_path)


def test_two_servers_at_once_do_not_hurt_each_other(tmp_path):
    weights, found = some_weights(), []

    def one():
        for _ in range(3):
            keep(tmp_path / "entry", weights)
            found.append(read(tmp_path / "entry", weights))

    threads = [threading.Thread(target=one) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(found) == 6 and not leftovers(tmp_path)
    for one_found in found:
        assert_same(one_found, weights)


def test_an_entry_that_is_taken_away_while_it_is_read_is_converted_again(entry, monkeypatch, caplog):
    whole = kept_weights._read

    def removed(folder, *rest):
        entries.discard(folder)
        return whole(folder, *rest)

    monkeypatch.setattr(kept_weights, "_read", removed)
    assert read(entry, some_weights()) is None and "converting again" in caplog.text


def test_a_disk_without_room_is_said_and_nothing_is_written(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(kept_weights.shutil, "disk_usage", lambda path: _Usage(100))
    keep(tmp_path / "entry", some_weights())
    assert "has 100 bytes free of" in caplog.text and not list(tmp_path.iterdir())


class _Usage:
    def __init__(self, free):
        self.free = free


def test_a_disk_that_becomes_full_is_said_and_not_fatal(tmp_path, caplog):
    """A limit on the size of files stands for the full disk: the write itself fails."""
    weights = {"embed.table": jnp.ones((600, 1000), ml_dtypes.bfloat16)}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        keep(tmp_path / "entry", weights)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "converted weights are not kept" in caplog.text and not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_said(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    keep(tmp_path / "file" / "entry", some_weights())
    assert "converted weights are not kept" in caplog.text


def test_a_folder_of_another_user_holds_nothing(entry, tmp_path, caplog):
    steps = kept_steps.KeptSteps(tmp_path / "steps", {"model": "a"}, ["a"])
    steps.folder.mkdir(parents=True)
    for name in (kept_steps.FACTS, *steps.paths.values()):
        (steps.folder / name).write_text("")
    assert kept_weights.exists(entry) and steps.is_complete
    weights, user = some_weights(), os.geteuid()
    tmp_path.chmod(0)
    try:
        if user == 0:  # who may read everything
            os.seteuid(65534)
        assert not kept_weights.exists(entry) and not steps.is_complete and not steps.nearest()
        keep(tmp_path / "other", weights)
        with steps.making() as draft:
            assert draft.work is None
    finally:
        os.seteuid(user)
        tmp_path.chmod(0o700)
    assert "converted weights are not kept" in caplog.text and "compiled steps are not kept" in caplog.text


@pytest.fixture(autouse=True)
def warnings_are_seen(caplog):
    caplog.set_level(logging.WARNING, logger="runtime.kept_weights")
