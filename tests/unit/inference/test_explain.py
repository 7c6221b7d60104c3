"""What is written about attention is what the model computed, the pictures show it, and nobody who does not ask pays for it."""

import dataclasses
import math
from pathlib import Path

import ase.build
import ase.io
import numpy as np
import pytest
import torch
from ase import Atoms
from PIL import Image
from structures import STATISTICS, make_batch, make_crystal, make_molecule
from torch.utils._python_dispatch import TorchDispatchMode

from so3krates_dist import cli
from so3krates_dist.config import (
    EuclideanTransformerSection,
    GeomAttEnvelopeSection,
    GeomAttSection,
    ModelSection,
    So3kratesSection,
    So3lrSection,
)
from so3krates_dist.errors import EXIT_CONFIG, EXIT_DATA, EXIT_FAILURE, CheckpointError, DataError
from so3krates_dist.graph import Graph
from so3krates_dist.inference import attention_pictures
from so3krates_dist.inference.attention_pictures import BLUE, VERMILLION, Panel, find_strongest, plot_attention
from so3krates_dist.inference.explain import Explanation, explain, make_arrays, read_structure, write_explanation
from so3krates_dist.model.geomatt_paths import MatrixPath
from so3krates_dist.model.potential import Potential, compute_vectors
from so3krates_dist.model.record import AttentionRecord
from so3krates_dist.model.registry import NETWORKS, build_model, save_model

_SIZES = {"num_features": 24, "num_layers": 2, "num_heads": 2, "num_radial_basis": 8, "cutoff": 4.0}
_GEOMATT_SIZES = {"num_features": 12, "num_layers": 2, "inner_width": 8, "grid_end": 2.0, "grid_spacing": 0.1}

SECTIONS: dict[str, ModelSection] = {
    "so3krates": So3kratesSection(**_SIZES, degrees=(1, 2)),
    "so3krates_non_local": So3kratesSection(**_SIZES, degrees=(1, 2), non_local=True),
    "euclidean_transformer": EuclideanTransformerSection(**_SIZES, degrees=(1, 2)),
    "so3lr": So3lrSection(**_SIZES, degrees=(1, 2)),
    "geomatt": GeomAttSection(**_GEOMATT_SIZES),
    "geomatt_envelope": GeomAttEnvelopeSection(**_GEOMATT_SIZES, cutoff=4.0),
}
MODELS = [name for name, section in SECTIONS.items() if section.name in NETWORKS]
PERIODIC = [m for m in MODELS if "cell" in SECTIONS[m].sees and math.isfinite(SECTIONS[m].reach)]


def make_model(name: str, dtype: torch.dtype = torch.float64) -> Potential:
    torch.manual_seed(0)
    potential = build_model(SECTIONS[name], STATISTICS)
    with torch.no_grad():
        for parameter in potential.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return potential.to(dtype=dtype).eval()


def to_atoms(graph: Graph) -> Atoms:
    pbc = False if graph.pbc is None else graph.pbc
    return Atoms(numbers=graph.atomic_numbers, positions=graph.positions, cell=graph.cell, pbc=pbc)


def make_atoms(kind: str) -> Atoms:
    return to_atoms(make_molecule() if kind == "molecule" else make_crystal(kind))


CASES = [(m, "molecule") for m in MODELS] + [(m, kind) for m in PERIODIC for kind in ("triclinic", "tiny")]


def save(folder: Path, name: str = "euclidean_transformer") -> Path:
    section = dataclasses.replace(SECTIONS[name], num_layers=1)  # pictures take time
    save_model(folder, section, STATISTICS, build_model(section, STATISTICS).state_dict(), {})
    return folder


def read_colors(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        return np.asarray(picture.convert("RGB")).astype(int)


def count_pixels(path: Path, color: str) -> int:
    wanted = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)])
    return int((np.abs(read_colors(path) - wanted).max(-1) < 12).sum())


def test_every_model_is_tested():
    assert {section.name for section in SECTIONS.values()} >= set(NETWORKS)


# ---------------------------------------------------------------------------------------------------------------- the numbers


