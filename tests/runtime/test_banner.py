"""Progress of start-up, of stages that run beside each other too."""

import io

from runtime.banner import Starting


class Terminal(io.StringIO):
    def isatty(self):
        return True


def shown(stream, *events):
    progress = Starting(stream)
    for event in events:
        progress.drawn_at = 0.0
        progress(*event)
    return stream.getvalue()


BESIDE = [
    ("weights", 0, 4),
    ("decode 1x1", 1, 2),
    ("weights", 2, 4),
    ("decode 8x8", 2, 2),
    ("weights", 4, 4),
]


def test_a_log_has_one_line_a_stage():
    lines = shown(io.StringIO(), *BESIDE).splitlines()
    assert [line.rpartition(" ")[2] for line in lines] == ["weights", "steps"]


def test_on_a_terminal_the_first_stage_has_the_bar_and_the_other_is_shown_when_it_ends():
    lines = [part.split()[0] for part in shown(Terminal(), *BESIDE).split("\r\x1b[K") if part]
    assert lines == ["weights", "weights", "steps", "weights"]
    assert shown(Terminal(), *BESIDE).count("\n") == 2


def test_stages_one_after_the_other_each_have_the_bar():
    events = [("kernels", 0, 1), ("kernels", 1, 1), ("decode 1x1", 1, 2), ("decode 8x8", 2, 2)]
    assert shown(Terminal(), *events).count("\r") == 4


def test_nothing_is_shown_where_nothing_is_wanted():
    stream = io.StringIO()
    progress = Starting(stream, show=False)
    progress("weights", 0, 1)
    progress.says("port taken")
    assert not stream.getvalue()
