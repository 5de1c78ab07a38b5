"""Linear kernels compute x @ kernel.T in float32, whatever the batch around a row."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import cpu, panels
from pallas_kernels.cpu import matmul
from pallas_kernels.linear import linear
from pallas_kernels.rotation import rotate

needs_cpu_kernels = pytest.mark.skipif(not cpu.is_available(), reason="needs Linux and numba")


def random(*shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng([seed, *shape]).standard_normal(shape), dtype)


@pytest.mark.parametrize("dtype, atol", [(jnp.float32, 1e-5), (jnp.bfloat16, 3e-2)])
@pytest.mark.parametrize("T", [1, 9])
def test_matches_numpy(T, dtype, atol):
    x_TI, kernel_OI = random(T, 24, dtype=dtype), random(40, 24, dtype=dtype)
    y_TO = linear(x_TI, kernel_OI)
    assert y_TO.dtype == dtype
    expected = np.asarray(x_TI, np.float64) @ np.asarray(kernel_OI, np.float64).T
    np.testing.assert_allclose(np.asarray(y_TO, np.float64), expected, atol=atol * 4)
    np.testing.assert_allclose(linear(x_TI, kernel_OI, out_dtype=jnp.float32), expected, atol=1e-4)


def around(T, I, out, dtype=jnp.float32):
    """Everything that may stand around a product of these widths."""
    return {
        "norm_I": random(I, dtype=dtype),
        "norm_eps": 1e-5,
        "norm_offset": 1.0,
        "residual_TO": random(T, out[-1], dtype=dtype),
        "bias": random(*out, dtype=dtype),
        "activation": "silu" if len(out) == 2 else "gelu_tanh",
    }


@pytest.mark.parametrize("platform", ["tpu", "gpu"])
def test_accelerators_round_gate_and_up_and_nothing_else(platform, monkeypatch):
    """Each half to bfloat16, which is off by 2 ** -8 of it, as the result is; silu's slope is below 1.1."""
    monkeypatch.setattr("pallas_kernels.linear.current_platform", lambda: platform)
    x_TI, kernel = random(9, 24, dtype=jnp.bfloat16), random(2, 40, 24, dtype=jnp.bfloat16)
    gate_TO, up_TO = (np.asarray(x_TI, np.float64) @ np.asarray(half, np.float64).T for half in kernel)
    silu_TO = gate_TO / (1 + np.exp(-gate_TO))
    got_TO = linear(x_TI, kernel, activation="silu", implementation="reference")
    error_TO = 2.0**-8 * (1.1 * np.abs(gate_TO * up_TO) + 2 * np.abs(silu_TO * up_TO)) * 1.01
    assert (np.abs(np.asarray(got_TO, np.float64) - silu_TO * up_TO) <= error_TO).all()

    def product_dtype(kernel, **options):
        """What a product's sums are rounded to."""
        made = jax.make_jaxpr(lambda x, k: linear(x, k, implementation="reference", **options))(x_TI, kernel)
        (product,) = (e for e in made.eqns if e.primitive.name == "dot_general")
        return product.outvars[0].aval.dtype

    assert product_dtype(kernel) == jnp.bfloat16
    assert product_dtype(kernel[0]) == product_dtype(kernel, out_dtype=jnp.float32) == jnp.float32


@needs_cpu_kernels
@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize(
    "T, I, out",
    [(1, 32, (5,)), (7, 64, (40,)), (8, 64, (2, 40)), (5, 1056, (2, 51)), (35, 2112, (30,))],
    ids=str,
)
def test_cpu_kernel_matches_the_reference(T, I, out, fused):
    x_TI, kernel = random(T, I), random(*out, I) * I**-0.5
    options = around(T, I, out) if fused else {}
    want_TO = linear(x_TI, kernel, implementation="reference", **options)
    got_TO = linear(x_TI, kernel, implementation="cpu", **options)
    np.testing.assert_allclose(got_TO, want_TO, atol=1e-5)


@needs_cpu_kernels
def test_cpu_kernel_rounds_to_bfloat16_once():
    x_TI, kernel = random(6, 64, dtype=jnp.bfloat16), random(48, 64, dtype=jnp.bfloat16)
    want_TO = linear(x_TI, kernel, implementation="cpu", out_dtype=jnp.float32).astype(jnp.bfloat16)
    np.testing.assert_array_equal(linear(x_TI, kernel, implementation="cpu"), want_TO)


