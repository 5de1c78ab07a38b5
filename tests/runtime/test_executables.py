"""Compiled programs are kept as one set: all are restored, or all are compiled again."""

import dataclasses
import json
import logging
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from runtime import executables, kept_steps, machine
from runtime.executables import Program

HERE = machine.here()


@pytest.fixture
def programs():
    shape = jax.ShapeDtypeStruct((4,), jnp.float32)
    return {name: Program(jax.jit(lambda x, n=n: x * n + 1), (shape,)) for n, name in enumerate("abc", start=2)}


def build(programs, facts, folder):
    facts = {"model": facts} if isinstance(facts, str) else facts
    return executables.build(programs, facts, HERE, HERE.devices[:1], folder)


def results(built):
    return {name: np.asarray(run(np.ones(4, np.float32)))[0] for name, run in built.table.items()}


def programs_in(folder):
    return sorted(folder.glob("*/*.jaxexec"))


def test_a_second_build_restores_every_program(programs, tmp_path):
    first = build(programs, "model", tmp_path)
    second = build(programs, "model", tmp_path)
    assert (first.num_loaded, second.num_loaded) == (0, 3)
    assert results(first) == results(second) == {"a": 3.0, "b": 4.0, "c": 5.0}
    assert first.folder == second.folder and [path.parent for path in programs_in(tmp_path)] == [first.folder] * 3


def test_another_model_shares_nothing(programs, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    build(programs, "model", tmp_path)
    assert build(programs, "another", tmp_path).num_loaded == 0
    assert not caplog.text


def test_a_missing_program_makes_all_be_compiled_and_kept_again(programs, tmp_path):
    build(programs, "model", tmp_path)
    programs_in(tmp_path)[0].unlink()
    assert build(programs, "model", tmp_path).num_loaded == 0
    assert build(programs, "model", tmp_path).num_loaded == 3


@pytest.mark.parametrize("damage", [b"", b"\0" * 40, None], ids=["empty", "garbage", "cut"])
def test_a_damaged_program_is_never_trusted_and_the_set_is_made_anew(programs, tmp_path, damage, caplog):
    build(programs, "model", tmp_path)
    victim = programs_in(tmp_path)[0]
    victim.write_bytes(victim.read_bytes()[:-10] if damage is None else damage)
    again = build(programs, "model", tmp_path)
    assert again.num_loaded == 2 and results(again) == {"a": 3.0, "b": 4.0, "c": 5.0}
    assert "is damaged" in caplog.text and not list(tmp_path.iterdir())
    assert build(programs, "model", tmp_path).num_loaded == 0
    assert build(programs, "model", tmp_path).num_loaded == 3


def test_without_a_folder_nothing_is_kept(programs):
    assert build(programs, "model", None).num_loaded == build(programs, "model", None).num_loaded == 0


def test_a_disk_that_cannot_be_written_costs_a_warning_only(programs, tmp_path, caplog):
    (tmp_path / "file").write_text("in the way")
    built = build(programs, "model", tmp_path / "file" / "steps")
    assert results(built) == {"a": 3.0, "b": 4.0, "c": 5.0} and built.folder is None
    assert "not kept on disk" in caplog.text


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda patch: patch.setattr(jax, "__version__", "0.99.0"), f"jax {jax.__version__} (here 0.99.0)"),
        (lambda patch: patch.setenv("XLA_FLAGS", "--xla_cpu_max_isa=AVX2"), "flags none (here --xla_cpu_max_isa=AVX2)"),
        (lambda patch: patch.setattr(kept_steps, "_num_cpus", lambda: 96), "(here 96)"),
        (lambda patch: patch.setattr(kept_steps, "source_digest", lambda: "f" * 64), "in: source"),
    ],
    ids=["JAX", "flags", "processors", "source"],
)
def test_what_was_compiled_for_something_else_is_said_and_left_alone(programs, tmp_path, change, said, caplog):
    caplog.set_level(logging.INFO)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("XLA_FLAGS", raising=False)
        first = build(programs, "model", tmp_path)
        change(patch)
        second = build(programs, "model", tmp_path)
    assert second.num_loaded == 0 and second.folder != first.folder
    assert said in caplog.text and caplog.text.count("differ in") == 1
    assert len(programs_in(tmp_path)) == 6


def test_of_several_kept_sets_the_most_similar_is_named(programs, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    build(programs, {"model": "m", "num_pages": "8", "max_num_seqs": "4"}, tmp_path)
    build(programs, {"model": "m", "num_pages": "16", "max_num_seqs": "2"}, tmp_path)
    caplog.clear()
    build(programs, {"model": "m", "num_pages": "24", "max_num_seqs": "2"}, tmp_path)
    assert caplog.messages[-1].endswith("differ in: num_pages 16 (here 24)")


def test_facts_that_are_damaged_disturb_nobody(programs, tmp_path):
    first = build(programs, "model", tmp_path)
    (first.folder / kept_steps.FACTS).write_text("[1")
    assert build(programs, "model", tmp_path).num_loaded == 3
    assert build(programs, {"model": "model", "more": ""}, tmp_path).num_loaded == 0
    assert json.loads((build(programs, {"model": "model", "more": ""}, tmp_path).folder / "facts.json").read_text())


def test_the_hosts_own_flags_and_processor_mean_nothing_to_another_device(monkeypatch):
    """A host without accelerators makes what one with them looks for."""
    tpus = [types.SimpleNamespace(platform="tpu", device_kind="TPU v6 lite", id=i, coords=(i, 0, 0)) for i in range(4)]
    there = dataclasses.replace(HERE, devices=tuple(tpus))
    monkeypatch.setenv("XLA_FLAGS", "")
    want = kept_steps.facts_of({"model": "m"}, there, tpus[:2])
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=8 --xla_cpu_max_isa=AVX2")
    monkeypatch.setattr(kept_steps, "_num_cpus", lambda: 96)
    monkeypatch.setattr(kept_steps, "_cpu_features", lambda: "flags: none")
    elsewhere = dataclasses.replace(there, name="v6e-4", is_here=False)
    assert kept_steps.facts_of({"model": "m"}, elsewhere, tpus[:2]) == want
    assert want["used"] == "0@0,0,0 1@1,0,0" and want["devices"] == "4 x tpu:TPU v6 lite"
    assert kept_steps.facts_of({"model": "m"}, elsewhere, tpus[:1]) != want
    monkeypatch.setenv("XLA_FLAGS", "--xla_tpu_enable_anything=true")
    assert kept_steps.facts_of({"model": "m"}, elsewhere, tpus[:2]) != want


def test_a_kind_of_device_has_options_of_its_own_and_a_users_flags_come_first(monkeypatch):
    def of_kind(kind):
        device = types.SimpleNamespace(platform="tpu", device_kind=kind, id=0)
        return dataclasses.replace(HERE, devices=(device,))

    name = "xla_tpu_control_large_2nd_minor_layout_for_x16"
    monkeypatch.delenv("LIBTPU_INIT_ARGS", raising=False)
    there = of_kind("TPU7x")
    assert there.compiler_options == {name: "false"}
    assert kept_steps.facts_of({}, there, there.devices)["options"] == f"{name}=false"
    assert of_kind("TPU v6 lite").compiler_options == HERE.compiler_options == {}
    monkeypatch.setenv("LIBTPU_INIT_ARGS", f"--xla_tpu_one=2 --{name}=true")
    assert there.compiler_options == {}
    facts = kept_steps.facts_of({}, there, there.devices)
    assert (facts["options"], facts["libtpu flags"]) == ("", f"--xla_tpu_one=2 --{name}=true")
