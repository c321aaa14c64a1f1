"""A run's configuration: what is read, what is refused and how, and the numbers that follow from it."""

import argparse
from pathlib import Path

import pytest
import yaml
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from mdmtrain import config, config_help, yaml12
from mdmtrain.config import Config, resolve
from tests.conftest import ROOT

BASE = """
run: {dir: runs/x, steps: 10, global_batch: 8, micro_batch: 4}
model: {preset: 2m}
data: {sources: [{path: p}], sequence_length: 16}
optim: {lr: 1e-3}
"""


@pytest.fixture
def base(tmp_path):
    path = tmp_path / "base.yaml"
    path.write_text(BASE)
    return str(path)


def built(**run) -> Config:
    """BASE with some fields of its run section changed, without a file."""
    tree = yaml12.parse(BASE, "BASE")
    tree["run"].update(run)
    return config.validate(tree, "BASE")


def refused(*arguments: str) -> str:
    """The message with which `load` refuses: a ValueError of one line."""
    with pytest.raises(ValueError) as caught:
        config.load(list(arguments))
    assert type(caught.value) is ValueError
    message = str(caught.value)
    assert message and "\n" not in message
    return message


# ---- scalars


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *(("1e-3", 1e-3), ("1E+3", 1000.0), (".5", 0.5), ("2.", 2.0), ("-1.5e2", -150.0), ("+3", 3)),
        *(("010", 10), ("-07", -7), ("0", 0), ("1:30", "1:30"), ("1_000", "1_000"), ("0x", "0x")),
        *(("off", "off"), ("yes", "yes"), ("no", "no"), ("On", "On"), ("y", "y"), ("true", True), ("FALSE", False)),
        *(("null", None), ("~", None), ("", None), ("nULL", "nULL"), ("2024-01-31", "2024-01-31"), ("=", "=")),
        *(("'1e-3'", "1e-3"), ("1e", "1e"), ("e3", "e3"), (".", "."), ("1.2.3", "1.2.3"), ("[1, off]", [1, "off"])),
    ],
)
def test_yaml_scalars_are_those_of_1_2(text, value):
    read = yaml12.parse(text, "here")
    assert read == value and type(read) is type(value)


def test_yaml_1_1_would_read_some_of_them_otherwise():
    read = yaml.safe_load("[1e-3, off, 010, 1:30, yes]")
    assert read == ["1e-3", False, 8, 90, True]


@given(st.integers(-(10**30), 10**30))
@settings(deadline=None, derandomize=True)
def test_any_integer_keeps_its_type(number):
    assert yaml12.parse(str(number), "here") == number
    assert isinstance(yaml12.parse(f"{number:+05d}", "here"), int)


@given(st.floats(allow_nan=False, allow_infinity=False))
@settings(deadline=None, derandomize=True)
def test_any_float_survives_its_shortest_form(number):
    read = yaml12.parse(repr(number), "here")
    assert isinstance(read, float) and read == number


# ---- reading and overlaying


def test_defaults_types_and_the_tree(base):
    loaded = config.load([base])
    assert loaded.optim.lr == 1e-3 and loaded.run.seed == 0 and loaded.data.sources[0].path == "p"
    assert loaded.diffusion.eps == 1e-3 and loaded.diffusion.strata == "global"


def test_later_files_and_then_overrides_win_wherever_they_stand(base, tmp_path):
    arm = tmp_path / "arm.yaml"
    arm.write_text("diffusion: {strata: none}\nrun: {seed: 1, steps: 20}\ndata: {sources: [{path: q}, {path: r}]}")
    loaded = config.load(["run.steps=30", base, "optim.lr=2", str(arm), "optim.lr=3"])
    assert loaded.run.steps == 30 and loaded.run.seed == 1 and loaded.run.global_batch == 8  # merged, key by key
    assert loaded.diffusion.strata == "none" and loaded.optim.lr == 3
    assert [source.path for source in loaded.data.sources] == ["q", "r"]  # a list is replaced
    assert config.load([str(arm), base]).run.steps == 10


