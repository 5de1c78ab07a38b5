"""Grouped matmul gives each row its own expert's product, whichever implementation runs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import grouped_matmul as module
from pallas_kernels import panels
from pallas_kernels.grouped_matmul import grouped_matmul, triton
from pallas_kernels.rotation import rotate_rows
from runtime.quantise import to_int4, to_int8

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
    for name, how in (("megablox", True), ("tpu", True), ("triton", True), ("mosaic", races)):
        monkeypatch.setitem(
            module.IMPLEMENTATIONS, name, functools.partial(module.IMPLEMENTATIONS[name], interpret=how)
        )


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("implementation", ["reference", "ragged_dot", "megablox", "triton", "cpu"])
def test_matches_numpy(sizes, implementation):
    args, expected = batch(sizes)
    np.testing.assert_allclose(grouped_matmul(*args, implementation=implementation), expected, atol=1e-5)


# Tiles of 16 rows, of which the weights are the first operand, and of 64.
@pytest.mark.parametrize("rows", [64, 96])
@pytest.mark.parametrize("sizes", [[3, 0, 17, 1], [0, 64, 0, 0], [0, 0, 0, 0], [16, 0, 15, 0]])
@pytest.mark.parametrize("out_dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("implementation", ["mosaic", "triton"])
def test_gpu_kernels_match_numpy(implementation, rows, sizes, out_dtype):
    args, expected = batch(sizes, rows, 192, dtype=jnp.bfloat16)
    found = grouped_matmul(*args, out_dtype=out_dtype, implementation=implementation)
    assert found.dtype == out_dtype
    np.testing.assert_allclose(found.astype(np.float32), expected, atol=1e-5, rtol=2**-8 * (out_dtype != jnp.float32))


def rounded_batch(sizes, rows=32, inputs=128, outputs=256, dtype=jnp.bfloat16):
    """A batch of int8 kernels; what is exact of it, and how far tokens' own rounding may lead from that."""
    (x_TI, kernel_EOI, sizes_E), _ = batch(sizes, rows, inputs, outputs, dtype)
    exact_TI = rotate_rows(np.asarray(x_TI, np.float32))
    kernel_EOI, scale_EO = to_int8(np.array(kernel_EOI, np.float32))
    expected, most = np.zeros((2, rows, outputs))
    half_step_T = np.abs(exact_TI).max(1) / 127 / 2
    ends = np.cumsum([0, *sizes])
    for e, (begin, end) in enumerate(zip(ends, ends[1:], strict=False)):
        weights_OI = kernel_EOI[e].astype(np.float64) * scale_EO[e][:, None]
        expected[begin:end] = exact_TI[begin:end].astype(np.float64) @ weights_OI.T
        most[begin:end] = half_step_T[begin:end, None] * np.abs(weights_OI).sum(1)
    return (
        (x_TI, jnp.asarray(kernel_EOI), sizes_E),
        {"kernel_scale": jnp.asarray(scale_EO)},
        expected,
        1.01 * most + 1e-5,
    )


ROUNDED = ["reference", "ragged_dot", "tpu", "mosaic", "triton", "cpu"]


@pytest.mark.parametrize("sizes", [SIZES["padding rows"], SIZES["no rows"], [1, 1, 0, 30]])
@pytest.mark.parametrize("implementation", ROUNDED)
def test_int8_is_as_near_as_the_rounding_of_tokens_lets_it(sizes, implementation):
    args, options, expected, most = rounded_batch(sizes)
    found = np.asarray(grouped_matmul(*args, **options, implementation=implementation))
    assert (np.abs(found - expected) <= most).all()
    reference = grouped_matmul(*args, **options, implementation="reference")
    # Sums are exact. A token is rounded in the kernel on a CPU, where it may fall to the other side of a half step.
    np.testing.assert_allclose(found, reference, rtol=1e-5, atol=2e-2 if implementation == "cpu" else 1e-6)


@pytest.mark.parametrize("rows, implementation", [(192, "tpu"), (96, "mosaic"), (96, "triton")])
def test_int8_in_tiles_of_many_rows(rows, implementation):
    args, options, expected, most = rounded_batch([3, 0, rows - 5, 1], rows, 256)
    found = grouped_matmul(*args, **options, implementation=implementation, out_dtype=jnp.bfloat16)
    assert (np.abs(found.astype(np.float32) - expected) <= most + 2**-8 * np.abs(expected)).all()


