"""Made prompts and answers: right by a second reckoning, no prompt in two splits, the same from the same seed."""

import re
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mdmtrain.data.tasks import ASKED, KINDS, LETTERS, SHARES, TABLE, TERMS, Task, make_tasks, split_of

NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
splits = st.sampled_from(list(SHARES))
seeds = st.integers(0, 2**63 - 1)


def right_answer(prompt: str) -> str:
    """The response that a prompt asks for, reckoned from its text alone."""
    name, *rest = re.fullmatch(r"\((.+)\):\n", prompt).group(1).split()
    if name == "codes":
        assert len(rest) in ASKED
        return "(" + "".join(TABLE[10 * "abcdefghij".index(letter) + int(digit)] for letter, digit in rest) + ")"
    if name in ("reverse", "sort", "rotate"):
        assert len(rest) == len(set(rest)) and len(rest) in LETTERS
        moved = {"reverse": list(reversed(rest)), "sort": sorted(rest), "rotate": [*rest[1:], rest[0]]}
        return "( " + " ".join(moved[name]) + ")"
    numbers = [name, *rest][::2]
    assert len(numbers) in TERMS and set(rest[::2]) == {"plus"}
    return f"({sum(NUMBERS.index(number) for number in numbers):02d})"


@settings(max_examples=40, deadline=None)
@given(split=splits, seed=seeds)
def test_answers_are_right_and_kinds_take_turns(split, seed):
    tasks = make_tasks(split, 12, seed)
    assert [task.kind for task in tasks] == list(KINDS) * 4
    for task in tasks:
        assert task.response == right_answer(task.prompt), task
        assert split_of(task.prompt) == split


@settings(max_examples=30, deadline=None)
@given(one=seeds, other=seeds, sizes=st.tuples(*[st.integers(3, 40)] * 3))
def test_splits_are_disjoint_whatever_their_seeds_and_sizes(one, other, sizes):
    prompts = {
        split: {t.prompt for seed in (one, other) for t in make_tasks(split, n, seed)}
        for split, n in zip(SHARES, sizes, strict=True)
    }
    assert sum(map(len, prompts.values())) == len(set().union(*prompts.values()))


@settings(max_examples=10, deadline=None)
@given(split=splits, seed=seeds, fewer=st.integers(1, 30))
def test_a_list_is_a_function_of_its_seed_and_shorter_ones_are_its_beginning(split, seed, fewer):
    tasks = make_tasks(split, 30, seed)
    assert make_tasks(split, fewer, seed) == tasks[:fewer]
    assert make_tasks(split, 30, seed + 1 if seed else 1) != tasks


def test_test_prompts_are_all_different_and_run_out(monkeypatch):
    tasks = make_tasks("test", 600, 0)
    assert len({task.prompt for task in tasks}) == 600
    assert Counter(task.kind for task in tasks) == dict.fromkeys(KINDS, 200)
    monkeypatch.setattr("mdmtrain.data.tasks.FUTILE", 200)
    monkeypatch.setattr("mdmtrain.data.tasks.TERMS", range(1, 3))  # 110 prompts in all splits
    with pytest.raises(ValueError, match="fewer than 100 arithmetic tasks in the test split"):
        make_tasks("test", 300, 0)


def test_all_sizes_come_up():
    tasks = make_tasks("train", 600, 3)
    sizes = {kind: Counter(len(t.response) for t in tasks if t.kind == kind) for kind in KINDS}
    assert {t.prompt.count(" plus ") + 1 for t in tasks if t.kind == "arithmetic"} == set(TERMS)
    assert set(sizes["lookup"]) == {2 + asked for asked in ASKED}
    assert set(sizes["transformation"]) == {2 + 2 * letters for letters in LETTERS}


def test_shares_of_the_splits():
    counts = Counter(split_of(Task("", f"{i}", "").prompt) for i in range(20_000))
    for split, share in SHARES.items():
        assert abs(counts[split] / 20_000 - share) < 5 * (share * (1 - share) / 20_000) ** 0.5
