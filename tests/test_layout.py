"""Imports point one way: http/openai_api -> runtime -> converters -> models -> pallas_kernels."""

import ast
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAY_IMPORT = {
    "pallas_kernels": set(),
    "models": {"pallas_kernels"},
    "converters": {"models"},
    # The shape of a page is the kernel's to say, and the engine allocates the pages.
    "runtime": {"models", "converters", "pallas_kernels"},
    "http/openai_api": {"runtime"},
}
HOUSE = {folder.split("/")[-1] for folder in MAY_IMPORT}
# The files that put the layers together.
WIRING = {"runtime/serve.py", "runtime/serve_ray.py"}


def imports(source: str) -> set[str]:
    """The top-level names that a source imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_imports_point_down(folder):
    own = folder.split("/")[-1]
    for path in sorted((ROOT / folder).rglob("*.py")):
        if path.relative_to(ROOT).as_posix() in WIRING:
            continue
        upward = imports(path.read_text()) & HOUSE - MAY_IMPORT[folder] - {own}
        assert not upward, (
            f"{path.relative_to(ROOT)} imports {upward}; move the shared part down, or pass it as a value"
        )


def test_a_wrong_arrow_would_be_seen():
    source = "def f():\n    from openai_api.app import create_app\n    import runtime.engine as e\n"
    assert imports(source) & HOUSE == {"openai_api", "runtime"}


def test_wiring_reaches_the_http_layer_only_inside_functions():
    """So that flags, ports and help cost no web server and no jax."""
    for name in WIRING:
        path = ROOT / name
        if path.exists():
            top = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)]
            assert not imports("\n".join(map(ast.unparse, top))) & {"openai_api", "jax", "flax", "sanic"}, name


def test_no_package_hides_the_standard_library():
    assert not (ROOT / "http" / "__init__.py").exists()
    assert not list((ROOT / "tests").rglob("__init__.py"))
    test_names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert len(test_names) == len(set(test_names)), "two test files share a name"


def test_files_that_take_longest_are_there():
    longest = runpy.run_path(str(ROOT / "tests" / "conftest.py"))["LONGEST"]
    assert not set(longest) - {path.stem for path in (ROOT / "tests").rglob("test_*.py")}


def test_other_peoples_clients_are_tried_without_jax():
    """Their environments have what a client needs, and read tests/conftest.py too."""
    run = "import sys; sys.modules['jax'] = None; import pytest; sys.exit(pytest.main(sys.argv[1:]))"
    options = ["-q", "-m", "clients", "-o", "addopts=", "-p", "no:cacheprovider", "--collect-only"]
    done = subprocess.run([sys.executable, "-c", run, *options, __file__], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == pytest.ExitCode.NO_TESTS_COLLECTED, done.stdout + done.stderr
