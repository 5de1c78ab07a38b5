"""What a compiled step gives a model: one ragged batch, packed end to end.

Rows are sequences. Rows [0, num_decode) bring one query token each; rows [num_decode, num_rows)
bring any number (chunks of prompts). What lies past the real counts is padding.

Dimension key
    T  tokens in the step (padded)     S  rows (padded)     M  page-table columns
"""

import dataclasses

import jax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StepInputs:
    """One step's batch, every array int32.

    Attributes:
        token_ids_T: tokens of all rows end to end; padding is 0.
        positions_T: each token's position in its own sequence; padding is 0.
        cu_q_lens_S1: `[S + 1]` running sum of query lengths; padding rows repeat the last value.
        kv_lens_S: tokens in the cache after this step, its own included; 0 marks a padding row.
        page_table_SM: page ids of each row; columns past its last page are unread.
        counts_2: `[num_decode, num_rows]`.
        num_tokens: scalar, real tokens; equals cu_q_lens_S1[-1].
        max_q_len: the most tokens that a row brings, where the program is made for so few; None for any.
    """

    token_ids_T: jax.Array
    positions_T: jax.Array
    cu_q_lens_S1: jax.Array
    kv_lens_S: jax.Array
    page_table_SM: jax.Array
    counts_2: jax.Array
    num_tokens: jax.Array
    max_q_len: int | None = dataclasses.field(default=None, metadata={"static": True})


@dataclasses.dataclass(frozen=True)
class CacheSpec:
    """What one layer keeps between steps: pages of keys and values.

    Attributes:
        num_kv_heads, head_dim: width of one token's keys.
        window: tokens a query looks back, itself included; None for all.
    """

    num_kv_heads: int
    head_dim: int
    window: int | None = None
