"""A run on prompts and responses, as a person starts it, with SyRM and a paired arm; and its evaluation."""

import json
import math

import numpy as np
import pytest

from mdmtrain.data.prepare import Options, prepare
from mdmtrain.data.shards import PreparedSplit
from tests.conftest import read_metrics, write_config
from tests.test_commands import run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Words, and the same words again in brackets: a response says little that its prompt has not said."""
    base, generator = tmp_path_factory.mktemp("prompts"), np.random.default_rng(0)
    with open(base / "a.jsonl", "w") as file:
        for i in range(1500):
            text = " ".join(generator.choice(["red", "blue", "cat", "dog"], 3 + 60 * (i % 50 == 0)))
            file.write(json.dumps({"prompt": f"({text}):\n", "response": f"({text})"}) + "\n")
    prepare([base / "a.jsonl"], base / "out", Options(vocab_size=300, validation_fraction=0.1), 1)
    return base / "out"


def test_a_run_on_prompts_and_responses(folder, small_run, tmp_path):
    tree = small_run({
        "run": {"dir": str(tmp_path / "run"), "steps": 40, "global_batch": 16, "micro_batch": 8},
        "data": {"sources": [{"path": str(folder)}], "sequence_length": 24, "workers": 1},
        "diffusion": {"syrm_tokens": ["(", ")", "\n"], "masks": "counted", "views": "mirror", "sampler": "ppots",
                      "min_hits": 1, "refit_every": 10, "bins": 8},
        "eval": {"every": 20, "rows": 40, "samples": 2},
    })  # fmt: skip
    output = run("mdmtrain.train", str(write_config(tree, tmp_path / "config.yaml")))
    split = PreparedSplit(folder, "train")
    too_long = int((split.document_lengths()[0] >= 24).sum())
    assert too_long > 10 and f"prompts with their responses, one in a row of 24; {too_long} do not fit" in output
    records = read_metrics(tmp_path / "run")
    training, evaluations = ([r for r in records if ("split" in r) == kind] for kind in (False, True))
    assert all(0 < r["masked_fraction"] < 1 and math.isfinite(r["nelbo"]) and not r["skipped"] for r in training)
    # By eligible token: at first every one costs the logarithm of the vocabulary, however few they are in a row.
    assert training[0]["nelbo"] == pytest.approx(math.log(300), rel=0.25)
    assert training[0]["loss"] < 0.7 * training[0]["nelbo"]
    assert evaluations[1]["nelbo"] < evaluations[0]["nelbo"] < math.log(300)

    file = tmp_path / "evaluation.json"
    run("mdmtrain.evaluate", str(tmp_path / "run"), "--json", str(file))
    result = json.loads(file.read_text())["results"][0]
    assert result["nelbo"] == pytest.approx(evaluations[1]["nelbo"], rel=1e-12)
    validation = PreparedSplit(folder, "validation")
    per_byte = validation.eligible_tokens / validation.bytes / math.log(2)
    assert result["bits_per_byte"] == pytest.approx(result["nelbo"] * per_byte, rel=1e-12)
