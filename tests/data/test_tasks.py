"""Made prompts and answers: right by a second reckoning, no prompt in two splits, the same from the same seed."""

import re
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mdmtrain.data.tasks import ASKED, KINDS, LETTERS, SHARES, TABLE, Task, in_words, make_tasks, split_of

WORDS = {  # written out, not derived: what `in_words` must say
    0: "zero", 7: "seven", 10: "ten", 12: "twelve", 19: "nineteen", 20: "twenty", 21: "twenty one", 40: "forty",
    58: "fifty eight", 83: "eighty three", 99: "ninety nine",
}  # fmt: skip
splits = st.sampled_from(list(SHARES))
seeds = st.integers(0, 2**63 - 1)


def right_answer(prompt: str) -> str:
    """The response that a prompt asks for, reckoned from its text alone."""
    if ":" in prompt[:-2]:
        table, asked = prompt[1:-3].split(": ")
        values = dict(re.findall(r"([a-z])(\d)", table))
        assert len(values) in TABLE and 1 <= len(asked.split()) == len(set(asked.split())) <= ASKED
        return "(" + "".join(values[key] for key in asked.split()) + ")"
    name, rest = prompt[1:-3].split(" ", 1)
    if name in ("reverse", "sort", "rotate"):
        letters = rest.split()
        assert len(letters) == len(set(letters)) and len(letters) in LETTERS
        moved = {"reverse": list(reversed(letters)), "sort": sorted(letters), "rotate": [*letters[1:], letters[0]]}
        return "( " + " ".join(moved[name]) + ")"
    numbers = {in_words(n): n for n in range(100)}
    larger, word, smaller = re.fullmatch(r"\((.+) (plus|minus) (.+)\):\n", prompt).groups()
    result = numbers[larger] + numbers[smaller] if word == "plus" else numbers[larger] - numbers[smaller]
    return f"({result:03d})"


def test_numbers_in_words():
    assert {n: in_words(n) for n in WORDS} == WORDS
    assert len({in_words(n) for n in range(100)}) == 100


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
    with pytest.raises(ValueError, match="fewer than 1,100 arithmetic tasks in the test split"):
        make_tasks("test", 3300, 0)


def test_all_sizes_come_up():
    tasks = make_tasks("train", 600, 3)
    sizes = {kind: Counter(len(t.response) for t in tasks if t.kind == kind) for kind in KINDS}
    assert set(sizes["arithmetic"]) == {5}
    assert set(sizes["lookup"]) == {2 + asked for asked in range(1, ASKED + 1)}
    assert set(sizes["transformation"]) == {2 + 2 * letters for letters in LETTERS}


def test_shares_of_the_splits():
    counts = Counter(split_of(Task("", f"{i}", "").prompt) for i in range(20_000))
    for split, share in SHARES.items():
        assert abs(counts[split] / 20_000 - share) < 5 * (share * (1 - share) / 20_000) ** 0.5
