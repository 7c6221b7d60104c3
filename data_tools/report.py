"""The data report: what is in a data set, on one page that needs nothing else: HTML with its pictures inside, or one PNG.

Every text from the data is escaped; the page has no links, loads nothing and runs nothing. It says how much was read.
"""

import base64
import dataclasses
import html
import textwrap
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, Final

from data_tools import charts, drawing, quarantine
from data_tools.drawing import GREY, make_plain
from data_tools.examine import Findings
from data_tools.survey import Outlier, Survey, survey_dataset
from so3krates_dist import files
from so3krates_dist.data import loss_weights, shards
from so3krates_dist.errors import DataError
from so3krates_dist.graph import ELEMENT_SYMBOLS

DEFAULT_LIMIT: Final = 20_000
"""conformers that are read for a report; more change no picture"""
_SUFFIXES: Final = (".html", ".png")
_MAX_ROWS: Final = 40
"""of a table"""
_MAX_FINDINGS: Final = 20
_MAX_SHORT: Final = 6
"""rows of a table in one line of text"""
_SHORT: Final = {"Splits": 1, "Labels": -1, "Groups": 1, "Quarantine": 1}
"""Tables that become one line of text in a PNG, and the column that goes there"""
_MAX_LISTED: Final = 10
_LEGEND: Final = (
    "From the front and from above; the arrow, or the ring where it points at the reader, is the largest force."
)
_LABEL_UNITS: Final = {
    "energy": "eV", "forces": "eV/Å", "stress": "eV/Å³", "dipole": "e Å", "partial_charges": "e", "hirshfeld_ratios": "1",
}  # fmt: skip


@dataclasses.dataclass(frozen=True, slots=True)
class Table:
    """Rows of text under a title."""

    title: str
    header: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    num_left_out: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class Content:
    """All that a report says and shows."""

    title: str
    lines: list[str]
    """facts, one sentence each"""
    tables: list[Table]
    survey: Survey
    findings: list[tuple[str, str]]
    """kind and text of what `so3krates validate` found"""


def check_target(path: Path) -> None:
    """Raise `DataError` where no report can be written to a path, before anything is read for it."""
    if path.suffix.lower() not in _SUFFIXES:
        raise DataError("--report", "end in .html or .png", repr(path.name), "Give another name")
    if not path.parent.is_dir() or path.is_dir():
        got = "a folder" if path.is_dir() else f"no folder {path.parent}"
        raise DataError(f"--report {path}", "be a file in a folder that is there", got, "Choose another --report")


def write_report(
    folder: Path, path: Path, *, limit: int | None = DEFAULT_LIMIT, findings: Findings | None = None
) -> Survey:
    """Look at a data set and write its report.

    Args:
        folder: Data set.
        path: `.html` or `.png`.
        limit: Read about so many conformers, in evenly spaced blocks; None: all.
        findings: What `so3krates validate` found, to be listed too.

    Returns:
        What was seen.

    Raises:
        DataError: The report cannot be written there, or the data set has no manifest or index that can be read.
    """
    check_target(path)
    with shards.open_dataset(folder) as dataset:
        survey = survey_dataset(dataset, limit)
        content = gather(folder, dataset.manifest, survey, findings)
    if path.suffix.lower() == ".png":
        drawing.save_figure(draw_page(content), path)
        return survey
    try:
        files.write_text(path, format_page(content))
    except OSError as error:
        raise DataError(str(path), "be writable", error.strerror, "Choose another --report") from error
    return survey


# ------------------------------------------------------------------------------------------------------- what it says


def gather(folder: Path, manifest: shards.Manifest, survey: Survey, findings: Findings | None = None) -> Content:
    """Put into words and tables what is known of a data set.

    Args:
        folder: Data set.
        manifest: Of that data set.
        survey: What was seen in it.
        findings: What `so3krates validate` found.
    """
    listed = [] if findings is None else [
        (kind, line)
        for kind, lines in (("error", findings.errors), ("warning", findings.warnings))
        for line in lines[:_MAX_FINDINGS]
    ]  # fmt: skip
    if findings is not None and (more := findings.count("errors") + findings.count("warnings") - len(listed)) > 0:
        listed.append(("more", f"and {more} more"))
    tables = [
        _tabulate_splits(manifest), _tabulate_labels(manifest), _tabulate_elements(manifest, survey),
        _tabulate_counts("Total charges", "charge (e)", survey.total_charges),
        _tabulate_counts("Unpaired electrons", "number", survey.unpaired_electrons),
        _tabulate_counts("Groups", "group", manifest.groups),
        _tabulate_quarantine(folder), _tabulate_provenance(manifest),
    ]  # fmt: skip
    return Content(manifest.name, _write_lines(manifest, survey), [t for t in tables if t.rows], survey, listed)


