"""Weights that others published, as model folders of this package; so far those of SO3LR (10.1021/jacs.5c09558).

The published file is a pickle of plain numpy arrays. It is read with a whitelist of the three numpy names that such a file needs,
so it cannot run code, and no JAX is needed. Refuses files whose arrays are not exactly those of the model, and settings that it
does not have or does not know. Of the settings beside the file only those of the model are kept.
"""

import argparse
import io
import json
import math
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from so3krates_dist import __version__
from so3krates_dist.config import So3lrSection, parse_config
from so3krates_dist.errors import CheckpointError, ConfigError
from so3krates_dist.files import hash_file
from so3krates_dist.graph import ELEMENT_SYMBOLS, MAX_ATOMIC_NUMBER, FloatArray
from so3krates_dist.model.longrange import DISPERSION_SWITCH_WIDTH
from so3krates_dist.model.potential import ModelStatistics
from so3krates_dist.model.registry import CONFIG_NAME, WEIGHTS_NAME, build_model, read_model_config, save_model
from so3krates_dist.model.so3lr import NUM_HEAD_ELEMENTS

HYPERPARAMETERS_NAME: Final = "hyperparameters.json"
SO3LR_ELEMENTS: Final = tuple(ELEMENT_SYMBOLS.index(s) for s in ("H", "C", "N", "O", "F", "P", "S", "Cl"))
"""What SO3LR was trained on"""
SOURCE: Final = "SO3LR, published weights"

RESULTS: Final = ("evaluation", "dynamics", "explain")
"""Folders that other verbs make beside a model"""

EXAMPLES: Final = """\
example:
  so3krates import so3lr so3lr/params/params.pkl --out so3lr
  so3krates md so3lr --structure molecule.xyz --out trajectory

PARAMS.pkl is the file `so3lr/params/params.pkl` of https://github.com/general-molecular-simulations/so3lr (MIT licence). The
file hyperparameters.json beside it is read for the mean number of neighbours, a part of the model; without it give
--mean-neighbors. The written model ends its long-range terms at 12 Å, like the authors' program; So3kratesCalculator takes
long_range_cutoff to change that. It knows H C N O F P S Cl and total charges, no unpaired electrons; its energies are relative
to no reference, only differences between structures of the same atoms mean something.
"""

_RECONSTRUCT: Final = np._core.multiarray._reconstruct  # type: ignore[attr-defined] # private in numpy, but what its pickles name

