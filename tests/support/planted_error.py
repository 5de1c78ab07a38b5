"""What notices an error that is planted into an interpreted kernel."""

import jax


def what_notices(interpreter, args, *, max_q_len=None, soft_cap=None, **options) -> str:
    """Runs the kernel on a batch: "races", "differs" from the reference, or "nothing".

    Args:
        interpreter: the module tpu_interpreter or gpu_interpreter.
        args: the batch's arrays.
        max_q_len, soft_cap: static options of the kernel.
        options: its others, arrays or numbers.
    """
    try:
        program = interpreter.program(max_q_len=max_q_len, soft_cap=soft_cap)
        got = jax.block_until_ready(program(*args, **options))
    except jax.errors.JaxRuntimeError as error:
        interpreter.reset()
        assert "RACE DETECTED" in str(error), error
        return "races"
    try:
        interpreter.assert_same(got, args, soft_cap=soft_cap, **options)
    except AssertionError:
        return "differs"
    return "nothing"
