"""SamplerConfig: which points share a batch, and which labels are added to it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from jaxserve.errors import ConfigError

SamplerName: TypeAlias = Literal["random", "tas", "ngame", "ngame_centroid", "ance"]

CLUSTERED = ("tas", "ngame", "ngame_centroid")
MINING = ("ngame_centroid", "ance")


@dataclass(frozen=True, kw_only=True)
class SamplerConfig:
    """How batches are made.

    `random`: plain in-batch negatives (DPR). `tas`: clusters of the first encoder's embeddings,
    never made anew (Hofstaetter et al. 2021, without their balancing of margins). `ngame`: clusters
    of the points' embeddings, made anew as they move (Dahiya et al. 2023, algorithm 1).
    `ngame_centroid`: and the labels that score highest for each cluster's centre join the batch.
    `ance`: random batches, and one of the labels that score highest for each point joins (Xiong
    et al. 2021).

    Attributes:
        name: one of these.
        cluster_size: C, points of a cluster, nearly; 1 makes `ngame` the same as `random`.
        initial_cluster_size: the curriculum's first C, doubled until it is `cluster_size`.
        double_every: epochs between two doublings.
        warmup_epochs: epochs of random batches before the first clusters or mined labels.
        refresh_every: tau, epochs between two.
        num_mined: labels that `ngame_centroid` adds to a step, over all its clusters.
        pool: labels that are mined for each cluster, or point.
        memory_bank: clusters are made of each point's embedding when it was last in a batch,
            instead of encoding all points anew.
    """

    name: SamplerName = "ngame"
    cluster_size: int = 64
    initial_cluster_size: int | None = None
    double_every: int = 2
    warmup_epochs: int = 2
    refresh_every: int = 2
    num_mined: int = 0
    pool: int = 20
    memory_bank: bool = False

    def __post_init__(self) -> None:
        least = {"cluster_size": 1, "double_every": 1, "warmup_epochs": 0, "refresh_every": 1}
        for name, least_value in {**least, "pool": 1, "num_mined": 0}.items():
            if getattr(self, name) < least_value:
                raise ConfigError(
                    f"{name} is {getattr(self, name)}; it must be at least {least_value}"
                )
        first = self.initial_cluster_size
        if first is not None and not 1 <= first <= self.cluster_size:
            raise ConfigError(
                f"initial_cluster_size is {first}; it must be 1 to cluster_size "
                f"({self.cluster_size})"
            )
        if (self.name == "ngame_centroid") != (self.num_mined > 0):
            raise ConfigError(
                f"num_mined is {self.num_mined} with name {self.name!r}: 'ngame_centroid' needs it "
                "above 0, such as 320, and the others have none"
            )
        if self.name == "ngame_centroid" and self.cluster_size_at(self.first_refresh) < 2:
            raise ConfigError(
                "'ngame_centroid' needs clusters of at least 2 points: raise cluster_size or "
                "initial_cluster_size"
            )
        if self.memory_bank and (self.name not in CLUSTERED or self.first_refresh < 1):
            raise ConfigError(
                "memory_bank needs a sampler that clusters, and warmup_epochs of at least 1, so "
                "that every point has been in a batch before its first use"
            )

    @property
    def first_refresh(self) -> int:
        """The first epoch that does not begin with random batches."""
        return 0 if self.name == "tas" else self.warmup_epochs

    def refreshes_at(self, epoch: int) -> bool:
        """Whether clusters or mined labels are made at the beginning of `epoch`."""
        since = epoch - self.first_refresh
        if self.name == "random" or since < 0:
            return False
        return since == 0 if self.name == "tas" else since % self.refresh_every == 0

    def cluster_size_at(self, epoch: int) -> int:
        """C of clusters made at the beginning of `epoch`: a function of the epoch alone."""
        if self.initial_cluster_size is None:
            return self.cluster_size
        doublings = (epoch - self.first_refresh) // self.double_every
        return min(self.cluster_size, self.initial_cluster_size << min(doublings, 40))

    def num_extra_labels(self, batch_size: int) -> int:
        """Labels that join each batch of so many points."""
        return batch_size if self.name == "ance" else self.num_mined