@pytest.mark.parametrize("implementation", ROUNDED)
def test_rows_are_tokens_and_int8_experts_are_found_among_those_of_other_layers(implementation):
    (x, kernels, sizes), options, _, _ = rounded_batch(SIZES["padding rows"])
    token_R = jnp.asarray(np.random.default_rng(1).integers(0, len(x), 48), jnp.int32)
    expected = grouped_matmul(x[token_R], kernels, sizes, **options, implementation=implementation)
    several = jnp.concatenate([-kernels, kernels, -kernels])
    options |= {"token_R": token_R, "first": jnp.int32(4)}
    found = grouped_matmul(x, several, sizes, **options, implementation=implementation)
    np.testing.assert_array_equal(found, expected)
    assert np.abs(expected).max() > 1


def int4_batch(sizes, rows=32, inputs=256, outputs=128):
    """A batch of int4 kernels of two parts, in groups of 32; what is exact of it, and of its absolute terms."""
    (x_TI, kernel_EOI, sizes_E), _ = batch(sizes, rows, inputs, 2 * outputs, jnp.bfloat16)
    kernel, scale, offset = to_int4(np.array(kernel_EOI, np.float32).reshape(len(sizes), 2, outputs, inputs))
    wide = lambda of: of.astype(np.float64)[..., None]
    weights = (kernel.astype(np.float64).reshape(*scale.shape, -1) * wide(scale) + wide(offset)).reshape(
        len(sizes), 2 * outputs, inputs
    )
    expected, terms = np.zeros((2, rows, 2 * outputs))
    ends = np.cumsum([0, *sizes])
    for e, (begin, end) in enumerate(zip(ends, ends[1:], strict=False)):
        x = np.asarray(x_TI[begin:end], np.float64)
        expected[begin:end], terms[begin:end] = x @ weights[e].T, np.abs(x) @ np.abs(weights[e].T)
    options = {"kernel_scale": jnp.asarray(scale), "kernel_offset": jnp.asarray(offset)}
    return (x_TI, jnp.asarray(kernel), sizes_E), options, expected, terms


def in_panels(kernel, options):
    """The same in panels."""
    packed = {key: panels.pack(of, 1) for key, of in options.items()}
    return panels.pack(kernel), packed | {"in_panels": True, "implementation": "cpu"}


# Where weights become bfloat16 before they are multiplied, each term is rounded to eight bits.
INT4 = {"reference": 2**-20, "ragged_dot": 2**-8, "tpu": 2**-20, "triton": 2**-8, "cpu": 2**-20}


@pytest.mark.parametrize("sizes", [SIZES["padding rows"], SIZES["no rows"], [1, 1, 0, 30]])
@pytest.mark.parametrize("implementation", INT4)
def test_int4_matches_numpy(sizes, implementation):
    (x, kernel, sizes_E), options, expected, terms = int4_batch(sizes)
    kernel, options = in_panels(kernel, options) if implementation == "cpu" else (kernel, options)
    found = grouped_matmul(x, kernel, sizes_E, **{"implementation": implementation} | options)
    assert (np.abs(np.asarray(found) - expected) <= INT4[implementation] * terms).all()


@pytest.mark.parametrize("implementation", ["tpu", "triton"])
def test_int4_in_tiles_of_many_rows(implementation):
    args, options, expected, terms = int4_batch([3, 0, 120, 1], 128)
    found = grouped_matmul(*args, **options, implementation=implementation)
    error = np.abs(np.asarray(found) - expected)
    assert (error <= 2**-8 * terms).all() and (error > 2**-14 * terms).any()


def test_int4_of_an_odd_number_of_groups():
    args, options, expected, terms = int4_batch([3, 0, 9, 1], inputs=96)
    found = grouped_matmul(*args, **options, implementation="triton")
    assert (np.abs(np.asarray(found) - expected) <= INT4["triton"] * terms).all()


