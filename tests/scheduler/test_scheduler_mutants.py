"""Mutation gate: each seeded bug must be caught by the property that forbids it.

The names are those of `PropertyMonitor`; "device" is the fake device, which
finds a row without its context, "refused" a ValueError of the scheduler's own.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from jaxserve.engine.pages import PageIntegrityError
from tests.scheduler.driver import random_run
from tests.scheduler.fake_device import DeviceFault
from tests.scheduler.mutation import Edit, mutated
from tests.scheduler.properties import PropertyViolation

MAX_RUNS = 120
STEPS_PER_RUN = 60

PAGES = "pages"
DRAFT = "scheduler.draft"
ADMISSION = "scheduler.admission"
ROOM = "scheduler.room"
STATE = "scheduler.state"
POLICY = "scheduler.policies.sarathi"
SCHEDULER = "scheduler.scheduler"
UPDATES = "scheduler.updates"
WAITING = "scheduler.waiting"

# `release` refuses a request in flight; these bugs must be caught without it.
NO_RELEASE_GUARD = Edit(
    STATE, "if request.slot is None or request.num_in_flight_steps:", "if request.slot is None:"
)


@dataclass(frozen=True, slots=True)
class Mutant:
    name: str
    caught_by: tuple[str, ...]
    edits: tuple[Edit, ...]
    run: dict[str, Any] = field(default_factory=dict)
    """Arguments of `random_run`: what the bug needs to show."""


def mutant(name: str, caught_by: str, *edits: Edit, **run: Any) -> Mutant:
    return Mutant(name, tuple(caught_by.split()), edits, run)


MUTANTS = [
    mutant(
        "prefill_first",
        "S1",
        Edit(POLICY, "if not draft.add_decodes():\n            return\n        for", "for"),
        Edit(
            POLICY,
            "while draft.admit_next():\n            pass",
            "while draft.admit_next():\n            pass\n"
            "        if draft.is_empty:\n"
            "            draft.add_decodes()",
        ),
    ),
    mutant(
        "budget_off_by_one",
        "S2 refused",
        Edit(SCHEDULER, "return self._budget.max_rows()", "return self._budget.max_rows() + 1"),
    ),
    mutant(
        "leak_a_page_on_abort",
        "S5",
        Edit(
            SCHEDULER,
            "            self._state.retire(request)\n",
            "            if reason is FinishReason.CANCELLED:\n"
            "                request.page_ids.pop()\n"
            "            self._state.retire(request)\n",
        ),
    ),
    mutant(
        "free_a_shared_page",
        "S5",
        Edit(PAGES, "            if holders:\n                continue\n", ""),
    ),
    mutant(
        "fold_outputs_into_the_prompt_on_preempt",
        "S7",
        Edit(
            STATE,
            "        request.num_computed_tokens = 0\n",
            "        import dataclasses\n"
            "        request.num_computed_tokens = 0\n"
            "        known = request.known_token_ids(0, request.num_tokens)\n"
            "        request.generation = dataclasses.replace(\n"
            "            request.generation, prompt_token_ids=known)\n"
            "        request.output_token_ids = []\n",
        ),
    ),
    mutant(
        "decode_at_the_wrong_position",
        "S6",
        Edit(
            DRAFT,
            "self._decode_positions += positions",
            "self._decode_positions += [position + 1 for position in positions]",
        ),
    ),
    mutant(
        "admit_after_preempt",
        "S1",
        Edit(DRAFT, "if request is None or self._preempted or not", "if request is None or not"),
    ),
    mutant(
        "watermark_ignored",
        "watermark",
        Edit(ADMISSION, "watermark = state.config.num_watermark_pages", "watermark = 0"),
    ),
    mutant(
        "no_headroom_on_resume",
        "S4",
        Edit(ADMISSION, "return max(watermark, growth)", "return watermark"),
    ),
    mutant(
        "chunk_tokens_shifted",
        "device",
        Edit(
            DRAFT,
            "token_ids=request.known_token_ids(start, end)",
            "token_ids=request.known_token_ids(max(start - 1, 0), end - (start > 0))",
        ),
    ),
    mutant(
        "chunk_starts_a_token_early",
        "S6",
        Edit(DRAFT, "            start=start,\n", "            start=max(start - 1, 0),\n"),
    ),
    mutant(
        "every_chunk_samples",
        "S6",
        Edit(DRAFT, "samples=end == request.num_prefill_tokens", "samples=True"),
    ),
    mutant(
        "resumed_prefill_samples_at_the_prompt_end",
        "S6",
        Edit(
            DRAFT,
            "samples=end == request.num_prefill_tokens",
            "samples=end == request.num_prompt_tokens",
        ),
    ),
    mutant(
        "victim_in_flight",
        "S8",
        NO_RELEASE_GUARD,
        Edit(
            DRAFT,
            "            if self._in_flight:\n                return False\n"
            "            victim = self._victim()\n            if",
            "            victim = self._victim()\n            if",
        ),
    ),
    mutant(
        "oldest_is_the_victim",
        "S4",
        Edit(
            DRAFT,
            "max(reversed(self._state.running.values()), key",
            "max(self._state.running.values(), key",
        ),
    ),
    mutant(
        "lifo_queue",
        "S3",
        Edit(
            WAITING,
            "self._insert(request, self._num_turns)",
            "self._insert(request, 1_000_000 - self._num_turns)",
        ),
    ),
    mutant(
        "preempted_go_to_the_back",
        "S3",
        Edit(
            WAITING,
            "self._insert(request, -self._num_turns)",
            "self._insert(request, self._num_turns)",
        ),
    ),
    mutant(
        "younger_prefill_overtakes",
        "S3",
        Edit(
            POLICY,
            "if not draft.add_prefill(request):\n                return",
            "draft.add_prefill(request)",
        ),
    ),
    mutant(
        "prefix_key_without_salt",
        "salt",
        Edit(ADMISSION, "root_key(request.generation.cache_salt)", 'root_key("")'),
        # The salt is compared on a hit as well, which would save it.
        Edit(PAGES, "self._salt_of_page[page_id] != salt", "False"),
    ),
    mutant(
        "prefix_key_without_parent",
        "salt device",
        Edit(PAGES, 'parent + array("I", token_ids)', 'array("I", token_ids)'),
    ),
    mutant(
        "evicted_page_is_still_found",
        "S5 device",
        Edit(PAGES, "            del self._page_of_key[key]\n", "            pass\n"),
    ),
    mutant(
        "register_a_page_before_it_is_full",
        "S5 device",
        Edit(
            ADMISSION,
            "num_pages = end // size",
            "num_pages = min(end + 1, request.num_tokens) // size",
        ),
    ),
    mutant(
        "whole_prompt_from_the_prefix_cache",
        "S2 S4 S6",
        Edit(ADMISSION, "(request.num_tokens - 1) // size", "request.num_tokens // size"),
    ),
    mutant(
        "max_tokens_off_by_one",
        "S7",
        Edit(UPDATES, "num_output >= request.max_tokens", "num_output > request.max_tokens"),
    ),
    mutant(
        "decode_after_the_last_token",
        "S7",
        Edit(
            DRAFT,
            "r.num_computed_tokens < r.max_computed_tokens",
            "r.num_computed_tokens <= r.max_computed_tokens",
        ),
    ),
    mutant(
        "last_token_is_a_plain_one",
        "S7",
        Edit(UPDATES, "request.max_tokens - 1)", "request.max_tokens)"),
    ),
    mutant(
        "last_token_only_fills_a_page",
        "S7",
        Edit(UPDATES, "len(request.output_token_ids) + 1 < request.max_tokens", "True"),
    ),
    mutant(
        "stop_id_only_fills_a_page",
        "S7",
        Edit(UPDATES, "and token_id not in request.special_token_ids", "and True"),
    ),
    mutant(
        "finished_in_flight_fills_a_page",
        "S5 S6 S7",
        Edit(UPDATES, "request.finish_reason is None", "True"),
    ),
    mutant(
        "finished_in_flight_still_gets_tokens",
        "S5 S6 S7",
        Edit(
            SCHEDULER,
            "        request.num_plain_outputs = len(request.output_token_ids)\n",
            "",
        ),
    ),
    mutant(
        "stop_id_ignored",
        "S7",
        Edit(UPDATES, "if token_id in request.stop_token_ids and", "if False and"),
    ),
    mutant(
        "finished_in_flight_loses_its_pages",
        "S5",
        NO_RELEASE_GUARD,
        Edit(STATE, "        if request.num_in_flight_steps:\n", "        if False:\n"),
    ),
    mutant(
        "sequence_in_two_plans",
        "S8",
        Edit(DRAFT, "if not self._config.chain_decodes:", "if False:"),
    ),
    mutant(
        "chunk_follows_in_flight",
        "S8",
        Edit(
            DRAFT,
            "        if self._config.chain_decodes or not request.num_in_flight_steps:\n",
            "        if True:\n",
        ),
    ),
    mutant(
        "sample_rows_unlimited",
        "S2",
        Edit(ROOM, "return min(num_tokens, self.num_sample_rows)", "return num_tokens"),
    ),
    mutant(
        "last_chunk_without_a_sample_row",
        "S2",
        Edit(ROOM, "if num_tokens == remaining and self.num_sample_rows == 0:", "if False:"),
    ),
    mutant(
        "prompt_logprobs_twice",
        "logprobs",
        Edit(
            STATE,
            "        request.num_computed_tokens = 0\n",
            "        request.num_computed_tokens = request.num_prompt_logprobs = 0\n",
        ),
    ),
    mutant(
        "largest_bucket_always",
        "S2",
        Edit("scheduler.budget", "for bucket in buckets:", "for bucket in reversed(buckets):"),
    ),
    mutant(
        "whole_prompt_is_cut",
        "whole",
        Edit(DRAFT, "return start + num_tokens == request.num_prefill_tokens", "return True"),
        policy="orca",
    ),
    mutant(
        "longest_sequence_is_not_reserved",
        "S4",
        Edit(
            ADMISSION,
            "return state.config.max_pages_per_seq",
            "return state.num_pages_for(request.num_tokens)",
        ),
        policy="orca",
    ),
    mutant(
        "request_level_batch_takes_a_late_prompt",
        "S1",
        Edit("scheduler.policies.fastertransformer", "if not draft.returned():", "if True:"),
        Edit(
            "scheduler.policies.fastertransformer",
            "pass\n            return\n",
            "pass\n            if not draft.is_empty:\n                return\n",
        ),
        policy="fastertransformer",
    ),
    mutant(
        "chunk_pages_preempt_in_flight",
        "S8",
        NO_RELEASE_GUARD,
        Edit(
            DRAFT,
            "            if self._in_flight:\n                return False\n"
            "            victim = self._victim()\n            self._preempt(victim)",
            "            victim = self._victim()\n            self._preempt(victim)",
        ),
        policy="vllm_v1",
    ),
    mutant(
        "chunk_without_its_pages",
        "S5 device",
        Edit(DRAFT, "num_pages_for(start + num_tokens) - len", "num_pages_for(start) - len"),
        policy="vllm_v1",
    ),
    mutant(
        "class_ignored_in_the_queue",
        "S3",
        Edit(WAITING, "_Entry(request.generation.priority, key", "_Entry(0, key"),
        num_classes=3,
    ),
    mutant(
        "best_class_is_the_victim",
        "S4",
        Edit(
            DRAFT,
            "(reversed(self._state.running.values()), key=lambda r: r.",
            "(reversed(self._state.running.values()), key=lambda r: -r.",
        ),
        num_classes=3,
    ),
    mutant(
        "too_many_in_a_micro_batch",
        "S2",
        Edit(ROOM, "if num_tokens <= 0 or not self.num_seqs:", "if num_tokens <= 0:"),
        max_in_flight=4,
        chain_decodes=False,
        max_num_seqs=7,
        max_seqs_per_step=2,
        token_budget=12,
        buckets=(4, 12),
    ),
    mutant(
        "in_flight_limit_off_by_one",
        "S8",
        Edit(SCHEDULER, ">= self.config.max_in_flight:", "> self.config.max_in_flight:"),
    ),
]


def first_catch(run: dict[str, Any]) -> tuple[int, str, str] | None:
    """(run, property, message) of the first violation within the bound."""
    for seed in range(MAX_RUNS):
        try:
            random_run(seed, STEPS_PER_RUN, **run)
        except PropertyViolation as violation:
            return seed, violation.name, str(violation)
        except DeviceFault as fault:
            return seed, "device", str(fault)
        except PageIntegrityError as error:
            return seed, "S5", str(error)
        except ValueError as error:
            return seed, "refused", str(error)
    return None


@pytest.mark.parametrize("bug", MUTANTS, ids=lambda bug: bug.name)
def test_seeded_bug_is_caught(bug: Mutant) -> None:
    with mutated(bug.edits):
        caught = first_catch(bug.run)
    assert caught is not None, f"{bug.name} survived {MAX_RUNS} runs"
    assert caught[1] in bug.caught_by, caught
