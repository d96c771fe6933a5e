"""Durable checkpoints: saved in the background, verified before use, one writer at a time."""

from __future__ import annotations

from checkpoint.store.errors import (
    CorruptStep,
    Fenced,
    LeaseHeld,
    NoGoodStep,
    Problem,
    SaveFailed,
    SaveTimedOut,
    StepExists,
    StepNotFound,
    StoreError,
    StoreNotFound,
    StoreUnreadable,
    TreeMismatch,
    UnsupportedLeaf,
)
from checkpoint.store.identity import ProcessIdentity
from checkpoint.store.open_step import OpenStep
from checkpoint.store.reader import Restored, StoreReader
from checkpoint.store.retention import RetentionPolicy
from checkpoint.store.saving import SaveHandle
from checkpoint.store.store import Store, StoreOptions
from checkpoint.store.verification import VerifyReport

__all__ = [
    "CorruptStep",
    "Fenced",
    "LeaseHeld",
    "NoGoodStep",
    "OpenStep",
    "Problem",
    "ProcessIdentity",
    "Restored",
    "RetentionPolicy",
    "SaveFailed",
    "SaveHandle",
    "SaveTimedOut",
    "StepExists",
    "StepNotFound",
    "Store",
    "StoreError",
    "StoreNotFound",
    "StoreOptions",
    "StoreReader",
    "StoreUnreadable",
    "TreeMismatch",
    "UnsupportedLeaf",
    "VerifyReport",
]
