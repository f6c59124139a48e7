"""The errors of the lab: each names the argument, what was given and what is allowed, and says what to do."""

from __future__ import annotations

import difflib
import re
import reprlib
import signal
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib import metadata
from typing import Any


class QtxError(Exception):
    """Base class of every error that qtx_lab raises on purpose.

    Examples
    --------
    >>> from qtx_lab import make_sampler
    >>> try:
    ...     make_sampler("systemtic")
    ... except QtxError as error:
    ...     print(error)
    sampler='systemtic' is unknown. Did you mean 'systematic'? ...
    """


class ArgumentError(QtxError, ValueError):
    """The value of an argument is not allowed, such as NaN, zero draws or an unknown name.

    Examples
    --------
    >>> from qtx_lab import HeadTailSampler
    >>> HeadTailSampler(head="best")
    Traceback (most recent call last):
    qtx_lab.errors.ArgumentError: head='best' is not allowed: ...
    """


class CostError(ArgumentError):
    """A call would cost more than its limit, or than is left of the budget, and nobody confirmed it.

    Examples
    --------
    The guard of a device's calls, with a limit of one minute, is asked about a call of two:

    >>> from qtx_lab.backends.costs import Cost, RunCost
    >>> from qtx_lab.backends.ibm.budget import CostGuard
    >>> cost = Cost((RunCost("rows", circuits=100, shots=4000, jobs=1, quantum_seconds=120.0),))
    >>> try:
    ...     with CostGuard("ibm_boston", max_quantum_seconds=60, budget=None).allow(cost):
    ...         print("sent")
    ... except CostError as error:
    ...     print(error)
    ibm_boston: 100 circuits × 4,000 shots = ..., more than max_quantum_seconds=60. Nothing of it was sent...
    """


class ShapeError(ArgumentError):
    """The shapes of tensors do not fit each other.

    Examples
    --------
    >>> import torch
    >>> from qtx_lab import sampled_attention
    >>> sampled_attention(torch.zeros(2, 4), torch.zeros(3, 5), torch.zeros(3, 5))
    Traceback (most recent call last):
    qtx_lab.errors.ShapeError: ...
    """


class DtypeError(QtxError, TypeError):
    """The type of an argument, or the dtype of a tensor, cannot be used.

    Examples
    --------
    >>> from qtx_lab import make_loader
    >>> make_loader(3)
    Traceback (most recent call last):
    qtx_lab.errors.DtypeError: loader=3 is a int; ...
    """


class NumberError(ArgumentError, DtypeError):
    """What must be a number is not one, such as True or "3"; it is a ValueError and a TypeError.

    Examples
    --------
    >>> from qtx_lab import HeadTailSampler
    >>> HeadTailSampler(head=True)
    Traceback (most recent call last):
    qtx_lab.errors.NumberError: ...
    """


class SpecError(ArgumentError):
    """A spec is not valid, or a file or a parameter cannot become one.

    Examples
    --------
    >>> from qtx_lab import SamplerSpec
    >>> SamplerSpec(num_samples=0)
    Traceback (most recent call last):
    qtx_lab.errors.SpecError: num_samples=0 ...
    """


class TransformError(QtxError, NotImplementedError):
    """torch cannot batch, trace, export or differentiate this; the message says what to use instead.

    Examples
    --------
    >>> import torch
    >>> from qtx_lab import sampled_attention
    >>> q, k, v = torch.zeros(3, 5, 4, 2)
    >>> torch.func.vmap(sampled_attention)(q, k, v)
    Traceback (most recent call last):
    qtx_lab.errors.TransformError: ...
    """


class TextError(QtxError, OSError):
    """A text file cannot be read.

    Examples
    --------
    >>> from qtx_lab import read_text
    >>> read_text("no-such-file.txt")
    Traceback (most recent call last):
    qtx_lab.errors.TextError: ...
    """


class StorageError(QtxError, OSError):
    """A run folder cannot be written or read: a disk is full, a permission is missing or a file is broken.

    Examples
    --------
    >>> import tempfile
    >>> from qtx_lab import Run
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     Run.open(folder)
    Traceback (most recent call last):
    qtx_lab.errors.StorageError: ...
    """


