"""How the TPU's attention kernels change parts of pages: two walks over granules of tokens, many granules at a time.

A copy starts and ends at whole tiles. Where new tokens are less than that, the granule that they lie in is brought
in, they take their places in it, and it goes out again.

Dimension key as in the package.
"""

import dataclasses

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.ragged_paged_attention.tpu_walk import Rows


@dataclasses.dataclass(frozen=True, kw_only=True)
class Writer(Rows):
    """Two walks over the granules of new tokens: one brings them in, the other follows, changes and sends them.

    A kernel brings `place` and `change`, and more copies that a change needs by `fetch` and `wait_fetched`.
    """

    new: object  # of the step's tokens
    granules: object  # in scratch memory, by slot
    in_sems: object
    out_sems: object
    granule: int  # tokens; those of no granule are in two pages

    @property
    def in_flight(self) -> int:
        return self.granules.shape[0]

    def place(self, s, g):
        """Granule g of row s in its page."""
        raise NotImplementedError

    def change(self, s, g, slot):
        """Puts new tokens into a granule."""
        raise NotImplementedError

    def first(self, s):
        """The first granule of the next row from s on that has new tokens."""
        s = self.next_row(s - 1)
        return s, self.past_len(jnp.minimum(s, self.kv_lens.shape[0] - 1)) // self.granule

    def after(self, s, g):
        is_more = (g + 1) * self.granule < self.kv_lens[s]
        next_s, next_g = self.first(s + 1)
        return jnp.where(is_more, s, next_s), jnp.where(is_more, g + 1, next_g)

    def fetch(self, s, g, slot):
        pltpu.make_async_copy(self.place(s, g), self.granules.at[slot], self.in_sems.at[slot]).start()

    def wait_fetched(self, slot):
        self.wait(self.in_sems, slot)

    def wait(self, sems, slot):
        buffer = self.granules.at[slot]
        pltpu.make_async_copy(buffer, buffer, sems.at[slot]).wait()

    def run(self):
        zero = jnp.int32(0)
        start = self.first(zero)
        _, num_in, _, _ = lax.while_loop(lambda state: state[2][0] < self.last, self.turn, (start, zero, start, zero))
        pl.loop(0, jnp.minimum(num_in, self.in_flight))(lambda slot: self.wait(self.out_sems, slot))

    def turn(self, state):
        """One granule more on its way in, and one on its way out once enough are."""
        ahead, num_in, behind, num_out = state
        can_fetch = ahead[0] < self.last
        can_send = ~can_fetch | (num_in - num_out >= self.in_flight // 2)
        slot_in, slot_out = num_in % self.in_flight, num_out % self.in_flight

        @pl.when(can_fetch)
        def _fetch():
            pl.when(num_in >= self.in_flight)(lambda: self.wait(self.out_sems, slot_in))
            self.fetch(*ahead, slot_in)

        @pl.when(can_send)
        def _send():
            self.wait_fetched(slot_out)
            self.change(*behind, slot_out)
            pltpu.make_async_copy(self.granules.at[slot_out], self.place(*behind), self.out_sems.at[slot_out]).start()

        inside = lambda s: jnp.minimum(s, self.kv_lens.shape[0] - 1)
        pick = lambda chosen, old, new: tuple(jnp.where(chosen, n, o) for o, n in zip(old, new, strict=True))
        ahead = pick(can_fetch, ahead, self.after(inside(ahead[0]), ahead[1]))
        behind = pick(can_send, behind, self.after(inside(behind[0]), behind[1]))
        return ahead, num_in + can_fetch, behind, num_out + can_send
