"""What the README shows is what lies here, and what lies here runs."""

import functools
import os
import re
import runpy
from pathlib import Path

import nbclient
import nbformat
import pytest
import tiny

import runtime
from runtime import demo

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
# A few steps to compile instead of those for any traffic, the same ones for all examples; a model this small knows no
# more positions.
SMALL = dict(dtype="float32", max_model_len=64, max_num_seqs=4, max_num_batched_tokens=32)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A tiny model that stands in for the demo model."""
    return tiny.make_checkpoint("llama", tmp_path_factory.mktemp("tiny"))


def test_the_readme_shows_these_examples():
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    examples = [path.read_text() for path in HERE.glob("*.py") if not path.name.startswith("test_")]
    assert blocks and sorted(blocks) == sorted(examples)


def test_generate_runs(checkpoint, monkeypatch, capsys):
    monkeypatch.setattr(demo, "demo", lambda progress=None: checkpoint)
    monkeypatch.setattr(runtime, "LLM", functools.partial(runtime.LLM, **SMALL))
    runpy.run_path(str(HERE / "generate.py"))
    assert capsys.readouterr().out.strip()


def notebook():
    return nbformat.read(HERE / "quickstart.ipynb", as_version=4)


def execute(book):
    """Runs every cell in a kernel of its own; raises when one fails."""
    nbclient.NotebookClient(book, timeout=300, resources={"metadata": {"path": str(ROOT)}}).execute()
    return book


def printed(book):
    return [
        "".join(out.text for out in cell.outputs if out.get("name") == "stdout")
        for cell in book.cells
        if cell.cell_type == "code"
    ]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_the_notebook_runs(checkpoint, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT)]))
    book = notebook()
    code = f"import pathlib, runtime.demo\nruntime.demo.demo = lambda progress=None: pathlib.Path({str(checkpoint)!r})"
    book.cells.insert(0, nbformat.v4.new_code_cell(code))
    book.cells[2].source, count = re.subn(r"LLM\(.*\)", f"LLM(**{SMALL!r})", book.cells[2].source)
    assert count == 1
    execute(book)


@pytest.mark.weights
def test_the_notebook_prints_what_it_shows(monkeypatch):
    """On the real demo model, whose text is greedy or seeded."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    assert printed(execute(notebook())) == printed(notebook())
