"""Sampling settings as options, named like the fields of a request.

A command takes one parameter `sampling` and is decorated:

    @app.command()
    @with_engine_options
    @with_sampling_options
    def generate(engine_config: EngineConfig, sampling: dict[str, Any], ...) -> None:

It gets the settings that were given, by field, once their bounds are checked:
a mistake must not wait until a model is loaded.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Annotated, Any

import typer

from jaxserve.engine.sampling_json import checked_sampling
from jaxserve.engine.sampling_params import SamplingParams
from jaxserve.errors import ConfigError, InvalidRequest

PANEL = "Sampling"


def _option(kind: Any, text: str, default: str | None = None, **settings: Any) -> Any:
    option = typer.Option(
        help=text, show_default=default or False, rich_help_panel=PANEL, **settings
    )
    return Annotated[kind | None, option]


SAMPLING_OPTIONS: dict[str, Any] = {
    "temperature": _option(float, "0: always the likeliest token; higher: bolder.", "1.0"),
    "top_p": _option(float, "Sample from the likeliest tokens with this total probability.", "1.0"),
    "top_k": _option(int, "Sample from the K likeliest tokens.", "all"),
    "min_p": _option(float, "Drop tokens less likely than this fraction of the likeliest.", "0.0"),
    "seed": _option(int, "The same seed gives the same text.", "random"),
    "repetition_penalty": _option(
        float, "Above 1: tokens of the prompt and the text so far become less likely.", "1.0"
    ),
    "presence_penalty": _option(
        float, "Above 0: tokens that have been generated become less likely.", "0.0"
    ),
    "frequency_penalty": _option(float, "The same, for each time that they have been.", "0.0"),
    "max_tokens": _option(int, "Most tokens to generate.", "to the end of the context"),
    "min_tokens": _option(int, "No stop and no end before so many tokens.", "0"),
    "stop": _option(list[str], "End before this text; may be given several times."),
    "stop_token_ids": _option(
        list[int], "End at this token id; may be given several times.", metavar="ID"
    ),
    "ignore_eos": Annotated[
        bool,
        typer.Option(
            "--ignore-eos", help="Go on past the model's end of text.", rich_help_panel=PANEL
        ),
    ],
    "logprobs": _option(
        int, "Report the logprob of each token and of the N likeliest.", metavar="N"
    ),
}
"""SamplingParams field -> its command-line option. What is not given is not set."""


def check_options(sampling: Mapping[str, Any]) -> SamplingParams:
    """The settings of options, keyed by field. Raises ConfigError naming the option."""
    try:
        return checked_sampling(sampling)
    except InvalidRequest as error:
        text = str(error).removeprefix(f"{error.field}: ")
        raise ConfigError(f"--{error.field.replace('_', '-')} {text}") from error


def _is_given(value: Any) -> bool:
    # An option that may be repeated is an empty list when it was not given.
    return value is not None and value is not False and value != []


def with_sampling_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Replaces the parameter `sampling` by the options of SAMPLING_OPTIONS."""
    signature = inspect.signature(command, eval_str=True)
    own = [p for p in signature.parameters.values() if p.name != "sampling"]
    options = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=False if name == "ignore_eos" else None,
            annotation=annotation,
        )
        for name, annotation in SAMPLING_OPTIONS.items()
    ]

    def run(**values: Any) -> Any:
        given = {name: values.pop(name) for name in SAMPLING_OPTIONS}
        sampling = {name: value for name, value in given.items() if _is_given(value)}
        check_options(sampling)
        return command(sampling=sampling, **values)

    run.__name__ = command.__name__
    run.__doc__ = command.__doc__
    run.__module__ = command.__module__
    keyword = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own]
    run.__signature__ = inspect.Signature([*keyword, *options])  # type: ignore[attr-defined]
    return run
