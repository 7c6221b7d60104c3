"""`so3krates doctor`: what it finds, what it advises, when it fails."""

import collections
import importlib.metadata
import importlib.util
import shutil
import types

import pytest
import torch

from so3krates_dist.cli import main
from so3krates_dist.errors import EXIT_FAILURE
from so3krates_dist.train import doctor

Usage = collections.namedtuple("Usage", "total used free")


def get_states(findings) -> dict[str, str]:
    return {finding.name: finding.state for finding in findings}


def find_version_of(versions: dict[str, str]):
    def find(name: str) -> str:
        if name not in versions:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions[name]

    return find


def test_this_machine_can_train(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(1e12, 1e11, 9e11))
    assert main(["doctor", "--folder", str(tmp_path / "not/yet")]) == 0
    out = capsys.readouterr().out
    for name in ("python", "torch", "import deepspeed", "cores", "memory", "gloo", "disk", "writing", "W&B", "LAUNCH"):
        assert f"  {name}" in out, name
    assert "fail" not in out
    assert out.endswith("This machine can train.\n")
    assert list(tmp_path.iterdir()) == [], "the file that measures the speed is removed, the folder is not made"


def test_something_missing_is_a_failure(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(
        doctor,
        "check_requirements",
        lambda: iter([doctor.Finding("fail", "e3nn", "not installed", "pip install e3nn")]),
    )
    monkeypatch.setattr(
        doctor, "check_import", lambda module: iter([doctor.Finding("fail", f"import {module}", "broken")])
    )
    assert main(["doctor", "--folder", str(tmp_path)]) == EXIT_FAILURE
    out = capsys.readouterr().out
    assert "fail  e3nn            not installed. pip install e3nn\n" in out
    assert out.endswith("Missing or broken: e3nn, import torch, import deepspeed.\n")


def test_requirements_of_the_package_are_compared_with_what_is_there():
    findings = list(
        doctor.check_requirements(
            [
                "torch<3,>=2.10",
                "omegaconf<2.5,>=2.4",
                "e3nn>=0.6",
                "tblite>=0.8; extra == 'generate'",
                "torch-pme<0.6,>=0.5; extra == 'longrange'",
                "pytest; extra == 'dev'",
            ],
            find_version_of({"torch": "2.13.0+cpu", "omegaconf": "2.3.1"}),
        )
    )
    assert [str(f) for f in findings] == [
        "ok    torch           2.13.0+cpu",
        "fail  omegaconf       2.3.1, but <2.5,>=2.4 is needed. pip install 'omegaconf<2.5,>=2.4'",
        "fail  e3nn            not installed. pip install 'e3nn>=0.6'",
        "warn  tblite          not installed. `so3krates generate` uses it: pip install 'so3krates-dist[generate]'",
        "note  torch-pme       not installed. Ewald and PME electrostatics use it: pip install 'so3krates-dist[longrange]'",
    ]


def test_a_package_that_pip_does_not_know(monkeypatch):
    def requires(name: str):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "requires", requires)
    (finding,) = doctor.check_requirements()
    assert finding.state == "fail"
    assert "pip does not know" in finding.text


@pytest.mark.parametrize(
    ("version", "state"), [((3, 10, 1), "fail"), ((3, 11, 0), "ok"), ((3, 12, 9), "ok"), ((3, 13, 0), "fail")]
)
def test_python_versions(monkeypatch, version, state):
    monkeypatch.setattr(doctor.sys, "version_info", version)
    assert get_states(doctor.check_python()) == {"python": state}


def test_a_broken_import_is_a_finding_with_its_last_line():
    (finding,) = doctor.check_import("no_such_module_here")
    assert finding.state == "fail"
    assert finding.text == "ModuleNotFoundError: No module named 'no_such_module_here'"
    (finding,) = doctor.check_import("json")
    assert finding.state == "ok"


@pytest.mark.parametrize(
    ("gpus", "gloo", "nccl", "expected"),
    [
        (0, True, False, {"gpu": "note", "gloo": "ok", "nccl": "note"}),
        (0, False, False, {"gpu": "note", "gloo": "fail", "nccl": "note"}),
        (2, True, True, {"gpu 0": "ok", "gpu 1": "ok", "gloo": "ok", "nccl": "ok"}),
        (1, True, False, {"gpu 0": "ok", "gloo": "ok", "nccl": "fail"}),
    ],
)
def test_devices_and_what_processes_talk_through(monkeypatch, gpus, gloo, nccl, expected):
    properties = types.SimpleNamespace(name="GPU", total_memory=2**33)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(torch.distributed, "is_gloo_available", lambda: gloo)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: nccl)
    assert get_states(doctor.check_devices()) == expected


def test_without_torch_the_rest_is_still_examined(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert list(doctor.check_devices()) == []
    assert doctor._count_gpus() == 0


def test_a_full_disk_is_a_failure(monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(1e12, 1e12, 1e9))
    (finding,) = doctor.check_disk(tmp_path)
    assert finding.state == "fail"
    assert "1.0 GB free" in finding.text
    assert "at least 2 GB" in finding.remedy


@pytest.mark.parametrize(("speed", "state"), [(500.0, "ok"), (5.0, "warn")])
def test_a_slow_disk_is_a_warning(monkeypatch, tmp_path, speed, state):
    monkeypatch.setattr(doctor, "_measure_write_speed", lambda _: speed)
    assert get_states(doctor.check_disk(tmp_path))["writing"] == state


def test_a_disk_that_may_not_be_written_is_a_failure(monkeypatch, tmp_path):
    def refuse(_folder):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(doctor, "_measure_write_speed", refuse)
    finding = list(doctor.check_disk(tmp_path))[-1]
    assert finding.state == "fail"
    assert "Permission denied" in finding.text


@pytest.mark.parametrize(("key", "text"), [("", "no login"), ("x" * 40, "logged in")])
def test_wandb_login_is_said_and_the_key_is_not(monkeypatch, tmp_path, key, text):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_API_KEY", key)
    (finding,) = doctor.check_wandb()
    assert text in finding.text
    assert not key or key not in str(finding)


@pytest.mark.parametrize(
    ("gpus", "cores", "srun", "expected"),
    [
        (0, 1, False, ["1 core(s), no GPU: so3krates train run=quickstart data.folder=DIR"]),
        (0, 8, False, [
            "8 core(s), no GPU: DS_ACCELERATOR=cpu deepspeed --num_accelerators 2 launch/train.py run=quickstart "
            "data.folder=DIR run.threads=4"
        ]),
        (1, 8, False, ["1 GPU(s): so3krates train run=quickstart data.folder=DIR"]),
        (4, 8, True, [
            "4 GPU(s): deepspeed --num_accelerators 4 launch/train.py run=quickstart data.folder=DIR",
            'on a Slurm cluster, in a job: export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1) '
            "MASTER_PORT=29500; srun python launch/train.py run=quickstart data.folder=DIR",
        ]),
    ],
)  # fmt: skip
def test_advice(gpus, cores, srun, expected):
    assert doctor.advise_launch(gpus, cores, has_srun=srun) == expected
