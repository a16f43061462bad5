"""``fiddler chat``: a conversation on the terminal, or one turn for each line of a pipe."""

import contextlib
from dataclasses import replace
from typing import Any

import click

from fiddler.cli import session
from fiddler.cli.options import engine_options, model_argument, reasoning_options, sampling_options
from fiddler.config import BUILTIN


@click.command()
@model_argument(default=BUILTIN)
@reasoning_options
@click.option("--no-history", is_flag=True, help="Do not keep what is typed for later chats.")
@click.option("-q", "--quiet", is_flag=True, help="No statistics after an answer.")
@sampling_options(longest="to the end of the context")
@engine_options
@click.pass_context
def command(
    ctx: click.Context,
    model: str,
    system: str | None,
    think: str,
    hide_thinking: bool,
    no_history: bool,
    quiet: bool,
    sampling: dict[str, Any],
    engine: dict[str, Any],
) -> None:
    """Talk with MODEL. /help in the chat lists its commands.

    It is 'builtin', a folder, or ORG/NAME[@REVISION] on the hub.

    From a pipe every line is a turn, and the answers are plain text.
    """
    from fiddler.cli.chat_actions import TABLE
    from fiddler.cli.chat_input import is_interactive, piped_turns, typed_turns
    from fiddler.cli.chat_session import Chat
    from fiddler.cli.conversation import Conversation
    from fiddler.cli.interrupts import silent_keyboard

    with silent_keyboard():
        opened = session.open_llm(model=model, must_chat=True, **engine)
    with contextlib.closing(opened) as llm:
        defaults = replace(llm.default_params(), max_tokens=None)
        chat = Chat(
            llm=llm,
            defaults=defaults,
            params=replace(defaults, **sampling),
            conversation=Conversation(system=system or ""),
            think=think,
            show_reasoning=not hide_thinking,
            is_quiet=quiet,
            is_interactive=is_interactive(),
            is_debug=bool(ctx.find_root().params.get("debug")),
        )
        if chat.is_interactive:
            if not quiet:
                _greet(chat.llm)
            chat.run(typed_turns(TABLE, keep_history=not no_history))
        elif not chat.run(piped_turns()):
            ctx.exit(1)


def _greet(llm: session.ChatModel) -> None:
    from fiddler._version import __version__
    from fiddler.cli.console import error_width, note
    from fiddler.cli.stats_line import SEPARATOR, folded

    parts = f"fiddler {__version__}", llm.model_name, "/help lists commands, Ctrl-D leaves"
    head = folded(SEPARATOR.join(parts), error_width())
    for line in filter(None, (*head, _placement_line(llm), _tip(llm))):
        note(line)


def _placement_line(llm: session.ChatModel) -> str:
    """How many experts have their GPU side and by what they were chosen; empty without one."""
    from offload.plan import GpuSide

    plan, config = llm.plan, llm.model_config
    if plan.gpu_side is GpuSide.NONE:
        return ""
    is_uniform = plan.popularity_name == "uniform"
    chosen = "no profile" if is_uniform else f"placed by {plan.popularity_name}"
    num_moe_layers = sum(config.is_moe_layer(layer) for layer in range(config.num_layers))
    return (
        f"{plan.placement.num_resident:,} of {config.num_experts * num_moe_layers:,} experts "
        f"on the GPU side, {chosen}"
    )


def _tip(llm: session.ChatModel) -> str:
    """What is faster where bfloat16 experts have no room on a GPU, and costs nothing."""
    from offload.plan import GpuSide

    plan, config = llm.plan, llm.model_config
    is_plain = config.dtype == "bfloat16" and config.packed is None and llm.config.dtype == "auto"
    if not is_plain or plan.gpu_side is not GpuSide.CUDA or not plan.memory.cpu_experts:
        return ""
    return "--dtype bf12 keeps these experts in 12 bits: nothing is lost, and more have room there"