def test_overrides_take_null_lists_and_strings(base):
    assert config.load([base, "optim.clip_norm=null"]).optim.clip_norm is None
    assert config.load([base, "optim.clip_norm=~"]).optim.clip_norm is None
    assert config.load([base, "run.dir=off"]).run.dir == "off"
    assert config.load([base, "run.dir=a=b"]).run.dir == "a=b"
    sources = config.load([base, "data.sources=[{path: x, weight: 2}, {path: y}]"]).data.sources
    assert [(s.path, s.weight) for s in sources] == [("x", 2.0), ("y", 1.0)]
    assert config.load([base, "model={d_model: 96}"]).model.preset == "2m"  # a mapping is merged


def test_a_file_below_a_folder_with_an_equals_sign_is_a_file(tmp_path):
    """A sweep's folders are called lr=1e-3, and RUN/config.yaml is a configuration."""
    folder = tmp_path / "lr=1e-3"
    folder.mkdir()
    (folder / "config.yaml").write_text(BASE)
    assert config.load([str(folder / "config.yaml")]).run.steps == 10


def test_the_written_configuration_is_the_read_one(base, tmp_path):
    kept = tmp_path / "config.yaml"
    loaded = config.load([base, "optim.lr=1e-5", "optim.clip_norm=null", "diffusion.strata=none"])
    kept.write_text(loaded.to_yaml())
    assert config.load([str(kept)]) == loaded


NUMBER_LIKE = st.from_regex(r"[0-9+.:_-]{1,6}([eE][+-]?[0-9]{1,3})?", fullmatch=True)


@given(name=st.one_of(NUMBER_LIKE, st.text(min_size=1, max_size=20)))
@example(name="1e3")
@example(name="off")
@example(name="010")
@example(name="null")
@settings(deadline=None, derandomize=True, max_examples=150, phases=[Phase.explicit, Phase.generate])
def test_any_string_survives_to_yaml(name):
    """Written by a YAML 1.1 dumper and read as 1.2, a name called 1e3 must stay a string."""
    tree = yaml12.parse(BASE, "BASE")
    tree["diffusion"] = {"isad_tokens": [name]}
    loaded = config.validate(tree, "BASE")
    assert config.validate(yaml12.parse(loaded.to_yaml(), "config.yaml"), "config.yaml") == loaded


def test_configured_paths_are_expanded(monkeypatch):
    """And what cannot be expanded is refused: the run would write into a folder called $SCRATCH."""
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    monkeypatch.delenv("UNSET", raising=False)
    tree = yaml12.parse(BASE, "BASE")
    tree["run"]["dir"] = "~/runs/x"
    tree["data"]["sources"] = [{"path": "$SCRATCH/a"}, {"path": "b/~c"}]
    tree["checkpoint"] = {"dir": "s3://${SCRATCH}/x", "init_from": "~"}
    loaded = config.validate(tree, "here")
    assert loaded.run.dir == "/home/me/runs/x"
    assert [source.path for source in loaded.data.sources] == ["/scratch/me/a", "b/~c"]
    assert (loaded.checkpoint.dir, loaded.checkpoint.init_from) == ("s3:///scratch/me/x", "/home/me")
    assert config.validate(yaml12.parse(loaded.to_yaml(), "stored"), "stored") == loaded
    for text, problem in {
        "$UNSET/x": "environment variable UNSET is not set",
        "a/${UNSET}": "environment variable UNSET is not set",
        "a$": "must start an environment variable",
        "~no-such-user/x": "no home folder is known for ~no-such-user",
    }.items():
        with pytest.raises(ValueError, match=problem) as caught:
            built(dir=text)
        assert str(caught.value).startswith(f"BASE: 'run.dir': {text}: ") and "\n" not in str(caught.value)


