"""Hugging Face transformers on the same shape and requests: continuous batching, and
`torch.compile` with a static cache. Needs torch and transformers; imports nothing of JAX's."""

from __future__ import annotations

from time import perf_counter
from typing import Any

from tools.gpu_bench.case import Case
from tools.gpu_bench.requests import Prompt, make_requests

STATIC_CONTEXT, STATIC_OUTPUT = 1024, 128
ATTENTION = "sdpa"
"""What torch has of its own; FlashAttention is a package that must be built."""
MAX_BATCH_TOKENS = 1024
"""Rows of its largest step. Its mask is rows x cached tokens, and its warm-up takes the largest of
both: with its defaults (8192 rows, 90 % of the card for the cache) that ran out of memory."""


def _model(case: Case) -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = case.config
    hf_config = LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        max_position_embeddings=config.max_position_embeddings,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        attn_implementation=ATTENTION,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    with torch.device("cuda"):
        dtype = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try:
            model = LlamaForCausalLM(hf_config)
        finally:
            torch.set_default_dtype(dtype)
    return model.eval()


def measure_continuous_batching(case: Case, num_requests: int, limit_s: float) -> dict[str, Any]:
    """The engine's first requests through transformers' continuous batching.

    A request ends at its own length: requests are added one by one, as a server adds them. If it
    fails with CUDA graphs, it is tried without; `cuda_graphs` says which the figures are of.
    """
    import transformers

    model = _model(case)
    requests, warm = make_requests(case, num_requests), make_requests(case, 8, seed=1)
    result: dict[str, Any] = {
        "version": transformers.__version__,
        "attention": ATTENTION,
        "num_requests": len(requests),
    }
    try:
        return result | _serve_all(model, warm, requests, True, limit_s)
    except RuntimeError as error:
        result["failure_with_cuda_graphs"] = str(error)[-500:]
        return result | _serve_all(model, warm, requests, False, limit_s)


def _serve_all(
    model: Any, warm: list[Prompt], requests: list[Prompt], cuda_graphs: bool, limit_s: float
) -> dict[str, Any]:
    from transformers import GenerationConfig
    from transformers.generation import ContinuousBatchingConfig

    longest = max(request.num_output_tokens for request in [*warm, *requests])
    generation = GenerationConfig(
        max_new_tokens=longest, do_sample=False, eos_token_id=-1, pad_token_id=0
    )
    settings = ContinuousBatchingConfig(
        use_cuda_graph=cuda_graphs,
        num_blocks=_num_blocks(requests, ContinuousBatchingConfig.block_size),
        max_batch_tokens=MAX_BATCH_TOKENS,
        max_requests_per_batch=len(requests),
    )
    begun = perf_counter()
    with model.continuous_batching_context_manager(
        generation_config=generation, continuous_batching_config=settings
    ) as manager:
        _serve(manager, warm, "warm", limit_s)
        warm_s = perf_counter() - begun
        num_tokens, seconds = _serve(manager, requests, "run", limit_s)
    return {
        "cuda_graphs": cuda_graphs,
        "warm_s": warm_s,
        "output_tokens": num_tokens,
        "seconds": seconds,
        "output_tokens_per_s": num_tokens / seconds,
    }


def _num_blocks(requests: list[Prompt], block_size: int) -> int:
    """Of a cache that holds all requests at once, to their ends and a block more each."""
    return sum(
        -(-(len(request.token_ids) + request.num_output_tokens) // block_size) + 1
        for request in requests
    )


def _serve(manager: Any, prompts: list[Prompt], name: str, limit_s: float) -> tuple[int, float]:
    """All prompts at once; their output tokens and the seconds until the last."""
    start = perf_counter()
    for index, prompt in enumerate(prompts):
        manager.add_request(
            input_ids=list(prompt.token_ids),
            request_id=f"{name}-{index}",
            max_new_tokens=prompt.num_output_tokens,
        )
    num_tokens, num_done = 0, 0
    while num_done < len(prompts):
        if perf_counter() - start > limit_s:
            raise TimeoutError(f"{num_done} of {len(prompts)} requests in {limit_s} s")
        result = manager.get_result(timeout=1)
        if result is None:
            if not manager.is_running():
                raise RuntimeError("the manager's thread has ended")
            continue
        if result.error:
            raise RuntimeError(str(result.error))
        if result.is_finished():
            num_done += 1
            num_tokens += len(result.generated_tokens)
    return num_tokens, perf_counter() - start


def measure_static_cache(case: Case, batch_size: int) -> dict[str, Any]:
    """`generate` with a static cache, which transformers compiles with `torch.compile`."""
    import torch

    model = _model(case)
    context = min(STATIC_CONTEXT, case.max_request_tokens // 2)
    output = min(STATIC_OUTPUT, case.max_request_tokens // 4)
    prompts = torch.randint(1, case.config.vocab_size, (batch_size, context), device="cuda")

    def generate(num_tokens: int) -> float:
        torch.cuda.synchronize()
        start = perf_counter()
        out = model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=num_tokens,
            min_new_tokens=num_tokens,
            do_sample=False,
            cache_implementation="static",
        )
        torch.cuda.synchronize()
        if out.shape[1] != context + num_tokens:
            raise RuntimeError(f"{out.shape[1] - context} tokens instead of {num_tokens}")
        return perf_counter() - start

    with torch.no_grad():
        first_s = generate(output)
        generate(output)
        seconds = generate(output)
        prefill_s = generate(1)
    return {
        "batch_size": batch_size,
        "context": context,
        "output_tokens": batch_size * output,
        "compile_s": first_s - seconds,
        "seconds": seconds,
        "output_tokens_per_s": batch_size * output / seconds,
        "decode_step_ms": (seconds - prefill_s) / (output - 1) * 1e3,
    }
