"""What the launcher asked for, read from its environment variables. A launch that could not be
given as it was asked for is refused by every process.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from ..errors import LaunchError

TORCHRUN = "torchrun --nproc_per_node N -m fiducial ..."
SIZES = {
    "WORLD_SIZE": "RANK",
    "OMPI_COMM_WORLD_SIZE": "OMPI_COMM_WORLD_RANK",
    "PMI_SIZE": "PMI_RANK",
    "MV2_COMM_WORLD_SIZE": "MV2_COMM_WORLD_RANK",
    "SLURM_STEP_NUM_TASKS": "SLURM_PROCID",
}
"""The number of processes and the number of this one, as torchrun, Open MPI, MPICH, MVAPICH and
Slurm name them. The first that is set counts.
"""
ENGINES = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism_config",
    "ACCELERATE_USE_SAGEMAKER": "SageMaker's own distribution",
}
"""Accelerate's variables for ways of sharing a model that no method here was tested with."""
_OFF = ("", "0", "false", "no", "off")


@dataclass(frozen=True)
class Asked:
    """count: how many processes the launcher was asked for. index: which of them this is.
    variable: the environment variable that says so, or "".
    """

    count: int
    index: int
    variable: str


def asked(environ: Mapping[str, str] | None = None) -> Asked:
    """What the launcher was asked for; one process where nothing started any.

    Raises:
        LaunchError: the variables contradict each other, or a process was started without what it
            needs to find the others.
    """
    environ = os.environ if environ is None else environ
    name = next((name for name in SIZES if environ.get(name)), None)
    if name is None:
        _refuse_simple_launch(environ)
        return Asked(1, 0, "")
    count, index = (_number(environ, key) for key in (name, SIZES[name]))
    if count is None or count == 1:
        return Asked(1, 0, name)
    if index is None or not 0 <= index < count:
        given = environ.get(SIZES[name])
        raise LaunchError(
            f"{name} asks for {count} processes, and {SIZES[name]}, which numbers them from 0, is "
            f"{given if given is not None else 'not set'}: start with `{TORCHRUN}`, or unset {name}"
        )
    if not environ.get("MASTER_ADDR"):
        raise LaunchError(
            f"{name} asks for {count} processes, and MASTER_ADDR, where they find each other, is "
            f"not set: start with `{TORCHRUN}`, or unset {name} for {count} runs of their own"
        )
    return Asked(count, index, name)


def check_engine(environ: Mapping[str, str] | None = None) -> None:
    """Refuse what a config of `accelerate launch` asks for and would change the numbers.

    Raises:
        LaunchError: names it, and what to write instead.
    """
    environ = os.environ if environ is None else environ
    for name, engine in ENGINES.items():
        if environ.get(name, "").lower() not in _OFF:
            raise LaunchError(
                f"accelerate was asked for {engine} ({name}), with which no method here was "
                f"tested: start with `{TORCHRUN}`, or choose distributed_type MULTI_GPU in "
                "accelerate's config"
            )
    precision = environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if precision not in _OFF:
        raise LaunchError(
            f"accelerate was asked for mixed_precision {precision}: leave it at no, and give "
            "--run.precision bfloat16 for a forward pass in bfloat16"
        )
    backend = environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower()
    if backend not in _OFF:
        raise LaunchError(
            f"accelerate was asked for dynamo_backend {backend}, with which no method here was "
            "tested: set it to no"
        )
    pieces = environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if pieces not in ("", "1"):
        raise LaunchError(
            f"accelerate was asked for gradient_accumulation_steps {pieces}, which would divide "
            "every gradient by it: leave it at 1; --batch-size is the batch of one optimizer "
            "step, and --run.tokens says how much of it is computed at a time"
        )


def check_given(wanted: Asked, given: int) -> None:
    """Compare the processes that were asked for with those that found each other.

    Raises:
        LaunchError: they differ, so that every process would train a model of its own.
    """
    if given != wanted.count:
        raise LaunchError(
            f"{wanted.variable or 'no launcher'} asks for {wanted.count} processes, and this is "
            f"process {wanted.index} in a group of {given}: each would train alone and overwrite "
            f"the others; start with `{TORCHRUN}`"
        )


def alone(verb: str) -> None:
    """Refuse several processes for a verb that does not share its work between them.

    Raises:
        LaunchError: a launcher started several.
    """
    if (count := asked().count) > 1:
        raise LaunchError(
            f"fiducial {verb} does not share its work, and the launcher started {count} processes "
            f"of it: start it alone, as `fiducial {verb} ...`"
        )


def _refuse_simple_launch(environ: Mapping[str, str]) -> None:
    """`accelerate launch` starts one process on a CPU, however many its config asks for.

    It gives that one the address of the others, and sets that for several processes only.
    """
    if environ.get("MASTER_ADDR") and "ACCELERATE_MIXED_PRECISION" in environ:
        raise LaunchError(
            "accelerate launch was asked for several processes and started one, as it does on a "
            f"CPU without mpirun: start with `{TORCHRUN}`, or give it --num_processes 1"
        )


def _number(environ: Mapping[str, str], name: str) -> int | None:
    value = environ.get(name)
    if not value:
        return None
    try:
        return int(value)
    except ValueError:
        raise LaunchError(f"{name} is {value!r}, which is no number of processes") from None
