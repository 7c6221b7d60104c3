"""The memory that there is and the peak of a computation, of this very process."""

from pathlib import Path

import pytest
import torch

from so3krates_dist.distributed import Rank
from so3krates_dist.errors import ConfigError
from so3krates_dist.train import memory
from so3krates_dist.train.memory import find_available_bytes, find_cgroup_limit, measure_peak

CPU = torch.device("cpu")
MB = 10**6


def allocate(*sizes: int) -> int:
    """Hold tensors of so many bytes at the same time, written to; give them up."""
    held = [torch.ones(size, dtype=torch.uint8) for size in sizes]
    return sum(len(tensor) for tensor in held)


class TestPeak:
    @pytest.mark.parametrize("size", [20 * MB, 80 * MB])
    def test_it_is_what_was_held_at_a_time(self, size: int) -> None:
        assert measure_peak(lambda: allocate(size, size // 2), CPU) == pytest.approx(1.5 * size, rel=0.1, abs=2 * MB)

    def test_what_came_one_after_another_is_not_added_up(self) -> None:
        peak = measure_peak(lambda: [allocate(40 * MB) for _ in range(5)], CPU)
        assert peak == pytest.approx(40 * MB, rel=0.1, abs=2 * MB)

    def test_a_larger_one_before_is_forgotten(self) -> None:
        allocate(200 * MB)
        assert measure_peak(lambda: allocate(20 * MB), CPU) == pytest.approx(20 * MB, rel=0.1, abs=2 * MB)

    def test_memory_that_was_freed_but_kept_hides_nothing(self) -> None:
        """Many small tensors come from the heap, which does not shrink while something lies at its end."""
        held = [torch.ones(20_000, dtype=torch.uint8) for _ in range(2001)]
        del held[:-1]
        peak = measure_peak(lambda: allocate(*[20_000] * 2000), CPU)
        assert peak == pytest.approx(40 * MB, rel=0.15, abs=2 * MB)

    def test_a_system_that_does_not_tell_is_refused(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(memory, "PROC", tmp_path)
        text = r"data\.find_limits must be false where the system does not measure memory; got true \(.*\)\. Set data\.max_at"
        with pytest.raises(ConfigError, match=text):
            measure_peak(lambda: None, CPU)
        with pytest.raises(ConfigError, match=text):
            find_available_bytes(CPU, Rank())
        (tmp_path / "self").mkdir()
        (tmp_path / "self" / "status").write_text("Name: python\n")
        with pytest.raises(ConfigError, match="has no entry VmRSS"):
            find_available_bytes(CPU, Rank())


class TestAvailable:
    def test_processes_of_a_machine_share_it(self) -> None:
        alone = find_available_bytes(CPU, Rank())
        shared = find_available_bytes(CPU, Rank(rank=1, local_rank=1, world_size=4, local_world_size=4))
        total = next(
            int(line.split()[1]) for line in Path("/proc/meminfo").read_text().splitlines() if "MemTotal" in line
        )
        assert 0 < alone <= total * 1024 / 2
        assert 0 < shared < alone / 2

    def test_what_a_scheduler_allows_counts(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A job's share of a machine may be much smaller than what the machine has free."""
        (tmp_path / "self").mkdir()
        (tmp_path / "self" / "status").write_text("VmRSS:\t 1000000 kB\n")
        (tmp_path / "meminfo").write_text("MemAvailable:   64000000 kB\n")
        (tmp_path / "self" / "cgroup").write_text("0::/\n")
        monkeypatch.setattr(memory, "PROC", tmp_path)
        both = Rank(world_size=2, local_world_size=2)
        monkeypatch.setattr(memory, "find_cgroup_limit", lambda *_: None)
        assert find_available_bytes(CPU, both) == 64_000_000 * 1024 // 4
        monkeypatch.setattr(memory, "find_cgroup_limit", lambda *_: 10_000_000 * 1024)
        assert find_available_bytes(CPU, both) == 8_000_000 * 1024 // 4, "less what both processes hold already"
        monkeypatch.setattr(memory, "find_cgroup_limit", lambda *_: 1_000_000 * 1024)
        assert find_available_bytes(CPU, both) == 0


class TestControlGroups:
    def write(self, root: Path, files: dict[str, str]) -> Path:
        for name, content in files.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(content + "\n")
        return root

    def test_the_lowest_limit_on_the_way_up_counts(self, tmp_path: Path) -> None:
        files = {"slurm/job/memory.max": "5000", "slurm/job/step/memory.max": "max", "slurm/memory.max": "9000"}
        root = self.write(tmp_path, files | {"other/memory.max": "10"})
        assert find_cgroup_limit("0::/slurm/job/step\n", root) == 5000

    def test_version_1(self, tmp_path: Path) -> None:
        files = {
            "memory/memory.limit_in_bytes": "9223372036854771712",
            "memory/slurm/job/memory.limit_in_bytes": "7000",
            "cpu/slurm/job/memory.limit_in_bytes": "10",
        }
        membership = "5:cpu,cpuacct:/slurm/job\n4:memory:/slurm/job\n0::/\n"
        assert find_cgroup_limit(membership, self.write(tmp_path, files)) == 7000
        assert find_cgroup_limit("4:memory:/\n", tmp_path) is None, "the largest number there is means none"

    def test_no_limit_anywhere(self, tmp_path: Path) -> None:
        assert find_cgroup_limit("0::/\n", tmp_path) is None
        assert find_cgroup_limit("", tmp_path) is None