@needs_cpu_kernels
@pytest.mark.parametrize("name", ["silu", "gelu_tanh", "relu"])
def test_cpu_activations(name):
    x_TI, kernel = random(4, 32) * 3, random(24, 32)
    want_TO = linear(x_TI, kernel, activation=name, implementation="reference")
    np.testing.assert_allclose(linear(x_TI, kernel, activation=name, implementation="cpu"), want_TO, atol=2e-5)


@needs_cpu_kernels
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("I, out", [(64, (53,)), (1056, (2, 29)), (2112, (24,))], ids=str)
def test_bits_do_not_depend_on_the_batch(I, out, dtype):
    x_TI, kernel = random(40, I, dtype=dtype), random(*out, I, dtype=dtype)
    options = around(40, I, out, dtype)
    residual_TO = options.pop("residual_TO")
    whole_TO = linear(x_TI, kernel, residual_TO=residual_TO, implementation="cpu", **options)
    for start, end in [(0, 1), (3, 5), (7, 10), (11, 15), (10, 15), (2, 9), (30, 38), (1, 40)]:
        some = slice(start, end)
        part_TO = linear(x_TI[some], kernel, residual_TO=residual_TO[some], implementation="cpu", **options)
        np.testing.assert_array_equal(part_TO, whole_TO[some])


@needs_cpu_kernels
def test_bits_do_not_depend_on_the_number_of_threads():
    x_TI, kernel = random(70, 64), random(700, 64)
    pool = cpu.register()
    before, outs = pool.num_threads, []
    for num_threads in (1, 2, 5):
        pool.start(num_threads)
        outs += [jax.jit(lambda x, k: linear(x, k, implementation="cpu"))(x_TI, kernel)]
    pool.start(before)
    np.testing.assert_array_equal(outs[0], outs[1])
    np.testing.assert_array_equal(outs[0], outs[2])


@needs_cpu_kernels
def test_padding_costs_and_changes_nothing():
    x_TI, kernel = random(64, 32), random(40, 32)
    poisoned_TI = x_TI.at[5:].set(jnp.nan)
    got_TO = linear(poisoned_TI, kernel, jnp.int32(5), implementation="cpu")
    np.testing.assert_array_equal(got_TO[:5], linear(x_TI, kernel, implementation="cpu")[:5])
    assert linear(x_TI, kernel, jnp.int32(0), implementation="cpu").shape == (64, 40)


def eight_bit(*shape):
    """A kernel of int8 and its scales."""
    kernel = rotate(random(*shape))
    scale = jnp.max(jnp.abs(kernel), axis=-1) / 127
    return jnp.round(kernel / scale[..., None]).astype(jnp.int8), scale


def test_int8_kernels_come_close_to_what_they_stand_for():
    x_TI, (kernel_OI, scale_O) = random(5, 64), eight_bit(40, 64)
    exact_TO = x_TI @ rotate(kernel_OI * scale_O[:, None]).T
    y_TO = linear(x_TI, kernel_OI, kernel_scale=scale_O, implementation="reference")
    assert 0 < np.abs(y_TO - exact_TO).max() < 0.02 * np.abs(exact_TO).max()


@pytest.mark.parametrize("implementation", ["reference", pytest.param("cpu", marks=needs_cpu_kernels)])
def test_int8_layers_bear_an_input_that_stands_out(implementation):
    """Without a rotation all others would round to nothing."""
    x_TI, (kernel_OI, scale_O) = random(5, 256).at[:, 70].set(300), eight_bit(40, 256)
    exact_TO = x_TI @ rotate(kernel_OI * scale_O[:, None]).T
    y_TO = linear(x_TI, kernel_OI, kernel_scale=scale_O, implementation=implementation)
    assert np.abs(y_TO - exact_TO).max() < 4


@needs_cpu_kernels
@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("T, I, out", [(1, 64, (5,)), (7, 128, (40,)), (6, 192, (2, 40)), (33, 2112, (30,))], ids=str)
def test_int8_cpu_kernel_matches_the_reference(T, I, out, fused):
    x_TI, (kernel, scale) = random(T, I), eight_bit(*out, I)
    options = {"kernel_scale": scale * I**-0.5} | (around(T, I, out) if fused else {})
    want_TO = linear(x_TI, kernel, implementation="reference", **options)
    got_TO = linear(x_TI, kernel, implementation="cpu", **options)
    # The last bit of a norm or of a rotation can move an element that lies between two steps to the other one.
    np.testing.assert_allclose(got_TO, want_TO, atol=0.05)
    assert np.isclose(got_TO, want_TO, atol=1e-5).mean() > (0.5 if fused else 0.95)
    if fused:
        options["residual_TO"] = options["residual_TO"][:1]
    np.testing.assert_array_equal(linear(x_TI[:1], kernel, implementation="cpu", **options), got_TO[:1])


