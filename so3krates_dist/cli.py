"""The one console command, `so3krates <verb>`: parse, call, exit code; no logic of its own.

Only the verb that was asked for is imported, so that a mistake in a setting is reported before anything heavy is loaded.
An error that the user can mend is one line on stderr. Exit codes: errors.py, 2 for a malformed command line, 130 for Ctrl-C.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from so3krates_dist import __version__
from so3krates_dist.errors import EXIT_DONE, ConfigError, So3kratesError

EXIT_USAGE = 2
EXIT_INTERRUPTED = 130

Run = Callable[[argparse.Namespace], int]

TRAIN_EXAMPLES = """\
examples:
  so3krates train run=quickstart data.folder=DIR            one process
  so3krates train model=small data.folder=DIR run.name=mine train.num_steps=20000
  deepspeed --num_accelerators 2 launch/train.py run=quickstart data.folder=DIR       two processes, on GPUs or CPU
  so3krates train --dry-run --world-size 8 run=quickstart data.folder=DIR             what eight processes would need

The same command resumes the run at the step where it stopped. `so3krates info --config` lists all keys.
"""


class _Parser(argparse.ArgumentParser):
    """Reports a malformed command line in one line instead of the whole usage."""

    def error(self, message: str) -> NoReturn:
        """Print the message and leave."""
        self.exit(EXIT_USAGE, f"{self.prog}: {message}. `{self.prog} --help` shows what it takes.\n")


def _generate(parser: argparse.ArgumentParser) -> Run:
    from data_tools import generate

    generate.add_arguments(parser)
    return generate.run


def _convert(parser: argparse.ArgumentParser) -> Run:
    from data_tools import convert

    convert.add_arguments(parser)
    return convert.run


def _merge(parser: argparse.ArgumentParser) -> Run:
    from data_tools import merge

    merge.add_arguments(parser)
    return merge.run


def _validate(parser: argparse.ArgumentParser) -> Run:
    from data_tools import validate

    validate.add_arguments(parser)
    return validate.run


def _inspect(parser: argparse.ArgumentParser) -> Run:
    from data_tools import inspect

    inspect.add_arguments(parser)
    return inspect.run


def _train(parser: argparse.ArgumentParser) -> Run:
    parser.epilog = TRAIN_EXAMPLES
    parser.add_argument(
        "settings",
        nargs="*",
        metavar="KEY=VALUE",
        help="overlays (run=quickstart, model=small, ... or the path of a yaml file) and values (train.num_steps=100)",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check everything and take one step here; say what the run needs; write nothing",
    )
    parser.add_argument(
        "--world-size", type=int, metavar="N", help="with --dry-run: processes of the run that is checked (default: 1)"
    )

    def run(arguments: argparse.Namespace) -> int:
        from so3krates_dist.config import describe_left_out, load_config

        if arguments.world_size is not None and not arguments.dry_run:
            remedy = "Add --dry-run; real processes are started by a launcher"
            raise ConfigError("--world-size", "be left out without --dry-run", arguments.world_size, remedy)
        config = load_config(arguments.settings)
        from so3krates_dist.distributed import read_rank

        for line in describe_left_out(arguments.settings) if read_rank().is_main else ():
            print(f"note: {line}", file=sys.stderr, flush=True)
        if arguments.dry_run:
            from so3krates_dist.train import dry_run

            return dry_run.run_dry(config, arguments.settings, arguments.world_size)
        from so3krates_dist.train import loop

        return loop.run_training(config)

    return run


def _replay(parser: argparse.ArgumentParser) -> Run:
    from so3krates_dist.train import replay

    replay.add_arguments(parser)
    return replay.run


def _lr_find(parser: argparse.ArgumentParser) -> Run:
    from so3krates_dist.train import lr_find

    lr_find.add_arguments(parser)
    return lr_find.run


def _evaluate(parser: argparse.ArgumentParser) -> Run:
    from so3krates_dist.train import evaluate

    evaluate.add_arguments(parser)
    return evaluate.run


def _md(parser: argparse.ArgumentParser) -> Run:
    from so3krates_dist.inference import dynamics

    dynamics.add_arguments(parser)
    return dynamics.run


def _explain(parser: argparse.ArgumentParser) -> Run:
    from so3krates_dist.inference import explain

    explain.add_arguments(parser)
    return explain.run


def _import(parser: argparse.ArgumentParser) -> Run:
    from so3krates_dist.inference import interop

    interop.add_arguments(parser)
    return interop.run


def _info(parser: argparse.ArgumentParser) -> Run:
    from so3krates_dist.train import info

    info.add_arguments(parser)
    return info.run


def _doctor(parser: argparse.ArgumentParser) -> Run:
    from so3krates_dist.train import doctor

    doctor.add_arguments(parser)
    return doctor.run


VERBS: dict[str, tuple[Callable[[argparse.ArgumentParser], Run], str]] = {
    "generate": (_generate, "make a data set: conformers of molecules with GFN2-xTB energies and forces"),
    "convert": (_convert, "make a data set from files with labels (extxyz, npz, HDF5, databases, what ASE reads)"),
    "merge": (_merge, "make one data set of the parts that `convert --part K/N` has written"),
    "validate": (_validate, "check a data set: every shard, every block, every label"),
    "inspect": (_inspect, "show what is in a data set"),
    "train": (_train, "train a model, or resume a run"),
    "lr-find": (_lr_find, "find which learning rates are worth trying, by a short test on the data of a run"),
    "replay": (_replay, "repeat a step that a run has skipped, and say what was wrong with it"),
    "evaluate": (_evaluate, "measure the errors of a trained model, with pictures"),
    "md": (_md, "run molecular dynamics with a trained model"),
    "explain": (_explain, "show what a trained model attends to in a structure: pictures and numbers"),
    "import": (_import, "turn weights that others published into a model"),
    "info": (_info, "show versions, all settings, or what a run folder holds"),
    "doctor": (_doctor, "check this machine and say how to start a run on it"),
}


def _build_parser(verb: str | None) -> tuple[argparse.ArgumentParser, Run | None]:
    parser = _Parser(prog="so3krates", description="Train and use So3krates force fields.")
    parser.add_argument("--version", action="version", version=__version__)
    verbs = parser.add_subparsers(dest="verb", metavar="verb", required=True)
    run = None
    for name, (add_arguments, help_text) in VERBS.items():
        child = verbs.add_parser(
            name,
            help=help_text,
            description=f"{help_text[0].upper()}{help_text[1:]}.",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        if name == verb:
            run = add_arguments(child)
    return parser, run


def _put_settings_first(words: list[str]) -> list[str]:
    """Return a command line with KEY=VALUE before options: argparse takes them from one place only."""
    if not words or words[0] not in ("train", "lr-find"):
        return words
    settings = [w for w in words[1:] if "=" in w and not w.startswith("-")]
    return [words[0], *settings, *(w for w in words[1:] if w not in settings)]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb.

    Args:
        argv: Words after the program's name; None takes them from the command line.

    Returns:
        The exit code.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        parser, run = _build_parser(next((w for w in words if not w.startswith("-")), None))
        arguments = parser.parse_args(_put_settings_first(words))
        assert run is not None, "argparse lets known verbs through only"
        code = run(arguments)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # `so3krates info --config | head`: the reader has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_DONE
    except So3kratesError as error:
        print(f"so3krates: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    except KeyboardInterrupt:
        print("so3krates: interrupted", file=sys.stderr, flush=True)
        return EXIT_INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
