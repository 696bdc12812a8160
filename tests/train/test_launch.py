"""Launchers: what they were asked for is what a run gets, or every process says why not.

The environments are those that the launchers themselves make; that processes which are started by
torchrun find each other is in `methods/test_processes.py`.
"""

import os

import pytest
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env, prepare_simple_launcher_cmd_env

from fiducial.cli import main
from fiducial.errors import LaunchError
from fiducial.lab.command import lab
from fiducial.lab.settings import Lab
from fiducial.train.launch import alone, asked, check_engine, check_given
from fiducial.train.processes import Processes

TORCHRUN = {
    "WORLD_SIZE": "2",
    "RANK": "1",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29400",
}
OPEN_MPI = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"}
SLURM = {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3"}


@pytest.mark.parametrize(
    ("environ", "count", "index"),
    [
        ({}, 1, 0),
        (TORCHRUN, 2, 1),
        (OPEN_MPI | {"MASTER_ADDR": "a"}, 2, 1),
        ({"PMI_SIZE": "3", "PMI_RANK": "2", "MASTER_ADDR": "a"}, 3, 2),
        ({"MV2_COMM_WORLD_SIZE": "3", "MV2_COMM_WORLD_RANK": "0", "MASTER_ADDR": "a"}, 3, 0),
        (SLURM | {"MASTER_ADDR": "a"}, 4, 3),
        (SLURM | TORCHRUN, 2, 1),  # torchrun, started once on each machine by srun
        ({"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"}, 1, 0),
        ({"SLURM_NTASKS": "4"}, 1, 0),  # a batch script, in which nothing was started yet
        ({"MASTER_ADDR": "a", "MASTER_PORT": "29500"}, 1, 0),
    ],
)
def test_what_a_launcher_asks_for_is_read_from_its_variables(environ, count, index):
    found = asked(environ)
    assert (found.count, found.index) == (count, index)


@pytest.mark.parametrize(
    ("environ", "says"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE asks for 2 processes, and RANK, .* is not set"),
        (TORCHRUN | {"RANK": "2"}, "RANK, which numbers them from 0, is 2"),
        (TORCHRUN | {"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two'"),
        (OPEN_MPI, "OMPI_COMM_WORLD_SIZE asks for 2 processes, and MASTER_ADDR"),
        (SLURM, "SLURM_STEP_NUM_TASKS asks for 4 processes, and MASTER_ADDR"),
    ],
)
def test_a_launch_that_cannot_come_together_is_refused(environ, says):
    with pytest.raises(LaunchError, match=says) as refused:
        asked(environ)
    assert "torchrun --nproc_per_node" in str(refused.value) or "two" in says


def launched(tmp_path, config, prepare, *flags):
    """The environment in which `accelerate launch` with this config starts the command."""
    (tmp_path / "config.yaml").write_text(config)
    words = ["--config_file", str(tmp_path / "config.yaml"), *flags, "-m", "fiducial"]
    args, _, _ = _validate_launch_command(launch_command_parser().parse_args(words))
    found = prepare(args)
    return found[1] if isinstance(found, tuple) else found


CPU = """
compute_environment: LOCAL_MACHINE
distributed_type: {kind}
num_machines: 1
num_processes: {count}
mixed_precision: '{precision}'
use_cpu: {cpu}
"""


def test_accelerate_with_a_config_for_several_processes_on_a_cpu_is_refused(tmp_path):
    """It starts one process and names no number of them."""
    text = CPU.format(kind="MULTI_CPU", count=2, precision="no", cpu="true")
    environ = launched(tmp_path, text, prepare_simple_launcher_cmd_env)
    assert "WORLD_SIZE" not in environ
    with pytest.raises(LaunchError, match="asked for several processes and started one"):
        asked(environ)
    one = CPU.format(kind="'NO'", count=1, precision="no", cpu="true")
    assert asked(launched(tmp_path, one, prepare_simple_launcher_cmd_env)).count == 1


FSDP = CPU + "fsdp_config:\n  fsdp_version: 2\n"
DYNAMO = CPU + "dynamo_config:\n  dynamo_backend: INDUCTOR\n"


@pytest.mark.parametrize(
    ("config", "kind", "precision", "says"),
    [
        (FSDP, "FSDP", "no", r"FSDP \(ACCELERATE_USE_FSDP\).*torchrun"),
        (CPU, "MULTI_GPU", "bf16", "mixed_precision bf16.*--run.precision bfloat16"),
        (DYNAMO, "MULTI_GPU", "no", "dynamo_backend inductor"),
    ],
)
def test_what_else_a_config_of_accelerate_asks_for_is_refused(
    tmp_path, config, kind, precision, says
):
    text = config.format(kind=kind, count=2, precision=precision, cpu="false")
    with pytest.raises(LaunchError, match=says):
        check_engine(launched(tmp_path, text, prepare_multi_gpu_env))
    plain = CPU.format(kind="MULTI_GPU", count=2, precision="no", cpu="false")
    check_engine(launched(tmp_path, plain, prepare_multi_gpu_env))


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("ACCELERATE_USE_DEEPSPEED", "true", "asked for DeepSpeed"),
        ("ACCELERATE_USE_MEGATRON_LM", "true", "asked for Megatron-LM"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "true", "asked for a parallelism_config"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4", "would divide every gradient by it"),
    ],
)
def test_variables_of_accelerate_that_change_the_numbers_are_refused(
    monkeypatch, name, value, says
):
    monkeypatch.setenv(name, value)
    with pytest.raises(LaunchError, match=says):
        Processes()


def test_a_group_of_another_size_than_asked_for_is_refused():
    for given in (1, 3):
        with pytest.raises(LaunchError, match=f"asks for 2 processes.* in a group of {given}"):
            check_given(asked(TORCHRUN), given)
    check_given(asked(TORCHRUN), 2)
    check_given(asked({}), 1)


def test_every_process_of_a_world_of_one_says_so(monkeypatch, capsys, models, data, tmp_path):
    """This interpreter's group has one process already, whatever the variables say."""
    assert Processes().count == 1
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    words = ["sft", "--model", models["llama"], "--data", data["completions"]]
    assert main([*words, "--out", str(tmp_path / "run")]) == 2
    assert "this is process 1 in a group of 1: each would train alone" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_verbs_that_do_not_share_their_work_refuse_several_processes(monkeypatch, tmp_path):
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(LaunchError, match="fiducial lab does not share its work"):
        lab(Lab(out=str(tmp_path / "lab")))
    assert os.listdir(tmp_path) == []
    monkeypatch.setenv("WORLD_SIZE", "1")
    alone("lab")
