"""Bad input gets one clear line: what is wrong, where, what to do. Exit status not 0; nothing lost or half-written.

Every case is a command as a user starts it, in a process of its own. Those marked `cold` start Python as well; the rest
fork from a server that has torch imported already, run the same module as `__main__`, and differ in nothing else.
"""

import json
import multiprocessing
import os
import runpy
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import pytest
import yaml

from mdmtrain.checkpoint import store
from tests.conftest import ROOT, read_metrics, write_config

WARM = multiprocessing.get_context("forkserver")
LIMIT = 240  # seconds for one command, on a busy machine


# ---- running a command


@dataclass(frozen=True)
class Outcome:
    status: int
    out: str
    err: str

    def refusal(self) -> str:
        """The one line that says what is wrong. Warnings of ours may stand before it; nothing else may."""
        assert self.status not in (0, None), self
        *before, last = self.err.splitlines()
        assert last.startswith("error: ") and all(line.startswith("WARNING: ") for line in before), self.err
        return last


def cold(module: str, arguments: list[str], _files: Path, launcher: tuple[str, ...] = ()) -> Outcome:
    command = [sys.executable, *launcher, "-m", f"mdmtrain.{module}", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=LIMIT)
    return Outcome(done.returncode, done.stdout, done.stderr)


def two_ranks(module: str, arguments: list[str], files: Path) -> Outcome:
    return cold(module, arguments, files, ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"))


def warm(module: str, arguments: list[str], files: Path) -> Outcome:
    out, err = files.with_suffix(".out"), files.with_suffix(".err")
    process = WARM.Process(target=_as_main, args=(f"mdmtrain.{module}", arguments, str(out), str(err)))
    process.start()
    process.join(LIMIT)
    if process.is_alive():
        process.kill()
        process.join()
    return Outcome(process.exitcode, out.read_text(), err.read_text())


def _as_main(module: str, arguments: list[str], out: str, err: str) -> None:
    for path, descriptor in ((out, 1), (err, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


@pytest.fixture(scope="module")
def server():
    """The server of the warm commands, with one thread per process."""
    WARM.set_forkserver_preload(["mdmtrain.checkpoint.run_folder", "mdmtrain.data.loader", "mdmtrain.monitor.metrics"])
    with patch.dict(os.environ, OMP_NUM_THREADS="1"):
        multiprocessing.forkserver.ensure_running()


# ---- what there is before something goes wrong


@pytest.fixture(scope="module")
def finished(server, corpus, tmp_path_factory) -> Path:
    """A finished run of six steps with its three checkpoints; config.yaml lies beside it."""
    folder = tmp_path_factory.mktemp("finished")
    tree = {
        "run": {"dir": str(folder / "run"), "seed": 5, "steps": 6, "global_batch": 8, "micro_batch": 4},
        "model": {"d_model": 32, "n_layers": 1, "n_heads": 2, "n_kv_heads": 1, "d_ff": 64},
        "data": {"sources": [{"path": str(corpus)}], "sequence_length": 32, "workers": 0},
        "optim": {"lr": 3e-3, "ema_decay": 0.9},
        "checkpoint": {"save_every": 2, "keep_last": 3},
        "monitor": {"log_every": 1, "tensorboard": False},
        "eval": {"every": 6, "rows": 8, "samples": 1, "batch": 8},
    }
    done = warm("train", [str(write_config(tree, folder / "config.yaml"))], folder / "train")
    assert done.status == 0 and not done.err, done.err
    assert len(store.complete_checkpoints(folder / "run")) == 3
    return folder / "run"


@pytest.fixture(scope="module")
def other_corpus(tmp_path_factory) -> Path:
    """Prepared with another tokenizer."""
    out = tmp_path_factory.mktemp("data") / "other"
    source = Path(sysconfig.get_paths()["stdlib"]) / "asyncio"
    options = ["--include", "*.py", "--vocab-size", "300", "--validation-fraction", "0.2", "--workers", "1"]
    command = [sys.executable, str(ROOT / "tools/prepare_data.py"), str(source), *options, "--out", str(out)]
    subprocess.run(command, check=True, capture_output=True)
    return out


class Lab:
    """One case's folder. Whatever lies in it when the command starts must lie there unchanged when it has failed."""

    def __init__(self, folder: Path, finished: Path, corpus: Path, other_corpus: Path, stack: ExitStack):
        self.folder, self.finished, self.corpus, self.other_corpus = folder, finished, corpus, other_corpus
        self.stack = stack  # closed after the command
        self.run, self.newest = folder / "run", "checkpoints/step-00000006"

    def train(self, *overrides: str) -> list[str]:
        """Arguments of the finished run's training, in this folder."""
        return [str(self.finished.parent / "config.yaml"), f"run.dir={self.run}", *overrides]

    def resume(self, *overrides: str) -> list[str]:
        """The same, where the run is already there and is to go on."""
        self.copy_run()
        return self.train("run.steps=8", *overrides)

    def copy_run(self) -> Path:
        return Path(shutil.copytree(self.finished, self.run))

    def copy_checkpoint(self) -> Path:
        return Path(shutil.copytree(self.finished / self.newest, self.folder / "checkpoint"))

    def copy_corpus(self) -> Path:
        return Path(shutil.copytree(self.corpus, self.folder / "corpus"))

    def file(self, name: str, content: str | bytes) -> Path:
        path = self.folder / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    def state(self) -> dict[str, bytes | None]:
        """Every file and folder here, but for the lock and the logs of a run folder. A new run folder counts."""
        return {
            str(path.relative_to(self.folder)): path.read_bytes() if path.is_file() else None
            for path in sorted(self.folder.rglob("*"))
            if path.name != ".lock" and "logs" not in path.parts
        }


def sources(*folders: Path, weights: tuple[float, ...] = (1.0, 1.0)) -> str:
    listed = [{"path": str(folder), "weight": weight} for folder, weight in zip(folders, weights, strict=False)]
    return f"data.sources={json.dumps(listed)}"


def cut(file: Path, to: float = 0.5) -> Path:
    os.truncate(file, int(file.stat().st_size * to))
    return file


def flip(file: Path) -> Path:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    return file


def blank(file: Path) -> None:
    file.write_bytes(bytes(file.stat().st_size))


def edit_json(file: Path, edit: Callable[[dict], None]) -> Path:
    content = json.loads(file.read_text())
    content.pop("own_crc32", None)  # or every edit would be found by it
    edit(content)
    file.write_text(json.dumps(content))
    return file


def shard(checkpoint: Path) -> Path:
    return next(checkpoint.glob("*.safetensors"))


# ---- the cases


@dataclass(frozen=True)
class Case:
    module: str
    make: Callable[[Lab], list[str]]  # damages what it wants to in its lab and gives the command's arguments
    words: tuple[str, ...]  # all in the error line; {lab} is the case's folder
    start: Callable[[str, list[str], Path], Outcome]


CASES: dict[str, Case] = {}


def case(module: str, *words: str, start=warm):
    def register(make: Callable[[Lab], list[str]]):
        CASES[make.__name__] = Case(module, make, words, start)
        return make

    return register


# -- configuration


@case("train", "unknown key 'optim.lrr'", "did you mean 'optim.lr'?", "config.yaml", start=cold)
def key_with_a_typing_mistake(lab):
    return lab.train("optim.lrr=1")


@case("train", "'run.steps'", "valid integer", 'got "many"')
def value_of_a_wrong_type(lab):
    return lab.train("run.steps=many")


@case("train", "'optim.lr' is missing", "optim.lr=VALUE")
def required_key_missing(lab):
    tree = yaml.safe_load((lab.finished.parent / "config.yaml").read_text())
    del tree["optim"]["lr"]
    return [str(write_config(tree, lab.folder / "config.yaml")), f"run.dir={lab.run}"]


@case("train", "cannot read configuration {lab}/nowhere.yaml", "No such file", start=cold)
def no_configuration_file(lab):
    return [str(lab.folder / "nowhere.yaml")]


@case("train", "CONFIG", "required", "--help")
def no_argument_at_all(lab):
    return []


@case("train", "{lab}/broken.yaml line 2", "not valid YAML")
def configuration_is_not_yaml(lab):
    return [str(lab.file("broken.yaml", "run:\n  dir: a: b\n"))]


@case("train", "{lab}/latin.yaml", "not UTF-8")
def configuration_is_not_utf8(lab):
    return [str(lab.file("latin.yaml", "run: {dir: caf\u00e9}".encode("latin-1")))]


@case("train", "{lab}/twice.yaml line 3", "'seed' twice")
def key_given_twice(lab):
    return [str(lab.file("twice.yaml", "run:\n  seed: 1\n  seed: 2\n"))]


@case("train", "run.micro_batch=3", "8 rows", "choose one of [1, 2, 4, 8]")
def micro_batch_that_does_not_divide(lab):
    return lab.train("run.micro_batch=3")


@case("train", "run.global_batch=9", "2 ranks", "multiple of 2", start=two_ranks)
def global_batch_that_does_not_divide_over_the_ranks(lab):
    return lab.train("run.global_batch=9")


# -- model


@case("train", "model.preset='9t'", "unknown", "170m")
def unknown_preset(lab):
    return lab.train("model.preset=9t")


@case("train", "model.d_ff missing", "model.preset")
def model_without_a_dimension(lab):
    return lab.train("model.d_ff=null")


@case("train", "model.d_model=32", "model.n_heads=3", "or set model.head_dim")
def heads_that_do_not_divide_the_width(lab):
    return lab.train("model.n_heads=3")


@case("train", "model.n_heads=4", "multiple of model.n_kv_heads=3")
def key_value_heads_that_do_not_divide_the_heads(lab):
    return lab.train("model.n_heads=4", "model.n_kv_heads=3")


@case("train", "model.vocab_size=500", "tokenizer's 512", "remove the setting")
def vocabulary_smaller_than_the_tokenizer(lab):
    return lab.train("model.vocab_size=500")


# -- data


@case("train", "no prepared data at {lab}/nowhere", "tools/prepare_data.py INPUT... --out", start=cold)
def data_folder_missing(lab):
    return lab.train(sources(lab.folder / "nowhere"))


@case("train", "{lab}/corpus", "no manifest.json", "prepare the data again")
def data_folder_unfinished(lab):
    (lab.copy_corpus() / "manifest.json").unlink()
    return lab.train(sources(lab.folder / "corpus"))


@case("train", "{lab}/corpus/train-00000.bin", "bytes, the manifest says", "prepare the data again")
def shard_truncated(lab):
    cut(lab.copy_corpus() / "train-00000.bin")
    return lab.train(sources(lab.folder / "corpus"))


@case("train", "{lab}/corpus/train-00000.bin was altered", "sha256", "prepare the data again")
def shard_altered(lab):
    flip(lab.copy_corpus() / "train-00000.bin")
    return lab.train(sources(lab.folder / "corpus"))


@case("train", "{lab}/corpus/manifest.json was altered", "prepare the data again")
def manifest_altered(lab):
    def claim_more(manifest):
        manifest["splits"]["train"]["tokens"] += 1

    edit_json(lab.copy_corpus() / "manifest.json", claim_more)
    return lab.train(sources(lab.folder / "corpus"))


@case("train", "{lab}/corpus/tokenizer.model", "not the tokenizer that made this data", "prepare the data again")
def tokenizer_replaced(lab):
    shutil.copyfile(lab.other_corpus / "tokenizer.model", lab.copy_corpus() / "tokenizer.model")
    return lab.train(sources(lab.folder / "corpus"))


@case("train", "other and ", "corpus have different tokenizers", "--tokenizer")
def sources_with_different_tokenizers(lab):
    return lab.train(sources(lab.corpus, lab.other_corpus))


@case(
    "train", "corpus: the validation split has", "data.sequence_length=200000", "shorten the rows or prepare more text"
)
def rows_longer_than_a_split(lab):
    return lab.train("data.sequence_length=200000")


@case("train", "data.sources weights", "0.333333333", "round them")
def weights_of_a_very_long_period(lab):
    return lab.train(sources(lab.corpus, lab.corpus, weights=(0.333333333, 0.7)))


# -- run folder


@case("train", "{lab}/run is in use by process", "on ", "choose another run.dir", start=cold)
def run_folder_in_use(lab):
    lab.copy_run()
    program = "import sys; from mdmtrain.checkpoint.run_lock import RunLock, Path; lock = RunLock(Path(sys.argv[1]))"
    holder = subprocess.Popen(
        [sys.executable, "-c", program + "; print('held', flush=True); sys.stdin.read()", str(lab.run)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    lab.stack.enter_context(holder)
    lab.stack.callback(holder.kill)
    assert holder.stdout.readline() == "held\n"
    return lab.train("run.steps=8")


@case("train", "{lab}/file/run: cannot write: Not a directory", "choose another place")
def run_folder_below_a_file(lab):
    return lab.train(f"run.dir={lab.file('file', '') / 'run'}")


@case("train", "cannot resume {lab}/run/checkpoints/step-00000006", "'d_model': 32", "not {'d_model': 64, ", start=cold)
def run_of_another_model(lab):
    return lab.resume("model.d_model=64")


@case("train", "cannot resume {lab}/run/checkpoints", "seed is 5, not 6", "another run.dir")
def run_of_another_seed(lab):
    return lab.resume("run.seed=6")


@case("train", "cannot resume {lab}/run/checkpoints", "global_batch is 8, not 16", "with checkpoint.allow_changed=")
def run_of_another_batch(lab):
    return lab.resume("run.global_batch=16")


@case("train", "cannot resume {lab}/run/checkpoints", "data is [[", "another run.dir")
def run_on_other_data(lab):
    return lab.resume(sources(lab.corpus, lab.corpus))


@case("train", "{lab}/corpus/train-00001.bin is missing", "prepare the data again")
def shard_lost_between_stop_and_resume(lab):
    (lab.copy_corpus() / "train-00001.bin").unlink()
    return lab.resume(sources(lab.folder / "corpus"))


@case("train", "cannot resume {lab}/run/checkpoints", "optim.ema_decay", "use the setting it was trained with")
def run_with_its_average_switched_off(lab):
    return lab.resume("optim.ema_decay=null")


@case("train", "{lab}/run already contains a run", "checkpoint.resume=never", "choose another run.dir")
def run_that_must_be_new(lab):
    return lab.resume("checkpoint.resume=never")


@case("train", "{lab}/run/checkpoints: all its checkpoints are damaged", "another run.dir")
def run_with_damaged_checkpoints_only(lab):
    arguments = lab.resume()
    for checkpoint in store.complete_checkpoints(lab.run):
        cut(shard(checkpoint))
    return arguments


@case("train", "{lab}/nowhere: no such run, checkpoint or exported folder", start=cold)
def initial_weights_missing(lab):
    return lab.train(f"checkpoint.init_from={lab.folder / 'nowhere'}")


@case("train", "checkpoint.init_from=", "step-00000006", "'n_layers': 1", "not {'n_layers': 2}", "start from")
def initial_weights_of_another_model(lab):
    return lab.train(f"checkpoint.init_from={lab.finished}", "model.n_layers=2")


# -- checkpoints


@case("evaluate", "{lab}/checkpoint", "no meta.json", "name a run, ", start=cold)
def checkpoint_without_its_marker(lab):
    (lab.copy_checkpoint() / "meta.json").unlink()
    return [str(lab.folder / "checkpoint")]


@case("evaluate", "{lab}/run", "no complete checkpoint", "train it first")
def run_without_a_checkpoint(lab):
    shutil.rmtree(lab.copy_run() / "checkpoints")
    return [str(lab.run)]


@case("evaluate", ".safetensors", "{lab}/checkpoint", "bytes instead of", "use another")
def checkpoint_truncated(lab):
    cut(shard(lab.copy_checkpoint()))
    return [str(lab.folder / "checkpoint")]


@case("evaluate", "cannot read checkpoint {lab}/checkpoint", "use another")
def checkpoint_with_a_rubbish_index(lab):
    edit_json(lab.copy_checkpoint() / "meta.json", lambda meta: meta["layout"]["tensors"].pop("model.norm.weight"))
    return [str(lab.folder / "checkpoint")]


@case("generate", "{lab}/checkpoint/meta.json", "damaged", "use another checkpoint", start=cold)
def marker_damaged(lab):
    cut(lab.copy_checkpoint() / "meta.json")
    return [str(lab.folder / "checkpoint")]


@case("generate", "{lab}/checkpoint/meta.json", "incomplete", "use another checkpoint")
def marker_incomplete(lab):
    edit_json(lab.copy_checkpoint() / "meta.json", lambda meta: meta.pop("identity"))
    return [str(lab.folder / "checkpoint")]


@case("generate", "{lab}/checkpoint/meta.json", "format version 99", "reads 1 and 2")
def checkpoint_of_another_format(lab):
    edit_json(lab.copy_checkpoint() / "meta.json", lambda meta: meta.update(format_version=99))
    return [str(lab.folder / "checkpoint")]


@case("generate", "{lab}/checkpoint/tokenizer.model", "not the tokenizer", "use another checkpoint")
def checkpoint_with_another_tokenizer(lab):
    other, mine = lab.other_corpus / "tokenizer.model", lab.copy_checkpoint() / "tokenizer.model"
    shutil.copyfile(other, mine)
    edit_json(mine.with_name("meta.json"), lambda meta: meta["files"].update({mine.name: mine.stat().st_size}))
    return [str(lab.folder / "checkpoint")]


@case("train", "cannot read checkpoint {lab}/run/checkpoints/step-00000006", "use another one", "the one before it")
def checkpoint_with_rubbish_inside(lab):
    """As old as checksums are not: a newer checkpoint is passed over."""
    arguments = lab.resume()
    blank(shard(lab.run / lab.newest))
    edit_json(lab.run / lab.newest / "meta.json", lambda meta: meta.pop("crc32"))
    return arguments


# -- evaluate


@case("evaluate", "--rows must be at least 1")
def no_rows(lab):
    return [str(lab.finished), "--rows", "0"]


@case("evaluate", "--rows", "'few'", "--help", start=cold)
def rows_that_are_no_number(lab):
    return [str(lab.finished), "--rows", "few"]


@case("evaluate", "no split 'tset'", "train, validation")
def unknown_split(lab):
    return [str(lab.finished), "--split", "tset"]


@case("evaluate", "the validation split has", "less than one row of data.sequence_length=200000", "prepare more text")
def rows_longer_than_the_split_to_evaluate(lab):
    def lengthen(meta):
        meta["config"]["data"]["sequence_length"] = 200_000

    edit_json(lab.copy_checkpoint() / "meta.json", lengthen)
    return [str(lab.folder / "checkpoint")]


@case("evaluate", "other", "another tokenizer than the model's", "prepare it again, with the folder")
def data_of_another_tokenizer(lab):
    return [str(lab.finished), "--data", str(lab.other_corpus)]


@case("evaluate", "no weight average", "leave out --weights")
def no_average_to_evaluate(lab):
    edit_json(lab.copy_checkpoint() / "meta.json", lambda meta: meta.update(has_average=False))
    return [str(lab.folder / "checkpoint"), "--weights", "average"]


@case("evaluate", "--json: cannot write {lab}/nowhere/numbers.json", "missing")
def numbers_into_a_missing_folder(lab):
    return ["a-run-to-look-for-later", "--json", str(lab.folder / "nowhere/numbers.json")]


@case("evaluate", "{lab}/nowhere.txt: no such file", "check the path")
def text_that_is_missing(lab):
    return [str(lab.finished), "--data", str(lab.folder / "nowhere.txt")]


@case("evaluate", "{lab}/empty.txt: no text in it")
def text_that_is_empty(lab):
    return [str(lab.finished), "--data", str(lab.file("empty.txt", ""))]


@case("evaluate", "{lab}/bytes.txt:1: not UTF-8 text", "convert")
def text_that_is_no_text(lab):
    file = lab.folder / "bytes.txt"
    file.write_bytes(b"ab\xff" * 100)
    return [str(lab.finished), "--data", str(file)]


@case("evaluate", "{lab}/short.txt", "less than one row of data.sequence_length=32", "--wrap no")
def text_shorter_than_a_row(lab):
    return [str(lab.finished), "--data", str(lab.file("short.txt", "short"))]


@case("evaluate", "{lab}/pairs.jsonl:3: no 'continuation' field")
def pairs_without_a_continuation(lab):
    lines = '{"prefix": "a", "continuation": "b"}\n\n{"prefix": "a"}\n'
    return [str(lab.finished), "--data", str(lab.file("pairs.jsonl", lines))]


@case(
    "evaluate",
    "{lab}/pairs.jsonl:1: longer than the model's rows: prefix (3 tokens with bos)",
    "(30)",
    "exceed the 32 tokens",
    "shorten",
)
def pairs_longer_than_the_model(lab):
    record = json.dumps({"prefix": "\x01\x02", "continuation": "\x03" * 30})
    return [str(lab.finished), "--data", str(lab.file("pairs.jsonl", record))]


@case("evaluate", "--mc-num 7", "systematic", "an even number")
def draws_that_make_no_sweeps(lab):
    return [str(lab.finished), "--estimator", "systematic", "--mc-num", "7"]


@case("evaluate", "--mc-num must be at least 1")
def no_draws(lab):
    return [str(lab.finished), "--mc-num", "0"]


@case("evaluate", "--estimator", "'exact'", "counted", "--help")
def unknown_estimator(lab):
    return [str(lab.finished), "--estimator", "exact"]


@case("evaluate", "--eps must be between 0 and 1")
def eps_that_is_no_rate(lab):
    return [str(lab.finished), "--estimator", "continuous", "--eps", "1.5"]


# -- generate


@case("generate", "the prompt", "40 tokens", "1 x --gen-length 8", "exceed the 32 tokens", "shorten", start=cold)
def prefix_too_long(lab):
    return [str(lab.finished), "--prefix", "\x01" * 39, "--gen-length", "8"]


@case("generate", "--gen-length must be a whole number of at least 1")
def nothing_to_generate(lab):
    return [str(lab.finished), "--gen-length", "0"]


@case("generate", "--block-length 5 does not divide --gen-length 12", "1, 2, 3, 4, 6, 12")
def blocks_that_do_not_fit(lab):
    return [str(lab.finished), "--gen-length", "12", "--block-length", "5"]


@case("generate", "--steps 7 cannot be divided evenly over 4 blocks", "a multiple of 4")
def steps_that_do_not_fit(lab):
    return [str(lab.finished), "--gen-length", "8", "--block-length", "2", "--steps", "7"]


@case("generate", "--remasking", "'best'", "low_confidence", "--help")
def unknown_remasking(lab):
    return [str(lab.finished), "--remasking", "best"]


@case("generate", "--cfg-scale must be 0 or more")
def guidance_below_zero(lab):
    return [str(lab.finished), "--cfg-scale", "-0.5"]


@case("generate", "{lab}/nowhere.jsonl: no such file", "check the path")
def prompts_that_are_missing(lab):
    return [str(lab.finished), "--input", str(lab.folder / "nowhere.jsonl"), "--output", str(lab.folder / "out.jsonl")]


@case(
    "generate",
    "{lab}/in.jsonl:2: a 'text' without <mask>",
    "needs 'text' with <mask> for every gap",
    "'prefix' and 'suffix'",
)
def prompts_without_a_gap(lab):
    file = lab.file("in.jsonl", '{"prefix": "a"}\n{"text": "no gap"}\n')
    return [str(lab.finished), "--input", str(file), "--output", str(lab.folder / "out.jsonl")]


@case("generate", "{lab}/in.jsonl:1: the given text", "2 x --gen-length 16", "exceed the 32 tokens")
def gaps_that_do_not_fit(lab):
    file = lab.file("in.jsonl", '{"text": "a<mask>b<mask>"}\n')
    return [str(lab.finished), "--input", str(file), "--gen-length", "16", "--output", str(lab.folder / "out.jsonl")]


@case("generate", "--input cannot be combined with --prefix or --suffix")
def prompts_twice(lab):
    return [str(lab.finished), "--input", str(lab.file("in.jsonl", '{"prefix": "a"}\n')), "--prefix", "b"]


@case("generate", "--prefix", "utf8_text", "'a\\udcff'", "--help")
def prefix_that_is_no_text(lab):
    return [str(lab.finished), "--prefix", os.fsdecode(b"a\xff"), "--gen-length", "4"]


@case("generate", "--steps must be at least 1")
def no_steps(lab):
    return [str(lab.finished), "--steps", "0"]


@case("generate", "--temperature must be 0 or more")
def temperature_below_zero(lab):
    return [str(lab.finished), "--temperature", "-1"]


@case("generate", "--temperature must be 0 or more", start=cold)
def temperature_that_is_no_number(lab):
    return [str(lab.finished), "--temperature", "nan"]


@case("generate", "--seed must be 0 or more", "2^63")
def seed_too_large(lab):
    return [str(lab.finished), "--seed", str(1 << 64), "--gen-length", "4"]


@case("generate", "--json: cannot write {lab}/file/texts.json", "missing")
def texts_below_a_file(lab):
    return ["a-run-to-look-for-later", "--json", str(lab.file("file", "") / "texts.json")]


# ---- the cases tried


@pytest.fixture(scope="module")
def tried(finished, corpus, other_corpus, tmp_path_factory, request):
    """Every selected case, two at a time: name -> (lab, outcome, state before, state after)."""
    root = tmp_path_factory.mktemp("labs")

    def attempt(name: str) -> tuple[Lab, Outcome, dict, dict]:
        with ExitStack() as stack:
            lab = Lab(root / name, finished, corpus, other_corpus, stack)
            lab.folder.mkdir()
            arguments = CASES[name].make(lab)
            before = lab.state()
            outcome = CASES[name].start(CASES[name].module, arguments, root / f"{name}.out")
            return lab, outcome, before, lab.state()

    selected = [item.callspec.params["name"] for item in request.session.items if item.function is test_one_clear_line]
    with ThreadPoolExecutor(2) as pool:
        yield {name: pool.submit(attempt, name) for name in selected}


@pytest.mark.parametrize("name", CASES)
def test_one_clear_line(tried, name):
    lab, outcome, before, after = tried[name].result()
    if CASES[name].start is two_ranks:  # torchrun adds its own report
        lines = [line for line in outcome.err.splitlines() if line.startswith("error:")]
        assert outcome.status != 0 and len(lines) == 1, outcome.err
        line = lines[0]
        *_, last, frame = outcome.err.splitlines()  # the last thing on the screen is the same line
        assert last.endswith(line) and frame.startswith("====="), outcome.err
    else:
        line = outcome.refusal()
    for word in CASES[name].words:
        assert word.replace("{lab}", str(lab.folder)) in line
    assert before == after


# ---- what goes wrong on the way


@pytest.fixture
def lab(finished, corpus, other_corpus, tmp_path) -> Lab:
    folder = tmp_path / "lab"
    folder.mkdir()
    return Lab(folder, finished, corpus, other_corpus, ExitStack())


def test_a_damaged_checkpoint_is_passed_over_with_a_warning(lab, tmp_path):
    """From the one before it the run comes to the same end."""
    lab.copy_run()
    damaged = cut(shard(lab.run / lab.newest))
    done = warm("train", lab.train(), tmp_path / "x.out")
    assert done.status == 0, done.err
    assert done.err.startswith(f"WARNING: skipping a damaged checkpoint: {damaged}: ") and done.err.count("\n") == 1
    assert f"resumed from {lab.run / 'checkpoints/step-00000004'}" in done.out
    assert read_metrics(lab.run) == read_metrics(lab.finished)
    assert damaged.read_bytes() == (lab.finished / lab.newest / damaged.name).read_bytes()


def test_a_loss_that_is_not_finite_stops_the_run_and_leaves_its_checkpoints(lab, tmp_path):
    arguments = lab.resume("run.steps=40", "optim.lr=1e30", "run.max_skips=3", "checkpoint.save_every=100")
    before = lab.state()
    line = warm("train", arguments, tmp_path / "x.out").refusal()
    assert "3 steps in a row had a non-finite loss" in line
    assert "lower optim.lr" in line and f"{lab.run} resumes from its last checkpoint" in line
    after = lab.state()
    metrics_before, metrics_after = before.pop("run/metrics.jsonl"), after.pop("run/metrics.jsonl")
    assert metrics_after.startswith(metrics_before)
    assert after.pop("run/skipped.jsonl").count(b"\n") >= 3
    assert all(record["skipped"] for record in read_metrics(lab.run)[-3:])
    for state in (before, after):
        assert state.pop("run/config.yaml") and state.pop("run/environment.json")
    history_before, history_after = before.pop("run/history.jsonl"), after.pop("run/history.jsonl")
    assert history_after.startswith(history_before), "a start adds to the history and changes nothing in it"
    assert before == after


@pytest.fixture
def small_disk(lab, tmp_path):
    """A disk for the run folder, with room for one checkpoint and a half; a function that makes it large."""
    size = sum(file.stat().st_size for file in (lab.finished / lab.newest).iterdir())
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size * 3 // 2}", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs needs root")
    try:
        yield disk, lambda: subprocess.run(["mount", "-o", f"remount,size={size * 9}", str(disk)], check=True)
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_a_full_disk_loses_nothing(lab, small_disk, tmp_path):
    """What does not fit is named, the checkpoint before it stays, and the same command goes on from there."""
    disk, enlarge = small_disk
    arguments = lab.train(f"run.dir={disk / 'run'}")
    checkpoint = f"cannot write checkpoint {disk / 'run/checkpoints/step-00000004'}: [Errno 28] No space left on device"
    metrics = f"{disk / 'run'}: cannot write: No space left on device"
    # Beside the training: the disk is full for the metrics too, and either may notice first.
    for asynchronous, lines in (("true", [checkpoint, metrics]), ("false", [checkpoint])):
        line = warm("train", [*arguments, f"checkpoint.asynchronous={asynchronous}"], tmp_path / "full.out").refusal()
        assert any(one in line for one in lines) and ("free disk space" in line or "make room" in line)
        assert [folder.name for folder in (disk / "run/checkpoints").iterdir()] == ["step-00000002"]
        store.read_meta(disk / "run/checkpoints/step-00000002")
    enlarge()
    done = warm("train", arguments, tmp_path / "large.out")
    assert done.status == 0 and "step-00000002" in done.out, done.err
    assert read_metrics(disk / "run") == read_metrics(lab.finished)


def test_a_full_disk_between_checkpoints_names_the_run_folder(lab, small_disk, tmp_path):
    """Something else fills the disk while metrics are written."""
    disk, _ = small_disk
    (disk / "other").write_bytes(bytes(os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize - (1 << 15)))
    rare = ["run.steps=200", "checkpoint.save_every=200", "eval.every=200"]
    arguments = lab.train(f"run.dir={disk / 'run'}", "monitor.tensorboard=true", *rare)
    line = warm("train", arguments, tmp_path / "full.out").refusal()
    assert f"{disk / 'run'}: cannot write: No space left on device: make room" in line
