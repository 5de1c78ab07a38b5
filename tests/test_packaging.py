"""The project runs from a checkout, from an editable install and from a wheel, whatever the current folder holds."""

import ast
import configparser
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOTS = {"runtime": "runtime", "models": "models", "converters": "converters", "pallas_kernels": "pallas_kernels"}
ROOTS |= {"openai_api": "http/openai_api"}

# Halves of packages that are listed: jax and pydantic each need theirs, of one version.
COME_ALONG = {"jaxlib", "pydantic-core"}

# Where each sibling came from, and that Python's own http is Python's own.
REPORT = """
import runtime, models, converters, pallas_kernels, openai_api, pathlib, http.server, http.client
for package in (runtime, models, converters, pallas_kernels, openai_api):
    print(pathlib.Path(package.__file__).resolve())
assert pathlib.Path(http.server.__file__).parent.name == "http" and hasattr(http.server, "HTTPServer")
"""


@pytest.fixture(scope="module")
def setup_cfg():
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


@pytest.fixture
def a_users_folder(tmp_path):
    """A current folder that holds weights under the names of our packages."""
    for name in ("models", "converters"):
        (tmp_path / name / "llama").mkdir(parents=True)
        (tmp_path / name / "llama" / "config.json").write_text("{}")
    return tmp_path


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel of a copy of this tree, built with what is installed here."""
    work = tmp_path_factory.mktemp("wheel")
    source = work / "source"
    skipped = shutil.ignore_patterns("__pycache__", "*.egg-info", "build")
    for name in ("runtime", "models", "converters", "pallas_kernels", "http"):
        shutil.copytree(ROOT / name, source / name, ignore=skipped)
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    run([*command, "--wheel-dir", str(work), str(source)], cwd=work)
    return next(work.glob("*.whl"))


def run(command, cwd, **environment):
    """Runs to the end and returns standard output; PYTHONPATH is only what is given."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PIP_REQUIRE_VIRTUALENV")}
    done = subprocess.run(
        command, cwd=cwd, env=kept | environment, capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


def places(output: str, home: Path) -> list[str]:
    return [Path(line).relative_to(home.resolve()).as_posix() for line in output.split()]


CHECKOUT = [f"{folder}/__init__.py" for folder in ("runtime", "models", "converters", "pallas_kernels")]


def test_every_package_is_listed(setup_cfg):
    folders = {
        ".".join([package, *path.parent.relative_to(ROOT / folder).parts])
        for package, folder in ROOTS.items()
        for path in (ROOT / folder).rglob("*.py")
    }
    listed = setup_cfg["options"]["packages"].split()
    assert sorted(listed) == sorted(folders)
    assert listed == sorted(listed)


def test_every_package_has_an_init():
    """Without one, a folder of the same name elsewhere would be merged into it."""
    for folder in ROOTS.values():
        for path in (ROOT / folder).rglob("*.py"):
            assert (path.parent / "__init__.py").exists(), path.parent


def test_every_third_party_import_is_a_requirement(setup_cfg):
    """What runs without the tests must be installed without them."""
    named = {
        line.split()[0].split("[")[0].split(">")[0].lower().replace("_", "-")
        for line in setup_cfg["options"]["install_requires"].strip().splitlines()
    }
    owners = packages_distributions()
    missing = {}
    for folder in ROOTS.values():
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                names += [node.module] if isinstance(node, ast.ImportFrom) and node.module and not node.level else []
                for name in {name.split(".")[0] for name in names} - ROOTS.keys() - sys.stdlib_module_names:
                    if name in ("ray", "starlette"):  # behind an extra, and what somebody's middleware brings
                        continue
                    dists = {owner.lower().replace("_", "-") for owner in owners.get(name, [name])}
                    if not dists & (named | COME_ALONG):
                        missing.setdefault(name, path.relative_to(ROOT).as_posix())
    assert not missing


def test_a_checkout_runs_without_being_installed(a_users_folder):
    output = run([sys.executable, "-c", REPORT], cwd=ROOT)
    assert places(output, ROOT) == [*CHECKOUT, "http/openai_api/__init__.py"]
    output = run([sys.executable, "-c", REPORT], cwd=a_users_folder, PYTHONPATH=str(ROOT))
    assert places(output, ROOT) == [*CHECKOUT, "http/openai_api/__init__.py"]


def test_serve_runs_as_module_and_as_file(a_users_folder):
    (a_users_folder / "runtime").mkdir()  # a folder that would hide the package from a file run in place
    assert "--max-model-len" in run([sys.executable, "-m", "runtime.serve", "--help"], cwd=ROOT)
    assert "--max-model-len" in run([sys.executable, str(ROOT / "runtime/serve.py"), "--help"], cwd=a_users_folder)


def test_an_editable_install_finds_its_siblings(a_users_folder):
    """setuptools' editable finder comes after the current folder; the pin comes before it."""
    finder = f"""
import importlib.util, pathlib, sys
root = pathlib.Path({str(ROOT)!r})
places = dict(runtime=root / "runtime", models=root / "models", converters=root / "converters")
class Editable:
    def find_spec(name, path=None, target=None):
        if name in places:
            return importlib.util.spec_from_file_location(name, places[name] / "__init__.py")
sys.meta_path[:] = [*(f for f in sys.meta_path if "editable" not in getattr(f, "__module__", "")), Editable]
"""
    output = run([sys.executable, "-c", finder + REPORT], cwd=a_users_folder)
    assert places(output, ROOT) == [*CHECKOUT, "http/openai_api/__init__.py"]


def test_a_foreign_sibling_is_refused(a_users_folder):
    """It was imported before runtime could pin its own."""
    (a_users_folder / "models" / "__init__.py").touch()
    code = "import models\ntry: import runtime\nexcept ImportError as error: print(error)"
    output = run([sys.executable, "-c", code], cwd=a_users_folder, PYTHONPATH=f"{a_users_folder}:{ROOT}")
    assert f"imported from {a_users_folder}" in output and "import runtime before it" in output


def test_the_wheel_holds_every_file(wheel):
    inside = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    wanted = {
        (Path(package) / path.relative_to(ROOT / folder)).as_posix()
        for package, folder in ROOTS.items()
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".json", ".jinja") and "__pycache__" not in path.parts
    }
    assert inside == wanted


