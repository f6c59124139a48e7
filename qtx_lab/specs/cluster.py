"""`ClusterSpec`: which Dask cluster sweeps and training run on."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, field_validator, model_validator

from .base import Spec
from .fields import Real, Whole, each_once, field, python_number


class ClusterSpec(Spec):
    """Which Dask cluster sweeps and training run on; `open_cluster(**spec.arguments())` opens it.

    Examples
    --------
    >>> ClusterSpec(kind="local", num_workers=2).arguments()["num_workers"]
    2
    """

    kind: Literal["auto", "local", "cuda", "address"] = field(
        "auto",
        "local: processes; cuda: one worker for each GPU; address: a running scheduler; auto: GPUs if any.",
        "name",
        "cluster",
    )
    num_workers: Annotated[int, Field(strict=True, ge=1, le=4096), BeforeValidator(python_number)] | None = (
        field(
            None,
            "Number of workers; none: one for each core or GPU, or all that the scheduler has.",
            "workers",
            "cluster",
        )
    )
    threads_per_worker: Whole = field(1, "Threads of a local worker.", "threads", "cluster", ge=1, le=1024)
    address: str | None = field(
        None,
        "Address of the scheduler, as tcp://host:8786; only with kind address.",
        "address",
        "cluster",
        min_length=1,
    )
    rmm_pool_bytes: (
        Annotated[int, Field(strict=True, ge=0, le=2**50), BeforeValidator(python_number)] | None
    ) = field(None, "GPU memory that each worker reserves at its start; none: nothing.", "bytes", "GPUs")
    devices: tuple[Whole, ...] = field(
        (), "Numbers of the GPUs that are used; none named: all of them.", "number", "GPUs", max_length=1024
    )
    timeout: Real = field(
        60.0, "How long to wait for the scheduler and its workers.", "s", "cluster", gt=0, le=86_400
    )

    @field_validator("devices")
    @classmethod
    def _each_once(cls, devices: tuple[int, ...]) -> tuple[int, ...]:
        outside = [device for device in devices if not 0 <= device < 1024]
        if outside:
            raise ValueError(f"devices={list(devices)} is not allowed: {outside[0]} is not from 0 to 1023.")
        return each_once("devices", devices)

    @model_validator(mode="after")
    def _check_the_kind(self) -> Self:
        if (self.kind == "address") != (self.address is not None):
            raise ValueError(
                f"address={self.address!r} is not allowed with kind={self.kind!r}: kind 'address', "
                "and no other, has one."
            )
        if self.kind in ("local", "address"):
            of_gpus = {"devices": list(self.devices) or None, "rmm_pool_bytes": self.rmm_pool_bytes}
            for name, value in of_gpus.items():
                if value is not None:
                    raise ValueError(
                        f"{name}={value!r} is not allowed with kind={self.kind!r}: only 'cuda' and 'auto' "
                        "use the GPUs of this machine."
                    )
        return self

    def arguments(self) -> dict[str, Any]:
        """The arguments of `open_cluster`."""
        return dict(self)