_ALLOWED: Final[dict[tuple[str, str], Any]] = {
    ("numpy._core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy.core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
}
"""All that a pickle of plain arrays needs, by its names of numpy 2 and numpy 1"""

Arrays = dict[str, FloatArray]
"""Published names, with slashes, and their values"""


class _ArrayUnpickler(pickle.Unpickler):
    """Builds dictionaries, lists, numbers, texts and numpy arrays, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        """Return one of the allowed names; all others are refused before anything of them is imported."""
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return _ALLOWED[module, name]


def read_arrays(path: Path) -> Arrays:
    """Read a pickle of nested dictionaries of arrays.

    Args:
        path: The file.

    Returns:
        Arrays in float32 under their names, joined by slashes, without the leading `params/`.

    Raises:
        CheckpointError: It cannot be read, holds anything but arrays of finite numbers, or asks for code to be run.
    """
    try:
        tree = _ArrayUnpickler(io.BytesIO(path.read_bytes())).load()
        arrays = dict(_flatten(tree["params"]))
    except CheckpointError:
        raise
    except Exception as error:  # a damaged pickle may raise anything
        finding = str(error).partition("\n")[0] or type(error).__name__
        raise CheckpointError(
            str(path), "be a pickle of plain numpy arrays under `params`", finding, "Take the published params.pkl"
        ) from error
    return arrays


def _flatten(tree: Any, prefix: str = "") -> "list[tuple[str, FloatArray]]":
    if isinstance(tree, dict):
        return [pair for key, value in tree.items() for pair in _flatten(value, f"{prefix}{key}/")]
    name = prefix.rstrip("/")
    if isinstance(tree, np.ndarray) and tree.dtype.kind == "f":
        with np.errstate(over="ignore"):
            values = tree.astype(np.float32)
        if np.isfinite(values).all():
            return [(name, values)]
    raise ValueError(f"{name} is no array of finite numbers")


_FIXED: Final[dict[str, tuple[str | float | bool | None, ...]]] = {
    "activation_fn": ("silu",),
    "cutoff_fn": ("phys",),
    "dispersion_energy_bool": (True,),
    "dispersion_energy_cutoff_lr_damping": (None, DISPERSION_SWITCH_WIDTH),
    "electrostatic_energy_bool": (True,),
    "energy_activation_fn": ("silu",),
    "energy_learn_atomic_type_scales": (True,),
    "energy_learn_atomic_type_shifts": (True,),
    "layer_normalization_1": (True,),
    "layer_normalization_2": (True,),
    "message_normalization": ("avg_num_neighbors",),
    "qk_non_linearity": ("identity",),
    "radial_basis_fn": ("bernstein",),
    "residual_mlp_1": (True,),
    "residual_mlp_2": (False,),
    "use_charge_embed": (True,),
    "use_spin_embed": (True,),
    "zbl_repulsion_bool": (True,),
}
"""Settings of the published model that have one meaning here, and what they may say"""

_UNITS: Final = {"energy_unit": ("eV",), "length_unit": ("Angstrom",)}
"""Settings of the training data that the weights depend on"""

_IGNORED: Final = frozenset(
    {
        "energy_regression_dim",  # the arrays' shapes tell
        "input_convention",  # how the authors' program is given a structure
        "layers_behave_like_identity_fn_at_init",
        "num_features_head",  # read by nothing
        "output_is_zero_at_init",
    }
)
"""Settings that a trained model does not depend on"""

_RENAMED: Final = {
    "num_features": "num_features",
    "num_layers": "num_layers",
    "num_heads": "num_heads",
    "degrees": "degrees",
    "cutoff": "cutoff",
    "num_radial_basis_fn": "num_radial_basis",
    "electrostatic_energy_scale": "electrostatic_damping",
    "dispersion_energy_scale": "dispersion_damping",
    "cutoff_lr": "long_range_cutoff",
}
"""Settings that are options here, under our names"""


def read_hyperparameters(path: Path) -> tuple[So3lrSection, float | None]:
    """Read what a model is made of from the published settings; without the file they are those of the published model.

    Args:
        path: `hyperparameters.json`, which need not exist.

    Returns:
        The model's section, and the mean number of neighbours if the file is there.

    Raises:
        CheckpointError: The file cannot be read, or describes a model that is not SO3LR as published.
    """
    if not path.is_file():
        return So3lrSection(), None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        settings, mean_neighbors = content["model"], float(content["data"]["avg_num_neighbors"])
        _check_settings("model", settings, _FIXED)
        _check_settings("data", content["data"], _UNITS)
        unknown = sorted(set(settings) - set(_FIXED) - set(_RENAMED) - _IGNORED)
        if unknown:
            raise ValueError(f"model.{unknown[0]} is unknown here")
        options = {ours: settings[name] for name, ours in _RENAMED.items() if settings.get(name) is not None}
        section = parse_config({"model": {"name": "so3lr", **options}}, str(path)).model
        assert isinstance(section, So3lrSection)
        if not 0 < mean_neighbors < math.inf:
            raise ValueError(f"data.avg_num_neighbors is {mean_neighbors}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ConfigError) as error:
        finding = f"no {error}" if isinstance(error, KeyError) else str(error).rstrip(".").partition("\n")[0]
        raise CheckpointError(
            str(path), "describe SO3LR as published", finding, "Take the file that belongs to the weights"
        ) from error
    return section, mean_neighbors


def _check_settings(part: str, settings: Mapping[str, Any], allowed: Mapping[str, tuple[Any, ...]]) -> None:
    for name, values in allowed.items():
        if name in settings and settings[name] not in values:
            raise ValueError(f"{part}.{name} is {settings[name]!r}")


def list_shapes(section: So3lrSection) -> dict[str, tuple[int, ...]]:
    """Return the published name and shape of every array of a model."""
    features, rows = section.num_features, MAX_ATOMIC_NUMBER + 1
    half, degrees, basis = features // 2, len(section.degrees), section.num_radial_basis
    shapes: dict[str, tuple[int, ...]] = {"feature_embeddings_0/Embed_0/embedding": (rows, features)}
    for number in (1, 2):
        part = f"feature_embeddings_{number}/ChargeSpinEmbedSparse_0"
        for table, length in ((0, rows), (1, 2), (2, 2)):
            shapes[f"{part}/Embed_{table}/embedding"] = (length, features)
        for which in (0, 1):
            shapes[f"{part}/Residual_0/layers_{which}/kernel"] = (features, features)
    dense: dict[str, tuple[int, int]] = {}
    for layer in (f"layers_{number}" for number in range(section.num_layers)):
        for projection in ("Wq1", "Wk1", "Wv1", "Wq2", "Wk2"):
            heads = section.num_heads if projection.endswith("1") else degrees
            shapes[f"{layer}/attention_block/{projection}"] = (heads, features // heads, features // heads)
        for which in (1, 2):
            radial, spherical = (f"{layer}/attention_block/{kind}_filter{which}" for kind in ("radial", "spherical"))
            widths = section.radial_filter_width or features, section.spherical_filter_width or features // 4
            dense |= {f"{radial}_layer_1": (basis, widths[0]), f"{radial}_layer_2": (widths[0], features)}
            dense |= {f"{spherical}_layer_1": (degrees, widths[1]), f"{spherical}_layer_2": (widths[1], features)}
            shapes |= {f"{layer}/layer_normalization_{which}/{name}": (features,) for name in ("scale", "bias")}
            dense[f"{layer}/res_mlp_1_layer_{which}"] = (features, features)
        dense[f"{layer}/exchange_block/mlp_layer_2"] = (features + degrees, features + degrees)
    energy, charges, ratios = "observables_0", _CHARGES, "observables_2"
    dense |= {
        f"{energy}/energy_dense_regression": (features, features),
        f"{energy}/energy_dense_final": (features, 1),
        f"{charges}/charge_dense_regression_vec": (features, features),
        f"{charges}/charge_dense_final_vec": (features, 1),
        f"{ratios}/hirshfeld_ratios_dense_regression": (features, half),
        f"{ratios}/hirshfeld_ratios_dense_final": (half, half),
    }
    shapes |= {f"{energy}/atomic_scales": (rows,), f"{energy}/energy_offset": (rows,)}
    shapes |= {f"{_REPULSION}/{name}": (1,) for names in _REPULSION_NAMES.values() for name in names}
    shapes[f"{charges}/Embed_0/embedding"] = (NUM_HEAD_ELEMENTS, 1)
    shapes[f"{ratios}/Embed_0/embedding"] = (NUM_HEAD_ELEMENTS, 1)
    shapes[f"{ratios}/Embed_1/embedding"] = (NUM_HEAD_ELEMENTS, half)
    for name, shape in dense.items():
        shapes |= {f"{name}/kernel": shape, f"{name}/bias": shape[1:]}
    return shapes


_CHARGES: Final = "observables_0/electrostatic_energy/partial_charges"
_REPULSION: Final = "observables_0/zbl_repulsion"
_REPULSION_NAMES: Final = {
    "exponents": ("a1", "a2", "a3", "a4"),
    "weights": ("c1", "c2", "c3", "c4"),
    "power": ("p",),
    "inverse_length": ("d",),
}


def check_arrays(arrays: Mapping[str, FloatArray], section: So3lrSection, where: str) -> None:
    """Raise `CheckpointError` where an array is missing, unknown or of another shape."""
    offset = arrays.get("observables_0/energy_offset")
    if offset is not None and offset.ndim > 1:
        raise CheckpointError(
            where, "hold SO3LR as published, for one level of theory", f"{offset.shape[-1]} levels of theory",
            "Weights of that later program cannot be imported; take the published params.pkl",
        )  # fmt: skip
    shapes = list_shapes(section)
    missing, unknown = sorted(set(shapes) - set(arrays)), sorted(set(arrays) - set(shapes))
    wrong = [
        f"{name} of shape {arrays[name].shape}"
        for name in shapes
        if name in arrays and arrays[name].shape != shapes[name]
    ]
    for names, finding in ((missing, "no {}"), (unknown, "the unknown {}"), (wrong, "{}")):
        if names:
            more = f" and {len(names) - 1} more like that" if names[1:] else ""
            raise CheckpointError(
                where,
                "hold exactly the arrays of SO3LR",
                finding.format(names[0]) + more,
                "Take the published params.pkl",
            )


def convert_arrays(arrays: Mapping[str, FloatArray], num_layers: int) -> dict[str, torch.Tensor]:
    """Return the model's weights under our names; published dense kernels are (in, out), per-head matrices (out, in)."""

    def get(name: str) -> torch.Tensor:
        return torch.from_numpy(arrays[name].copy())

    weights: dict[str, torch.Tensor] = {"network.embedding.weight": get("feature_embeddings_0/Embed_0/embedding")}

    def take_dense(ours: str, published: str) -> None:
        weights[f"network.{ours}.weight"] = get(f"{published}/kernel").T.contiguous()
        weights[f"network.{ours}.bias"] = get(f"{published}/bias")

    for number, ours in ((1, "charge_embedding"), (2, "spin_embedding")):
        part = f"feature_embeddings_{number}/ChargeSpinEmbedSparse_0"
        for table, name in enumerate(("elements", "keys", "values")):
            weights[f"network.{ours}.{name}.weight"] = get(f"{part}/Embed_{table}/embedding")
        for layer, name in enumerate(("first", "second")):
            weights[f"network.{ours}.{name}.weight"] = get(f"{part}/Residual_0/layers_{layer}/kernel").T.contiguous()
    for number in range(num_layers):
        theirs, ours = f"layers_{number}", f"layers.{number}"
        weights |= _convert_attention(get, f"{theirs}/attention_block", f"network.{ours}.attention")
        take_dense(f"{ours}.exchange.linear", f"{theirs}/exchange_block/mlp_layer_2")
        for which, norm, dense in ((1, "post_attention_norm", "first"), (2, "post_exchange_norm", "second")):
            take_dense(f"{ours}.inner_mlp.{dense}", f"{theirs}/res_mlp_1_layer_{which}")
            weights[f"network.{ours}.{norm}.weight"] = get(f"{theirs}/layer_normalization_{which}/scale")
            weights[f"network.{ours}.{norm}.bias"] = get(f"{theirs}/layer_normalization_{which}/bias")
    take_dense("readout_hidden", "observables_0/energy_dense_regression")
    take_dense("readout", "observables_0/energy_dense_final")
    take_dense("charge_head.hidden", f"{_CHARGES}/charge_dense_regression_vec")
    take_dense("charge_head.output", f"{_CHARGES}/charge_dense_final_vec")
    take_dense("hirshfeld_head.hidden", "observables_2/hirshfeld_ratios_dense_regression")
    take_dense("hirshfeld_head.output", "observables_2/hirshfeld_ratios_dense_final")
    for name, published in (
        ("energy_factors", "observables_0/atomic_scales"), ("energy_offsets", "observables_0/energy_offset"),
        ("charge_head.offsets.weight", f"{_CHARGES}/Embed_0/embedding"),
        ("hirshfeld_head.offsets.weight", "observables_2/Embed_0/embedding"),
        ("hirshfeld_head.queries.weight", "observables_2/Embed_1/embedding"),
    ):  # fmt: skip
        weights[f"network.{name}"] = get(published)
    for name, parts in _REPULSION_NAMES.items():
        weights[f"network.repulsion.{name}"] = torch.cat([get(f"{_REPULSION}/{part}") for part in parts])
    return weights


def _convert_attention(get: Callable[[str], torch.Tensor], theirs: str, ours: str) -> dict[str, torch.Tensor]:
    """Return the weights of one attention block: ours are stacked, feature attention first."""
    weights = {}
    for kind in ("radial", "spherical"):
        inner, outer = ([f"{theirs}/{kind}_filter{which}_layer_{i}" for which in (1, 2)] for i in (1, 2))
        target = f"{ours}.{kind}_filter"
        weights[f"{target}.hidden.weight"] = torch.cat([get(f"{name}/kernel").T for name in inner])
        weights[f"{target}.hidden.bias"] = torch.cat([get(f"{name}/bias") for name in inner])
        weights[f"{target}.weight"] = torch.stack([get(f"{name}/kernel") for name in outer])
        weights[f"{target}.bias"] = torch.stack([get(f"{name}/bias") for name in outer])[:, None]
    for kind, names in (("feature", ("Wq1", "Wk1", "Wv1")), ("geometric", ("Wq2", "Wk2"))):
        matrices = [get(f"{theirs}/{name}").transpose(1, 2) for name in names]
        weights[f"{ours}.{kind}_projections.weight"] = torch.cat(matrices, dim=-1)
    return weights


def import_so3lr(path: Path, folder: Path, mean_neighbors: float | None = None) -> Path:
    """Write the published SO3LR as a model folder.

    Args:
        path: The published `params.pkl`, `hyperparameters.json` beside it.
        folder: Where the model goes; new, empty, or with a model that was imported before.
        mean_neighbors: What attention coefficients are divided by, where no `hyperparameters.json` says it.

    Returns:
        The folder.

    Raises:
        CheckpointError: A file is missing, damaged or of another model, or the folder holds something else.
        ConfigError: The mean number of neighbours is not known, not allowed, or not the published one.
    """
    _check_target(folder)
    if not path.is_file():
        raise CheckpointError(str(path), "be a file", "no such file", "Give the published params.pkl")
    section, published = read_hyperparameters(path.with_name(HYPERPARAMETERS_NAME))
    if None not in (published, mean_neighbors) and published != mean_neighbors:
        raise ConfigError(
            "--mean-neighbors", f"be what {HYPERPARAMETERS_NAME} beside the weights says, {published}", mean_neighbors,
            "Leave it out",
        )  # fmt: skip
    neighbors = published if mean_neighbors is None else mean_neighbors
    if neighbors is None or not 0 < neighbors < math.inf:
        raise ConfigError(
            "--mean-neighbors", f"be given and positive where no {HYPERPARAMETERS_NAME} lies beside the weights", neighbors,
            "Put the published file there, or give the value",
        )  # fmt: skip
    arrays = read_arrays(path)
    check_arrays(arrays, section, str(path))
    statistics = ModelStatistics(
        elements=SO3LR_ELEMENTS,
        energy_baselines={},
        energy_scale=1.0,
        mean_neighbors=neighbors,
        has_unpaired_electrons=False,
        charge_signs=(-1, 1),
    )
    with torch.random.fork_rng(devices=()):
        potential = build_model(section, statistics)
    potential.load_state_dict(convert_arrays(arrays, section.num_layers))
    provenance = {
        "source": SOURCE,
        "source_sha256": hash_file(path),
        "licence": "MIT",
        "citation": "A. Kabylda, J. T. Frank, et al., J. Am. Chem. Soc. 147, 33723 (2025), 10.1021/jacs.5c09558",
        "level_of_theory": "PBE0+MBD",
        "package_version": __version__,
    }
    try:
        save_model(folder, section, statistics, potential.state_dict(), provenance)
    except OSError as error:
        raise CheckpointError(
            str(folder), "be a folder that can be written", error.strerror, "Choose another"
        ) from error
    return folder


def _check_target(folder: Path) -> None:
    """Raise `CheckpointError` where writing would replace anything but a model that was imported."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    names = {p.name for p in folder.iterdir()} if folder.is_dir() else {folder.name}
    own = {CONFIG_NAME, WEIGHTS_NAME}
    names -= {name for name in RESULTS if (folder / name).is_dir()}  # they stay as they are
    is_imported = own <= names and read_model_config(folder)[2].get("source") == SOURCE
    others = sorted(names - own) if is_imported else sorted(names)
    if others:
        got = f"{'also ' if is_imported else ''}{', '.join(others[:3])}"
        remedy = "Choose another folder" + (", or move that away" if is_imported else "")
        raise CheckpointError(str(folder), "be new, empty, or hold nothing but a model that was imported", got, remedy)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what `so3krates import` takes."""
    parser.epilog = EXAMPLES
    parser.add_argument("model", choices=["so3lr"], help="whose weights these are")
    parser.add_argument("params", type=Path, metavar="PARAMS.pkl", help="file with the published weights")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the model; new or empty")
    parser.add_argument(
        "--mean-neighbors",
        type=float,
        metavar="N",
        help="mean number of neighbours, where hyperparameters.json is missing",
    )


def run(arguments: argparse.Namespace) -> int:
    """Import and say what was written."""
    folder = import_so3lr(arguments.params, arguments.out, arguments.mean_neighbors)
    section, statistics, provenance = read_model_config(folder)
    assert isinstance(section, So3lrSection)
    print(f"{folder}: {section.name}, elements {' '.join(ELEMENT_SYMBOLS[z] for z in statistics.elements)}")
    print(
        f"mean number of neighbours {statistics.mean_neighbors:g}; long-range terms end at {section.long_range_cutoff:g} Å,"
        " a choice of this program where the published settings say null"
    )
    print(f"licence {provenance['licence']}; cite {provenance['citation']}")
    return 0
