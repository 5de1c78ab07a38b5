"""Grouped matmul gives each row its own expert's product, whichever implementation runs."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import grouped_matmul as module
from pallas_kernels import panels
from pallas_kernels.grouped_matmul import grouped_matmul

SIZES = {
    "even": [8, 8, 8, 8],
    "one takes all": [0, 32, 0, 0],
    "first and last empty": [0, 20, 12, 0],
    "padding rows": [3, 0, 9, 1],
    "no rows": [0, 0, 0, 0],
}


def batch(sizes, rows=32, inputs=128, outputs=256, dtype=np.float32):
    rng = np.random.default_rng(0)
    x_TI = rng.normal(size=(rows, inputs)).astype(dtype)
    x_TI[sum(sizes) :] = 7.0
    kernel_EOI = (rng.normal(size=(len(sizes), outputs, inputs)) / inputs**0.5).astype(dtype)
    ends = np.cumsum([0, *sizes])
    expected = np.zeros((rows, outputs))
    for e, (begin, end) in enumerate(zip(ends, ends[1:], strict=False)):
        expected[begin:end] = x_TI[begin:end].astype(np.float64) @ kernel_EOI[e].astype(np.float64).T
    return (jnp.asarray(x_TI), jnp.asarray(kernel_EOI), jnp.asarray(sizes, jnp.int32)), expected


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    """Kernels for devices that are not here run in Pallas's interpreters."""
    races = plgpu.InterpretGPUParams(detect_races=True, uninitialized_memory="nan")
    for name, how in (("megablox", True), ("mosaic", races)):
        monkeypatch.setitem(
            module.IMPLEMENTATIONS, name, functools.partial(module.IMPLEMENTATIONS[name], interpret=how)
        )


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("implementation", ["reference", "ragged_dot", "megablox", "cpu"])
def test_matches_numpy(sizes, implementation):
    args, expected = batch(sizes)
    np.testing.assert_allclose(grouped_matmul(*args, implementation=implementation), expected, atol=1e-5)


# Tiles of 16 rows, of which the weights are the first operand, and of 64.
@pytest.mark.parametrize("rows", [64, 96])
@pytest.mark.parametrize("sizes", [[3, 0, 17, 1], [0, 64, 0, 0], [0, 0, 0, 0], [16, 0, 15, 0]])
@pytest.mark.parametrize("out_dtype", [jnp.float32, jnp.bfloat16])
def test_hopper_kernel_matches_numpy(rows, sizes, out_dtype):
    args, expected = batch(sizes, rows, 192, dtype=jnp.bfloat16)
    found = grouped_matmul(*args, out_dtype=out_dtype, implementation="mosaic")
    assert found.dtype == out_dtype
    np.testing.assert_allclose(found.astype(np.float32), expected, atol=1e-5, rtol=2**-8 * (out_dtype != jnp.float32))


@pytest.mark.parametrize("implementation", ["reference", "megablox", "cpu"])
def test_experts_are_found_among_those_of_other_layers(implementation):
    (x, kernels, sizes), expected = batch(SIZES["padding rows"])
    others = jnp.full_like(kernels, jnp.nan)
    found = grouped_matmul(
        x, jnp.concatenate([others, kernels, others]), sizes, first=jnp.int32(4), implementation=implementation
    )
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("implementation", ["ragged_dot", "cpu"])
@pytest.mark.parametrize("sizes", [SIZES["padding rows"], [1, 1, 0, 30]])
def test_kernels_in_panels(implementation, sizes):
    (x, kernels, sizes), _ = batch(sizes)
    x, kernels = x.astype(jnp.bfloat16), kernels.astype(jnp.bfloat16)
    expected = grouped_matmul(x, kernels, sizes, implementation="reference")
    found = grouped_matmul(x, panels.pack(kernels), sizes, in_panels=True, implementation=implementation)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_bfloat16_accumulates_in_float32():
    args, _ = batch(SIZES["even"])
    args = (args[0].astype(jnp.bfloat16), args[1].astype(jnp.bfloat16), args[2])
    got = grouped_matmul(*args)
    expected = grouped_matmul(*(x.astype(jnp.float32) for x in args[:2]), args[2], implementation="reference")
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, expected, atol=1e-4)


def test_refusals_say_what_to_do():
    (x, kernel, sizes), _ = batch(SIZES["even"])
    with pytest.raises(ValueError, match=r"\[experts, out, in\] with in = 128"):
        grouped_matmul(x, kernel.swapaxes(1, 2), sizes)
    with pytest.raises(ValueError, match="choose one of"):
        grouped_matmul(x, kernel, sizes, implementation="dense")
    with pytest.raises(ValueError, match="100 inputs .* pad the kernel to 128"):
        grouped_matmul(x[:, :100], kernel[:, :, :100], sizes, implementation="megablox")


def a_row_late(sizes_E):
    """Group sizes whose first boundary lies a row further on."""
    return sizes_E.at[0].add(1).at[1].add(-1)


ERRORS = {
    "a row takes the expert before its own": lambda run: (
        lambda x, kernel, sizes, *rest, **options: run(x, kernel, a_row_late(sizes), *rest, **options)
    ),
    "experts are rolled": lambda run: (
        lambda x, kernel, *rest, **options: run(x, jnp.roll(kernel, 1, axis=0), *rest, **options)
    ),
    "the last inputs are left out": lambda run: lambda x, *rest, **options: run(x.at[:, -1].set(0), *rest, **options),
}


@pytest.mark.parametrize("fault", ERRORS.values(), ids=ERRORS)
@pytest.mark.parametrize("implementation", ["reference", "ragged_dot", "megablox", "mosaic", "cpu"])
def test_planted_error_is_noticed(monkeypatch, implementation, fault):
    monkeypatch.setitem(module.IMPLEMENTATIONS, implementation, fault(module.IMPLEMENTATIONS[implementation]))
    args, expected = batch(SIZES["even"], dtype=jnp.bfloat16)
    got = grouped_matmul(*args, implementation=implementation)
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(got, expected, atol=1e-5)
