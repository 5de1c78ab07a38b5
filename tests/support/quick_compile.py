"""Programs that are compiled once and run a few times, as those of Pallas's interpreters are."""

import functools

import jax

# LLVM's optimisation takes half of the time that XLA needs for an interpreted kernel, and saves nothing: what runs is
# mostly the interpreter.
OPTIONS = {"xla_backend_optimization_level": 0}
quick_jit = functools.partial(jax.jit, compiler_options=OPTIONS)
