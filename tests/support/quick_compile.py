"""Programs that are compiled once and run a few times, as those of Pallas's interpreters are."""

import functools

import jax

# LLVM's optimisation takes half of the time that XLA needs for an interpreted kernel, and a quarter of that for a tiny
# model's steps; it saves nothing where a program runs a few times.
OPTIONS = {"xla_backend_optimization_level": 0}
QUICK = "--xla_backend_optimization_level=0"  # the same in XLA_FLAGS, of a process of its own
quick_jit = functools.partial(jax.jit, compiler_options=OPTIONS)
