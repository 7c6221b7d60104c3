"""Settings that every test starts from, and the folders of material that lies beside a clone."""

import atexit
import os
import shutil
import socket
import tempfile
from pathlib import Path

# Before torch is imported: one thread (the cores are shared), no W&B server, no screen, and no launcher around the tests.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("MPLBACKEND", "Agg")
# Marks of verified files and copies of remote ones do not go to the user's own cache; children inherit the name.
os.environ["SO3KRATES_CACHE_DIR"] = tempfile.mkdtemp(prefix="so3krates-cache-")
atexit.register(shutil.rmtree, os.environ["SO3KRATES_CACHE_DIR"], ignore_errors=True)
_LAUNCHER = "RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE LOCAL_SIZE MASTER_ADDR MASTER_PORT"
_SLURM = "SLURM_PROCID SLURM_LOCALID SLURM_NTASKS SLURM_NTASKS_PER_NODE SLURM_TASKS_PER_NODE"
for _name in (*_LAUNCHER.split(), *_SLURM.split()):
    os.environ.pop(_name, None)

import pytest  # noqa: E402 - after the environment is set
import torch  # noqa: E402

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
torch.set_num_threads(1)

CLONE = Path(__file__).parents[1]


def _find_material(variable: str) -> Path:
    folder = os.environ.get(variable)
    if not folder or not Path(folder).is_dir():
        pytest.skip(f"{variable} names no folder")
    return Path(folder)


@pytest.fixture(scope="session")
def clone() -> Path:
    """Root of the clone that the tests belong to."""
    return CLONE


@pytest.fixture(scope="session")
def reference_dir() -> Path:
    """Numbers made with the authors' own code (SO3KRATES_REFERENCE_DIR)."""
    return _find_material("SO3KRATES_REFERENCE_DIR")


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Public data with DFT labels (SO3KRATES_DATA_DIR)."""
    return _find_material("SO3KRATES_DATA_DIR")


@pytest.fixture
def free_port() -> int:
    """A TCP port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