def test_nothing_can_be_changed_afterwards(base):
    loaded = config.load([base])
    with pytest.raises(ValidationError):
        loaded.run.seed = 1
    with pytest.raises(ValidationError):
        loaded.optim = None
    assert isinstance(loaded.data.sources, tuple)


# ---- refusals: one line that says what, where, and what to do


def test_unknown_keys_name_the_nearest(base):
    assert refused(base, "run.step=5").endswith("unknown key 'run.step': did you mean 'run.steps'?")
    assert "'optim.warmup_step': did you mean 'optim.warmup_steps'?" in refused(base, "optim.warmup_step=5")
    assert "'data.sources.0.wieght': did you mean 'data.sources.0.weight'?" in refused(
        base, "data.sources=[{path: p, wieght: 2}]"
    )
    assert "unknown key 'optimizer': did you mean 'optim'?" in refused(base, "optimizer={lr: 1}")
    message = refused(base, "run.zzz=5")
    assert "unknown key 'run.zzz'" in message and "there are dir, seed, steps" in message


@pytest.mark.parametrize(
    ("override", "key", "got"),
    [
        *(("run.steps=ten", "run.steps", '"ten"'), ("run.steps=1.5", "run.steps", "1.5")),
        *(("run.steps=true", "run.steps", "true"), ("run.steps=0", "run.steps", "0")),
        *(("run.steps='10'", "run.steps", '"10"'), ("data.document_mask=yes", "data.document_mask", '"yes"')),
        *(("data.document_mask=1", "data.document_mask", "1"), ("run.dir=7", "run.dir", "7")),
        *(
            ("optim.lr=.nan", "optim.lr", "NaN"),
            ("optim.lr=.inf", "optim.lr", "Infinity"),
            ("optim.lr=1e999", "optim.lr", "Infinity"),
        ),
        *(("run.seed=9223372036854775808", "run.seed", "9223372036854775808"), ("run=5", "run", "5")),
        *(("optim.schedule=linear", "optim.schedule", '"linear"'), ("diffusion.eps=1", "diffusion.eps", "1")),
        *(
            ("monitor.probe_sequences=3", "monitor.probe_sequences", "3"),
            ("diffusion.fit_rates=0", "diffusion.fit_rates", "0"),
        ),
    ],
)
def test_wrong_types_and_ranges_name_the_key_and_the_value(base, override, key, got):
    message = refused(base, override)
    assert f"'{key}': " in message and message.endswith(f"got {got}")


def test_all_mistakes_are_told_at_once(base):
    message = refused(base, "run.steps=x", "optim.lr=y", "eval.zz=1")
    assert all(key in message for key in ("run.steps", "optim.lr", "eval.zz"))


def test_missing_keys(tmp_path):
    path = tmp_path / "half.yaml"
    path.write_text("run: {dir: x}\nmodel: {}\ndata: {sources: [{path: p}], sequence_length: 4}")
    message = refused(str(path))
    assert "'run.steps' is missing: give it in a file or as run.steps=VALUE" in message
    assert "'optim' is missing" in message and str(path) in message


def test_a_wrong_source_is_not_reported_as_an_empty_list(base):
    message = refused(base, "data.sources=[{weight: 2}]")
    assert "'data.sources.0.path' is missing" in message
    assert "at least 1 item" not in message


def test_unreadable_files(tmp_path):
    assert "nowhere.yaml: No such file" in refused(str(tmp_path / "nowhere.yaml"))
    assert "Is a directory" in refused(str(tmp_path))
    latin = tmp_path / "latin.yaml"
    latin.write_bytes("run: {dir: caf\xe9}".encode("latin-1"))
    assert refused(str(latin)).endswith("latin.yaml: not UTF-8 text")
    assert "no configuration file given" in refused() == refused("run.steps=3")


