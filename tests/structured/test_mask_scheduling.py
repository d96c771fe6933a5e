"""Rows that wait for a mask sit out; the others keep their pace."""

from __future__ import annotations

import numpy as np
import pytest

from jaxserve.engine.plan import StepPlan, StepResults
from jaxserve.engine.request import GenerationRequest, Request
from jaxserve.engine.sampling_params import MAX_TOP_LOGPROBS, SamplingParams
from jaxserve.engine.scheduler.config import SchedulerConfig
from jaxserve.engine.scheduler.policies import POLICIES
from jaxserve.engine.scheduler.scheduler import Scheduler


class SetMasks:
    """Masks that a test hands out."""

    def __init__(self) -> None:
        self.index = 0
        self.words = b"mask 0"
        self.loaded: bytes | None = None
        self.tokens: list[int] = []

    def push(self, token_id: int) -> None:
        self.tokens.append(token_id)
        self.index = -1

    def hand_out(self, words: bytes | None = None) -> None:
        self.index = len(self.tokens)
        self.words = words or f"mask {self.index}".encode()


class Rig:
    """A scheduler and the steps in flight, two at most."""

    def __init__(self, **config) -> None:
        settings = {"num_pages": 64, "max_model_len": 64, "max_num_seqs": 4, "token_budget": 16,
                    "buckets": (4, 16, 80), "page_size": 4}  # fmt: skip
        self.scheduler = Scheduler(SchedulerConfig(**(settings | config)))
        self.in_flight: list[StepPlan] = []

    def add(self, name: str, masks: SetMasks | None = None, prompt=(1, 2, 3)) -> Request:
        request = Request(
            generation=GenerationRequest(name, prompt, SamplingParams()),
            max_tokens=20,
            seed=0,
            stop_token_ids=frozenset(),
            arrival_s=0.0,
            masks=masks,
        )
        self.scheduler.add(request)
        return request

    def plan(self) -> StepPlan | None:
        plan = self.scheduler.plan(0.0)
        if plan is not None:
            self.in_flight.append(plan)
        return plan

    def commit(self) -> None:
        plan = self.in_flight.pop(0)
        n = plan.num_sample_rows
        results = StepResults(
            plan.step_id,
            np.full(n, 7, np.int32),
            np.zeros(n, np.float32),
            np.ones(n, np.int32),
            np.zeros((n, MAX_TOP_LOGPROBS), np.int32),
            np.zeros((n, MAX_TOP_LOGPROBS), np.float32),
        )
        self.scheduler.commit(plan, results, 0.0)


def names(plan: StepPlan | None) -> set[str]:
    return set() if plan is None else {chunk.request_id for chunk in plan.chunks}


def test_a_constrained_row_sits_out_one_step_and_the_others_none():
    rig, masks = Rig(), SetMasks()
    rig.add("free")
    rig.add("bound", masks)
    first = rig.plan()
    assert names(first) == {"free", "bound"}
    assert [(load.slot, load.words) for load in first.mask_loads] == [(1, b"mask 0")]
    for index in range(1, 6):
        # Its token is in flight, and so is no mask.
        between = rig.plan()
        assert (names(between), between.mask_loads) == ({"free"}, ())
        rig.commit()
        masks.hand_out()
        plan = rig.plan()
        assert names(plan) == {"free", "bound"}
        assert [load.words for load in plan.mask_loads] == [f"mask {index}".encode()]
        rig.commit()
    assert masks.tokens == [7] * 5


def test_it_sits_out_until_its_mask_is_there():
    rig, masks = Rig(), SetMasks()
    rig.add("free")
    rig.add("bound", masks)
    rig.plan()
    for _ in range(5):
        assert names(rig.plan()) == {"free"}
        rig.commit()
    masks.hand_out()
    assert names(rig.plan()) == {"free", "bound"}


def test_alone_it_waits_without_a_step():
    rig, masks = Rig(), SetMasks()
    rig.add("bound", masks)
    rig.plan()
    assert rig.plan() is None
    rig.commit()
    assert rig.plan() is None
    masks.hand_out()
    assert names(rig.plan()) == {"bound"}


def test_a_mask_that_the_slot_holds_is_not_loaded_again():
    rig, masks = Rig(), SetMasks()
    rig.add("bound", masks)
    assert len(rig.plan().mask_loads) == 1
    rig.commit()
    masks.hand_out(b"mask 0")
    assert rig.plan().mask_loads == ()
    rig.commit()
    masks.hand_out()
    assert len(rig.plan().mask_loads) == 1


def test_a_long_prompt_gets_its_mask_with_its_last_chunk():
    rig, masks = Rig(), SetMasks()
    rig.add("bound", masks, prompt=tuple(range(40)))
    loads = []
    for _ in range(3):
        loads.append(len(rig.plan().mask_loads))
        rig.commit()
    assert loads == [0, 0, 1]


def test_a_preempted_request_comes_back_with_the_mask_of_its_next_token():
    # Room for 8 pages: two requests of 3 + 20 tokens do not fit.
    rig, masks = Rig(num_pages=8, max_model_len=24, watermark=0.0), SetMasks()
    rig.add("old")
    bound = rig.add("young", masks)
    while not bound.num_preemptions:
        rig.plan()
        rig.commit()
        if masks.index < 0 and bound.num_preemptions == 0:
            masks.hand_out()
    num_output = len(bound.output_token_ids)
    assert (masks.index, num_output) == (num_output, num_output)
    masks.push(0)  # As if it were not there yet.
    masks.tokens.pop()
    rig.scheduler.finish("old", "stop")
    while rig.in_flight:
        rig.commit()
    assert rig.plan() is None
    masks.hand_out()
    plan = rig.plan()
    assert names(plan) == {"young"}
    assert [load.words for load in plan.mask_loads] == [f"mask {num_output}".encode()]
    rig.commit()
    rig.scheduler.check_integrity()


@pytest.mark.parametrize("policy", POLICIES)
def test_under_every_policy_nothing_is_sampled_without_its_mask(policy):
    rig = Rig(policy=policy)
    bound = {f"bound{i}": SetMasks() for i in range(2)}
    records = [rig.add(name, masks, tuple(range(2 + 11 * i)))
               for i, (name, masks) in enumerate(bound.items())]  # fmt: skip
    records.append(rig.add("free", None, tuple(range(9))))
    for step in range(400):
        plan = rig.plan()
        for chunk in () if plan is None else plan.chunks:
            if chunk.samples and chunk.request_id in bound:
                masks = bound[chunk.request_id]
                assert masks.index == len(masks.tokens)
                assert masks.loaded == masks.words
        if rig.in_flight and (plan is None or len(rig.in_flight) == 2):
            rig.commit()
        for name, masks in bound.items():
            # Now and then, one later than the other.
            if masks.index < 0 and step % (2 + len(name) % 3) == 0:
                masks.hand_out()
        if not rig.scheduler.has_work:
            break
    assert not rig.scheduler.has_work
    assert [len(record.output_token_ids) for record in records] == [20, 20, 20]
    rig.scheduler.check_integrity()
