"""The names of all metrics: dashboards and alerts are built on them, so one that goes or changes
is a change for users."""

from __future__ import annotations

import re
from pathlib import Path

from tests.security.keys import bearer, keyed_service, write_keys
from tests.server.http.raw_http import ask, post

DOCS = Path(__file__).parents[2] / "docs" / "observability.md"

OF_VLLM = {
    "num_requests_running": "gauge",
    "num_requests_waiting": "gauge",
    "kv_cache_usage_perc": "gauge",
    "prefix_cache_queries_total": "counter",
    "prefix_cache_hits_total": "counter",
    "num_preemptions_total": "counter",
    "spec_decode_num_drafts_total": "counter",
    "spec_decode_num_draft_tokens_total": "counter",
    "spec_decode_num_accepted_tokens_total": "counter",
    "prompt_tokens_total": "counter",
    "generation_tokens_total": "counter",
    "request_success_total": "counter",
    "cache_config_info": "gauge",
    "time_to_first_token_seconds": "histogram",
    "inter_token_latency_seconds": "histogram",
    "e2e_request_latency_seconds": "histogram",
    "request_queue_time_seconds": "histogram",
    "request_prompt_tokens": "histogram",
    "request_generation_tokens": "histogram",
}
"""With our prefix in place of `vllm:`."""
OF_STEPS = {
    "compiles_total": "counter",
    "unexpected_compiles_total": "counter",
    "step_seconds": "histogram",
    "step_fill_ratio": "histogram",
    "host_gap_seconds": "histogram",
    "slots_used": "gauge",
    "slots_total": "gauge",
    "steps_total": "counter",
    "step_in_flight_seconds": "gauge",
    "last_step_age_seconds": "gauge",
    "kv_cache_pages_free": "gauge",
    "kv_cache_pages_cached": "gauge",
    "num_tokens_waiting": "gauge",
}
OF_THE_SERVER = {
    "build_info": "gauge",
    "uptime_seconds": "gauge",
    "ready": "gauge",
    "requests_refused_total": "counter",
    "event_loop_tasks": "gauge",
    "weights_info": "gauge",
    "weight_swaps_total": "counter",
    "weight_swaps_refused_total": "counter",
    "api_keys_reload_failures_total": "counter",
    "tenant_prompt_tokens_total": "counter",
    "tenant_generation_tokens_total": "counter",
    "tenant_prefix_cache_hits_total": "counter",
    "tenant_requests_open": "gauge",
    "tenant_requests_refused_total": "counter",
}
NAMES = OF_VLLM | OF_STEPS | OF_THE_SERVER


def test_every_metric_has_its_name_and_kind(tmp_path):
    service = keyed_service(write_keys(tmp_path / "keys.toml"))
    try:
        assert post(service, "/v1/completions", {"prompt": "x"}, bearer("alpha"))[0] == 200
        _, _, text = ask(service, "GET", "/metrics", headers=bearer("watcher"))
    finally:
        service.close()
    found = dict(re.findall(r"^# TYPE jaxserve_(\w+) (\w+)$", text, re.MULTILINE))
    assert {name: found.get(name) for name in NAMES} == NAMES
    assert set(re.findall(r"^# TYPE (?!jaxserve_)(\w+)", text, re.MULTILINE)) == set()


OF_ADAPTERS = {"adapters_loaded", "adapters_room", "adapter_requests_total"}
OF_ADAPTERS |= {"adapter_requests_open"}
"""On servers with room for adapters: see `test_adapter_api.py`."""


def test_the_documentation_lists_them():
    text = DOCS.read_text()
    assert [name for name in {*NAMES, *OF_ADAPTERS} if f"`{name}`" not in text] == []
