"""A prompt as the batch takes it: token ids and all settings, within what the model can do."""

from typing import NamedTuple

from fiddler.loading import LoadedModel
from fiddler.prompts import Prompt, check_params, check_prompt, text_and_ids
from fiddler.sampling_params import SamplingParams


class CheckedPrompt(NamedTuple):
    """What is asked, complete and within the model's limits; ``text`` if it came as one."""

    text: str | None
    ids: list[int]
    params: SamplingParams


def checked_prompt(
    prompt: Prompt, params: SamplingParams | None, loaded: LoadedModel
) -> CheckedPrompt:
    """Check one prompt and complete its settings; nothing is queued yet.

    Raises PromptError or ConfigError for what ``loaded`` cannot run.
    """
    files, vocab_size = loaded.files, loaded.files.config.vocab_size
    context_tokens, most = loaded.plan.context_tokens, loaded.files.config.max_position
    check_params(params, vocab_size=vocab_size)
    params = (params or SamplingParams()).with_defaults(files.generation_config)
    text, ids = text_and_ids(prompt)
    if ids is None:
        ids = files.needed_tokenizer.encode(text or "")
    check_prompt(ids, context_tokens=context_tokens, max_position=most, vocab_size=vocab_size)
    if params.stop:
        files.needed_tokenizer  # noqa: B018  stop strings need text: refuse now, not at the first token
    return CheckedPrompt(text, ids, params)