@needs_cpu_kernels
def test_int8_products_are_exact_at_the_extremes():
    signs = jnp.asarray(np.random.default_rng(0).choice([-127, 127], (24, 64)), jnp.int8)
    x_TI = rotate(signs[:3].astype(jnp.float32))
    y_TO = linear(x_TI, signs, kernel_scale=jnp.ones(24), implementation="cpu")
    exact_TO = np.asarray(signs[:3], np.int64) @ np.asarray(signs, np.int64).T
    np.testing.assert_allclose(y_TO, exact_TO, rtol=1e-5, atol=0.1)  # one step off would be 127


@pytest.mark.parametrize("dtype, atol", [(jnp.float32, 1e-4), (jnp.bfloat16, 0.1)], ids=["f32", "bf16"])
@pytest.mark.parametrize("T, I, J, out", [(1, 64, 1, (5,)), (9, 192, 3, (2, 40))], ids=str)
def test_int4_kernels_are_their_steps_times_their_scales(T, I, J, out, dtype, atol):
    x_TI, rng = random(T, I).astype(dtype), np.random.default_rng(0)
    steps = rng.integers(-8, 8, (*out, I))
    scale, offset = (rng.standard_normal((*out, J)).astype(np.float32) for _ in range(2))
    kernel = (steps.reshape(*out, J, -1) * scale[..., None] + offset[..., None]).reshape(*out, I)
    want = np.einsum("ti,...oi->t...o", np.asarray(x_TI, np.float64), kernel)
    if len(out) == 2:
        want = np.maximum(want[:, 0], 0) * want[:, 1]
    options = {"activation": "relu", "residual_TO": random(T, out[-1])} if len(out) == 2 else {}
    options |= {"kernel_scale": jnp.asarray(scale), "kernel_offset": jnp.asarray(offset), "out_dtype": jnp.float32}
    got_TO = linear(x_TI, jnp.asarray(steps, jnp.int4), **options)
    want = want + np.asarray(options.get("residual_TO", 0), np.float64)
    np.testing.assert_allclose(got_TO, want, atol=atol * max(1, np.abs(want).max()), rtol=0)