def test_bytes_past_the_reach_of_tritons_offsets_are_refused():
    """Up to 4 GiB its offsets are int32."""
    for dtype, each in ((jnp.int8, 2**20), (jnp.int4, 2**21)):
        kernels = [jax.ShapeDtypeStruct((n, 1024, each // 1024), dtype) for n in (2**11, 2**11 + 1, 2**12 + 1)]
        scale = jax.ShapeDtypeStruct((1, 1024, each // 1024 // 32), jnp.float32)
        rows_dtype = jnp.int8 if dtype == jnp.int8 else jnp.bfloat16
        refused = [triton.refusal(jnp.dtype(rows_dtype), kernel, scale) for kernel in kernels]
        assert [reason is None for reason in refused] == [True, False, True]


@pytest.mark.parametrize("implementation", INT4)
def test_int4_experts_are_found_among_those_of_other_layers(implementation):
    (x, kernel, sizes), options, _, _ = int4_batch(SIZES["padding rows"])
    token_R = jnp.asarray(np.random.default_rng(1).integers(0, len(x), 48), jnp.int32)
    several = {key: jnp.concatenate([-of, of, 2 * of]) for key, of in options.items()}
    stack = jnp.concatenate([kernel[::-1], kernel, kernel])
    if implementation == "cpu":
        (kernel, options), (stack, several) = in_panels(kernel, options), in_panels(stack, several)
    expected = grouped_matmul(x[token_R], kernel, sizes, **{"implementation": implementation} | options)
    several |= {"implementation": implementation, "token_R": token_R, "first": jnp.int32(4)}
    found = grouped_matmul(x, stack, sizes, **several)
    np.testing.assert_array_equal(found, expected)
    assert np.abs(expected).max() > 1


@pytest.mark.parametrize("implementation", ["reference", "megablox", "triton", "cpu"])
def test_experts_are_found_among_those_of_other_layers(implementation):
    (x, kernels, sizes), expected = batch(SIZES["padding rows"])
    others = jnp.full_like(kernels, jnp.nan)
    options = {"first": jnp.int32(4), "implementation": implementation}
    stack = jnp.concatenate([others, kernels, others])
    np.testing.assert_allclose(grouped_matmul(x, stack, sizes, **options), expected, atol=1e-5)
    order = np.random.default_rng(1).permutation(len(x))
    found = grouped_matmul(x[np.argsort(order)], stack, sizes, token_R=order, **options)
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("implementation", ["ragged_dot", "cpu"])
@pytest.mark.parametrize("sizes", [SIZES["padding rows"], [1, 1, 0, 30]])
def test_kernels_in_panels(implementation, sizes):
    (x, kernels, sizes), _ = batch(sizes)
    x, kernels = x.astype(jnp.bfloat16), kernels.astype(jnp.bfloat16)
    expected = grouped_matmul(x, kernels, sizes, implementation="reference")
    found = grouped_matmul(x, panels.pack(kernels), sizes, in_panels=True, implementation=implementation)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_int8_kernels_in_panels():
    (x, kernels, sizes), options, _, _ = rounded_batch([1, 1, 0, 30])
    expected = grouped_matmul(x, kernels, sizes, **options, implementation="cpu")
    found = grouped_matmul(x, panels.pack(kernels), sizes, **options, in_panels=True, implementation="cpu")
    np.testing.assert_array_equal(found, expected)


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
    with pytest.raises(ValueError, match="int8 kernels, kernel_scale None and"):
        grouped_matmul(x, kernel.astype(jnp.int8), sizes)
    with pytest.raises(ValueError, match=r"kernel_scale \(4, 7\) of 4 experts \(4, 256, 128\)"):
        grouped_matmul(x, kernel.astype(jnp.int8), sizes, kernel_scale=jnp.ones((4, 7)))
    with pytest.raises(ValueError, match=r"int4 kernels \(4, 256, 128\).* groups share a row's inputs evenly"):
        of = jnp.ones((4, 256, 3))
        grouped_matmul(x, kernel.astype(jnp.int4), sizes, kernel_scale=of, kernel_offset=of)
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
@pytest.mark.parametrize("implementation", ["reference", "ragged_dot", "megablox", "mosaic", "triton", "cpu"])
def test_planted_error_is_noticed(monkeypatch, implementation, fault):
    monkeypatch.setitem(module.IMPLEMENTATIONS, implementation, fault(module.IMPLEMENTATIONS[implementation]))
    args, expected = batch(SIZES["even"], dtype=jnp.bfloat16)
    got = grouped_matmul(*args, implementation=implementation)
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(got, expected, atol=1e-5)


@pytest.mark.parametrize("fault", ERRORS.values(), ids=ERRORS)
@pytest.mark.parametrize("implementation", ROUNDED)
def test_planted_error_is_noticed_in_int8(monkeypatch, implementation, fault):
    monkeypatch.setitem(module.IMPLEMENTATIONS, implementation, fault(module.IMPLEMENTATIONS[implementation]))
    args, options, expected, most = rounded_batch(SIZES["even"])
    found = grouped_matmul(*args, **options, implementation=implementation)
    assert (np.abs(np.asarray(found) - expected) > most).any()


@pytest.mark.parametrize("fault", ERRORS.values(), ids=ERRORS)
@pytest.mark.parametrize("implementation", INT4)
def test_planted_error_is_noticed_in_int4(monkeypatch, implementation, fault):
    monkeypatch.setitem(module.IMPLEMENTATIONS, implementation, fault(module.IMPLEMENTATIONS[implementation]))
    (x, kernel, sizes), options, expected, terms = int4_batch(SIZES["even"])
    kernel, options = in_panels(kernel, options) if implementation == "cpu" else (kernel, options)
    found = grouped_matmul(x, kernel, sizes, **{"implementation": implementation} | options)
    assert (np.abs(np.asarray(found) - expected) > INT4[implementation] * terms).any()