class RunFailed(QtxError, RuntimeError):
    """A notebook stopped with an error; the run folder keeps what was done until then.

    Examples
    --------
    >>> import nbformat, tempfile
    >>> from pathlib import Path
    >>> from qtx_lab import run_notebook
    >>> cell = nbformat.v4.new_code_cell("1 / 0")
    >>> with tempfile.TemporaryDirectory() as home:
    ...     path = Path(home, "broken.ipynb")
    ...     nbformat.write(nbformat.v4.new_notebook(cells=[cell]), path)
    ...     try:
    ...         run_notebook(path, home=home, progress=False)
    ...     except RunFailed as error:
    ...         print(error)
    broken.ipynb stopped in cell [1] (1 / 0) with ZeroDivisionError: division by zero
    """


class MissingPackage(QtxError, ModuleNotFoundError):
    """A package of an extra of qtx_lab is not installed; the message has the command that installs it.

    Examples
    --------
    It is an ImportError, so that code which bears a missing package bears it too:

    >>> try:
    ...     raise MissingPackage("qtx_lab.TreeLoader needs qiskit: pip install 'qtx-lab[quantum]'.")
    ... except ImportError as error:
    ...     print(error)
    qtx_lab.TreeLoader needs qiskit: pip install 'qtx-lab[quantum]'.
    """


class BackendUnavailable(QtxError, RuntimeError):
    """A device or simulator cannot run something now.

    It may lack an account, the network or enough qubits, or a job may have failed.

    Examples
    --------
    A row of 8 keys, one qubit each, on the twin of a device of 5 qubits:

    >>> import torch
    >>> from qtx_lab import QiskitQuantumBackend
    >>> backend = QiskitQuantumBackend("aer", "fake_manila", loader="unary")
    >>> try:
    ...     backend.sample_rows(torch.full((1, 8), 1 / 8), shots=100)
    ... except BackendUnavailable as error:
    ...     print(error)
    8 connected qubits are needed; the device of 5 has no such region.
    """


class ModelUnavailable(QtxError, OSError):
    """A language model that cannot be fetched, read or used; the message says why, and what to do.

    Examples
    --------
    >>> from qtx_lab import load_language_model
    >>> load_language_model("./no-such-folder")
    Traceback (most recent call last):
    qtx_lab.errors.ModelUnavailable: ...
    """


class JobTimeout(QtxError, TimeoutError):
    """A device job did not end within the time given. The job goes on.

    Examples
    --------
    Ask for a result later, and do something else until then:

    >>> import torch
    >>> from qtx_lab import QiskitQuantumBackend
    >>> job = QiskitQuantumBackend("aer").submit_rows(torch.full((8, 64), 1 / 64), shots=1000)
    >>> try:
    ...     job.counts(timeout=0)
    ... except JobTimeout as error:
    ...     print(error)
    Job local-... is running after 0 s; it goes on.
    >>> job.counts().counts.sum(-1).tolist()
    [1000, 1000, 1000, 1000, 1000, 1000, 1000, 1000]
    """


class StoppedBySignal(KeyboardInterrupt):
    """SIGTERM, SIGHUP or SIGUSR1 stopped a training in order, after its step and with a checkpoint.

    Parameters
    ----------
    number : signal.Signals
        The signal; `exit_code` is 128 plus its number, as a shell reports it.
    message : str
        What was done, and where the checkpoint is.

    Examples
    --------
    >>> StoppedBySignal(signal.SIGTERM, "Step 7 is done.").exit_code
    143
    """

    def __init__(self, number: signal.Signals, message: str):
        super().__init__(message)
        self.number = number
        self.exit_code = 128 + number


class FallbackWarning(UserWarning):
    """A request was carried out in another way; the result's `fallbacks` say what was done, and why.

    Examples
    --------
    Make every fallback an error:

    >>> import torch, warnings
    >>> from qtx_lab import ZeroNoiseExtrapolation
    >>> q = torch.zeros(2, 4)
    >>> with warnings.catch_warnings():
    ...     warnings.simplefilter("error", FallbackWarning)
    ...     zne = ZeroNoiseExtrapolation(noise_levels=[0.0, 0.01, 0.02])
    ...     zne.mitigate_attention_errors(lambda q, k, v, noise_level: q, q, q, q)
    Traceback (most recent call last):
    qtx_lab.errors.FallbackWarning: noise_levels holds 0, which is the answer itself: ...
    """


