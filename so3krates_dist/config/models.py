"""The section `model` of the configuration: one schema for each model of the family, with what the data pipeline must know of it.

Which schema applies is decided by `model.name`; options of another model are refused. Sources: So3krates (arXiv 2205.14276),
Euclidean transformer (arXiv 2309.15126), SO3LR (10.1021/jacs.5c09558), GeomAtt (arXiv 2106.02549).
"""

import abc
import dataclasses
import itertools
import math
from typing import ClassVar, Final, Literal

from so3krates_dist.config.checks import check, check_numbers

MIN_LONG_RANGE_CUTOFF: Final = 10.0
"""Å; SO3LR's own program refuses less"""

MAX_DEGREE: Final = 8

EWALD_TRUNCATION: Final = 7.0
"""Sums of Gaussian tails end where the argument is this many widths; what is left out is erfc(7 / sqrt(2)) = 3e-12"""

MESH_POINTS_PER_WIDTH: Final = 10.0
"""Mesh points along the width of a Gaussian, for particle-mesh Ewald"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelSection(abc.ABC):
    """What every model has; the models themselves are the classes below."""

    name: str = ""
    """which model of the family"""

    outputs: ClassVar[frozenset[str]] = frozenset()
    """what it gives besides energy, forces and stress: `dipole`, `partial_charges`, `hirshfeld_ratios`"""

    @property
    @abc.abstractmethod
    def cutoff(self) -> float:
        """Å; atoms at this distance or beyond are no neighbours."""

    @property
    def reach(self) -> float:
        """Å; up to where the model's pairs of atoms go; infinite: all pairs of a molecule."""
        return self.cutoff

    @property
    def pair_cutoff(self) -> float:
        """Å; pairs up to here take most of a step's time and memory: batches are filled and limited by their number."""
        return self.reach

    @property
    def sees(self) -> frozenset[str]:
        """What it uses of a structure besides elements and positions: `total_charge`, `num_unpaired_electrons`, `cell`."""
        return frozenset({"cell"})

    @property
    def image_density(self) -> float:
        """1/Å; points along a lattice vector of the model's sum over all periodic images, 0 where it has none."""
        return 0.0

    @property
    def cuts_electrostatics(self) -> bool:
        """Whether Coulomb energies end at a cutoff; those of charged periodic structures then depend on it."""
        return False

    @property
    def uses_mean_neighbors(self) -> bool:
        """Whether the mean number of neighbours in the data enters the model."""
        return False

    @property
    def low_memory_obstacle(self) -> str:
        """Why `train.activation_checkpointing=low_memory` cannot work, as the words after "where"; empty: it can."""
        return ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _AttentionSection(ModelSection):
    """Sizes that So3krates, the Euclidean transformer and SO3LR have in common."""

    num_features: int = 128
    """width of the invariant features; divisible by num_heads and by the number of degrees"""
    num_layers: int = 3
    """attention layers"""
    num_heads: int = 4
    """heads of the feature attention"""
    degrees: tuple[int, ...] = (1, 2, 3, 4)
    """degrees l of the Euclidean variables, ascending; at least 1 (So3krates: at least 0)"""
    cutoff: float = 5.0
    """Å; atoms at this distance or beyond are no neighbours"""
    num_radial_basis: int = 32
    """functions in the radial basis"""
    radial_filter_width: int = 0
    """hidden width of the networks that filter by distance; 0: num_features"""
    spherical_filter_width: int = 0
    """hidden width of the networks that filter by differences of Euclidean variables; 0: num_features / 4"""

    min_degree: ClassVar[int] = 1

    def __post_init__(self) -> None:
        """Check the values."""
        check_numbers(
            self,
            "model",
            positive=("num_features", "num_layers", "num_heads", "cutoff", "num_radial_basis"),
            at_least_zero=("radial_filter_width", "spherical_filter_width"),
        )
        self._check_degrees()
        check(self.num_radial_basis >= 2, "model.num_radial_basis", "be at least 2", self.num_radial_basis)

    def _check_degrees(self) -> None:
        degrees, least = tuple(self.degrees), self.min_degree
        ascending = bool(degrees) and all(a < b for a, b in itertools.pairwise(degrees)) and degrees[0] >= least
        rule = f"be ascending integers from {least} to {MAX_DEGREE}"
        check(ascending and degrees[-1] <= MAX_DEGREE, "model.degrees", rule, list(degrees))
        both = math.lcm(self.num_heads, len(degrees))
        for name, divisor in (("num_heads", self.num_heads), ("number of degrees", len(degrees))):
            check(
                self.num_features % divisor == 0,
                "model.num_features",
                f"be divisible by the {name} ({divisor})",
                self.num_features,
                f"Take {self.num_features // both * both or both}",
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class So3kratesSection(_AttentionSection):
    """So3krates as published in 2022 (arXiv 2205.14276), with its attention over any distance."""

    name: Literal["so3krates"] = "so3krates"
    """which model of the family"""
    num_features: int = 132
    """width of the invariant features; divisible by num_heads and by the number of degrees"""
    num_layers: int = 6
    """attention layers"""
    degrees: tuple[int, ...] = (1, 2, 3)
    """degrees l of the spherical harmonic coordinates (SPHC), ascending, each at least 0"""
    radial_filter_width: int = 128
    """hidden width of the networks that filter by distance; 0: num_features"""
    spherical_filter_width: int = 32
    """hidden width of the networks that filter by distances of SPHC; 0: num_features / 4"""
    cutoff_function: Literal["cosine", "polynomial"] = "cosine"
    """envelope: cosine (published) or the C2-smooth 1 - 10u^3 + 15u^4 - 6u^5"""
    radial_basis: Literal["physnet", "bernstein"] = "physnet"
    """expansion of distances; physnet is the published one"""
    non_local: bool = False
    """geometric attention between all atoms of a molecule whose SPHC are close, whatever their distance; for molecules only"""
    sphc_cutoff: float = 0.0
    """where the softmax over SPHC distances is cut off; 0: at 1 / number of atoms (published)"""
    parity: bool = True
    """couple SPHC only where the product has the parity of its degree; false (the authors' default) gives a molecule and its
    mirror image different energies"""
    initial_sphc: Literal["published", "smooth", "zero"] = "published"
    """first SPHC: mean harmonics of the neighbours (jump where an atom loses its last one), the same without the jump, or zero"""
    layer_norm: bool = False
    """LayerNorm of the features after attention and after interaction"""
    sphc_norm: bool = False
    """normalise SPHC by their length after attention and after interaction, with one factor for each degree"""

    min_degree: ClassVar[int] = 0

    def __post_init__(self) -> None:
        """Check the values."""
        super().__post_init__()
        check_numbers(self, "model", at_least_zero=("sphc_cutoff",))
        check(
            self.non_local or not self.sphc_cutoff, "model.sphc_cutoff", "be 0 without model.non_local", self.sphc_cutoff,
            "Set model.non_local=true",
        )  # fmt: skip

    @property
    def reach(self) -> float:
        """Å; infinite where attention is non-local."""
        return math.inf if self.non_local else self.cutoff

    @property
    def sees(self) -> frozenset[str]:
        """Not the cell where attention is non-local: between all pairs of atoms of a crystal there is no one direction."""
        return frozenset() if self.non_local else super().sees


@dataclasses.dataclass(frozen=True, kw_only=True)
class EuclideanTransformerSection(_AttentionSection):
    """The Euclidean transformer (arXiv 2309.15126), with the options of SO3LR's backbone (10.1021/jacs.5c09558)."""

    name: Literal["euclidean_transformer"] = "euclidean_transformer"
    """which model of the family"""
    cutoff_function: Literal["cosine", "polynomial"] = "polynomial"
    """envelope: cosine (Euclidean transformer) or the C2-smooth 1 - 10u^3 + 15u^4 - 6u^5 (SO3LR)"""
    radial_basis: Literal["physnet", "bernstein"] = "bernstein"
    """expansion of distances"""
    normalization: Literal["none", "pre", "post"] = "post"
    """LayerNorm: none, before each block (Euclidean transformer) or after each block (SO3LR)"""
    final_norm: bool = False
    """one more LayerNorm before the readout; a network with normalization pre has none there by itself"""
    residual_mlp: Literal["none", "gated", "preactivation"] = "preactivation"
    """per-atom network after attention: none, the Euclidean transformer's (bias-free, twice a layer) or SO3LR's (once)"""
    message_scale: Literal["sqrt_features", "mean_neighbors"] = "mean_neighbors"
    """attention coefficients are divided by sqrt(features per head), or by the data's mean number of neighbours"""
    sphc_normalization: float = 0.0
    """Euclidean variables start as the sum of envelope times harmonics over this number (equation 11); 0: they start as zero"""
    zbl: bool = False
    """add the repulsion of nuclei (Ziegler, Biersack and Littmark) with trained parameters"""

    def __post_init__(self) -> None:
        """Check the values."""
        super().__post_init__()
        check_numbers(self, "model", at_least_zero=("sphc_normalization",))

    @property
    def uses_mean_neighbors(self) -> bool:
        """Whether attention coefficients are divided by the data's mean number of neighbours."""
        return self.message_scale == "mean_neighbors"


@dataclasses.dataclass(frozen=True, kw_only=True)
class So3lrSection(_AttentionSection):
    """SO3LR (10.1021/jacs.5c09558): its backbone with charge and spin, repulsion, electrostatics and dispersion."""

    name: Literal["so3lr"] = "so3lr"
    """which model of the family"""
    cutoff: float = 4.5
    """Å; atoms at this distance or beyond are no neighbours"""
    long_range_cutoff: float = 12.0
    """Å; where dispersion and electrostatics with a cutoff end; 0: they do not end, for molecules only"""
    zbl: bool = True
    """repulsion of nuclei (Ziegler, Biersack and Littmark) with trained parameters"""
    electrostatics: Literal["none", "cutoff", "ewald", "pme"] = "cutoff"
    """Coulomb energy of the charges: none; cutoff, with a shifted force (published; energies of charged periodic structures depend
    on it); ewald or pme, without cutoff, over all images of periodic structures and all pairs of molecules"""
    electrostatic_damping: float = 4.0
    """Å; sigma of erf(r / sigma) / r, which takes the place of 1 / r"""
    dispersion: bool = True
    """vdW-QDO dispersion from Hirshfeld ratios"""
    dispersion_damping: float = 1.2
    """factor of the distance below which dispersion is damped"""
    charge_embedding: bool = True
    """features know the structure's total charge"""
    spin_embedding: bool = True
    """features know the structure's number of unpaired electrons"""

    cutoff_function: ClassVar[Literal["polynomial"]] = "polynomial"
    radial_basis: ClassVar[Literal["bernstein"]] = "bernstein"
    normalization: ClassVar[Literal["post"]] = "post"
    final_norm: ClassVar[bool] = False
    residual_mlp: ClassVar[Literal["preactivation"]] = "preactivation"
    message_scale: ClassVar[Literal["mean_neighbors"]] = "mean_neighbors"
    sphc_normalization: ClassVar[float] = 0.0
    outputs: ClassVar[frozenset[str]] = frozenset({"dipole", "partial_charges", "hirshfeld_ratios"})

    def __post_init__(self) -> None:
        """Check the values."""
        super().__post_init__()
        check_numbers(self, "model", positive=("electrostatic_damping", "dispersion_damping"))
        self._check_effects()
        least = max(self.cutoff, MIN_LONG_RANGE_CUTOFF)
        check(
            self.long_range_cutoff == 0 or self.long_range_cutoff >= least,
            "model.long_range_cutoff", f"be 0 (none) or at least {least:g} Å", self.long_range_cutoff,
        )  # fmt: skip
        check(
            self.long_range_cutoff > 0 or not (self.image_density and self.dispersion),
            "model.long_range_cutoff", f"not be 0 with dispersion beside {self.electrostatics}", self.long_range_cutoff,
            "Set it to 12: crystals need an end of dispersion; or set model.electrostatics=cutoff",
        )  # fmt: skip

    def _check_effects(self) -> None:
        """Refuse options that are set and mean nothing without others."""
        charges = "model.electrostatics"
        needs = {
            "electrostatic_damping": (self.electrostatics != "none", charges),
            "dispersion_damping": (self.dispersion, "model.dispersion"),
            "long_range_cutoff": (self.electrostatics != "none" or self.dispersion, f"model.dispersion and {charges}"),
        }
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        for name, (has_effect, without) in needs.items():
            value, default = getattr(self, name), defaults[name]
            rule = f"be left at {default:g} without {without}"
            check(has_effect or value == default, f"model.{name}", rule, value, "Leave it out")

    @property
    def reach(self) -> float:
        """Å; the long-range cutoff, infinite without one, where a term goes so far."""
        if not (self.cuts_electrostatics or self.dispersion):
            return self.cutoff
        return self.long_range_cutoff or math.inf

    @property
    def pair_cutoff(self) -> float:
        """Å; the cutoff: pairs of long-range terms have a few numbers each, neighbours have features."""
        return self.cutoff

    @property
    def sees(self) -> frozenset[str]:
        """The total charge also without its embedding: partial charges add up to it."""
        electrons = {"total_charge", "num_unpaired_electrons"} if self.spin_embedding else {"total_charge"}
        return super().sees | electrons

    @property
    def image_density(self) -> float:
        """1/Å; vectors of the reciprocal lattice for Ewald, mesh points for PME, see `EWALD_TRUNCATION`."""
        width = self.electrostatic_damping / math.sqrt(2)
        densities = {"ewald": EWALD_TRUNCATION / math.pi / width, "pme": MESH_POINTS_PER_WIDTH / width}
        return densities.get(self.electrostatics, 0.0)

    @property
    def cuts_electrostatics(self) -> bool:
        """Whether Coulomb energies end at a cutoff, or would if there were one."""
        return self.electrostatics == "cutoff"

    @property
    def uses_mean_neighbors(self) -> bool:
        """Attention coefficients are divided by it."""
        return True


@dataclasses.dataclass(frozen=True, kw_only=True)
class _GeomAttSection(ModelSection):
    """Sizes of geometric attention."""

    orders: tuple[int, ...] = (2, 3, 4)
    """orders of the attention streams, ascending, from 2 to 5: order k sums over walks of k - 1 pairs"""
    num_layers: int = 3
    """layers in each stream"""
    num_features: int = 128
    """width of the atoms' features in each stream"""
    inner_width: int = 128
    """channels of order 2; each higher order has half as many"""
    grid_start: float = 0.0
    """Å, first centre of the Gaussians"""
    grid_end: float = 5.0
    """Å, end of the grid; no centre lies on it"""
    grid_spacing: float = 0.05
    """Å between centres"""
    gaussian_precision: float = 20.0
    """1/Å², gamma of exp(-gamma (d - mu)^2)"""
    shared_factors: bool = False
    """one pair factor for all steps of a walk; attention is then symmetric"""
    bias: bool = True
    """biases in the pair factors; with them attention tends to a constant at large distance"""
    linear_readout: bool = False
    """no activation function in the readout"""
    order_gains: tuple[float, ...] = ()
    """factor of each order's initial pair factors; high orders start almost switched off without; empty: 1 for each"""

    def __post_init__(self) -> None:
        """Check the values."""
        check_numbers(
            self,
            "model",
            positive=("num_layers", "num_features", "inner_width", "grid_spacing", "gaussian_precision"),
            at_least_zero=("grid_start",),
        )
        orders = tuple(self.orders)
        ascending = bool(orders) and all(a < b for a, b in itertools.pairwise(orders))
        valid = ascending and orders[0] >= 2 and orders[-1] <= 5
        check(valid, "model.orders", "be ascending integers from 2 to 5", list(orders))
        least = 2 ** (orders[-1] - 2)
        check(self.inner_width >= least, "model.inner_width", f"be at least {least} for these orders", self.inner_width)
        rule = f"be at least two spacings ({2 * self.grid_spacing:g} Å) above model.grid_start"
        check(self.grid_end >= self.grid_start + 2 * self.grid_spacing, "model.grid_end", rule, self.grid_end)
        gains = list(self.order_gains)
        check(
            not gains or (len(gains) == len(orders) and all(0 < g < math.inf for g in gains)),
            "model.order_gains", "be one number above zero for each of model.orders, or empty", gains,
        )  # fmt: skip

    @property
    def low_memory_obstacle(self) -> str:
        """Its sums over walks have a backward derivative of their own, and no forward one."""
        return f"model.name={self.name}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class GeomAttSection(_GeomAttSection):
    """GeomAtt as published (arXiv 2106.02549): attention between all atoms of a molecule, for molecules only."""

    name: Literal["geomatt"] = "geomatt"
    """which model of the family"""
    algorithm: Literal["auto", "dense", "neighbor_list"] = "auto"
    """dense: all pairs in matrices; neighbor_list: pairs up to 1.1 Å beyond the grid plus the constant rest, linear in the
    atoms (5e-12 from dense); auto: the same pairs, in matrices for small molecules"""

    @property
    def sees(self) -> frozenset[str]:
        """Nothing: without an end of attention there is no sum over periodic images."""
        return frozenset()

    @property
    def cutoff(self) -> float:
        """Å; the grid's end plus 1.1 Å at the published precision: the last Gaussian has fallen by more than exp(-24)."""
        return self.grid_end + math.sqrt(24.0 / self.gaussian_precision)

    @property
    def reach(self) -> float:
        """Å; infinite for the dense algorithm."""
        return math.inf if self.algorithm == "dense" else self.cutoff


@dataclasses.dataclass(frozen=True, kw_only=True)
class GeomAttEnvelopeSection(_GeomAttSection):
    """GeomAtt with a smooth cutoff: size consistent and fit for periodic structures; not the published model."""

    name: Literal["geomatt_envelope"] = "geomatt_envelope"
    """which model of the family"""
    cutoff: float = 5.0
    """Å; pair factors of different atoms vanish here with all their derivatives"""

    algorithm: ClassVar[Literal["auto"]] = "auto"

    def __post_init__(self) -> None:
        """Check the values."""
        super().__post_init__()
        check_numbers(self, "model", positive=("cutoff",))


MODEL_SECTIONS: Final[dict[str, type[ModelSection]]] = {
    "so3krates": So3kratesSection,
    "euclidean_transformer": EuclideanTransformerSection,
    "so3lr": So3lrSection,
    "geomatt": GeomAttSection,
    "geomatt_envelope": GeomAttEnvelopeSection,
}
"""Schema behind each `model.name`"""

DEFAULT_MODEL: Final = "euclidean_transformer"
