"""``fiddler generate``: one prompt in, its answer on standard output."""

import contextlib
import json
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import click

from fiddler.cli import session
from fiddler.cli.errors import INTERRUPTED
from fiddler.cli.options import engine_options, model_option, reasoning_options, sampling_options

if TYPE_CHECKING:
    from fiddler.cli.turn import Turn
    from fiddler.sampling_params import SamplingParams


@click.command()
@click.argument("prompt", nargs=-1, metavar="[PROMPT]")
@model_option
@click.option("--raw", is_flag=True, help="Continue PROMPT as it is, without the chat template.")
@reasoning_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object at the end instead.")
@click.option("-q", "--quiet", is_flag=True, help="No statistics.")
@sampling_options()
@engine_options
@click.pass_context
def command(
    ctx: click.Context,
    prompt: tuple[str, ...],
    model: str,
    raw: bool,
    system: str | None,
    think: str,
    hide_thinking: bool,
    as_json: bool,
    quiet: bool,
    sampling: dict[str, Any],
    engine: dict[str, Any],
) -> None:
    """Answer PROMPT and end. What is piped in is appended to it; '-' is only the pipe.

    A model with a chat template answers PROMPT as a message; others continue it.
    """
    from fiddler.cli.chat_view import note_stats
    from fiddler.cli.expected import Expected
    from fiddler.cli.prompt_input import full_prompt

    if raw and system:
        raise click.UsageError("--system needs the chat template that --raw leaves out")
    if len(prompt) > 1:
        raise click.UsageError("PROMPT is one argument: put it into quotes; -m MODEL is the model")
    text = full_prompt(*prompt)
    with contextlib.closing(session.open_llm(model=model, **engine)) as llm:
        params = replace(llm.default_params(), **sampling)
        messages = None if raw or not llm.has_chat_template else _messages(text, system)
        turn = _run(llm, text, messages, params, think, as_json, show_reasoning=not hide_thinking)
        if as_json:
            click.echo(json.dumps(_record(llm, text, params, turn), ensure_ascii=False, indent=1))
        if not quiet:
            note_stats(turn.stats, Expected(llm))
    if turn.finish_reason == "cancelled":
        ctx.exit(INTERRUPTED)


def _messages(text: str, system: str | None) -> session.Messages:
    from fiddler.cli.conversation import Conversation

    return [*Conversation(system=system or "").ask(text).for_model()]


def _run(
    llm: session.ChatModel,
    text: str,
    messages: session.Messages | None,
    params: "SamplingParams",
    think: str,
    is_silent: bool,
    *,
    show_reasoning: bool,
) -> "Turn":
    from fiddler.cli.chat_view import PlainView, SilentView
    from fiddler.cli.interrupts import stop_on_interrupt
    from fiddler.cli.thinking import ENABLE_THINKING
    from fiddler.cli.turn import run_turn
    from fiddler.text.reasoning import ReasoningSplitter

    view = SilentView() if is_silent else PlainView(show_reasoning=show_reasoning)
    with stop_on_interrupt() as stop, view:
        if messages is None:
            return run_turn(llm.stream(text, params), view, stop, splitter=None)
        kwargs = ENABLE_THINKING[think]
        inside = session.opens_reasoning(llm, messages, kwargs)
        stream = llm.stream_chat(messages, params, chat_template_kwargs=kwargs)
        return run_turn(stream, view, stop, splitter=ReasoningSplitter(starts_inside=inside))


def _record(
    llm: session.ChatModel, prompt: str, params: "SamplingParams", turn: "Turn"
) -> dict[str, Any]:
    """What ``--json`` prints."""
    return {
        "model": llm.model_name,
        "revision": llm.revision,
        "seed": llm.config.seed,  # decides where params have none
        "prompt": prompt,
        "text": turn.answer,
        "reasoning": turn.reasoning,
        "finish_reason": turn.finish_reason,
        "stop_reason": turn.stop_reason,
        "params": asdict(params),
        "stats": asdict(turn.stats)
        | {
            "prefill_tokens_per_s": turn.stats.prefill_tokens_per_s,
            "decode_tokens_per_s": turn.stats.decode_tokens_per_s,
            "gpu_hit_rate": turn.stats.gpu_hit_rate,
        },
    }
