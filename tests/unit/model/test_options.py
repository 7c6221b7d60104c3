"""No option is dead: with the same weights another value gives other forces, or says here why it does not."""

import dataclasses
import math
import typing

import numpy as np
import pytest
import torch
from structures import (
    GEOMATT,
    OPTIONS,
    PERIODIC,
    SO3KRATES,
    SO3LR,
    STATISTICS,
    TRANSFORMERS,
    check_deviations,
    compare,
    compute,
    make_batch,
    make_ion,
    make_molecule,
    make_potential,
)

from so3krates_dist.config import MODEL_SECTIONS, ModelSection
from so3krates_dist.model.potential import compute_vectors
from so3krates_dist.model.record import AttentionRecord
from so3krates_dist.model.registry import build_model

BASES = {
    "so3krates": "so3krates_non_local",
    "euclidean_transformer": "repulsive",
    "so3lr": "so3lr",
    "geomatt": "geomatt",
    "geomatt_envelope": "geomatt_envelope",
}
"""Options that each model starts from"""

SECTIONS: dict[str, ModelSection] = {
    name: (TRANSFORMERS | SO3KRATES | SO3LR | GEOMATT)[base] for name, base in BASES.items()
}

VALUES: dict[str, list[typing.Any]] = {
    "num_features": [48], "num_layers": [1], "num_heads": [2], "degrees": [(1,)], "num_radial_basis": [9],
    "radial_filter_width": [5], "spherical_filter_width": [5], "orders": [(2, 3, 5)], "inner_width": [16],
    "order_gains": [(1.0, 2.0, 1.0)], "sphc_cutoff": [0.05], "long_range_cutoff": [12.0, 0.0], "grid_start": [0.1],
    "grid_end": [2.5], "grid_spacing": [0.3], "electrostatics": ["none"],  # Ewald and PME: test_ewald_laws.py
}  # fmt: skip
"""What options are changed to; choices are tried all, numbers that are not here are changed by a tenth"""

NO_EFFECT = {"algorithm"}
"""Options that change the way and not the result"""


def list_values(name: str, value: typing.Any, hint: typing.Any) -> list[typing.Any]:
    """Return what an option is changed to."""
    if name in VALUES:
        return [other for other in VALUES[name] if other != value]
    if isinstance(value, bool):
        return [not value]
    return [other for other in typing.get_args(hint) if other != value] if isinstance(value, str) else [1.1 * value]


def list_changes() -> list[tuple[str, str, typing.Any]]:
    changes = []
    for model, section in SECTIONS.items():
        hints = typing.get_type_hints(type(section))
        names = [field.name for field in dataclasses.fields(section) if field.name != "name"]
        changes += [(model, n, other) for n in names for other in list_values(n, getattr(section, n), hints[n])]
    return changes


@pytest.mark.parametrize(("model", "name", "value"), list_changes(), ids=str)
def test_every_option_has_an_effect(model: str, name: str, value: typing.Any) -> None:
    changes = {name: value}
    if name == "orders":
        changes["order_gains"] = ()
    original, changed = make_potential(BASES[model]), make_potential(BASES[model], **changes)
    weights = original.state_dict()
    fitting = all(weights[k].shape == v.shape for k, v in changed.state_dict().items() if k in weights)
    if fitting and name not in ("order_gains", "orders"):  # these choose initial values too
        changed.load_state_dict(weights, strict=False)
    graphs = [make_molecule(), make_ion(1.0), make_ion(-1.0)]
    outputs, expected = compute(changed, *graphs), compute(original, *graphs)
    if name in NO_EFFECT:
        check_deviations(compare(outputs, expected), 1e-10)
    else:
        assert np.abs(outputs["forces"] - expected["forces"]).max() > 1e-4


@pytest.mark.parametrize("model", MODEL_SECTIONS)
def test_default_sizes_can_be_built(model: str) -> None:
    potential = build_model(MODEL_SECTIONS[model](), STATISTICS)
    assert potential.cutoffs == (MODEL_SECTIONS[model]().cutoff, MODEL_SECTIONS[model]().reach)
    assert sum(p.numel() for p in potential.parameters()) > 3e5


@pytest.mark.parametrize("options", OPTIONS)
def test_the_network_is_what_its_section_says(options: str) -> None:
    section, potential = OPTIONS[options], make_potential(options)
    network = potential.as_network
    assert potential.cutoffs == (section.cutoff, section.reach)
    assert network.sees == section.sees
    assert ("cell" in network.sees and math.isfinite(network.reach)) == (options in PERIODIC)
    assert network.uses_positions == (section.image_density > 0)
    assert network.checkpointing == "none"
    assert set(compute(potential, make_molecule())) == {"energy", "forces", *section.outputs}


@pytest.mark.parametrize("options", OPTIONS)
def test_what_a_model_does_not_see_changes_nothing(options: str) -> None:
    potential, molecule = make_potential(options), make_molecule()
    neutral = compute(potential, molecule)
    for name in ("total_charge", "num_unpaired_electrons"):
        changed = compute(potential, dataclasses.replace(molecule, **{name: 2.0}))
        same = all(np.array_equal(changed[key], neutral[key]) for key in neutral)
        # Without the embeddings SO3LR's charges still add up to the total charge; unpaired electrons are not seen then.
        assert same != (name in potential.as_network.sees), name


@pytest.mark.parametrize("options", OPTIONS)
def test_recording_attention_changes_nothing(options: str) -> None:
    """Every layer is recorded, with edges inside of structures only and, where all are listed, each ordered pair once."""
    section, potential = OPTIONS[options], make_potential(options)
    batch = make_batch([make_molecule(), make_ion(1.0)], potential.cutoffs)
    vectors, record = compute_vectors(batch), AttentionRecord()
    plain, recorded = (potential.as_network(batch, vectors, r) for r in (None, record))
    assert all(torch.equal(plain[name], recorded[name]) for name in plain)
    kinds = {"geometric", "feature"} if hasattr(section, "num_heads") else {f"order {k}" for k in section.orders}
    assert sorted((m.layer, m.kind) for m in record.maps) == sorted(
        (i, k) for i in range(section.num_layers) for k in kinds
    )
    for attention in record.maps:
        assert attention.values.shape == (len(attention.receivers), len(attention.heads))
        assert not attention.values.requires_grad
        assert attention.values.abs().max() > 1e-6
        assert torch.equal(batch.graph_index[attention.receivers], batch.graph_index[attention.senders])
        edges = list(zip(attention.receivers.tolist(), attention.senders.tolist(), strict=True))
        assert len(edges) == len(set(edges)) > 0
