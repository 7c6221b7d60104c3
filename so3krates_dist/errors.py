"""Errors that tell the user where, which rule, what was found, and what to do.

Every error a user can cause is one line of the form `<where> must <rule>; got <value>. <remedy>`. The exit codes tell a
scheduler what happened: only `EXIT_REQUEUE` asks for the job to be started again.
"""

EXIT_DONE = 0
EXIT_FAILURE = 1
EXIT_REQUEUE = 85
EXIT_NON_FINITE = 86
EXIT_DATA = 87
EXIT_CONFIG = 88


class So3kratesError(Exception):
    """An error with a place, a rule, a finding and a remedy.

    Args:
        where: Dotted config key, `shard:member`, file or molecule that is at fault.
        rule: What must hold there, as the words after "must", e.g. "be positive".
        got: What was found instead.
        remedy: One sentence that says what to do, without a full stop.
    """

    exit_code = EXIT_FAILURE

    def __init__(self, where: str, rule: str, got: object, remedy: str) -> None:
        super().__init__(f"{where} must {rule}; got {got}. {remedy}{'' if remedy.endswith('?') else '.'}")
        self.where, self.rule, self.got, self.remedy = where, rule, got, remedy

    def __reduce__(self) -> tuple[type["So3kratesError"], tuple[str, str, object, str]]:
        """Survive the way back from a worker process (exceptions pickle their message only)."""
        return type(self), (self.where, self.rule, self.got, self.remedy)


class ConfigError(So3kratesError):
    """A setting is unknown, of the wrong type, out of range or at odds with another one."""

    exit_code = EXIT_CONFIG


class DataError(So3kratesError):
    """A file of structures, a shard or a label is missing, damaged or not what it should be."""

    exit_code = EXIT_DATA


class CheckpointError(So3kratesError):
    """A checkpoint or a run folder is missing, damaged or belongs to something else."""

    exit_code = EXIT_FAILURE


class NonFiniteError(So3kratesError):
    """Training produced nan or infinity more often than is allowed."""

    exit_code = EXIT_NON_FINITE