@needs_cpu_kernels
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("T, I, out", [(1, 32, (64,)), (15, 1056, (2, 64)), (70, 192, (192,))], ids=str)
def test_int4_cpu_kernel_matches_the_reference(T, I, out, dtype):
    x_TI, rng = random(T, I).astype(dtype), np.random.default_rng(1)
    scale, offset = (jnp.asarray(rng.standard_normal((*out, I // 32)), jnp.bfloat16) for _ in range(2))
    kernel = jnp.asarray(rng.integers(-8, 8, (*out, I)), jnp.int4)
    options = {"out_dtype": jnp.float32} | ({"activation": "silu"} if len(out) == 2 else {})
    want_TO = linear(
        x_TI.astype(jnp.float32),
        kernel,
        kernel_scale=scale,
        kernel_offset=offset,
        implementation="reference",
        **options,
    )
    options |= {"kernel_scale": panels.pack(scale, width=1), "kernel_offset": panels.pack(offset, width=1)}
    run = functools.partial(linear, in_panels=True, implementation="cpu", **options)
    packed = panels.pack(kernel)
    got_TO = run(x_TI, packed)
    np.testing.assert_allclose(got_TO, want_TO, atol=2e-6 * np.abs(want_TO).max(), rtol=0)
    unpacked_TO = run(x_TI.astype(jnp.float32), packed, implementation="reference")
    np.testing.assert_array_equal(unpacked_TO, want_TO)
    np.testing.assert_array_equal(run(x_TI[:1], packed), got_TO[:1])
    some_TO = run(x_TI.at[-1].set(jnp.nan), packed, jnp.int32(T - 1))
    np.testing.assert_array_equal(some_TO[: T - 1], got_TO[: T - 1])


needs_byte_products = pytest.mark.skipif(
    not matmul.multiplies_panels(64, jnp.int8), reason="this CPU has no product of int8 in panels"
)


@needs_cpu_kernels
@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("T, I, out", [(1, 64, (64,)), (21, 1056, (2, 96)), (35, 2112, (128,))], ids=str)
def test_a_kernel_in_panels_gives_what_the_reference_does(T, I, out, fused):
    x_TI, kernel = random(T, I, dtype=jnp.bfloat16), (random(*out, I) * I**-0.5).astype(jnp.bfloat16)
    options = (around(T, I, out, jnp.bfloat16) if fused else {}) | {"out_dtype": jnp.float32}
    want_TO = linear(x_TI, kernel, implementation="reference", **options)
    packed = panels.pack(kernel)
    got_TO = linear(x_TI, packed, in_panels=True, implementation="reference", **options)
    np.testing.assert_array_equal(got_TO, want_TO)
    if not matmul.PAIRS:  # tokens stay float32 where they are not multiplied in pairs of bfloat16
        want_TO = linear(x_TI.astype(jnp.float32), kernel, implementation="reference", **options)
    got_TO = linear(x_TI, packed, in_panels=True, implementation="cpu", **options)
    # A norm's last bit can round an input to the other bfloat16.
    np.testing.assert_allclose(got_TO, want_TO, rtol=2e-6, atol=2e-2 if fused and matmul.PAIRS else 1e-5)


@needs_byte_products
@pytest.mark.parametrize("T, I, out", [(1, 64, (64,)), (21, 2112, (2, 96))], ids=str)
def test_an_int8_kernel_in_panels_is_multiplied_exactly(T, I, out):
    kernel = jnp.asarray(np.random.default_rng(0).integers(-127, 128, (*out, I)), jnp.int8)
    x_TI = jnp.asarray(np.random.default_rng(1).choice([-127.0, -3.0, 5.0, 127.0], (T, I)), jnp.float32)
    options = {"kernel_scale": jnp.ones(out), "activation": "relu" if len(out) == 2 else None}
    want_TO = linear(x_TI, kernel, implementation="cpu", **options)
    got_TO = linear(x_TI, panels.pack(kernel), in_panels=True, implementation="cpu", **options)
    np.testing.assert_array_equal(got_TO, want_TO)


@needs_cpu_kernels
def test_bits_of_products_with_panels_do_not_depend_on_the_batch():
    x_TI, kernel = random(40, 1056, dtype=jnp.bfloat16), random(2, 96, 1056, dtype=jnp.bfloat16)
    run = functools.partial(linear, kernel=panels.pack(kernel), in_panels=True, activation="silu", implementation="cpu")
    whole_TO = run(x_TI)
    for start, end in [(0, 1), (3, 5), (7, 10), (10, 15), (30, 38), (1, 40)]:
        np.testing.assert_array_equal(run(x_TI[start:end]), whole_TO[start:end])
    poisoned_TI = x_TI.at[5:].set(jnp.nan)
    np.testing.assert_array_equal(run(poisoned_TI, num_tokens=jnp.int32(5))[:5], whole_TO[:5])


@needs_cpu_kernels
def test_shapes_the_kernel_cannot_take_run_all_the_same():
    x_TI, kernel = random(3, 20), random(4, 20)
    np.testing.assert_allclose(linear(x_TI, kernel), x_TI @ kernel.T, atol=1e-5)


def test_refusals_say_what_to_do():
    with pytest.raises(ValueError, match=r"\[out, in\]"):
        linear(jnp.zeros((2, 3)), jnp.zeros((3, 5)))
    with pytest.raises(ValueError, match="int8 and int4 kernels"):
        linear(jnp.zeros((2, 3)), jnp.zeros((5, 3), jnp.int8))
    with pytest.raises(ValueError, match="share a row's inputs evenly"):
        three = {"kernel_scale": jnp.ones((5, 3)), "kernel_offset": jnp.ones((5, 3))}
        linear(jnp.zeros((2, 64)), jnp.zeros((5, 64), jnp.int4), **three)
    with pytest.raises(ValueError, match="kernel_offset None; int4 kernels"):
        linear(jnp.zeros((2, 64)), jnp.zeros((5, 64), jnp.int4), kernel_scale=jnp.ones((5, 2)))
    with pytest.raises(ValueError, match="choose one of .*silu"):
        linear(jnp.zeros((2, 3)), jnp.zeros((5, 3)), activation="tan")
    with pytest.raises(ValueError, match="choose one of .*reference"):
        linear(jnp.zeros((2, 3)), jnp.zeros((5, 3)), implementation="fast")
