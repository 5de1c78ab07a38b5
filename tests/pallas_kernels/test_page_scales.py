"""Eight-bit pages: what their scales and steps are, and that every implementation reads and writes the same."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import ragged_batch

from pallas_kernels import cpu
from pallas_kernels.ragged_paged_attention import cache_shape, gpu_gather, ragged_paged_attention, reference, scales

needs_cpu_kernels = pytest.mark.skipif(not cpu.is_available(), reason="needs Linux and numba")
FLOAT8 = [jnp.float8_e4m3fn, jnp.float8_e5m2]
MIXED = [(130, 1), (5, 1), (60, 70), (0, 64), (63, 2)]
attend = functools.partial(ragged_paged_attention, scale=0.25)


def a_batch(rows, dtype=jnp.int8, platform="cpu", **options):
    """A batch whose cache is empty and of eight bits; the histories are the rows' keys and values, unrounded."""
    batch = ragged_batch.batch(rows, N=6, K=2, H=32, **options)
    batch.cache_PBCH = jnp.zeros(cache_shape(*batch.cache_PBCH.shape[:2], 2, 32, platform, dtype), dtype)
    return batch


def from_nothing(rows, seed=0, dtype=jnp.int8, implementation="reference", **options):
    """(outputs of the rows' new tokens, the dense float64 answer) after the rows' pasts were written by a step."""
    batch = a_batch(rows, dtype, seed=seed, **options)
    past = [(0, before) for before, _ in rows]
    q, k, v, cache, lens, table, cu, counts = batch.args
    old_k, old_v = (
        np.concatenate([pair[i][:n] for pair, (n, _) in zip(batch.histories, rows, strict=True)]) for i in (0, 1)
    )
    old_q = jnp.zeros((len(old_k), *q.shape[1:]), q.dtype)
    old_lens = jnp.zeros_like(lens).at[: len(past)].set(jnp.array([n for _, n in past]))
    old_cu = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(old_lens)]).astype(jnp.int32)
    run = functools.partial(attend, implementation=implementation)
    if len(old_k):
        pair = (jnp.asarray(old_k, k.dtype), jnp.asarray(old_v, v.dtype))
        _, cache = run(old_q, *pair, cache, old_lens, table, old_cu, jnp.array([0, len(rows)], jnp.int32))
    out, cache = run(q, k, v, cache, lens, table, cu, counts)
    return out, cache, ragged_batch.dense(batch, scale=0.25)


def contents(cache_PBCW):
    """What the cache holds, float32: a scale's last bit depends on how it was divided."""
    flat_UCW = cache_PBCW.reshape(-1, *cache_PBCW.shape[2:])
    values_UCW = flat_UCW[:, :4].astype(jnp.float32)
    if not scales.are_in(cache_PBCW, 2):
        return values_UCW
    return values_UCW * scales.of_tokens(flat_UCW, 2)[..., None]


def test_a_vectors_largest_element_is_127_steps():
    x_TKH = np.random.default_rng(0).standard_normal((5, 3, 32)).astype(np.float32)
    x_TKH[2, 1] = 0
    values, scale_TK = map(np.asarray, scales.rounded(jnp.asarray(x_TKH)))
    assert values.dtype == np.int8 and (np.abs(values).max(-1) == np.where(scale_TK > 0, 127, 0)).all()
    assert not values[2, 1].any() and scale_TK[2, 1] == 0
    assert (np.abs(values * scale_TK[..., None] - x_TKH) <= 0.5001 * scale_TK[..., None]).all()


@pytest.mark.parametrize("num_kv_heads, width, vectors", [(3, 64, 1), (8, 128, 1), (8, 32, 2), (1, 8, 1), (24, 64, 3)])
def test_scales_come_back_out_of_the_cache_as_they_went_in(num_kv_heads, width, vectors):
    shape = cache_shape(2, 4, num_kv_heads, width, "cpu", jnp.int8)
    assert shape[2] == 2 * num_kv_heads + vectors and scales.are_in(jnp.zeros(shape, jnp.int8), num_kv_heads)
    assert not scales.are_in(jnp.zeros(shape, jnp.float8_e5m2), num_kv_heads)
    scale_TC = np.random.default_rng(0).standard_normal((7, 2 * num_kv_heads)).astype(np.float32)
    kv_TCW = jnp.concatenate([jnp.zeros((7, 2 * num_kv_heads, width), jnp.int8), scales.as_vectors(scale_TC, width)], 1)
    assert kv_TCW.shape[1:] == shape[2:]
    np.testing.assert_array_equal(scales.of_tokens(kv_TCW, num_kv_heads), scale_TC)