def test_the_wheel_runs_from_a_folder_with_models(wheel, a_users_folder):
    installed = a_users_folder / "site"
    zipfile.ZipFile(wheel).extractall(installed)
    for name in ("runtime", "models"):
        (a_users_folder / name).mkdir(exist_ok=True)
    output = run([sys.executable, "-c", REPORT], cwd=a_users_folder, PYTHONPATH=str(installed))
    names = ["runtime", "models", "converters", "pallas_kernels", "openai_api"]
    assert places(output, installed) == [f"{name}/__init__.py" for name in names]
    flags = run([sys.executable, "-m", "runtime.serve", "--help"], cwd=a_users_folder, PYTHONPATH=str(installed))
    assert "--max-model-len" in flags


@pytest.mark.slow
@pytest.mark.parametrize("how", ["editable", "wheel"])
def test_pip_installs_it(how, wheel, a_users_folder):
    """A fresh environment that borrows only the third-party packages of this one."""
    home = a_users_folder / "env"
    venv.create(home, with_pip=False, symlinks=True)
    python = home / "bin" / "python"
    site = Path(run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], cwd=home).strip())
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    source = wheel.parent / "source"
    what = ["--editable", str(source)] if how == "editable" else [str(wheel)]
    pip = [python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    run([*pip, "--ignore-installed", *what], cwd=home)
    output = run([python, "-c", REPORT], cwd=a_users_folder)
    folders = ROOTS if how == "editable" else {name: name for name in ROOTS}
    expected = [f"{folders[name]}/__init__.py" for name in ("runtime", "models", "converters", "pallas_kernels")]
    expected.append(f"{folders['openai_api']}/__init__.py")
    assert places(output, source if how == "editable" else site) == expected
    assert "--max-model-len" in run([home / "bin" / "jax-serving-runtime", "--help"], cwd=a_users_folder)
