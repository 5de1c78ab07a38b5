"""Programs that are compiled once and run a few times, as those of Pallas's interpreters are."""

import contextlib
import dataclasses
import functools

import jax
import pytest

from runtime import machine

# LLVM's optimisation takes half of the time that XLA needs for an interpreted kernel, and two fifths of that for a tiny
# model's steps; it saves nothing where a program runs a few times.
OPTIONS = {"xla_backend_optimization_level": 0}
QUICK = "--xla_backend_optimization_level=0"  # the same in XLA_FLAGS
quick_jit = functools.partial(jax.jit, compiler_options=OPTIONS)


@contextlib.contextmanager
def fully_compiled():
    """Engines that are loaded here are compiled as users' are, where QUICK is in XLA_FLAGS."""
    options, here = {"xla_backend_optimization_level": "3"}, machine.here
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(machine, "here", lambda: dataclasses.replace(here(), options=options))
        yield
