"""What a token's logits are does not depend on how the tokens are spread over steps, nor on neighbours or padding."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from models import interface
from pallas_kernels import panels

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 93]
SHAPE = dict(T=16, S=3)
FAMILIES = ["llama31", "gemma3", "qwen3_moe"]


@functools.cache
def model(family):
    return tiny.Tiny(family)


def run(family, rows, caches):
    """Logits of the real tokens; every step padded to one shape, so that a family compiles once."""
    num_tokens = sum(len(tokens) for tokens, _ in rows)
    pages = tiny.NUM_PAGES // 4
    step = tiny.batch(
        rows, pad_tokens=SHAPE["T"] - num_tokens, pad_rows=SHAPE["S"] - len(rows), num_pages=pages * len(rows)
    )
    logits_TV, caches = model(family).run(step, caches)
    return np.asarray(logits_TV[:num_tokens]), caches


@functools.cache
def at_once(family):
    return run(family, [(PROMPT, 0)], model(family).caches())[0]


@pytest.mark.parametrize("cuts", [[4, 9], [1, 2, 3], list(range(1, 15))], ids=["pages", "odd", "one by one"])
@pytest.mark.parametrize("family", FAMILIES)
def test_chunks_equal_one_prefill(family, cuts):
    caches, logits = model(family).caches(), []
    for start, end in zip([0, *cuts], [*cuts, len(PROMPT)], strict=True):
        chunk, caches = run(family, [(PROMPT[start:end], start)], caches)
        logits.append(chunk)
    np.testing.assert_allclose(np.concatenate(logits), at_once(family), atol=2e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_batched_equals_alone(family):
    neighbours = [([7], 0), ([8, 8, 9], 0)]
    together, _ = run(family, [*neighbours, (PROMPT[:12], 0)], model(family).caches())
    np.testing.assert_allclose(together[4:], at_once(family)[:12], atol=2e-5)


def test_a_missing_weight_is_named():
    llama = model("llama31")
    lacking = {path: array for path, array in llama.weights.items() if path != "layers.1.mlp.down.kernel"}
    with pytest.raises(KeyError, match="layers.1.mlp.down.kernel"):
        interface.bind(llama.graph, lacking)


def test_every_weight_has_logical_axes_of_its_own_rank():
    gemma = model("gemma3")
    for stacked in (False, True):
        axes = interface.logical_axes(gemma.model_class, gemma.config, stacked)
        _, shapes = interface.abstract(gemma.model_class, gemma.config, jnp.float32, stacked)
        assert {path: len(names) for path, names in axes.items()} == {p: len(s.shape) for p, s in shapes.items()}
        assert all((names[0] == "layers") == (stacked and path.startswith("layers")) for path, names in axes.items())


@pytest.mark.skipif(not panels.suits(64, 64, jnp.bfloat16), reason="this machine multiplies no panels")
def test_weights_in_panels_give_the_same_scores():
    plain = tiny.Tiny("qwen3", dtype=jnp.bfloat16)
    graph, shapes = interface.abstract(plain.model_class, plain.config, jnp.bfloat16, in_panels=True)
    assert shapes == plain.shapes
    # Some of the others' outputs are no whole panels of 32.
    assert graph.in_panels >= {"embed.table", "layers.0.attn.qkv.kernel", "layers.1.attn.qkv.kernel"}
    assert not any("norm" in name for name in graph.in_panels)
    weights = {name: panels.pack(w) if name in graph.in_panels else w for name, w in plain.weights.items()}
    step = tiny.one_prompt(PROMPT)
    want_TV, _ = plain.run(step, plain.caches())
    got_TV, _ = tiny.run(graph, weights, step, plain.caches())
    np.testing.assert_allclose(got_TV, want_TV, atol=0.02 * np.abs(want_TV).max())