@pytest.mark.parametrize(
    ("text", "found"), [("- 1\n- 2", "list"), ("just words", "str"), ("", "NoneType"), ("3", "int")]
)
def test_a_file_must_hold_sections(tmp_path, text, found):
    path = tmp_path / "odd.yaml"
    path.write_text(text)
    message = refused(str(path))
    assert str(path) in message and message.endswith(f"found {found}")


@pytest.mark.parametrize(
    "text", ["run: {seed: 1, seed: 2}", "run:\n  seed: 1\nmodel: {}\nrun: {}", 'run: {seed: 1, "seed": 2}']
)
def test_a_key_given_twice_is_refused(tmp_path, text):
    assert yaml.safe_load(text)  # PyYAML takes the last and says nothing
    path = tmp_path / "twice.yaml"
    path.write_text(text)
    message = refused(str(path))
    assert "twice" in message and "line" in message


@pytest.mark.parametrize(
    "text",
    [
        *(
            "run: [1, 2",
            "run: {a: b: c}",
            "a\tb: *x",
            "--- 1\n--- 2",
            "run: !!python/object:os.system {}",
            "a: b\n c: d",
        ),
        pytest.param("run: {dir: {{ folder }}}", id="a template that was not filled in"),
        pytest.param("run: {dir: !!timestamp 2024-01-01}", id="a date, which is no JSON"),
        pytest.param("run: {dir: !!binary aGk=}", id="bytes, which are no JSON"),
        pytest.param("run: {dir: a\x00b}", id="a control character"),
        pytest.param("run: {dir: &a [*a]}", id="a list inside itself"),
    ],
)
def test_broken_yaml_is_one_line_that_names_the_file(tmp_path, text):
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    assert str(path) in refused(str(path))


# ---- the plan


@st.composite
def divisible(draw):
    world, accumulation, micro = draw(st.integers(1, 64)), draw(st.integers(1, 9)), draw(st.integers(1, 33))
    return world, accumulation, micro