class CalibrationWarning(UserWarning):
    """A device has been calibrated again since the last request: circuits and corrections are made again.

    Examples
    --------
    A measurement that must not span two calibrations ends at the second one:

    >>> import warnings
    >>> with warnings.catch_warnings():
    ...     warnings.simplefilter("error", CalibrationWarning)
    ...     warnings.warn("ibm_boston was calibrated at 12:00.", CalibrationWarning)
    Traceback (most recent call last):
    qtx_lab.errors.CalibrationWarning: ibm_boston was calibrated at 12:00.
    """


class _Quotes(reprlib.Repr):
    """Shows what was given in one line: the ends of what is long, the shape of what holds many numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = 3
        self.maxlist = self.maxtuple = self.maxdict = self.maxset = self.maxfrozenset = self.maxarray = 20
        self.maxstring = self.maxother = 200

    def repr1(self, x: Any, level: int) -> str:
        return " ".join(super().repr1(x, level).split())

    def repr_int(self, x: int, level: int) -> str:
        # Python refuses to write a number of more than 4,300 digits.
        return repr(x) if x.bit_length() <= 200 else f"<int of {x.bit_length():,} bits>"

    def repr_Tensor(self, x: Any, level: int) -> str:
        return repr(x) if x.ndim < 2 and x.numel() <= 20 else f"<tensor of shape {tuple(x.shape)}>"

    repr_Parameter = repr_Tensor

    def repr_ndarray(self, x: Any, level: int) -> str:
        return repr(x) if x.ndim < 2 and x.size <= 20 else f"<array of shape {x.shape}>"


_QUOTES = _Quotes()


def quoted(given: object) -> str:
    """What was given, as an error message shows it: one line of bounded length, whatever it is.

    Examples
    --------
    >>> quoted("systemtic"), quoted([0.5, None])
    ("'systemtic'", '[0.5, None]')
    >>> quoted(list(range(5000)))
    '[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, ...]'
    >>> import torch
    >>> quoted(torch.zeros(2, 4, 512, 32)), quoted(10**5000)
    ('<tensor of shape (2, 4, 512, 32)>', '<int of 16,610 bits>')
    """
    text = _QUOTES.repr(given)
    return text if len(text) <= 250 else f"{text[:160]} ... {text[-60:]}"


def unknown_name(argument: str, given: object, allowed: Iterable[str]) -> ArgumentError:
    """Make the error for an argument that must be one of some names.

    Parameters
    ----------
    argument : str
        Name of the argument.
    given : object
        What was given in place of a name.
    allowed : iterable of str
        Names that exist. The message suggests the one that is most like `given`.

    Examples
    --------
    >>> print(unknown_name("loader", "dinamic", ["tree", "dynamic"]))
    loader='dinamic' is unknown. Did you mean 'dynamic'? Allowed: tree, dynamic.
    """
    allowed = list(allowed)
    similar = difflib.get_close_matches(given, allowed, n=1) if isinstance(given, str) else []
    hint = f" Did you mean {similar[0]!r}?" if similar else ""
    return ArgumentError(f"{argument}={quoted(given)} is unknown.{hint} Allowed: {', '.join(allowed)}.")


@contextmanager
def naming_the_extra(what: str) -> Iterator[None]:
    """Inside, a missing package that an extra of qtx_lab holds is an error with the command that installs it.

    Parameters
    ----------
    what : str
        What needs the package.

    Raises
    ------
    MissingPackage

    Examples
    --------
    >>> with naming_the_extra("qtx_lab.TreeLoader"):
    ...     raise ModuleNotFoundError("No module named 'qiskit'", name="qiskit")
    Traceback (most recent call last):
    qtx_lab.errors.MissingPackage: qtx_lab.TreeLoader needs qiskit: pip install 'qtx-lab[quantum]'.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        module = (error.name or "").partition(".")[0]
        package = {"PIL": "pillow", "pynvml": "nvidia-ml-py"}.get(module, module.lower().replace("_", "-"))
        extras: dict[str, list[str]] = {}
        for requirement in metadata.requires("qtx-lab") or ():
            if extra := re.search(r"extra == ['\"]([\w-]+)", requirement):
                extras.setdefault(extra[1], []).append(re.split(r"[^\w.-]", requirement)[0])
        holders = [extra for extra, packages in extras.items() if package in packages]
        if not holders:
            raise
        smallest = min(holders, key=lambda extra: len(extras[extra]))
        command = f"pip install 'qtx-lab[{smallest}]'"
        raise MissingPackage(f"{what} needs {package}: {command}.", name=error.name) from error