def _write_lines(manifest: shards.Manifest, survey: Survey) -> list[str]:
    units = ", ".join(f"{name} {unit}" for name, unit in sorted(manifest.units.items()))
    lines = [
        f"Level of theory: {manifest.level_of_theory}. Licence: {manifest.licence}. Fingerprint: {manifest.fingerprint}.",
        f"Units: {units}. Labels: {', '.join(manifest.labels) or 'none'}.",
        _describe_reading(survey),
        f"Units check: {survey.units if survey.units is not None else 'nothing to look at'}.",
    ]
    counts = {split: manifest.num_conformers(split) for split in shards.SPLITS}
    if weights := loss_weights.describe(manifest.loss_weights, counts):
        lines.append(f"{weights[0].upper()}{weights[1:]}.")
    if survey.num_periodic:
        lines.append(f"{survey.num_periodic} of the conformers that were read are periodic.")
    if survey.band is not None:
        usual = f"{1e3 * survey.band.median:.1f} +- {1.4826e3 * survey.band.mad:.1f} meV/atom"
        lines.append(f"Energies less baselines: {usual} (median, robust standard deviation); {survey.num_off} far off.")
    if survey.problems:
        lines.append(f"Faulty conformers: {quarantine.describe_counts(survey.problems, survey.num_read)}.")
    if survey.doubts:
        lines.append(f"Doubtful: {quarantine.describe_counts(survey.doubts, survey.num_read)}.")
    if survey.damaged:
        lines.append(f"{len(survey.damaged)} blocks could not be read, e.g. {survey.damaged[0]}")
    return lines


def _describe_reading(survey: Survey) -> str:
    read = f"{survey.num_read} of {survey.num_conformers} conformers in {survey.num_blocks_read} of {survey.num_blocks} blocks"
    if survey.num_blocks_read == survey.num_blocks:
        return f"Read for this report: all {read.partition(' of ')[2].partition(' in ')[0]}."
    return f"Read for this report: {read}, evenly spaced. Counts below that are not of the manifest are of these."


def _tabulate_splits(manifest: shards.Manifest) -> Table:
    rows = [
        (split, str(manifest.num_conformers(split)), str(len(own)), str(sum(s.num_blocks for s in own)),
         str(sum(s.num_atoms for s in own)), f"{sum(s.size for s in own) / 1e6:.2f}")
        for split in shards.SPLITS
        if (own := manifest.of_split(split))
    ]  # fmt: skip
    return Table("Splits", ("split", "conformers", "shards", "blocks", "atoms", "MB"), rows)


def _tabulate_labels(manifest: shards.Manifest) -> Table:
    rows = []
    for label in manifest.labels:
        counts = [manifest.label_counts.get(split, {}).get(label, 0) for split in shards.SPLITS]
        total = sum(s.num_conformers for s in manifest.shards)
        rows.append((label, _LABEL_UNITS.get(label, ""), *map(str, counts), f"{sum(counts) / max(total, 1):.1%}"))
    return Table("Labels", ("label", "unit", *shards.SPLITS, "share of all"), rows)


def _tabulate_elements(manifest: shards.Manifest, survey: Survey) -> Table:
    statistics = manifest.statistics
    baselines = statistics.get("energy_baselines") or {}
    isolated = statistics.get("isolated_atom_energies") or {}
    force_rms = statistics.get("force_rms_per_element") or {}

    def show(values: Mapping[str, Any], z: int, digits: int) -> str:
        return f"{values[str(z)]:.{digits}f}" if str(z) in values else "-"

    rows = [
        (ELEMENT_SYMBOLS[z] if 0 <= z < len(ELEMENT_SYMBOLS) else str(z), str(survey.atoms[z]), str(survey.with_element[z]),
         show(baselines, z, 4), show(isolated, z, 4), show(force_rms, z, 3))
        for z in sorted(survey.atoms)
    ]  # fmt: skip
    header = ("element", "atoms read", "in conformers", "baseline (eV)", "isolated atom (eV)", "force RMS (eV/Å)")
    return Table("Elements", header, rows)