@pytest.mark.parametrize("page_size", scales.PAGE_SIZES)
@pytest.mark.parametrize("heads, width", [(1, 64), (3, 64), (8, 128), (24, 256)])
def test_a_tpus_pages_hold_scales_behind_their_tokens(heads, width, page_size):
    """Four planes for 128 tokens, so that no vectors are padded for them."""
    pages = jnp.zeros(cache_shape(2, page_size, heads, width, "tpu", jnp.int8), jnp.int8)
    assert scales.are_behind(pages, heads) and not scales.are_in(pages, heads)
    assert scales.page_size(pages) == page_size
    _, tokens, C, W = pages.shape
    assert tokens == page_size + 4 * -(-page_size // 128)
    scale_MBC = np.random.default_rng(0).standard_normal((2, page_size, C)).astype(np.float32)
    planes = np.full((2, tokens - page_size, C, W), -1, np.int8)
    for token in range(page_size):
        bytes_MXC = np.asarray(scales.as_planes(jnp.asarray(scale_MBC[:, token])))
        planes[:, token // 128 * 4 : token // 128 * 4 + 4, :, token % 128] = bytes_MXC
    found = scales.of_planes(jnp.asarray(planes), page_size)
    np.testing.assert_array_equal(found, scale_MBC.reshape(-1, C))


def test_other_pages_hold_none_behind_their_tokens():
    for shape, dtype in [((2, 16, 4, 128), jnp.int8), ((2, 20, 4, 128), jnp.float8_e5m2), ((2, 20, 5, 128), jnp.int8)]:
        assert not scales.are_behind(jnp.zeros(shape, dtype), 2)
    assert cache_shape(2, 16, 2, 64, "tpu", jnp.float8_e5m2) == cache_shape(2, 16, 2, 64, "tpu") == (2, 16, 4, 128)


@pytest.mark.parametrize("implementation", ["reference", pytest.param("cpu", marks=needs_cpu_kernels)])
@pytest.mark.parametrize("rows", [[(0, 7)], [(4, 1)], MIXED], ids=str)
def test_int8_pages_come_close_to_dense_attention(rows, implementation):
    out, _, expected = from_nothing(rows, implementation=implementation)
    np.testing.assert_allclose(out[: len(expected)], expected, atol=0.03)


@pytest.mark.parametrize("page_size", [16, 256])
def test_int8_pages_of_a_tpu_come_close_to_dense_attention(page_size):
    out, cache, expected = from_nothing(MIXED, platform="tpu", page_size=page_size)
    assert scales.are_behind(cache, 2)
    np.testing.assert_allclose(out[: len(expected)], expected, atol=0.03)


@pytest.mark.parametrize("implementation", ["reference", pytest.param("cpu", marks=needs_cpu_kernels)])
@pytest.mark.parametrize("dtype, atol", [(jnp.float8_e4m3fn, 0.15), (jnp.float8_e5m2, 0.3)])
def test_float8_pages_come_close_to_dense_attention(dtype, atol, implementation):
    out, _, expected = from_nothing(MIXED, dtype=dtype, implementation=implementation)
    np.testing.assert_allclose(out[: len(expected)], expected, atol=atol)


@needs_cpu_kernels
@pytest.mark.parametrize("options", [{}, {"window": 70}, {"soft_cap": 2.0}], ids=["plain", "window", "soft_cap"])
@pytest.mark.parametrize("dtype", [jnp.int8, *FLOAT8])
def test_cpu_kernel_matches_the_reference(dtype, options):
    batch = a_batch([(0, 1), (0, 70), (0, 33)], dtype)
    got, got_cache = attend(*batch.args, implementation="cpu", **options)
    want, want_cache = attend(*batch.args, implementation="reference", **options)
    np.testing.assert_allclose(contents(got_cache), contents(want_cache), rtol=1e-6)
    np.testing.assert_allclose(got[:104], want[:104], atol=1e-5)


def test_gathered_pages_match_the_reference():
    batch = a_batch([(0, 1), (0, 70), (0, 33)])
    q, *_, lens, table, cu, counts = batch.args
    want, cache = attend(*batch.args, implementation="reference")
    options = {"num_kv_heads": 2, "scale": 0.25, "window": None, "soft_cap": None, "sinks_N": None}
    got = gpu_gather.attend_pages(
        q, cache, lens, table, cu, counts, k_scale=None, v_scale=None, page_offset=0, **options
    )  # fmt: skip
    np.testing.assert_allclose(got[:104], want[:104], atol=1e-5)


@needs_cpu_kernels
@pytest.mark.parametrize("dtype", [jnp.int8, *FLOAT8])
def test_bits_do_not_depend_on_how_a_prompt_was_cut(dtype):
    whole = a_batch([(0, 150)], dtype, seed=3)
    run = functools.partial(attend, implementation="cpu")
    expected, _ = run(*whole.args)
    for cuts in ([0, 1, 150], [0, 64, 65, 129, 150]):
        cache, parts = whole.cache_PBCH, []
        for start, end in zip(cuts, cuts[1:], strict=False):
            q, k, v = (x[start:end] for x in whole.args[:3])
            lens, cu = jnp.array([end, 0, 0], jnp.int32), jnp.array([0] + [end - start] * 3, jnp.int32)
            counts = jnp.array([end - start == 1, 1], jnp.int32)
            out, cache = run(q, k, v, cache, lens, whole.page_table_SM, cu, counts)
            parts.append(out)
        np.testing.assert_array_equal(jnp.concatenate(parts), expected[:150])


@needs_cpu_kernels
@pytest.mark.parametrize("dtype", FLOAT8)
def test_cpu_kernel_rounds_float8_as_ml_dtypes_does(dtype):
    """Halves of steps, subnormals, both ends, and numbers in between."""
    every = np.arange(256, dtype=np.uint8).view(dtype).astype(np.float32)
    every = np.unique(every[np.isfinite(every)])
    middles = (every[1:] + every[:-1]) / 2
    values = np.concatenate([every, middles, np.nextafter(middles, 1e9), np.nextafter(middles, -1e9), [1e6, -1e6]])
    values = np.resize(values.astype(np.float32), 64 * 2 * 32).reshape(64, 2, 32)
    top = float(ml_dtypes.finfo(dtype).max)
    q, *rest = a_batch([(0, 64)], dtype).args
    k, v = jnp.asarray(values), jnp.asarray(values[::-1])
    _, cache = attend(q[:64], k, v, *rest[2:], implementation="cpu")
    table = np.asarray(rest[4])[0, : 64 // 4]
    found = np.asarray(cache)[table].reshape(-1, 4, 32)[:64]
    np.testing.assert_array_equal(found[:, 0::2], np.clip(values, -top, top).astype(dtype))
    np.testing.assert_array_equal(found[:, 1::2], np.clip(values[::-1], -top, top).astype(dtype))


def test_scales_are_given_or_kept_never_both():
    batch = a_batch([(0, 3)])
    with pytest.raises(ValueError, match="leave k_scale and v_scale out"):
        attend(*batch.args, k_scale=0.1)


def test_layers_share_an_array_by_offset():
    batch = a_batch([(0, 5)])
    out, _ = attend(*batch.args, implementation="reference")
    q, k, v, cache, *rest = batch.args
    stacked = jnp.concatenate([jnp.full_like(cache, 127), cache])
    shifted, written = jax.jit(functools.partial(reference.attend, scale=0.25))(
        q, k, v, stacked, *rest, page_offset=jnp.int32(len(cache))
    )
    np.testing.assert_allclose(shifted[:5], out[:5], atol=1e-6)
    assert (np.asarray(written[: len(cache)]) == 127).all()
