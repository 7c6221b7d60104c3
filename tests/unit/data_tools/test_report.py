"""The data report: all of it on one page that needs nothing else, the worst conformers with their places, texts that do no harm."""

import base64
import dataclasses
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from data_tools import charts, drawing, quarantine, report, survey, validate
from data_tools.examine import Findings
from data_tools.survey import Histogram
from so3krates_dist.data import shards
from so3krates_dist.data.shards import build_manifest
from so3krates_dist.errors import DataError
from so3krates_dist.graph import Graph

EVIL = "<script>alert('x')</script>&amp; $\\frac{1$ \u540d\u524d\u0007"


def write_set(folder: Path, by_split: dict[str, list[Graph]], *, block_size: int = 10, **changes) -> Path:
    folder.mkdir()
    entries = []
    for split, graphs in by_split.items():
        entries += shards.write_shards(folder, split, graphs, block_size=block_size, blocks_per_shard=50)
    every = [g for graphs in by_split.values() for g in graphs]
    statistics = {
        "elements": [1, 8], "energy_baselines": {"1": -693.0, "8": -692.0}, "isolated_atom_energies": {"1": -13.6},
        "force_rms_per_element": {"8": 1.5},
    }  # fmt: skip
    options = {
        "name": "water", "level_of_theory": "springs", "licence": "MIT", "groups": {"water": len(every)}, "splits": {},
        "statistics": statistics, "provenance": {"tool": "test", "sources": [{"file": "a.xyz", "sha256": "0" * 64}]},
    } | changes  # fmt: skip
    shards.write_index_and_manifest(folder, build_manifest(shards=entries, **options))
    return folder