@given(divisible(), st.integers(0, 100))
@settings(deadline=None, derandomize=True, max_examples=150)
def test_slots_of_ranks_and_micro_steps_partition_the_batch_rank_major(case, surplus):
    world, accumulation, micro = case
    batch = world * accumulation * micro
    asked = micro if accumulation > 1 else micro + surplus  # a micro-batch larger than the rank's rows is cut
    plan = resolve(built(global_batch=batch, micro_batch=asked), world)
    assert (plan.micro_batch, plan.accumulation, plan.rows_per_rank) == (micro, accumulation, batch // world)
    assert plan.tokens_per_step == batch * 16
    blocks = [plan.slots(rank, step) for rank in range(world) for step in range(accumulation)]
    assert [slot for block in blocks for slot in block] == list(range(batch))
    # Rank r's slots do not depend on the micro-batch: dealing rows out in turn, rank r + world * i, would.
    own = [slot for step in range(accumulation) for slot in plan.slots(world - 1, step)]
    assert own == list(range(batch - batch // world, batch))
    dealt = list(range(world - 1, batch, world))
    assert (own == dealt) == (world == 1 or batch == world)


def test_the_plan_gives_its_reasons():
    plan = resolve(built(global_batch=256, micro_batch=32), 2)
    assert plan.reasons[0] == "accumulation 4 = 256 / (2 ranks x 32)"
    assert plan.reasons[1] == "tokens per step 4,096 = 256 rows x 16"
    assert plan.reasons[2] == "tokens in the run 40,960 = 10 steps x 4,096"
    cut = resolve(built(global_batch=8, micro_batch=32), 2)
    assert cut.micro_batch == 4 and "micro-batch 4 instead of 32: a rank has only 4 rows" in cut.reasons[0]


@given(st.integers(1, 300), st.integers(1, 64), st.integers(1, 40))
@settings(deadline=None, derandomize=True, max_examples=200)
def test_a_batch_is_split_evenly_or_refused_with_a_remedy_that_works(batch, world, micro):
    asked = built(global_batch=batch, micro_batch=micro)
    try:
        plan = resolve(asked, world)
    except ValueError as error:
        assert "\n" not in str(error)
        if batch % world:
            assert f"run.global_batch={batch} does not divide over {world} ranks" in str(error)
            return
        remedies = str(error).rpartition("choose one of ")[2]
        assert (batch // world) % micro
        for remedy in yaml.safe_load(remedies):
            resolve(built(global_batch=batch, micro_batch=remedy), world)
    else:
        assert plan.micro_batch * plan.accumulation * world == batch


def test_the_plan_is_frozen_and_leaves_the_configuration_alone():
    asked = built(global_batch=8, micro_batch=32)
    before = asked.to_yaml()
    plan = resolve(asked, 2)
    assert asked.to_yaml() == before
    with pytest.raises(AttributeError):
        plan.micro_batch = 1


CONFIGS = sorted((Path(__file__).parent.parent / "configs").rglob("*.yaml"))


def files_of(path: Path) -> list[str]:
    """A configuration with what it is laid over: an arm over any preset, fine-tuning over its base."""
    folder = path.parent if path.parent.name == "configs" else path.parent.parent
    below = {"arms": ["quickstart.yaml"]}.get(path.parent.name, [])
    below = ["finetune-base.yaml"] if path.name == "finetune.yaml" else below
    return [*(str(folder / name) for name in below), str(path)]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_configuration_that_we_ship_loads_and_resolves(path):
    resolve(config.load(files_of(path)), 1)


ARMS = [path for path in CONFIGS if path.parent.name == "arms"]
METHODS = {
    "strata", "schedule", "rate_low", "rate_high", "sampler", "target", "form", "when", "masks", "views", "weights",
    "objective", "bell", "anneal_fraction", "isad_tokens", "syrm_tokens",
}  # fmt: skip


@pytest.mark.parametrize("path", ARMS, ids=lambda path: path.stem)
def test_an_arm_is_the_same_over_every_configuration(base, path):
    """It sets every method and the optimizer. One key less, and the presets' recipe would leak into the arm."""
    tree = yaml12.read_file(str(path))
    assert tree.keys() == {"diffusion", "optim"} | ({"model"} if path.stem == "ar" else set())
    assert tree["diffusion"].keys() == METHODS and tree["optim"].keys() == {"name", "muon_lr"}
    presets = [files_of(file) for file in CONFIGS if file.parent.name == "configs"]
    arms = [config.load([*below, str(path)]) for below in ([base], *presets)]
    methods = [arm.diffusion.model_dump(include=METHODS) for arm in arms]
    assert all(one == methods[0] for one in methods) and len({arm.optim.name for arm in arms}) == 1


def test_the_standard_arm_is_the_standard_objective_with_adamw():
    over = config.load(["configs/quickstart.yaml", "configs/arms/standard.yaml"])
    plain = config.DiffusionConfig(strata="none")
    assert over.diffusion == plain and over.optim.name == "adamw"
    assert config.load(["configs/quickstart.yaml"]).diffusion.rate_low == 0.3, "the preset trains with the recipe"


def test_there_are_configurations_to_ship():
    assert "quickstart" in {path.stem for path in CONFIGS}


@pytest.mark.parametrize(("old", "keys"), config.RENAMED.items())
def test_a_renamed_key_is_answered_with_its_new_name(base, old, keys):
    assert f"unknown key '{old}': it is now {', '.join(keys)}" in refused(base, f"{old}=1")


def test_a_stored_configuration_of_an_older_version_is_read_under_the_new_keys():
    old = {
        "diffusion": {"grid": [9, 8, 7], "eps": 0.01},
        "monitor": {"probe": [8, 4, 2]},
        "parallel": {"recompute": "full", "recompute_every": 3},
        "checkpoint": {"allow": ["data"]},
        "run": {"steps": 5},
    }
    assert config.upgrade(old) == {
        "diffusion": {"fit_rates": 9, "fit_sequences": 8, "fit_masks": 7, "eps": 0.01},
        "monitor": {"probe_sequences": 8, "probe_rates": 4, "probe_masks": 2},
        "parallel": {"activation_checkpointing": "full", "recompute_every": 3},
        "checkpoint": {"allow_changed": ["data"]},
        "run": {"steps": 5},
    }
    assert "grid" in old["diffusion"], "the caller's tree is left as it was"


def test_phases_and_weights_that_cannot_be_are_refused(base):
    two = "data.sources=[{path: x, weight: 2}, {path: y, weight: 0}]"
    phase = "data.phases=[{from_step: 9, weights: [1, 3]}]"
    loaded = config.load([base, two, phase]).data
    assert loaded.weights == (2.0, 0.0) and loaded.phases[0].weights == (1.0, 3.0)
    for arguments, words in [
        ([two], "y has weight 0 throughout"),
        ([two, "data.phases=[{from_step: 9, weights: [1]}]"], "the phase from step 9 has 1 weights for 2 sources"),
        ([two, "data.phases=[{from_step: 9, weights: [0, 0]}]"], "all weights are 0 from step 9 on"),
        ([two, "data.phases=[{from_step: 9, weights: [1, 1]}, {from_step: 9, weights: [1, 2]}]"], "in the order of"),
        ([two, "data.phases=[{from_step: 0, weights: [1, 1]}]"], "greater than 0"),
        ([two, "data.phases=[{form_step: 9, weights: [1, 1]}]"], "did you mean 'data.phases.0.from_step'?"),
        (["data.sources=[{path: x, weight: 0}]"], "all weights are 0 from step 0 on"),
        (["data.sources=[{path: 's3://bucket/x'}]"], "s3://bucket/x is read through a cache: give data.cache_dir"),
    ]:
        assert words in refused(base, *arguments), arguments


# ---- what --help says


def model_keys(prefix: str, model: type) -> set[str]:
    """section.key of every field, found without config_help."""
    found = set()
    for name, field in model.model_fields.items():
        inner = field.annotation if isinstance(field.annotation, type) else None
        if inner is not None and issubclass(inner, config.Section):
            found |= model_keys(f"{prefix}{name}.", inner)
        else:
            found.add(prefix + name)
    return found


def test_help_has_every_key_with_its_default_and_meaning():
    listed = {key.name: key for section in config_help.sections() for key in config_help.keys(section)}
    inner = {name for name in listed if "[]." in name}
    assert inner == {f"data.sources[].{name}" for name in config.DataSource.model_fields} | {
        f"data.phases[].{name}" for name in config.DataPhase.model_fields
    }
    assert set(listed) - inner == model_keys("", Config)
    assert all(key.meaning and key.kind for key in listed.values())
    assert listed["run.dir"].default is None and listed["optim.adam_eps"].default == "1e-08"
    assert listed["optim.ema_decay"].kind == "number > 0, < 1 or null"
    assert listed["checkpoint.allow_changed"].kind == "list of global_batch | data | sequence_length | phases"
    whole = config_help.text()
    for key in listed.values():
        value = "(required)" if key.default is None else f"= {key.default}"
        assert f"  {key.name} {value}    [{key.kind}]\n" in whole
        assert " ".join(key.meaning.split()[:5]) in " ".join(whole.split())


def test_help_of_one_section(capsys):
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--help", action=config_help.HelpAction)
    with pytest.raises(SystemExit) as ended:
        parser.parse_args(["--help", "optim"])
    assert not ended.value.code
    shown = capsys.readouterr().out
    assert "optim.lr (required)" in shown and "run.dir" not in shown
    with pytest.raises(ValueError, match="unknown section 'optimm' of the configuration: choose from run, model, data"):
        config_help.text("optimm")


def test_the_page_of_configuration_keys_is_current():
    assert (ROOT / "docs/configuration.md").read_text() == config_help.markdown(), "run `make configuration`"
