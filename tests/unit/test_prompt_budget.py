"""The time between two tokens while prompts come in, by a clock that the tests turn."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fiddler.engine.prompt_budget import LEAST, PromptBudget

ROOM = 4096


class Machine:
    """Takes ``plain_s`` for a step of decodes, ``fixed_s`` more if a prompt is in it, and a time
    a token.
    """

    def __init__(self, plain_s: float, fixed_s: float, token_s: float) -> None:
        self.plain_s, self.fixed_s, self.token_s = plain_s, fixed_s, token_s

    def step_s(self, prompt_tokens: int) -> float:
        more_s = self.fixed_s + self.token_s * prompt_tokens if prompt_tokens else 0.0
        return self.plain_s + more_s

    def run(self, budget: PromptBudget, num_steps: int, *, plain_between: int = 0) -> list[int]:
        """Prompt tokens of each step, with steps without a prompt before each."""
        chosen = []
        for _ in range(num_steps):
            for _ in range(plain_between):
                budget.observe(2, 0, self.step_s(0))
            chosen.append(budget.most_tokens(2, ROOM))
            budget.observe(2, chosen[-1], self.step_s(chosen[-1]))
        return chosen


def test_without_a_target_the_room_is_used() -> None:
    budget = PromptBudget(None)
    budget.observe(1, 100, 9.0)
    assert budget.most_tokens(3, ROOM) == ROOM


def test_nobody_waits_for_a_token_while_nobody_decodes() -> None:
    budget = PromptBudget(0.001)
    budget.observe(0, 512, 9.0)
    assert budget.most_tokens(0, ROOM) == ROOM


def test_it_starts_carefully_and_grows_to_the_target() -> None:
    machine = Machine(0.02, 0.0, 0.001)
    chosen = machine.run(PromptBudget(0.22), 12, plain_between=1)
    assert chosen[0] == LEAST
    assert all(b <= 2 * a for a, b in itertools.pairwise(chosen))
    assert chosen[-1] == pytest.approx(200, abs=2)
    assert max(map(machine.step_s, chosen)) <= 0.2211


def test_chunks_of_streamed_experts_grow_though_the_first_are_dear() -> None:
    machine = Machine(0.04, 0.65, 0.00005)  # Qwen3-30B-A3B of which 5 of 8 experts are streamed
    chosen = machine.run(PromptBudget(0.8), 30, plain_between=1)
    assert chosen[14] > 900 and max(map(machine.step_s, chosen)) <= 0.81


def test_a_target_that_cannot_be_met_leaves_prompts_the_least() -> None:
    assert Machine(0.04, 0.65, 0.0).run(PromptBudget(0.1), 9)[3:] == [LEAST] * 6
    assert Machine(0.5, 0.0, 0.0).run(PromptBudget(0.1), 9, plain_between=1)[3:] == [LEAST] * 6


def test_one_step_that_compiled_is_forgotten() -> None:
    budget, machine = PromptBudget(0.22), Machine(0.02, 0.0, 0.001)
    machine.run(budget, 9, plain_between=1)
    budget.observe(2, 150, 30.0)
    assert budget.most_tokens(2, ROOM) > 150
    budget.observe(2, 0, 30.0)  # a graph was captured
    assert budget.most_tokens(2, ROOM) > 150


def test_a_slower_machine_gets_smaller_chunks() -> None:
    budget = PromptBudget(0.22)
    before = Machine(0.02, 0.0, 0.001).run(budget, 9, plain_between=1)[-1]
    after = Machine(0.02, 0.0, 0.004).run(budget, 9, plain_between=1)[-1]
    assert before == pytest.approx(4 * after, rel=0.05)


@given(
    st.floats(0.001, 1),
    st.tuples(st.floats(0, 0.5), st.floats(0, 1), st.floats(0, 0.01)),
    st.integers(1, ROOM),
)
def test_it_always_goes_on_and_never_beyond_the_room(
    target_s: float, times: tuple[float, float, float], room: int
) -> None:
    budget, machine = PromptBudget(target_s), Machine(*times)
    for _ in range(12):
        tokens = budget.most_tokens(1, room)
        assert min(room, LEAST) <= tokens <= room
        budget.observe(1, tokens, machine.step_s(tokens))


@given(
    st.tuples(st.floats(0.001, 0.1), st.floats(0, 1), st.floats(1e-5, 0.01)),
    st.floats(1.1, 20),
    st.lists(st.floats(0.9, 1.1), min_size=40, max_size=40),
)
def test_with_noise_it_stays_near_the_target(
    times: tuple[float, float, float], easy: float, noise: list[float]
) -> None:
    """A target that chunks of ``LEAST`` tokens meet; steps differ by a tenth."""
    machine = Machine(*times)
    target_s = easy * machine.step_s(LEAST)
    budget, taken_s = PromptBudget(target_s), []
    for factor in noise:
        budget.observe(1, 0, machine.step_s(0) * factor)
        tokens = budget.most_tokens(1, ROOM)
        taken_s.append(machine.step_s(tokens) * factor)
        budget.observe(1, tokens, taken_s[-1])
    assert max(taken_s) <= 2.5 * target_s
    assert sum(taken_s) / len(taken_s) <= 1.2 * target_s
