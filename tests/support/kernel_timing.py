"""Times a kernel inside of one program, so that no call is waited for and none is dispatched by itself.

A program calls the kernel in a loop. An argument of each call, the smallest, depends on the answer before, so that none
may run ahead, be hoisted out of the loop or be left out. Several sets of arrays take turns: one alone could stay in a
cache of the chip, where no step of a model finds its weights and pages. Two lengths of the loop are timed, and the
difference of their times is what the additional turns take: starting a program and waiting for it is in both.
"""

import functools
import statistics
import time

import jax
import jax.numpy as jnp
from jax import lax

SET_BYTES = 512 * 2**20  # that all sets take at least, several times what any chip keeps on it
MOST_SETS = 8
LONG_S = 0.1  # how long the longer loop takes at least


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def repeated(function, written, num_turns, sets):
    """Calls the function on each set in turn, so many times; returns the sets as they are left."""

    def turn(_, carry):
        sets, mark = carry
        after = []
        for arrays in sets:
            arrays, mark = lax.optimization_barrier((arrays, mark))
            marked = _smallest_of_floats(arrays)
            arrays[marked] = arrays[marked].at[_corner(arrays[marked])].add(mark.astype(arrays[marked].dtype))
            answer, *new = lax.optimization_barrier(_tuple(function(*arrays)))  # so that all of the answer is needed
            mark = answer[_corner(answer)].astype(jnp.float32) * 1e-30
            for index, array in zip(written, new, strict=True):
                arrays[index] = array
            after.append(arrays)
        return after, mark

    return lax.fori_loop(0, num_turns, turn, (sets, jnp.float32(0)))[0]


def seconds_a_call(case, platform, runs: int) -> float:
    """Of a kernel_cases.Case, on the device that JAX uses."""
    make = jax.jit(lambda: case.arrays(platform))
    sets = [make() for _ in range(num_sets(case.bytes(platform)))]
    function = case.function

    def run(num_turns):
        nonlocal sets
        sets = jax.block_until_ready(repeated(function, case.written, num_turns, sets))

    return seconds_a_turn(run, runs) / len(sets)


def num_sets(num_bytes: float) -> int:
    return max(1, min(MOST_SETS, round(SET_BYTES / num_bytes)))


def seconds_a_turn(run, runs: int, clock=time.perf_counter) -> float:
    """Of run(n), which takes a time of its own and n turns: the median of several."""

    def timed(num_turns):
        start = clock()
        run(num_turns)
        return clock() - start

    timed(1)  # compiles
    num_turns = 4
    while timed(num_turns) < LONG_S:
        num_turns *= 4
    return statistics.median((timed(1 + num_turns) - timed(1)) / num_turns for _ in range(runs))


def _smallest_of_floats(arrays) -> int:
    floats = [i for i, array in enumerate(arrays) if jnp.issubdtype(array.dtype, jnp.floating)]
    return min(floats, key=lambda i: arrays[i].size)


def _corner(array):
    return (0,) * array.ndim


def _tuple(results):
    return results if isinstance(results, tuple) else (results,)