class Page(HTMLParser):
    """Gathers what a browser would see, and refuses what it would load or run."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.pictures: list[bytes] = []
        self.open: list[str] = []
        self.feed(text)
        assert not self.open, f"{self.open} are not closed"

    def handle_starttag(self, tag: str, attributes) -> None:
        assert tag not in ("script", "link", "iframe", "object", "a", "form", "base"), tag
        values = dict(attributes)
        assert not [name for name in values if name.startswith("on") or name in ("href", "srcset", "action")]
        if tag == "img":
            kind, _, content = values["src"].partition(",")
            assert kind == "data:image/png;base64"
            self.pictures.append(base64.b64decode(content, validate=True))
        elif tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def spoil(graphs: list[Graph]) -> list[Graph]:
    """Put six odd conformers among sound ones."""
    graphs[3].energy += 5.0
    graphs[17].energy -= 9.0
    graphs[25].forces = graphs[25].forces * 10.0
    graphs[31] = dataclasses.replace(graphs[31], positions=np.zeros((3, 3)))
    graphs[32] = dataclasses.replace(graphs[32], forces=np.full((3, 3), np.nan))
    graphs[45] = dataclasses.replace(graphs[45], total_charge=1.0, num_unpaired_electrons=1.0, energy=-2066.0)
    graphs[46].dipole, graphs[46].partial_charges = np.zeros(3), np.array([-0.8, 0.4, 0.3])
    return graphs


def test_the_page_says_and_shows_all_there_is(tmp_path: Path, make_water) -> None:
    folder = write_set(tmp_path / "set", {"train": spoil(make_water(60)), "test": make_water(10, seed=1)})
    bad = quarantine.BadStructure(
        source="a.xyz", record=7, reason="force too large", rule="have less", got="9", formula="H2O"
    )
    quarantine.write_quarantine(folder / quarantine.QUARANTINE_NAME, [bad, dataclasses.replace(bad, record=9)])
    seen = report.write_report(folder, tmp_path / "a.html")
    page = Page((tmp_path / "a.html").read_text())
    for part in (
        "water: data report", "Level of theory: springs. Licence: MIT. Fingerprint: ",
        "Units: charge e, energy eV, forces eV/Angstrom, length Angstrom, stress eV/Angstrom^3.",
        "Labels: energy, forces, dipole, partial_charges.", "Read for this report: all 70 conformers.",
        "Units check: agrees: energies follow forces with slope 1.0",
        "Energies less baselines: ", "meV/atom (median, robust standard deviation); 2 far off.",
        "Faulty conformers: 2 of 70 (2.86%): 1 for atoms too close, 1 for forces not finite.",
        "Doubtful: 1 of 70 (1.43%): 1 for partial charges do not add up.",
        "The 10 worst conformers", "train-000000.tar:train-000000-000003:1 (train)",
        "must have its atoms at least 0.3 Å apart; got 0.000 Å", "must have finite forces; got nan or infinity",
        "energy -3047 meV/atom off (", "median deviations)", "force of ", "eV/Å on H",
        "Splits split conformers shards blocks atoms MB train 60 1 6 180 ", "test 10 1 1 30 ",
        "Labels label unit train validation test share of all energy eV 60 0 10 100.0%", "dipole e Å 1 0 0 1.4%",
        "Elements element atoms read in conformers baseline (eV) isolated atom (eV) force RMS (eV/Å) "
        "H 140 70 -693.0000 -13.6000 - O 70 70 -692.0000 - 1.500",
        "Total charges charge (e) conformers 0 69 1 1", "Unpaired electrons number conformers 0 69 1 1",
        "Groups group conformers water 70",
        "Quarantine reason structures e.g. what is wrong with it force too large 2 a.xyz:7 H2O must have less; got 9",
        "Provenance entry value sources file: a.xyz, sha256: 000", "tool test",
    ):  # fmt: skip
        assert part in page.text, part
    assert "water (H2O), 3 atoms, charge +1, 1 unpaired electrons" in page.text
    assert len(page.pictures) == 1 + 10
    for picture in page.pictures:
        assert np.ptp(imread(BytesIO(picture))) > 0.5, "an empty picture"
    places = [outlier.place for outlier in seen.worst]
    assert len(set(places)) == 10
    first = [f"train-000000.tar:train-000000-00000{b}:{i}" for b, i in ((3, 1), (1, 7), (2, 5), (3, 2), (0, 3))]
    assert places[:5] == first, "faulty, energy, force; faulty, energy"


def test_texts_from_data_cannot_do_anything(tmp_path: Path, make_water) -> None:
    graphs = [dataclasses.replace(g, group=EVIL) for g in make_water(20)]
    folder = write_set(
        tmp_path / "set", {"train": graphs}, name=EVIL, level_of_theory=EVIL, licence=EVIL, groups={EVIL: 20},
        provenance={EVIL: [{EVIL: EVIL}]},
    )  # fmt: skip
    bad = quarantine.BadStructure(source=EVIL, record=7, reason=EVIL, rule=EVIL, got=EVIL, formula=EVIL)
    quarantine.write_quarantine(folder / quarantine.QUARANTINE_NAME, [bad])
    findings = Findings()
    findings.error(EVIL, EVIL, EVIL)
    report.write_report(folder, tmp_path / "a.html", findings=findings)
    text = (tmp_path / "a.html").read_text()
    assert text.count("<script") == 0
    page = Page(text)
    assert page.text.count("<script>alert('x')</script>&amp;") >= 12
    assert "default-src 'none'" in text.replace("&#x27;", "'")
    report.write_report(folder, tmp_path / "a.png", findings=findings)
    assert imread(tmp_path / "a.png").shape[1] == 11 * drawing.DOTS_PER_INCH


def test_the_picture_shows_the_same(tmp_path: Path, make_water) -> None:
    folder = write_set(tmp_path / "set", {"train": spoil(make_water(60)), "test": make_water(10, seed=1)})
    findings = Findings(errors=[f"error {i}" for i in range(50)], warnings=["warning"])
    with shards.open_dataset(folder) as dataset:
        seen = survey.survey_dataset(dataset, None)
        content = report.gather(folder, dataset.manifest, seen, findings)
    assert content.findings[0] == ("error", "error 0")
    assert content.findings[20:] == [("warning", "warning"), ("more", "and 30 more")]
    figure = report.draw_page(content)
    texts = [t.get_text() for part in [figure, *figure.subfigs] for t in part.texts]
    assert texts[0] == "water"
    assert "Splits: train 60, test 10." in texts[1]
    assert "Labels: energy 100.0%, forces 100.0%, dipole 1.4%, partial_charges 1.4%." in texts[1]
    titles = [part.get_suptitle() for row in figure.subfigs[3:] for part in row.subfigs]
    assert len(titles) == 10
    assert titles[0].startswith(
        "train-000000.tar:train-000000-000003:1 (train)\nwater (H2O), 3 atoms\nmust have its atoms"
    )
    axes = [a for row in figure.subfigs[3:] for part in row.subfigs for a in part.axes]
    assert len(axes) == 20, "two sides of each"
    report.write_report(folder, tmp_path / "a.PNG")
    assert (tmp_path / "a.PNG").read_bytes().startswith(b"\x89PNG")


def test_large_sets_are_read_in_part_and_the_report_says_so(tmp_path: Path, make_water) -> None:
    folder = write_set(tmp_path / "set", {"train": make_water(200)})
    with shards.open_dataset(folder) as dataset:
        assert survey.survey_dataset(dataset, None).num_read == 200
    seen = report.write_report(folder, tmp_path / "a.html", limit=50)
    assert (seen.num_read, seen.num_conformers, seen.num_blocks_read, seen.num_blocks) == (50, 200, 5, 20)
    text = Page((tmp_path / "a.html").read_text()).text
    assert "Read for this report: 50 of 200 conformers in 5 of 20 blocks, evenly spaced." in text


def test_damaged_blocks_do_not_hide_the_others(tmp_path: Path, make_water) -> None:
    folder = write_set(tmp_path / "set", {"train": make_water(40)})
    path = folder / "train-000000.tar"
    content = bytearray(path.read_bytes())
    content[1700] ^= 4
    path.write_bytes(content)
    (folder / quarantine.QUARANTINE_NAME).write_text("nothing\n")
    seen = report.write_report(folder, tmp_path / "a.html")
    assert seen.num_read == 30
    text = Page((tmp_path / "a.html").read_text()).text
    assert "1 blocks could not be read, e.g. " in text
    assert "train-000000.tar:train-000000-000000 must have the CRC" in text
    assert "quarantine.jsonl:1 must be the record of a bad structure" in text


@pytest.mark.parametrize("change", [{"energy": None}, {"forces": None}, {"positions": np.zeros((3, 3))}])
def test_sets_that_lack_something_are_reported(tmp_path: Path, make_water, change) -> None:
    graphs = [dataclasses.replace(g, **change) for g in make_water(20)]
    folder = write_set(tmp_path / "set", {"train": graphs}, statistics={}, provenance={}, groups={})
    seen = report.write_report(folder, tmp_path / ("a.png" if "forces" in change else "a.html"))
    assert seen.num_read == 20
    assert len(seen.worst) == 10 if "forces" not in change else not seen.worst


def test_sets_of_the_first_schema_are_reported(clone: Path, tmp_path: Path) -> None:
    seen = report.write_report(clone / "tests" / "data" / "shards_schema_1", tmp_path / "a.html")
    assert seen.neighbors is not None
    assert seen.neighbors.total == seen.num_read - seen.problems.total()


def test_validate_writes_its_findings_into_the_report(tmp_path: Path, make_water, run_tool, capsys) -> None:
    folder = write_set(tmp_path / "set", {"train": spoil(make_water(60))}, splits={"num_conformers": {"train": 60}})
    assert run_tool(validate, folder, "--report", tmp_path / "a.html") == 87
    assert f"report: {tmp_path / 'a.html'}" in capsys.readouterr().out
    text = Page((tmp_path / "a.html").read_text()).text
    assert (
        "Findings of so3krates validate error: train-000000.tar:train-000000-000003:1 water (H2O) must have its" in text
    )
    assert "warning: the manifest does not say how the split was made" in text


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a.pdf", r"--report must end in .html or .png; got 'a.pdf'. Give another name."),
        ("nowhere/a.html", r"nowhere/a.html must be a file in a folder that is there; got no folder .*nowhere. Choose"),
        ("folder.png", r"folder.png must be a file in a folder that is there; got a folder. Choose another --report."),
    ],
)
def test_reports_that_cannot_be_written_are_refused_before_anything_is_read(
    tmp_path: Path, run_tool, name: str, message: str
) -> None:
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(DataError, match=message):
        run_tool(validate, tmp_path / "no set", "--report", tmp_path / name)


@pytest.mark.parametrize("name", ["a.html", "a.png"])
def test_a_target_that_goes_away_is_named(tmp_path: Path, make_water, name: str) -> None:
    folder = write_set(tmp_path / "set", {"train": make_water(20)})
    (tmp_path / f".{name}.tmp").mkdir()  # where it is written first
    with pytest.raises(DataError, match=rf"{name} must be writable; got Is a directory. Choose another --report"):
        report.write_report(folder, tmp_path / name)


# ----------------------------------------------------------------------------------------------------------- histograms


def test_histograms_count_all_values_once() -> None:
    values = np.random.default_rng(0).normal(size=10_000)
    histogram = Histogram.fit(values[:1000], least=0.1)
    histogram.add(values)
    histogram.add(np.array([np.nan, np.inf]))
    assert histogram.total == 10_000
    assert 0 < histogram.num_below < 100
    assert 0 < histogram.num_above < 100
    assert len(histogram.counts) == 60


def test_histograms_of_whole_numbers_have_bins_around_them() -> None:
    few = Histogram.fit(np.full(10, 9.0), least=4.0, whole=True)
    few.add(np.array([9.0, 9.0, 10.0, 27.0]))
    assert few.edges.tolist() == [6.5, 7.5, 8.5, 9.5, 10.5, 11.5], "the only size is in the middle"
    assert few.counts.tolist() == [0, 0, 2, 1, 0]
    assert few.num_above == 1
    assert Histogram.fit(np.ones(10), least=4.0, whole=True).edges[0] == 0.5, "no structure has no atoms"
    many = Histogram.fit(np.arange(2.0, 500.0), least=4.0, whole=True)
    many.add(np.arange(2.0, 500.0))
    assert len(many.counts) <= 62
    assert np.unique(np.diff(many.edges)).tolist() == [10.0]
    assert Histogram.fit(np.zeros(0), least=4.0).edges[-1] == 4.0


def test_a_histogram_of_one_value_is_a_bar_in_the_middle() -> None:
    one = Histogram.fit(np.full(10, 8.0), least=4.0)
    one.add(np.full(10, 8.0))
    assert one.counts.tolist() == [0, 0, 10, 0, 0]
    assert one.edges.tolist() == pytest.approx([6.0, 6.8, 7.6, 8.4, 9.2, 10.0])


# ----------------------------------------------------------------------------------------------------------- structures


def draw(graph: Graph):
    figure = drawing.make_figure(5, 2.5)
    drawing.draw_structure(figure, graph)
    figure.canvas.draw()
    return figure


def test_bonds_names_and_the_largest_force_are_drawn(make_water) -> None:
    graph = make_water(1)[0]
    graph.forces = np.array([[0, 0, 0], [0, 0, 0], [0.0, -1.0, 0]])
    front, above = draw(graph).axes
    assert [len(c.get_offsets()) for c in front.collections if len(c.get_offsets()) > 1] == [3]
    assert [len(c.get_segments()) for c in front.collections if hasattr(c, "get_segments")] == [2]
    assert {t.get_text() for t in front.texts} == {"O", "front", ""}
    assert "above" in {t.get_text() for t in above.texts}


def test_forces_towards_the_reader_are_rings() -> None:
    positions = np.array([[0.0, 0, 0], [1.5, 0, 0], [0, 1.2, 0]])
    forces = np.array([[0, 0, 0], [0, 0, 0], [0, 0, 3.0]])
    front, above = draw(Graph(atomic_numbers=np.array([6, 6, 6]), positions=positions, forces=forces)).axes
    assert len(front.patches) == 1
    assert len(above.patches) == 0
    assert sum(t.get_text() == "" for t in above.texts) == 1, "the arrow"


def test_an_angstrom_is_as_long_in_both_views_and_nothing_is_cut_off() -> None:
    generator = np.random.default_rng(0)
    for shape in ([9, 3, 1], [1, 1, 9], [4, 4, 4]):
        graph = Graph(atomic_numbers=np.full(30, 6), positions=generator.uniform(-1, 1, (30, 3)) * shape)
        panels = draw(graph).axes
        assert np.ptp(panels[0].get_xlim()) == pytest.approx(np.ptp(panels[1].get_xlim()))
        for axes in panels:
            places = axes.collections[-1].get_offsets()
            assert places[:, 0].min() > axes.get_xlim()[0]
            assert places[:, 0].max() < axes.get_xlim()[1]
            assert places[:, 1].min() > axes.get_ylim()[0]
            assert places[:, 1].max() < axes.get_ylim()[1]


def test_the_cell_of_a_crystal_is_drawn() -> None:
    graph = Graph(atomic_numbers=np.array([14]), positions=np.zeros((1, 3)), cell=3 * np.eye(3), pbc=np.ones(3, bool))
    front, _ = draw(graph).axes
    assert [len(c.get_segments()) for c in front.collections if hasattr(c, "get_segments")] == [12]


@pytest.mark.parametrize(
    "change",
    [
        {"positions": np.zeros((3, 3))},
        {"positions": np.full((3, 3), np.nan)},
        {"positions": np.array([[0, 0, 0], [np.nan, 0, 0], [0, 0, 1.0]])},
        {"positions": np.array([[0, 0, 0], [1e30, 0, 0], [0, 0, 1.0]])},
        {"forces": np.full((3, 3), np.nan)},
        {"forces": None},
        {"cell": np.zeros((3, 3)), "pbc": np.ones(3, bool)},
        {"cell": np.full((3, 3), np.nan), "pbc": np.ones(3, bool)},
        {"atomic_numbers": np.array([8, 1, 200])},
        {"atomic_numbers": np.array([8, 1, 0])},
    ],
)
def test_whatever_is_wrong_with_a_structure_it_is_drawn(make_water, change) -> None:
    graph = dataclasses.replace(make_water(1)[0], **change)
    assert len(draw(graph).axes) == 2
    outlier = survey.Outlier("a:b:0", "train", graph, "")
    assert charts.name_outlier(outlier).startswith("water (")


@pytest.mark.parametrize("num_atoms", [1, 2, 41, 6000])
def test_structures_of_all_sizes_are_drawn(num_atoms: int) -> None:
    side = int(np.ceil(num_atoms ** (1 / 3)))
    positions = 1.5 * np.indices((side, side, side)).reshape(3, -1).T[:num_atoms].astype(np.float64)
    forces = np.zeros((num_atoms, 3))
    forces[0, 0] = 1.0
    graph = Graph(atomic_numbers=np.full(num_atoms, 6), positions=positions, forces=forces)
    axes = draw(graph).axes[0]
    assert any(len(c.get_offsets()) == num_atoms for c in axes.collections)
