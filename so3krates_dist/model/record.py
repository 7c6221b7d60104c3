"""What a model attends to, for people to look at: kept only while a record is passed along with the structures."""

import dataclasses

import torch


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class AttentionMap:
    """Attention coefficients of one block: from every sender to every receiver, signed, as they multiply the messages."""

    layer: int
    """counted from 0"""
    kind: str
    """`feature`, `geometric`, or `order k`"""
    heads: tuple[str, ...]
    """name of each head"""
    receivers: torch.Tensor
    """(num_edges,) atom whose features change"""
    senders: torch.Tensor
    """(num_edges,) atom that is looked at; an atom and several of its periodic images are several edges"""
    values: torch.Tensor
    """(num_edges, num_heads), detached"""


class AttentionRecord:
    """Collects the maps of one evaluation, in the order of the layers."""

    def __init__(self) -> None:
        self.maps: list[AttentionMap] = []
        self.layer = 0

    def add(
        self, kind: str, heads: tuple[str, ...], receivers: torch.Tensor, senders: torch.Tensor, values: torch.Tensor
    ) -> None:
        """Keep the coefficients of a block of the current layer; shapes as in `AttentionMap`."""
        self.maps.append(
            AttentionMap(
                layer=self.layer, kind=kind, heads=heads, receivers=receivers, senders=senders, values=values.detach()
            )
        )
