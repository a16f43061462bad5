"""``fiddler generate``, and ``fiddler chat`` on a pipe: what they answer; with a fake model."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from fake_llm import FakeLLM

from fiddler.cli import cli


def run(*arguments: str, stdin: str = "") -> tuple[int, str, str]:
    result = CliRunner().invoke(cli, arguments, input=stdin, prog_name="fiddler")
    return result.exit_code, result.stdout, result.stderr


# --- generate ---


def test_generate_writes_the_answer_and_nothing_else(fake: list[FakeLLM]) -> None:
    code, out, err = run("generate", "hello there")
    assert (code, out) == (0, "You said: hello there\n")
    assert err.startswith("prompt 2 tok")
    assert fake[0].is_closed
    assert fake[0].asked[0][0] == [{"role": "user", "content": "hello there"}]


def test_quiet_generate_says_nothing_else(fake: list[FakeLLM]) -> None:
    assert run("generate", "-q", "hello") == (0, "You said: hello\n", "")


@pytest.mark.parametrize(
    ("arguments", "stdin", "prompt"),
    [
        (["say"], "piped\n", "say\n\npiped"),
        (["-"], "piped\n", "piped"),
        ([], "piped\n", "piped"),
        (["say"], "", "say"),
    ],
)
def test_the_pipe_goes_behind_the_prompt(
    fake: list[FakeLLM], arguments: list[str], stdin: str, prompt: str
) -> None:
    code, _, _ = run("generate", *arguments, stdin=stdin)
    assert code == 0
    assert fake[0].asked[0][0] == [{"role": "user", "content": prompt}]


def test_a_prompt_without_quotes_is_told_of_them(fake: list[FakeLLM]) -> None:
    code, _, err = run("generate", "hello", "world")
    assert code == 2 and not fake and "put it into quotes" in err


def test_an_empty_prompt_is_one_sentence(fake: list[FakeLLM]) -> None:
    code, out, err = run("generate", "-", stdin="\n")
    assert (code, out) == (1, "")
    assert err.startswith("error: the prompt is empty\nhint: ")
    assert not fake, "the model was loaded for nothing"


def test_raw_and_models_without_template_continue_the_text(
    fake: list[FakeLLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    run("generate", "--raw", "once upon")
    monkeypatch.setattr(FakeLLM, "has_chat_template", False)
    run("generate", "a time")
    assert [llm.asked[0][0] for llm in fake] == ["once upon", "a time"]


def test_system_and_think_reach_the_template(fake: list[FakeLLM]) -> None:
    run("generate", "-s", "be brief", "--think", "off", "hello")
    messages, _, kwargs = fake[0].asked[0]
    assert messages[0] == {"role": "system", "content": "be brief"}
    assert kwargs == {"enable_thinking": False}


def test_system_with_raw_is_misuse(fake: list[FakeLLM]) -> None:
    assert run("generate", "--raw", "-s", "x", "hello")[0] == 2


def test_json_is_one_object(fake: list[FakeLLM]) -> None:
    code, out, _ = run("generate", "--json", "--seed", "5", "--max-tokens", "3", "ponder and go on")
    record = json.loads(out)
    assert code == 0
    assert record["seed"] == 5
    assert record["finish_reason"] == "length"
    assert record["params"]["max_tokens"] == 3
    assert record["stats"]["output_tokens"] == 3
    assert (record["text"], record["reasoning"]) == ("", "hmm ")


def test_options_become_the_fields_they_name(fake: list[FakeLLM]) -> None:
    given = "--temperature 0.5 --top-k 9 --stop a --stop b --ignore-eos --vram-gb 0.5 --context 99"
    code, _, err = run("generate", "-m", "org/name", *given.split(), "--offline", "hello")
    assert code == 0, err
    params = fake[0].asked[0][1]
    assert (params.temperature, params.top_k, params.stop) == (0.5, 9, ("a", "b"))
    assert params.ignore_eos
    assert fake[0].options == {
        "model": "org/name",
        "vram_gb": 0.5,
        "max_model_len": 99,
        "offline": True,
    }


def test_options_not_given_leave_the_defaults(fake: list[FakeLLM]) -> None:
    run("generate", "hello")
    assert fake[0].options == {"model": "builtin"}
    assert fake[0].asked[0][1] == fake[0].default_params()


def test_a_bad_parameter_is_one_sentence(fake: list[FakeLLM]) -> None:
    code, _, err = run("generate", "--top-p", "7", "hello")
    assert code == 1
    assert err.startswith("error: top_p must be")


# --- chat on a pipe ---


def test_chat_takes_a_line_as_a_turn(fake: list[FakeLLM]) -> None:
    piped = 'one\n\n/set temperature=0\n"""two\nlines"""\n'
    code, out, err = run("chat", stdin=piped)
    assert (code, out) == (0, "You said: one\nYou said: two\nlines\n")
    assert "\x1b" not in out + err
    assert fake[0].asked[1][1].temperature == 0
    assert fake[0].is_closed


def test_only_a_chats_answers_go_on_to_the_end_of_the_context(fake: list[FakeLLM]) -> None:
    limits = []
    for command, stdin in ((["generate", "hello"], None), (["chat"], "hello\n")):
        for options in ([], ["--max-tokens", "9"]):
            assert run(*command, *options, stdin=stdin)[0] == 0
            limits.append(fake[-1].asked[0][1].max_tokens)
    assert limits == [512, 9, None, 9]
    for command in ("generate", "chat"):
        assert ("[default: 512]" in run(command, "--help")[1]) == (command == "generate")


def test_chat_on_a_pipe_fails_if_a_turn_failed(fake: list[FakeLLM]) -> None:
    code, out, err = run("chat", "-q", stdin="too long\nhello\n")
    assert (code, out) == (1, "You said: hello\n")
    assert err.startswith("error: ")


def test_a_model_without_a_template_cannot_chat_and_is_not_loaded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("fiddler.llm.LLM", lambda **_: pytest.fail("was loaded"))
    folder = tmp_path / "my models"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    code, out, err = run("chat", "-m", str(folder), stdin="hello\n")
    assert (code, out) == (1, "")
    assert "my models has no chat template" in err
    assert f"fiddler generate -m '{folder}' --raw" in " ".join(err.split())


@pytest.mark.parametrize("command", [("generate", "hello"), ("chat",)])
def test_a_shape_without_a_tokenizer_is_refused_before_weights_are_made(
    monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...]
) -> None:
    monkeypatch.setattr("fiddler.llm.LLM", lambda **_: pytest.fail("was loaded"))
    code, out, err = run(*command, "-m", "mixtral-8x7b", "--load-format", "dummy", stdin="hello\n")
    assert (code, out) == (1, "")
    assert "mixtral-8x7b has no tokenizer" in err
