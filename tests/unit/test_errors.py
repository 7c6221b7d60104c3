"""An error names the place, the rule, the finding and the remedy in one line, and survives the way between processes."""

import pickle

import pytest

from so3krates_dist import errors

CLASSES = {
    errors.So3kratesError: errors.EXIT_FAILURE,
    errors.ConfigError: errors.EXIT_CONFIG,
    errors.DataError: errors.EXIT_DATA,
    errors.CheckpointError: errors.EXIT_FAILURE,
    errors.NonFiniteError: errors.EXIT_NON_FINITE,
}


def test_every_error_class_has_its_exit_code():
    found = {c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, errors.So3kratesError)}
    assert found == set(CLASSES)
    for error, code in CLASSES.items():
        assert error("a", "b", 1, "c").exit_code == code != 0


def test_exit_codes_are_distinct():
    codes = [value for name, value in vars(errors).items() if name.startswith("EXIT_")]
    assert len(set(codes)) == len(codes)
    assert all(0 <= code < 126 for code in codes), "126 and above belong to the shell and to signals"


@pytest.mark.parametrize(
    ("remedy", "ending"), [("Set it to 1", "Set it to 1."), ("Did you mean `b`?", "Did you mean `b`?")]
)
def test_the_message_is_one_sentence_and_a_remedy(remedy, ending):
    error = errors.ConfigError("train.zero_stage", "be 0, 1 or 2", 3, remedy)
    assert str(error) == f"train.zero_stage must be 0, 1 or 2; got 3. {ending}"
    assert (error.where, error.rule, error.got, error.remedy) == ("train.zero_stage", "be 0, 1 or 2", 3, remedy)


@pytest.mark.parametrize("error_class", CLASSES)
def test_errors_come_back_whole_from_another_process(error_class):
    error = error_class("shard:7", "have 3 bytes", "2 bytes", "Copy it again")
    back = pickle.loads(pickle.dumps(error))
    assert type(back) is error_class
    assert str(back) == str(error)
    assert back.got == "2 bytes"
