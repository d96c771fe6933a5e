"""What a run of extreme classification trains, and on which batches, as frozen values."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from jaxserve.errors import ConfigError
from jaxserve.xc.sampler_config import SamplerConfig

Stage: TypeAlias = Literal["encoder", "classifiers"]
EncoderKind: TypeAlias = Literal["bag", "bert"]
LossName: TypeAlias = Literal["triplet", "softmax"]


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """Which encoder.

    Attributes:
        kind: "bag": a bag of embeddings, for a CPU. "bert": a transformer, from `source`.
        source: an encoder as `jaxserve embed` takes it. A bag starts from the principal components
            of its word embeddings, or without one from random numbers.
        width: of a bag's vectors.
        hidden: of a bag's residual layer.
    """

    kind: EncoderKind = "bag"
    source: str | None = None
    width: int = 96
    hidden: int = 192

    def __post_init__(self) -> None:
        if self.kind == "bert" and self.source is None:
            raise ConfigError(
                "kind 'bert' needs source, the encoder to start from, such as 'all-minilm-l6-v2'"
            )
        for name in ("width", "hidden"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1")


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Which loss.

    Attributes:
        name: "triplet": hinge over the hardest negatives, harder ones weigh more (NGAME's).
            "softmax": cross entropy of the positive against all negatives of the batch, without
            the other positives (decoupled; Yeh et al. 2022). It does not collapse where labels
            are noisy.
        margin: gamma of the triplet loss.
        num_hard: hardest negatives that the triplet loss looks at.
        temperature: of the softmax.
        num_hard_positives: lowest-scoring positives that label classifiers look at.
    """

    name: LossName = "triplet"
    margin: float = 0.3
    num_hard: int = 10
    temperature: float = 0.07
    num_hard_positives: int = 3

    def __post_init__(self) -> None:
        for name in ("margin", "temperature"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be above 0")
        for name in ("num_hard", "num_hard_positives"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1")


@dataclass(frozen=True, kw_only=True)
class XcSection:
    """The table [xc] of a training config.

    Attributes:
        stage: "encoder": one encoder for points and labels (NGAME's module M1). "classifiers": a
            vector for each label, which begins as its embedding (M3); the encoder is left alone
            (M4).
        encoder: of stage "encoder".
        encoder_run: of stage "classifiers": folder of the run that trained the encoder.
        sampler: which points share a batch.
        loss: what is minimised.
        collapse_steps: a run ends with an error once for so many steps in a row its embeddings are
            all the same, or its triplet loss is the margin; 0: it goes on.
    """

    stage: Stage = "encoder"
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    encoder_run: str | None = None
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    collapse_steps: int = 200

    def __post_init__(self) -> None:
        if (self.stage == "classifiers") != (self.encoder_run is not None):
            raise ConfigError(
                f"encoder_run is {self.encoder_run!r} with stage {self.stage!r}: 'classifiers' "
                "needs the folder of the run that trained the encoder, and 'encoder' has none"
            )
        if self.collapse_steps < 0:
            raise ConfigError(f"collapse_steps is {self.collapse_steps}; it must be at least 0")
