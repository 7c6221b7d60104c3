"""Processes that were started otherwise than the first one are refused, with what is different."""

import pytest
import torch
from training_setup import make_config, run_processes

from so3krates_dist.distributed import Rank, read_rank, start_processes, stop_processes
from so3krates_dist.errors import EXIT_CONFIG, ConfigError, So3kratesError
from so3krates_dist.train.agreement import check_same, compare, describe_process

CPU = torch.device("cpu")


def test_one_process_agrees_with_itself():
    check_same(make_config("data", "run"), CPU, Rank())


@pytest.mark.parametrize(
    ("setting", "name", "values"),
    [
        ("run.seed=7", "run.seed", ("0", "7")),
        ("train.learning_rate=1.0", "train.learning_rate", ("0.002", "1.0")),
        ("model.num_layers=3", "model.num_layers", ("2", "3")),
        ("train.precision=bf16-mixed", "train.precision", ('"float32"', '"bf16-mixed"')),
        ("model.name=geomatt", "model.name", ('"euclidean_transformer"', '"geomatt"')),
    ],
)
def test_the_first_difference_is_named_with_both_values(setting, name, values):
    main, other = (describe_process(make_config("data", "run", *more)) for more in ((), (setting,)))
    with pytest.raises(ConfigError) as caught:
        compare(other, main, Rank(rank=3, world_size=4))
    expected = f"{name} of process 3 must be that of process 0 ({values[0]}); got {values[1]}. Start all processes with the same"
    assert str(caught.value).startswith(expected)


def test_what_is_a_matter_of_the_machine_may_differ():
    one = describe_process(make_config("data", "run"))
    other = describe_process(
        make_config("/scratch/data", "run", "run.threads=7", "data.cache=/scratch", "data.num_workers=3")
    )
    compare(other, one, Rank())


def test_the_run_folder_is_compared_as_it_is_meant(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    one = describe_process(make_config("data", "run"))
    compare(describe_process(make_config("data", tmp_path / "run")), one, Rank())
    with pytest.raises(
        ConfigError, match=r"run.folder of process 1 must be that of process 0 \(.*/run\); got .*/other\."
    ):
        compare(describe_process(make_config("data", tmp_path / "other")), one, Rank(rank=1, world_size=2))


def test_another_version_is_refused():
    one = describe_process(make_config("data", "run"))
    with pytest.raises(
        ConfigError, match=r"version of torch of process 1 must be that of process 0 \(.*\); got 1\.0\."
    ):
        compare(one | {"version of torch": "1.0"}, one, Rank(rank=1, world_size=2))
    missing = {name: value for name, value in one.items() if name != "train.proof"}
    with pytest.raises(ConfigError, match=r"train.proof of process 1 must be that of process 0 \(true\); got None\."):
        compare(missing, one, Rank(rank=1, world_size=2))


def agree(seed_of_second: int) -> int:
    """Do what a process does first, the second one with a seed of its own."""
    rank = read_rank()
    config = make_config("data", "run", f"run.seed={seed_of_second if rank.rank else 0}")
    start_processes(rank, CPU)
    try:
        check_same(config, CPU, rank)
    except So3kratesError as error:
        print(error, flush=True)
        return error.exit_code
    finally:
        stop_processes()
    return 0


def test_two_processes_end_together(tmp_path):
    assert run_processes(tmp_path / "same", 2, agree, 0).codes == (0, 0)
    outcome = run_processes(tmp_path / "other", 2, agree, 5)
    assert outcome.codes[1] == EXIT_CONFIG, outcome
    assert outcome.codes[0] not in (0, None), outcome
    assert outcome.outputs[1].startswith("run.seed of process 1 must be that of process 0 (0); got 5."), outcome
    assert "another process must be able to start as well" in outcome.outputs[0], outcome
