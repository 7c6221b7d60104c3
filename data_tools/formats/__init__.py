"""Other people's files: layouts recognised by content, their documented units, and records read chunk by chunk."""

from data_tools.formats.base import Chunk, Layout, ManyFiles, OpenFile, Request, Units
from data_tools.formats.registry import LAYOUTS, find_files, open_layout, recognise

__all__ = [
    "LAYOUTS",
    "Chunk",
    "Layout",
    "ManyFiles",
    "OpenFile",
    "Request",
    "Units",
    "find_files",
    "open_layout",
    "recognise",
]
