"""The statistics line: what it says, what it leaves out, and how it folds."""

from hypothesis import given
from hypothesis import strategies as st

from fiddler.cli.stats_line import SEPARATOR, Totals, folded, stats_line
from fiddler.outputs import RunStats

FULL = RunStats(
    prompt_tokens=512,
    prompt_tokens_cached=92,
    output_tokens=149,
    time_to_first_token_s=0.42,
    prefill_s=2.0,
    decode_s=148 / 11.3,
    expert_tokens_gpu=71,
    expert_tokens_cpu=29,
    peak_vram_bytes=round(21.8 * 2**30),
)
counts = st.integers(0, 10**6)


def test_a_whole_line() -> None:
    assert stats_line(FULL).split(SEPARATOR) == [
        "prompt 512 tok (92 cached) 210 tok/s",
        "decode 149 tok 11.3 tok/s",
        "TTFT 0.4 s",
        "GPU-resident 71 %",
        "VRAM 21.8 GiB",
    ]


def test_what_does_not_apply_is_left_out() -> None:
    one_token = RunStats(
        prompt_tokens=3, output_tokens=1, time_to_first_token_s=0.012, expert_tokens_cpu=9
    )
    assert stats_line(one_token).split(SEPARATOR) == ["prompt 3 tok", "decode 1 tok", "TTFT 12 ms"]


@given(width=st.integers(1, 200))
def test_folding_breaks_at_separators_only(width: int) -> None:
    line = stats_line(FULL)
    pieces = folded(line, width)
    assert SEPARATOR.join(pieces) == line
    assert all(len(piece) <= width or SEPARATOR not in piece for piece in pieces)


@given(turns=st.lists(st.tuples(counts, counts, counts), max_size=5))
def test_totals_add_up(turns: list[tuple[int, int, int]]) -> None:
    totals = Totals()
    for prompt, cached, output in turns:
        totals = totals.plus(
            RunStats(
                prompt_tokens=prompt,
                prompt_tokens_cached=cached,
                output_tokens=output,
                time_to_first_token_s=1.0,
                decode_s=2.0,
            )
        )
    assert totals.num_turns == len(turns)
    assert totals.prompt_tokens == sum(prompt for prompt, _, _ in turns)
    assert totals.prompt_tokens_cached == sum(cached for _, cached, _ in turns)
    assert totals.output_tokens == sum(output for _, _, output in turns)
    assert totals.busy_s == 3.0 * len(turns)


def test_totals_in_words() -> None:
    line = Totals().plus(FULL).line()
    assert line.startswith("1 turn" + SEPARATOR + "prompt 512 tok (92 cached)")