def _tabulate_counts(title: str, name: str, counts: Mapping[str, int]) -> Table:
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    rows = [(key, str(count)) for key, count in ranked[:_MAX_ROWS]]
    return Table(title, (name, "conformers"), rows, len(ranked) - len(rows))


def _tabulate_quarantine(folder: Path) -> Table:
    """Say what was left out when the data set was made, with the first structure of each reason."""
    path, counts, first = folder / quarantine.QUARANTINE_NAME, Counter[str](), dict[str, quarantine.BadStructure]()
    title = "Quarantine"
    try:
        for entry in quarantine.iter_quarantine(path) if path.is_file() else ():
            counts[entry.reason] += 1
            first.setdefault(entry.reason, entry)
    except DataError as error:
        return Table(title, ("error",), [(str(error),)])
    rows = []
    for reason, count in counts.most_common(_MAX_ROWS):
        entry = first[reason]
        rows.append(
            (
                reason,
                str(count),
                f"{entry.source}:{entry.record} {entry.formula}",
                f"must {entry.rule}; got {entry.got}",
            )
        )
    return Table(title, ("reason", "structures", "e.g.", "what is wrong with it"), rows, len(counts) - len(rows))


def _tabulate_provenance(manifest: shards.Manifest) -> Table:
    rows = [(key, _to_text(value)) for key, value in sorted(manifest.provenance.items())]
    return Table("Provenance", ("entry", "value"), rows[:_MAX_ROWS], max(0, len(rows) - _MAX_ROWS))


