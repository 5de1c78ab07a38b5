"""Splits one kernel's work over the cores: a job is a function called once for each chunk of it.

The thread that calls `run` works too. Helpers spin for a moment after each job, since in a decode step the next
one follows within microseconds, then sleep. Chunks are claimed one by one, and a helper that has not joined in
time is not waited for: on a busy machine the caller simply does more. A second job while one is running is done
by its own caller alone. Results must therefore not depend on who computes which chunk.

Threads with even numbers claim chunks from the first on, those with odd ones from the last back: with two threads,
each one's next chunk lies beside the one it has, so that its data can be fetched meanwhile (see `ahead`).

The state is a block of memory outside Python, one word a cache line, found by the symbol `POOL`.
"""

import atexit
import ctypes
import mmap
import os
import platform
import threading

import llvmlite.binding
from numba import types

from pallas_kernels.cpu import vectors as v

POOL = "jax_serving_cpu_pool"
BACK = 32  # NEXT counts chunks claimed from the front in its lower half, and from the back in its upper
LINE = 128  # two cache lines: neighbours are prefetched in pairs
LOCK, TICKET, NEXT, JOB, HELPERS, LIMIT, SLEEPERS, ALARM, STOP = (LINE * i for i in range(9))
# TICKET: the job's number << 8, | CLOSED once all chunks are claimed, + helpers at work on it.
CLOSED, AT_WORK = 128, 127
MAX_THREADS = 64
SPINS = 3000  # about 60 us on Zen 3; a futex wake-up costs about as much
PATIENCE = 2000  # spins before the caller yields its core to a helper that was descheduled
FUTEX, FUTEX_WAIT, FUTEX_WAKE = {"aarch64": 98}.get(platform.machine(), 202), 128, 129

chunk_signature = types.intp(types.intp, types.intp, types.intp)
pool_address = v.external(POOL)


@v.inner
def run(function, argument, chunks, max_threads):
    """Calls `function(argument, chunk, thread)` for every chunk; thread is below max_threads."""
    pool = pool_address()
    helpers = min(v.load_i64(pool + HELPERS), max_threads - 1, chunks - 1)
    if helpers <= 0 or not v.replace_if(pool + LOCK, 0, 1):
        for chunk in range(chunks):
            v.call_address(function, argument, chunk, 0)
        return
    v.store_i64(pool + JOB, function)
    v.store_i64(pool + JOB + 8, argument)
    v.store_i64(pool + JOB + 16, chunks)
    v.store_i64(pool + LIMIT, helpers)
    v.store_i64(pool + NEXT, 0)
    v.exchange(pool + TICKET, ((v.atomic_load(pool + TICKET) >> 8) + 1) << 8)
    if v.atomic_load(pool + SLEEPERS) > 0:
        v.fetch_add(pool + ALARM, 1)
        v.futex(FUTEX, pool + ALARM, FUTEX_WAKE, MAX_THREADS)
    _claim(pool, 0)
    v.fetch_or(pool + TICKET, CLOSED)
    spins = 0
    while v.atomic_load(pool + TICKET) & AT_WORK:
        v.pause()
        spins += 1
        if spins > PATIENCE:
            v.sched_yield()
    v.exchange(pool + LOCK, 0)


@v.inner
def _claim(pool, thread):
    function, argument = v.load_i64(pool + JOB), v.load_i64(pool + JOB + 8)
    chunks = v.load_i64(pool + JOB + 16)
    while True:
        claimed = v.fetch_add(pool + NEXT, 1 << BACK if thread & 1 else 1)
        front, back = claimed & ((1 << BACK) - 1), claimed >> BACK
        if front + back >= chunks:
            return
        v.call_address(function, argument, chunks - 1 - back if thread & 1 else front, thread)


@v.inner
def ahead(thread):
    """What to add to a thread's chunk for the one it is likely to claim next."""
    return -1 if thread & 1 else 1


@v.inner
def _is_open(pool, last):
    ticket = v.atomic_load(pool + TICKET)
    return (ticket >> 8) != last and (ticket & CLOSED) == 0


def help_out(pool, thread):
    """A helper's life."""
    last, spins = 0, 0
    while v.atomic_load(pool + STOP) == 0:
        ticket = v.atomic_load(pool + TICKET)
        if (ticket >> 8) != last and (ticket & CLOSED) == 0:
            if thread > v.load_i64(pool + LIMIT):
                last = ticket >> 8
            elif v.replace_if(pool + TICKET, ticket, ticket + 1):
                last, spins = ticket >> 8, 0
                _claim(pool, thread)
                v.fetch_add(pool + TICKET, -1)
            continue
        v.pause()
        spins += 1
        if spins > SPINS:
            alarm = v.load_i32(pool + ALARM)
            v.fetch_add(pool + SLEEPERS, 1)
            if not _is_open(pool, last) and v.atomic_load(pool + STOP) == 0:
                v.futex(FUTEX, pool + ALARM, FUTEX_WAIT, alarm)
            v.fetch_add(pool + SLEEPERS, -1)
            spins = 0
    return 0


def available_threads() -> int:
    """CPUs this process may run on, or JAX_SERVING_CPU_THREADS where it is set."""
    wished = os.environ.get("JAX_SERVING_CPU_THREADS")
    return max(1, min(int(wished) if wished else len(os.sched_getaffinity(0)), MAX_THREADS))


class Pool:
    """The helpers of this process."""

    def __init__(self, entry):
        """Args: entry: `help_out`, compiled."""
        self._entry = entry
        # Anonymous memory that nothing frees: a helper may look at it while Python shuts down.
        self._memory = mmap.mmap(-1, mmap.PAGESIZE)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        llvmlite.binding.add_symbol(POOL, self.address)
        self._helpers = []
        atexit.register(self.stop)
        os.register_at_fork(after_in_child=self._forget)

    @property
    def num_threads(self) -> int:
        return self._word(HELPERS) + 1

    def start(self, num_threads: int):
        """Makes jobs run on num_threads threads; More are started as needed, none ended."""
        if not 1 <= num_threads <= MAX_THREADS:
            raise ValueError(f"{num_threads} threads; choose 1 to {MAX_THREADS}")
        for index in range(len(self._helpers) + 1, num_threads):
            helper = threading.Thread(
                target=self._entry, args=(self.address, index), name=f"cpu-kernels-{index}", daemon=True
            )
            helper.start()
            self._helpers.append(helper)
        self._set_word(HELPERS, num_threads - 1)

    def stop(self):
        """Ends the helpers before the machine code they run is unloaded."""
        self._set_word(HELPERS, 0)
        self._set_word(STOP, 1)
        self._set_word(ALARM, self._word(ALARM) + 1)
        libc = ctypes.CDLL(None)
        libc.syscall(FUTEX, ctypes.c_void_p(self.address + ALARM), FUTEX_WAKE, MAX_THREADS, None)
        for helper in self._helpers:
            helper.join(timeout=1)
        self._helpers = []
        self._set_word(STOP, 0)

    def _forget(self):
        """A forked child has this memory's copy but none of the threads."""
        self._helpers = []
        for offset in (HELPERS, LOCK, SLEEPERS):
            self._set_word(offset, 0)

    def _word(self, offset) -> int:
        return ctypes.c_int64.from_address(self.address + offset).value

    def _set_word(self, offset, value):
        ctypes.c_int64.from_address(self.address + offset).value = value
