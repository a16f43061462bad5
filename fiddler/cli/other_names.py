"""What options and commands of llama.cpp, Ollama and vLLM are called here."""

import re
from collections.abc import Sequence
from itertools import pairwise, takewhile

import click

from fiddler.cli.options import ENGINE_OPTIONS
from fiddler.errors import BY_OTHER_NAMES

_CONTEXT = "--context is its name here"
_LONGEST = "--max-tokens is its name here"
_ON_GPU = "--vram-gb says how much of the GPU to use, and fiddler plan what then lies where"
_KV_TYPE = "--kv-dtype is its name here, for keys and values alike"
_STEP = "how many tokens a step has follows from the memory, and fiddler plan shows it"
_NO_SERVER = "there is no server yet; fiddler chat is on the terminal, fiddler.LLM in Python"
_DOWNLOADED = "fiddler doctor names the folder of downloaded models"

COMMANDS = {
    "run": "fiddler chat -m MODEL talks with a model, fiddler generate -m MODEL PROMPT asks once",
    "serve": _NO_SERVER,
    "list": _DOWNLOADED,
    "ls": _DOWNLOADED,
    "show": "fiddler plan MODEL shows what there is to know of a model here",
    "download": "fiddler pull downloads a model",
    "help": "fiddler --help lists commands, fiddler COMMAND --help the options of one",
    "version": "fiddler --version",
}

# without dashes, with _ between words
OPTIONS = {
    **dict.fromkeys(("c", "ctx_size", "n_ctx", "num_ctx"), _CONTEXT),
    **dict.fromkeys(("n", "n_predict", "num_predict", "max_new_tokens"), _LONGEST),
    "temp": "--temperature is its name here",
    **dict.fromkeys(("ngl", "gpu_layers", "n_gpu_layers"), _ON_GPU),
    **dict.fromkeys(("ncmoe", "n_cpu_moe", "cmoe", "cpu_moe", "ot", "override_tensor"), _ON_GPU),
    **dict.fromkeys(("gpu_memory_utilization", "cpu_offload_gb"), _ON_GPU),
    **dict.fromkeys(("ctk", "cache_type_k", "ctv", "cache_type_v"), _KV_TYPE),
    **dict.fromkeys(("t", "threads"), "--cpu-threads is its name here"),
    **dict.fromkeys(("b", "batch_size", "ub", "ubatch_size"), _STEP),
    "dev": "--device is its name here",
    "quantization": "--dtype w4g128 quantises experts as they are loaded",
    "max_num_seqs": "--batch is its name here",
    **dict.fromkeys(("hf", "hfr", "hf_repo"), "-m ORG/NAME takes a model from the hub"),
    **dict.fromkeys(("p", "prompt"), "the prompt is an argument: fiddler generate PROMPT"),
    **dict.fromkeys(("f", "file"), "a prompt may come from a pipe: fiddler generate < FILE"),
    **dict.fromkeys(("tp", "tensor_parallel_size"), BY_OTHER_NAMES["tensor_parallel_size"]),
    **dict.fromkeys(("hft", "hf_token"), "--token is its name here"),
    "trust_remote_code": BY_OTHER_NAMES["trust_remote_code"],
    **dict.fromkeys(("host", "port"), _NO_SERVER),
    # what LLM(...) calls otherwise than the commands do
    **{
        option.field: f"{option.flag} is its name here"
        for option in ENGINE_OPTIONS
        if option.flag != f"--{option.field.replace('_', '-')}"
    },
}

# words behind one dash, of which click would make a short option and its value
_WORDS = {
    *(name for name in OPTIONS if len(name) > 1),
    # llama.cpp's without a counterpart
    *("dio", "embd", "fa", "fitc", "fitt", "hff", "lm", "lzm", "mg", "mmp", "nkvo", "nopo", "nr"),
    *("oe", "rpc", "sm", "ts"),
}


def check_words(ctx: click.Context, words: Sequence[str]) -> None:
    """Raise NoSuchOption for a word like ``-ngl``, which is no ``-n`` with the value ``gl``.

    ``words`` are those of ``ctx``'s command; what an option takes as its value is left alone.
    """
    options = [one for one in ctx.command.params if isinstance(one, click.Option)]
    own = {flag for one in options for flag in one.opts}
    taking = {flag for one in options if not one.is_flag and not one.count for flag in one.opts}
    for before, word in pairwise(["", *takewhile(lambda word: word != "--", words)]):
        typed = word.partition("=")[0]
        is_foreign = typed.startswith("-") and typed[1:] in _WORDS and typed not in own
        if is_foreign and before not in taking:
            raise click.NoSuchOption(typed, ctx=ctx)


def known_option(error: click.NoSuchOption, words: Sequence[str]) -> click.NoSuchOption | None:
    """``error`` with what its option is called here; None where nothing more is known of it.

    ``words`` are the command line: of ``-ngl`` click has looked for ``-n`` only.
    """
    name = error.option_name
    typed = name if name.startswith("--") else _whole_word(name, words)
    said = OPTIONS.get(typed.lstrip("-").replace("-", "_"), "")
    own = {flag for one in error.ctx.command.params for flag in one.opts} if error.ctx else set()
    if not said or not own.issuperset(re.findall(r"(?<!\w)--[a-z-]+", said)):
        return None if typed == name else click.NoSuchOption(typed, ctx=error.ctx)
    return click.NoSuchOption(typed, message=f"No such option {typed!r}: {said}.", ctx=error.ctx)


def _whole_word(name: str, words: Sequence[str]) -> str:
    """What was typed where click has found no ``-n``: the word that begins so, as ``-ngl``."""
    return next((word for word in words if word.startswith(name)), name).partition("=")[0]