def _to_text(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {_to_text(entry)}" for key, entry in sorted(value.items()))
    if isinstance(value, Sequence) and not isinstance(value, str):
        shown = "; ".join(_to_text(entry) for entry in value[:_MAX_LISTED])
        return f"{shown}; and {len(value) - _MAX_LISTED} more" if len(value) > _MAX_LISTED else shown
    return str(value)


# ------------------------------------------------------------------------------------------------------------- as HTML


_STYLE: Final = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1080px; margin: 2em auto; padding: 0 1em; }
h1 { font-size: 1.6em; margin-bottom: .3em; } h2 { font-size: 1.15em; margin: 1.6em 0 .4em; }
p { margin: .25em 0; } img { max-width: 100%; height: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .92em; }
th, td { padding: .15em .9em .15em 0; text-align: left; vertical-align: top; border-bottom: 1px solid #ddd; }
th, td { overflow-wrap: anywhere; }
.worst { display: grid; grid-template-columns: repeat(auto-fit, minmax(420px, 1fr)); gap: 1em; }
figure { margin: 0; border: 1px solid #ddd; border-radius: 4px; padding: .6em; }
figcaption { font-size: .88em; overflow-wrap: anywhere; } code { font-size: .95em; }
.error { color: #b03000; } .note { color: #777; font-size: .88em; }
"""
_POLICY: Final = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
"""A browser shall load and run nothing, whatever a text has in it"""


def format_page(content: Content) -> str:
    """Return the report as HTML that needs no other file."""
    escape = html.escape
    parts = [
        "<!DOCTYPE html>",
        '<html lang="en"><head><meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{escape(_POLICY)}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(content.title)}: data report</title><style>{_STYLE}</style></head><body>",
        f"<h1>{escape(content.title)}</h1>",
        *(f"<p>{escape(line)}</p>" for line in content.lines),
    ]
    if content.findings:
        parts.append("<h2>Findings of so3krates validate</h2>")
        parts += [f'<p class="{escape(kind)}">{escape(kind)}: {escape(line)}</p>' for kind, line in content.findings]
    parts.append("<h2>Distributions</h2>")
    parts.append(_embed(lambda figure: charts.draw_histograms(figure, content.survey), (11, 6), "six histograms"))
    parts.append(f"<h2>The {len(content.survey.worst)} worst conformers that were read</h2>")
    parts.append(f'<p class="note">{escape(_LEGEND)}</p><div class="worst">')
    parts += [_format_outlier(outlier) for outlier in content.survey.worst]
    parts.append("</div>")
    parts += [_format_table(table) for table in content.tables]
    return "\n".join([*parts, "</body></html>", ""])


def _format_outlier(outlier: Outlier) -> str:
    picture = _embed(
        lambda figure: drawing.draw_structure(figure, outlier.graph), (5.2, 2.5), "structure from two sides"
    )
    name, escape = charts.name_outlier(outlier), html.escape
    caption = (
        f"<code>{escape(outlier.place)}</code> ({escape(outlier.split)})<br>{escape(name)}<br>{escape(outlier.reason)}"
    )
    return f"<figure>{picture}<figcaption>{caption}</figcaption></figure>"


def _embed(draw: Callable[[Any], None], size: tuple[float, float], alternative: str) -> str:
    """Return a picture as a tag that holds it."""
    figure, memory = drawing.make_figure(*size), BytesIO()
    draw(figure)
    figure.savefig(memory, format="png")
    text = base64.b64encode(memory.getvalue()).decode()
    return f'<img alt="{html.escape(alternative)}" src="data:image/png;base64,{text}">'


def _format_table(table: Table) -> str:
    def cells(tag: str, texts: Iterable[str]) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(text)}</{tag}>" for text in texts) + "</tr>"

    rows = [cells("th", table.header), *(cells("td", row) for row in table.rows)]
    note = f'<p class="note">and {table.num_left_out} more</p>' if table.num_left_out else ""
    return f"<h2>{html.escape(table.title)}</h2><table>{''.join(rows)}</table>{note}"


# -------------------------------------------------------------------------------------------------------------- as PNG


def draw_page(content: Content) -> Any:
    """Return the report as one figure: facts, findings, histograms, the worst conformers."""
    lines = [*content.lines, *(f"{kind}: {line}" for kind, line in content.findings)]
    lines += [_shorten_table(t, _SHORT[t.title]) for t in content.tables if t.title in _SHORT]
    wrapped = [part for line in lines for part in textwrap.wrap(make_plain(line), 150, subsequent_indent="    ")]
    rows = -(-len(content.survey.worst) // 2)
    heights = [0.5 + 0.19 * len(wrapped), 6.0, 0.35, *[2.9] * rows]
    figure = drawing.make_figure(11, sum(heights))
    parts = figure.subfigures(len(heights), 1, height_ratios=heights)
    parts[0].text(0.01, 0.99, make_plain(content.title), fontsize=15, va="top", weight="bold", parse_math=False)
    top = 1 - 0.42 / heights[0]
    parts[0].text(0.01, top, "\n".join(wrapped), fontsize=8.5, va="top", linespacing=1.45, parse_math=False)
    charts.draw_histograms(parts[1], content.survey)
    legend = f"The {len(content.survey.worst)} worst conformers that were read. {_LEGEND}"
    parts[2].text(0.01, 0.4, legend, fontsize=8.5, color=GREY)
    for number, outlier in enumerate(content.survey.worst):
        if number % 2 == 0:
            pair = parts[3 + number // 2].subfigures(1, 2)
        title = f"{outlier.place} ({outlier.split})\n{charts.name_outlier(outlier)}\n{outlier.reason}"
        title = "\n".join(textwrap.shorten(make_plain(line), 95, placeholder=" ...") for line in title.split("\n"))
        pair[number % 2].suptitle(title, fontsize=7.5, parse_math=False)
        drawing.draw_structure(pair[number % 2], outlier.graph)
    return figure


def _shorten_table(table: Table, column: int) -> str:
    """Return the first cells of the rows and those of another column as one line."""
    shown = [f"{row[0]} {row[column]}" for row in table.rows[:_MAX_SHORT] if len(row) > 1]
    more = len(table.rows) - len(shown) + table.num_left_out
    return f"{table.title}: {', '.join(shown)}{f' and {more} more' if more else ''}."
