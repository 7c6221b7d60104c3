"""`so3krates merge`: the data set out of what `so3krates convert --part K/N` made, when all parts are there."""

import argparse
import dataclasses
from pathlib import Path

from data_tools import quarantine
from data_tools.console import say
from data_tools.convert import finish
from data_tools.parts import SETTINGS_NAME, Settings, check_no_leftovers, find_parts, open_parts
from data_tools.workplace import check_output_folder
from so3krates_dist.errors import DataError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `so3krates merge`."""
    parser.add_argument("out", type=Path, metavar="FOLDER", help="data set to write, the --out of the parts")
    parser.add_argument(
        "--max-bad-share", type=float, metavar="SHARE", help="of faulty structures (default: what the parts were given)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Merge the parts of one data set; returns the exit code."""
    check_no_leftovers(arguments.out)
    check_output_folder(arguments.out)
    folder = find_parts(arguments.out)
    if not folder.is_dir():
        remedy = "Convert first, with --part K/N, or check the path"
        raise DataError(str(arguments.out), "have parts to be merged", "no folder for them", remedy)
    with open_parts(arguments.out, None) as parts:
        settings = Settings.load(parts / SETTINGS_NAME)
        if arguments.max_bad_share is not None:
            quarantine.check_max_bad_share(arguments.max_bad_share)
            description = dataclasses.replace(settings.description, max_bad_share=arguments.max_bad_share)
            settings = dataclasses.replace(settings, description=description)
        say(f"merging {settings.num_chunks} chunks")
        finish(parts, arguments.out, settings, verify=True)
    return 0