@pytest.mark.parametrize(("model", "kind"), CASES)
def test_arrays_hold_what_the_model_computed(tmp_path: Path, model: str, kind: str) -> None:
    potential, atoms = make_model(model), make_atoms(kind)
    graph = make_molecule() if kind == "molecule" else make_crystal(kind)
    graph.positions -= graph.positions.mean(0)
    batch = make_batch([graph], potential.cutoffs)
    maps = potential.record_attention(batch)
    np.savez(tmp_path / "arrays.npz", allow_pickle=False, **make_arrays(explain(potential, atoms)))
    with np.load(tmp_path / "arrays.npz", allow_pickle=False) as stored:
        arrays = dict(stored)
    assert {m.layer for m in maps} == {0, 1}
    np.testing.assert_array_equal(arrays["positions"], atoms.positions)
    np.testing.assert_array_equal(arrays["atomic_numbers"], atoms.numbers)
    assert ("cell" in arrays) == ("pbc" in arrays) == (kind != "molecule")
    for m in maps:
        name = f"layer{m.layer}/{m.kind}"
        assert tuple(arrays[f"{name}/heads"]) == m.heads
        np.testing.assert_array_equal(arrays[f"{name}/receivers"], m.receivers)
        np.testing.assert_array_equal(arrays[f"{name}/senders"], m.senders)
        np.testing.assert_allclose(arrays[f"{name}/values"], m.values, rtol=1e-9, atol=1e-13)
        assert np.abs(arrays[f"{name}/values"]).max() > 0
        if f"{name}/vectors" in arrays:
            assert len(m.receivers) == 2 * batch.num_short_pairs
            shortest = np.linalg.norm(arrays[f"{name}/vectors"], axis=1)
            apart = atoms.get_all_distances(mic=True)[m.receivers, m.senders]
            np.testing.assert_array_less(shortest, potential.cutoffs[0])
            assert (shortest > apart - 1e-9).all() if kind != "molecule" else np.allclose(shortest, apart)
        for column, head in enumerate(m.heads):
            expected = np.zeros((len(atoms), len(atoms)))
            for i, j, value in zip(m.receivers, m.senders, arrays[f"{name}/values"][:, column], strict=True):
                expected[i, j] += value
            np.testing.assert_allclose(arrays[f"{name}/{head}/matrix"], expected, rtol=1e-12, atol=1e-15)


def test_images_of_an_atom_are_summed() -> None:
    explanation = explain(make_model("euclidean_transformer"), make_atoms("tiny"))
    for block in explanation.blocks:
        assert block.vectors is not None
        assert len(np.unique(np.round(block.vectors, 6), axis=0)) > 20
        assert len(block.receivers) > 4  # of two atoms: most edges go to images
        np.testing.assert_allclose(block.matrices.sum((1, 2)), block.values.sum(0), rtol=1e-12)


def test_rows_are_receivers() -> None:
    """A hydrogen molecule far from a carbon atom: nobody looks at the carbon, and it looks at nobody."""
    atoms = Atoms("CH2", positions=[[0, 0, 0], [9, 0, 0], [9.7, 0, 0]])
    block = explain(make_model("euclidean_transformer"), atoms).blocks[-1]
    assert block.connected.tolist() == [[False] * 3, [False, False, True], [False, True, False]]
    i, j = int(block.receivers[0]), int(block.senders[0])
    np.testing.assert_array_equal(block.matrices[:, i, j], block.values[0])


@pytest.mark.skipif("geomatt" not in NETWORKS, reason="GeomAtt is not there")
@pytest.mark.parametrize("model", ["geomatt", "geomatt_envelope"])
def test_rollout_is_the_product_over_layers(model: str) -> None:
    explanation = explain(make_model(model), make_atoms("molecule"))
    arrays = make_arrays(explanation)
    assert [key for key in arrays if key.startswith("rollout")] == [f"rollout/order {k}/matrix" for k in (2, 3, 4)]
    for order in ("order 2", "order 3", "order 4"):
        features = start = np.random.default_rng(0).normal(size=(len(explanation.atoms), 3))
        for layer in (0, 1):  # a layer whose map of features is one
            head = explanation.blocks[0].heads[0]
            features = features + arrays[f"layer{layer}/{order}/{head}/matrix"] @ features
        np.testing.assert_allclose(arrays[f"rollout/{order}/matrix"] @ start, features, rtol=1e-10)


def test_other_models_have_no_rollout() -> None:
    assert explain(make_model("euclidean_transformer"), make_atoms("molecule")).rollouts == {}


