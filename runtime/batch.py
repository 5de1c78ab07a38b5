"""A step's batch as one packed int32 vector: written by the host, read inside the compiled step.

One table of fields serves both sides. On the host `StepBuffer` holds NumPy views into the vector;
on the device `unpack` slices the same places. Floats travel bit-cast.

Dimension key
    T  tokens of the bucket   S  rows of the bucket   M  page-table columns   Q  knobs a row
"""

import dataclasses
import math

import numpy as np

from runtime.buckets import Bucket
from runtime.config import EnginePlan
from runtime.sampling import KNOB_FIELDS

FROM_DEVICE = -1  # as a token id: take the slot's newest token, which the host may not have read yet


@dataclasses.dataclass(frozen=True)
class StepLayout:
    """Where each field of a bucket's packed vector lies.

    Fields:
        counts: num_decode, num_rows, num_tokens, number of tokens whose prompt logprobs are wanted, num_steps,
            num_drafts.
        token_ids: `[T]`, or FROM_DEVICE.
        cu_q_lens: `[S + 1]`. kv_lens: `[S]`. slots: `[S]`, padding rows name the last slot.
        advance: `[S]`, most tokens the row may gain; 0 where nothing is to be sampled.
        next_tokens: `[S]`, the prompt token after a chunk's last one, for prompt logprobs.
        knobs: `[Q, S]`. page_table: `[S, M]`.
    """

    fields: dict[str, tuple[int, tuple[int, ...]]]
    size: int

    @classmethod
    def of(cls, bucket: Bucket, plan: EnginePlan) -> "StepLayout":
        T, S, M = bucket.num_tokens, bucket.num_rows, plan.page_columns
        shapes = {
            "counts": (6,),
            "token_ids": (T,),
            "cu_q_lens": (S + 1,),
            "kv_lens": (S,),
            "slots": (S,),
            "advance": (S,),
            "next_tokens": (S,),
            "knobs": (len(KNOB_FIELDS), S),
            "page_table": (S, M),
        }
        fields, offset = {}, 0
        for name, shape in shapes.items():
            fields[name] = (offset, shape)
            offset += math.prod(shape)
        return cls(fields, offset)

    def unpack(self, packed) -> dict:
        """The fields of a packed vector, NumPy or traced."""
        return {
            name: packed[offset : offset + math.prod(shape)].reshape(shape)
            for name, (offset, shape) in self.fields.items()
        }


class StepBuffer:
    """One packed vector and its views. Filled anew each step; a step in flight keeps its own."""

    def __init__(self, layout: StepLayout, idle_slot: int):
        self.packed = np.zeros(layout.size, np.int32)
        views = layout.unpack(self.packed)
        self.counts, self.token_ids, self.cu_q_lens = views["counts"], views["token_ids"], views["cu_q_lens"]
        self.kv_lens, self.slots, self.advance = views["kv_lens"], views["slots"], views["advance"]
        self.next_tokens, self.knobs, self.page_table = views["next_tokens"], views["knobs"], views["page_table"]
        self.slots[:] = idle_slot