def test_strongest_pairs() -> None:
    atoms = Atoms("OHHC", positions=np.eye(4, 3))
    matrix = np.diag([9.0, 9, 9, 9])
    matrix[0, 1] = matrix[1, 0] = 0.5
    matrix[2, 3] = matrix[3, 2] = -0.75
    assert find_strongest(atoms, matrix, 5) == ["H2-C3 -0.75", "O0-H1 +0.5"]
    assert find_strongest(atoms, matrix, 1) == ["H2-C3 -0.75"]


def test_blocks_are_summed_up_by_their_strongest_head() -> None:
    explanation = explain(make_model("euclidean_transformer"), make_atoms("molecule"))
    for block in explanation.blocks:
        mean = (block.matrices + block.matrices.transpose(0, 2, 1)) / 2
        np.testing.assert_array_equal(np.abs(block.symmetric), np.abs(mean).max(0))
        assert (block.symmetric < 0).any()


# ------------------------------------------------------------------------------------------------------- no cost unless asked


class CountOperations(TorchDispatchMode):
    """Counts what torch computes."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def count_nodes(output: torch.Tensor) -> int:
    seen, stack = set(), [output.grad_fn]
    while stack:
        node = stack.pop()
        if node is not None and node not in seen:
            seen.add(node)
            stack.extend(n for n, _ in node.next_functions)
    return len(seen)


@pytest.mark.parametrize(("model", "kind"), CASES)
def test_no_cost_unless_asked(monkeypatch: pytest.MonkeyPatch, model: str, kind: str) -> None:
    potential = make_model(model)
    graph = make_molecule() if kind == "molecule" else make_crystal(kind)
    batch = make_batch([graph], potential.cutoffs)
    vectors = compute_vectors(batch).requires_grad_(True)

    def evaluate(record: AttentionRecord | None) -> tuple[torch.Tensor, int, int]:
        with CountOperations() as counter:
            energies = potential.network(batch, vectors, record)["atom_energies"]
        return energies, counter.count, count_nodes(energies)

    record = AttentionRecord()
    with_record, more_operations, nodes = evaluate(record)
    num_maps = len(record.maps)
    without, operations, nodes_without = evaluate(None)
    assert num_maps >= 2
    assert len(record.maps) == num_maps
    assert torch.equal(with_record, without)
    assert nodes == nodes_without
    assert operations < more_operations
    assert not any(m.values.requires_grad for m in record.maps)

    def refuse(*_: object) -> None:
        raise AssertionError("nobody asked for attention")

    monkeypatch.setattr(AttentionRecord, "add", refuse)
    monkeypatch.setattr(AttentionRecord, "__init__", refuse)
    potential(batch, compute_stress=graph.is_periodic)
    potential.train()(batch)["forces"].sum().backward()


# --------------------------------------------------------------------------------------------------------------- the pictures


def make_panel(atoms: Atoms, title: str = "head 0", seed: int = 0) -> Panel:
    matrix = np.random.default_rng(seed).normal(size=(len(atoms), len(atoms)))
    return Panel(title=title, matrix=matrix, connected=np.ones_like(matrix, bool))


def make_chain(num_atoms: int) -> Atoms:
    rng = np.random.default_rng(0)
    positions = np.arange(num_atoms)[:, None] * np.array([1.2, 0, 0]) + rng.normal(scale=1.5, size=(num_atoms, 3))
    return Atoms(numbers=rng.choice([1, 6, 8, 17], num_atoms), positions=positions)


@pytest.mark.parametrize(
    "atoms",
    [Atoms("H"), Atoms("H2", positions=[[0, 0, 0], [0, 0, 0.74]]), make_chain(40), make_chain(150),
     ase.build.bulk("NaCl", "rocksalt", a=5.64), ase.build.fcc111("Al", (2, 2, 2))],
    ids=["atom", "H2", "40", "150", "NaCl", "slab"],
)  # fmt: skip
def test_page_of_any_size(tmp_path: Path, atoms: Atoms) -> None:
    plot_attention(atoms, [make_panel(atoms)], tmp_path / "page.png", "a model, layer 0, feature attention")
    height, width = read_colors(tmp_path / "page.png").shape[:2]
    assert 500 < height < 3000
    assert 700 < width < 3000
    assert [p.name for p in tmp_path.iterdir()] == ["page.png"]


def test_sign_is_the_colour(tmp_path: Path) -> None:
    atoms = Atoms("CO", positions=[[0, 0, 0], [1.1, 0, 0]])
    counts = {}
    for sign in (1, -1):
        matrix = sign * np.array([[0.0, 0.3], [0.3, 0.0]])
        panel = Panel(title="head 0", matrix=matrix, connected=~np.eye(2, dtype=bool))
        plot_attention(atoms, [panel], tmp_path / "page.png", "title")
        counts[sign] = [count_pixels(tmp_path / "page.png", color) for color in (VERMILLION, BLUE)]
    assert counts[1][0] > 50 * counts[1][1]
    assert counts[-1][1] > 50 * counts[-1][0]


def test_scale_is_that_of_different_atoms() -> None:
    matrix = np.array([[50.0, 0.5], [-0.25, 50.0]])
    assert attention_pictures._find_scale(Panel(title="", matrix=matrix, connected=np.ones((2, 2), bool))) == 0.5
    assert attention_pictures._find_scale(Panel(title="", matrix=np.diag([3.0, -4.0]), connected=matrix > 0)) == 4.0
    assert (
        attention_pictures._find_scale(Panel(title="", matrix=np.zeros((1, 1)), connected=np.ones((1, 1), bool))) == 1.0
    )


def test_view_is_no_mirror_image_and_hides_nothing_it_can_show() -> None:
    atoms = ase.build.molecule("CH3CH2OH")  # has a mirror plane, which the principal axes put before the eye
    view = attention_pictures._View(atoms)
    placed = np.column_stack([view.positions, view.depths])
    expected = atoms.get_all_distances()
    np.testing.assert_allclose(np.linalg.norm(placed[:, None] - placed[None], axis=-1), expected, atol=1e-10)
    volumes = [np.linalg.det(p[1:4] - p[0]) for p in (placed[[0, 1, 2, 4]], atoms.positions[[0, 1, 2, 4]])]
    assert volumes[0] == pytest.approx(volumes[1])
    assert abs(volumes[0]) > 0.1
    apart = np.linalg.norm(view.positions[:, None] - view.positions[None], axis=-1)[np.triu_indices(9, 1)]
    assert apart.min() > 0.3


def test_only_the_strongest_lines_are_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    view, matrix = attention_pictures._View(make_chain(5)), np.zeros((5, 5))
    matrix[0, 1], matrix[2, 1], matrix[3, 4], matrix[1, 4] = 1.0, -0.5, 0.25, 0.001
    for most, expected in ((500, [1.5, 3.0, 6.0]), (2, [3.0, 6.0])):
        monkeypatch.setattr(attention_pictures, "MAX_LINES", most)
        axes = Figure().subplots()
        attention_pictures._draw_lines(axes, view, matrix + matrix.T, widest=6.0)
        (lines,) = axes.collections
        widths, colors = lines.get_linewidths(), lines.get_colors()
        np.testing.assert_allclose(widths, 0.3 + (np.array(expected) / 6) * 5.7)
        assert colors[-1, 0] > colors[-1, 2]  # the strongest one is positive
        assert colors[-2, 0] < colors[-2, 2]
        assert np.all(np.diff(colors[:, 3]) > 0)


def test_lines_bend_around_atoms_between() -> None:
    view = attention_pictures._View(Atoms("C3", positions=[[0, 0, 0], [1.3, 0, 0], [2.6, 0, 0]]))
    assert len(attention_pictures._trace(view, 0, 1)) == 2
    line = attention_pictures._trace(view, 0, 2)
    assert np.linalg.norm(line - view.positions[1], axis=1).min() > 0.3
    np.testing.assert_allclose(line[[0, -1]], view.positions[[0, 2]], atol=1e-12)


def test_pages_of_a_model(tmp_path: Path) -> None:
    explanation = explain(make_model("euclidean_transformer"), make_atoms("molecule"))
    files = write_explanation(explanation, tmp_path, "a model")
    expected = [f"layer{i}-{kind}.png" for i in (0, 1) for kind in ("feature", "geometric")]
    assert [f.name for f in files] == ["attention.npz", *expected, "all-layers-feature.png", "all-layers-geometric.png"]
    for file in files[1:]:
        assert count_pixels(file, VERMILLION) > 100
        assert count_pixels(file, BLUE) > 100
    first = [f.read_bytes() for f in files[1:]]
    write_explanation(explanation, tmp_path, "a model")
    assert [f.read_bytes() for f in files[1:]] == first


@pytest.mark.skipif("geomatt" not in NETWORKS, reason="GeomAtt is not there")
def test_orders_share_a_page(tmp_path: Path) -> None:
    files = write_explanation(explain(make_model("geomatt"), make_atoms("molecule")), tmp_path, "a model")
    names = ["layer0-geometric.png", "layer1-geometric.png", "all-layers-geometric.png", "rollout.png"]
    assert [f.name for f in files[1:]] == names


# -------------------------------------------------------------------------------------------------------------------- the verb


def run_verb(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    code = cli.main(["explain", *(str(w) for w in words)])
    return code, *capsys.readouterr()


def write_structures(path: Path, *structures: Atoms) -> Path:
    ase.io.write(path, list(structures), format="extxyz")
    return path


def test_verb(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = save(tmp_path / "mine")
    file = write_structures(tmp_path / "two.xyz", make_atoms("molecule"), ase.build.molecule("H2O"))
    (model / "explain" / "two").mkdir(parents=True)
    (model / "explain" / "two" / "notes.txt").write_text("mine")
    code, out, err = run_verb(capsys, model, file)
    assert (code, err) == (0, "")
    assert "euclidean_transformer (mine), two.xyz: strongest pairs" in out
    assert "layer 0, geometric" in out
    assert "O0-H1" in out  # the last structure
    written = [Path(line.removeprefix("written ")) for line in out.splitlines() if line.startswith("written ")]
    assert {p.parent for p in written} == {model / "explain" / "two"}
    assert {p.name for p in (model / "explain" / "two").iterdir()} == {"notes.txt", *(p.name for p in written)}
    assert (model / "explain" / "two" / "notes.txt").read_text() == "mine"
    code, out, _ = run_verb(capsys, model, file, "--index", 0, "--out", tmp_path / "there", "--dtype", "float32")
    assert code == 0
    with np.load(tmp_path / "there" / "attention.npz", allow_pickle=False) as arrays:
        assert len(arrays["positions"]) == 9
        assert str(arrays["model"]) == "euclidean_transformer (mine)"


def test_charge_and_spin(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = save(tmp_path / "mine")
    said = ase.build.molecule("H2O")
    said.info |= {"charge": -1, "spin": 2}
    file, silent = (
        write_structures(tmp_path / "said.xyz", said),
        write_structures(tmp_path / "h.xyz", Atoms("H2O", np.eye(3))),
    )
    cases = ((file, None, None, (-1, 1)), (silent, 2, 3, (2, 2)), (silent, None, None, (0, 0)), (file, -1, 2, (-1, 1)))
    for path, charge, spin, expected in cases:
        atoms = read_structure(path, None, {"charge": charge, "spin": spin})
        arrays = make_arrays(explain(make_model("euclidean_transformer"), atoms))
        assert (arrays["total_charge"], arrays["num_unpaired_electrons"]) == expected
    assert run_verb(capsys, model, silent, "--charge", 2, "--spin", 3, "--out", tmp_path / "out")[0] == 0
    with np.load(tmp_path / "out" / "attention.npz") as stored:
        assert (stored["total_charge"], stored["num_unpaired_electrons"]) == (2, 2)
    code, _, err = run_verb(capsys, model, file, "--charge", 0)
    assert code == EXIT_CONFIG
    assert err == f"so3krates: --charge must agree with {file} (-1); got 0. Leave it out, or correct the file.\n"


@pytest.mark.skipif("so3lr" not in NETWORKS, reason="SO3LR is not there")
def test_charge_reaches_the_model() -> None:
    neutral, charged = make_atoms("molecule"), make_atoms("molecule")
    charged.info["charge"] = 2
    potential = make_model("so3lr")
    first, second = (explain(potential, atoms).blocks[-1].values for atoms in (neutral, charged))
    assert np.abs(first - second).max() > 1e-6
    radical = Atoms("CH3", positions=[[0, 0, 0], [1.1, 0, 0], [-0.5, 1, 0], [-0.5, -1, 0]])
    assert explain(potential, radical).graph.num_unpaired_electrons == 0  # it saw none in training, and none is stated
    (line,) = explain(potential, radical).notes
    assert line.startswith("CH3 has an odd number of electrons and states no spin; this model")
    assert explain(potential, neutral).notes == ()
    radical.info["spin"] = 2
    with pytest.raises(DataError, match="unpaired electrons"):
        explain(potential, radical)


@pytest.mark.parametrize(
    ("words", "code", "expected"),
    [
        (("nowhere", "water.xyz"), EXIT_FAILURE, "nowhere must hold config.json and model.safetensors; got no such file"),
        (("mine", "nothing.xyz"), EXIT_DATA, "nothing.xyz must be a structure file that ASE reads; got FileNotFoundError"),
        (("mine", "damaged.xyz"), EXIT_DATA, "damaged.xyz must be a structure file that ASE reads; got "),
        (("mine", "water.xyz", "--index", "1"), EXIT_DATA, "water.xyz must have a structure of index 1; got 1 of them"),
        (("mine", "water.xyz", "--index", "-2"), EXIT_DATA, "water.xyz must have a structure of index -2; got 1 of them"),
        (("mine", "argon.xyz"), EXIT_DATA, "Ar must have only elements the model was trained on (H, C, N, O); got Ar"),
        (("mine", "water.xyz", "--spin", "-1"), EXIT_DATA, 'atoms.info["spin"] must be a whole number, zero or greater'),
        (("mine", "water.xyz", "--out", "water.xyz"), EXIT_DATA, "water.xyz must be a folder that can be written to; got a file"),
        (("mine", "water.xyz", "--out", "water.xyz/below"), EXIT_DATA, "water.xyz/below must be a folder that can be written to"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, words, code: int, expected: str
) -> None:
    monkeypatch.chdir(tmp_path)
    save(Path("mine"))
    write_structures(Path("water.xyz"), ase.build.molecule("H2O"))
    write_structures(Path("argon.xyz"), Atoms("Ar"))
    Path("damaged.xyz").write_text("3\n\nH 0 0\n")
    found, out, err = run_verb(capsys, *words)
    assert found == code
    assert out == ""
    assert err.startswith(f"so3krates: {expected}")
    assert err.count("\n") == 1
    assert not Path("mine/explain").exists()


@pytest.mark.parametrize("model", [m for m in MODELS if m not in PERIODIC])
def test_models_for_molecules_refuse_crystals(model: str) -> None:
    with pytest.raises(DataError, match=r"must .*(molecule|periodic).*; got .*"):
        explain(make_model(model), make_atoms("triclinic"))


def test_structures_with_too_many_pairs_are_refused() -> None:
    atoms = Atoms("H1001", positions=2.0 * np.arange(3003).reshape(-1, 3))
    rule = r"^H1001 must have at most 1000 atoms to be explained; got 1001\. Cut out the part that matters\.$"
    with pytest.raises(DataError, match=rule):
        explain(make_model("geomatt"), atoms)


def test_geomatt_keeps_one_order_of_one_layer_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """All pairs times all channels is what fills it."""
    sizes: list[int] = []
    model, expand = make_model("geomatt"), MatrixPath.expand
    channels = max(w.shape[1:3].numel() for name, w in model.named_parameters() if name.endswith("pair_weight"))

    def watch(path: MatrixPath, weights: list[torch.Tensor]) -> list[torch.Tensor]:
        sizes.append(sum(w.shape[:3].numel() for w in weights))
        return expand(path, weights)

    monkeypatch.setattr(MatrixPath, "expand", watch)
    maps = model.record_attention(make_batch([make_molecule()], model.cutoffs))
    *recorded, computed = sizes  # the last call is that of the evaluation itself
    assert len(recorded) == len(maps) == 6
    assert max(recorded) <= channels < computed


def test_weights_that_are_not_finite() -> None:
    potential = make_model("euclidean_transformer")
    with torch.no_grad():
        next(potential.parameters()).fill_(math.nan)
    with pytest.raises(CheckpointError, match="must give finite attention; got nan or infinity"):
        explain(potential, make_atoms("molecule"))


def test_explanation_is_of_the_structure_as_given() -> None:
    atoms = make_atoms("molecule")
    far = atoms.copy()
    far.positions += 7.0
    first, second = (explain(make_model("euclidean_transformer"), a) for a in (atoms, far))
    assert isinstance(first, Explanation)
    np.testing.assert_allclose(first.blocks[-1].values, second.blocks[-1].values, rtol=1e-9, atol=1e-12)
    np.testing.assert_array_equal(make_arrays(second)["positions"], far.positions)
    assert dataclasses.asdict(first.graph)["total_charge"] == 0
