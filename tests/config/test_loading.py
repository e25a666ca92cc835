"""load_config: values, sources, and every problem at once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megazebra.config import Config, ConfigError, load_config
from megazebra.config.keys import fields, sections


def problems_of(text: str | None, *overrides: str, folder: Path) -> list[str]:
    """The problems with the folder's name left out: 'tiny.yaml:3: ...'."""
    path = None if text is None else folder / "tiny.yaml"
    if path is not None:
        path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return [problem.replace(f"{folder}/", "") for problem in caught.value.problems]


def write(folder: Path, text: str) -> Path:
    path = folder / "tiny.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_nothing_gives_the_defaults() -> None:
    assert load_config(None) == Config()


@pytest.mark.parametrize("text", ["", "# only a comment\n", "---\n", "train:\nmodel:\n  # window: 3\n"])
def test_empty_files_and_sections_give_the_defaults(text: str, tmp_path: Path) -> None:
    assert load_config(write(tmp_path, text)) == Config()


def test_file_and_overrides(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "\ufefftrain:\n  steps: 20\n  guard: {sigma: 4}\nmodel:\n  num_layers: 4\n"
        "  rope_local: {theta: 5e5}\n  rope_global: {theta: 5e5}\n",
    )
    config = load_config(path, ["--train.steps=30", "model.pattern=[G, L, 128, L]", "train.guard={history: 70}"])
    assert config.train.steps == 30
    assert (config.train.guard.sigma, config.train.guard.history) == (4.0, 70)
    assert config.model.pattern == ("G", "L", 128, "L")
    assert config.model.rope_global.theta == config.model.rope_local.theta == 500000.0


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("optimizer.lr=1e-3", 1e-3),
        ("optimizer.lr=1E-3", 1e-3),
        ("optimizer.lr=.5", 0.5),
        ("optimizer.lr=+2.", 2.0),
        ("optimizer.lr=3", 3.0),
        ("train.steps=1_000_000", 1_000_000),
        ("train.steps=+5", 5),
        ("model.qk_norm=true", True),
        ("model.qk_norm=False", False),
        ("model.attention_softcap=null", None),
        ("model.attention_softcap=~", None),
        ("model.attention_softcap=50", 50.0),
        ("model.pattern=GL", "GL"),
        ("optimizer.betas=[0.8, 0.99]", (0.8, 0.99)),
        # Text stays text, whatever YAML 1.1 makes of it.
        ("run.dir=no", "no"),
        ("run.dir=on", "on"),
        ("run.dir=2024-01-01", "2024-01-01"),
        ("run.dir=1:30", "1:30"),
        ("run.dir=007", "007"),
        ("run.dir=1__0", "1__0"),
        ("run.dir='5'", "5"),
        ("run.dir='*'", "*"),
        ("run.dir=a*b&c", "a*b&c"),
        ("run.dir=a=b", "a=b"),
    ],
)
def test_values_of_overrides(override: str, value: object) -> None:
    key = override.partition("=")[0]
    section, name = key.split(".")
    read = getattr(getattr(load_config(None, [override]), section), name)
    assert read == value
    assert type(read) is type(value)


def test_the_last_value_counts_and_mends_an_earlier_one(tmp_path: Path) -> None:
    path = write(tmp_path, "train:\n  steps: abc\n")
    assert load_config(path, ["train.steps=4", "train.steps=5"]).train.steps == 5


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.steps=abc", "must be a whole number >= 1"),
        ("train.steps='5'", "must be a whole number >= 1"),
        ("train.steps=true", "must be a whole number >= 1"),
        ("train.steps=2.5", "must be a whole number >= 1"),
        ("train.steps=null", "must be a whole number >= 1"),
        ("train.steps=0", "must be >= 1"),
        ("train.steps=-3", "must be >= 1"),
        ("model.window=0", "must be >= 1 (the window counts the query itself)"),
        ("model.window=x", "must be a whole number >= 1 (the window counts the query itself)"),
        ("model.num_kv_heads=0", "must be >= 1"),
        ("model.num_kv_heads=x", "must be a whole number >= 1 or null"),
        ("optimizer.lr=x", "must be a number > 0"),
        ("optimizer.lr=false", "must be a number > 0"),
        ("optimizer.lr=.inf", "must be finite"),
        ("optimizer.lr=0.0", "must be > 0"),
        ("optimizer.momentum=1.0", "must be < 1"),
        ("schedule.min_lr_ratio=1.5", "must be <= 1"),
        ("optimizer.betas=[0.9]", "must be [a number >= 0 and < 1, a number >= 0 and < 1]"),
        ("optimizer.betas=[0.9, 1.0]", "must be [a number >= 0 and < 1, a number >= 0 and < 1]"),
        ("model.rope_global.short_factor=[1.0, 0.0]", "must be [a number > 0, ...] or null"),
        ("train.precision=bf17", "must be fp32 | bf16"),
        ("parallel.zero_stage=4", "must be 0 | 1 | 2 | 3"),
        ("model.qk_norm=1", "must be true or false"),
        ("run.dir=2024", "must be text; put it in quotes to make it text"),
        ("run.dir=null", "must be text"),
        ("data.path=5", "must be text or null; put it in quotes to make it text"),
        (
            "model.pattern=[G, 1.5]",
            "must be a string to tile, such as GLLL, or a list of every layer, such as [G, 128, L]",
        ),
        ("train.seed=2147483648", "must be < 2147483648"),
        ("train.guard.history=15", "must be >= 16"),
    ],
)
def test_wrong_values(override: str, message: str, tmp_path: Path) -> None:
    assert problems_of(None, override, folder=tmp_path) == [f"command line --{override}: {message}"]


def test_a_value_that_reads_differently_is_shown_as_read(tmp_path: Path) -> None:
    assert problems_of(None, "optimizer.lr=-1e-3", folder=tmp_path) == [
        "command line --optimizer.lr=-1e-3: optimizer.lr=-0.001: must be > 0"
    ]


@pytest.mark.parametrize("override", ["train.steps={a: 1}", "run.dir=[1]", "model.pattern=5", "optimizer.lr=1e999"])
def test_wrong_shapes_are_refused(override: str, tmp_path: Path) -> None:
    assert len(problems_of(None, override, folder=tmp_path)) == 1


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("--steps=5", "command line --steps=5: unknown key 'steps'; did you mean 'train.steps' or 'profile.steps'?"),
        ("model.windw=5", "command line --model.windw=5: unknown key 'model.windw'; did you mean 'model.window'?"),
        ("train.window=5", "command line --train.window=5: unknown key 'train.window'; did you mean 'model.window'?"),
        ("windw=5", "command line --windw=5: unknown key 'windw'; did you mean 'model.window'?"),
        (
            "model.window.size=5",
            "command line --model.window.size=5: unknown key 'model.window.size'; did you mean 'model.window'?",
        ),
        ("modle={window: 5}", "command line --modle={window: 5}: unknown key 'modle'; did you mean 'model'?"),
        ("qqq=5", "command line --qqq=5: unknown key 'qqq'"),
        ("train=5", "command line --train=5: is a section; set its keys, such as train.steps"),
        ("train.steps=", "command line --train.steps: has no value; write --train.steps=VALUE (null for none)"),
        ("train.steps", "command line --train.steps: has no value; write --train.steps=VALUE (null for none)"),
        ("=5", "command line --: has no value; write --section.key=VALUE (null for none)"),
    ],
)
def test_unknown_keys_and_missing_values(override: str, problem: str, tmp_path: Path) -> None:
    assert problems_of(None, override, folder=tmp_path) == [problem]


def test_a_name_that_several_sections_have_suggests_them_all(tmp_path: Path) -> None:
    (problem,) = problems_of(None, "interval=5", folder=tmp_path)
    assert "'validation.interval' or 'evaluation.interval' or 'checkpoint.interval'" in problem


def test_everything_at_once_with_its_line(tmp_path: Path) -> None:
    text = """\
model:
  windw: 3
  window: 0
  hidden_size: 64
  hidden_size: 65
parallel:
  context_local: halo
train:
  guard:
    sigma: no
validation: {interval: 4}
optimizer: {lr: 1e-3, momentum: 0.5}
schedule: 5
"""
    found = problems_of(text, "--train.steps=abc", "--model.pattern=[", "--steps=3", folder=tmp_path)
    assert sorted(found) == sorted(
        [
            "tiny.yaml:2: unknown key 'model.windw'; did you mean 'model.window'?",
            "tiny.yaml:3: model.window=0: must be >= 1 (the window counts the query itself)",
            "tiny.yaml:5: model.hidden_size: is given twice in this section (first on line 4); keep one",
            "tiny.yaml:7: parallel.context_local=halo: is not read with parallel.context=1; remove it",
            "tiny.yaml:10: train.guard.sigma='no': must be a number > 0",
            "tiny.yaml:11: validation.interval=4: needs a held-out corpus: set data.validation_path "
            "or data.validation_sources, or validation.interval=0",
            "tiny.yaml:12: optimizer.momentum=0.5: is not read with name=adamw, only with sgd; remove it",
            "tiny.yaml:13: schedule=5: is a section; set its keys, such as schedule.kind",
            "command line --train.steps=abc: must be a whole number >= 1",
            "command line --model.pattern=[: is not valid YAML: while parsing a flow node, "
            "expected the node content, but found '<stream end>'",
            "command line --steps=3: unknown key 'steps'; did you mean 'train.steps' or 'profile.steps'?",
        ]
    )


def test_the_error_reads_as_a_list() -> None:
    assert str(ConfigError(["a: wrong"])) == "a: wrong"
    assert str(ConfigError(["a: wrong", "b: too"])) == "2 problems in the configuration:\n  a: wrong\n  b: too"
    assert isinstance(ConfigError([]), ValueError)


def test_checks_across_keys_wait_for_their_sections(tmp_path: Path) -> None:
    # num_attention_heads is unknown here, so nothing can be said about the heads; the batch is checked all the same.
    text = "model:\n  num_attention_heads: x\n  hidden_size: 33\ntrain:\n  micro_batch_size: 3\n"
    found = problems_of(text, folder=tmp_path)
    assert [problem.partition(": ")[0] for problem in found] == ["tiny.yaml:2", "default"]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("train:\n  steps: [1\n", "tiny.yaml:3: is not valid YAML: while parsing a flow sequence"),
        ("train:\n\tsteps: 1\n", "tiny.yaml:2: is not valid YAML: while scanning for the next token"),
        ("a: 1\n---\nb: 2\n", "tiny.yaml:2: is not valid YAML: expected a single document"),
        ("- 1\n- 2\n", "tiny.yaml:1: must be a mapping of sections"),
        ("\nhello\n", "tiny.yaml:2: must be a mapping of sections"),
        ("train:\n  steps: !!python/object/apply:os.system ['true']\n", "tiny.yaml:2: is not valid YAML: tags such as"),
        ("train:\n  steps: !!int '5'\n", "tiny.yaml:2: is not valid YAML: tags such as"),
        ("train:\n  steps: \x07\n", "tiny.yaml:2: is not valid YAML: the character U+0007 may not stand here"),
        (
            "train:\n  steps: *u\n",
            "tiny.yaml:2: is not valid YAML: anchors and aliases (&name, *name) are not used here",
        ),
        ("[" * 5000, "tiny.yaml:1: is not valid YAML: it is nested too deeply"),
        ("train:\n  steps: " + "[" * 300 + "]" * 300, "tiny.yaml:2: is not valid YAML: it is nested too deeply"),
        ("train:\n  <<: {steps: 5}\n", "tiny.yaml:2: unknown key 'train.<<'"),
        ("model: &m\n  rope_global: *m\n", "tiny.yaml:1: is not valid YAML: anchors and aliases"),
        (
            "model:\n  pattern:\n" + "".join(f"  - &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 40)),
            "tiny.yaml:3: is not valid YAML: anchors and aliases (&name, *name) are not used here; put text",
        ),
        ("? [a]\n: 5\n", "tiny.yaml:1: unknown key '?'"),
        ("3: 5\n", "tiny.yaml:1: unknown key '3'"),
        (
            "train:\n  steps: 5\ntrain:\n  seed: 5\n",
            "tiny.yaml:3: train: is given twice in this section (first on line 1)",
        ),
        ("train:\n  steps: " + "9" * 5000, "tiny.yaml:2: train.steps: Exceeds the limit"),
    ],
)
def test_files_that_are_no_configuration(text: str, problem: str, tmp_path: Path) -> None:
    found = problems_of(text, folder=tmp_path)
    assert len(found) == 1
    assert found[0].startswith(problem)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    missing = tmp_path / "missing.yaml"
    with pytest.raises(ConfigError, match=r"missing\.yaml: no such file"):
        load_config(missing)
    with pytest.raises(ConfigError) as caught:  # a bad override is reported with it; nothing is said about defaults
        load_config(missing, ["steps=5", "data.seq_len=100000"])
    assert len(caught.value.problems) == 2
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        load_config(tmp_path)
    with pytest.raises(ConfigError, match="cannot be read: embedded null byte"):
        load_config("a\0b")
    (tmp_path / "latin.yaml").write_bytes(b"run:\n  dir: \xe9\n")
    with pytest.raises(ConfigError, match=r"latin\.yaml:2: is not UTF-8"):
        load_config(tmp_path / "latin.yaml")


def test_no_torch_and_quick(tmp_path: Path) -> None:
    """Help, errors and the DeepSpeed configuration come before the seconds that torch takes to import."""
    program = """
import sys
from megazebra.config import ConfigError, load_config, parse_command_line
from megazebra.train.deepspeed_config import deepspeed_config
try:
    parse_command_line(["--help"])
except SystemExit as stop:
    assert stop.code == 0
try:
    load_config(None, ["train.steps=abc"])
except ConfigError:
    pass
deepspeed_config(load_config(None), 1)
heavy = {"torch", "deepspeed", "numpy"} & set(sys.modules)
assert not heavy, heavy
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert "--train.steps=1000" in result.stdout


NAMES = [*fields(), *sections(), "steps", "model.windw", "<<", "?"]
SCRAPS = st.sampled_from(
    [*"[]{}:,&*!|>#\"' \n\t-~@`%.", "null", "1e-3", "G", "0", "-5", "true", "x", ": ", "\n  ", "- "]
)
VALUES = st.one_of(
    st.text(max_size=20), st.lists(SCRAPS, max_size=8).map("".join), st.integers().map(str), st.floats().map(str)
)
LINES = st.tuples(st.sampled_from(["", "  "]), st.sampled_from(NAMES).map(lambda name: name.rpartition(".")[2]), VALUES)
DOCUMENTS = st.one_of(
    st.text(max_size=60),
    st.lists(SCRAPS, max_size=20).map("".join),
    st.lists(LINES, max_size=6).map(
        lambda lines: "\n".join(f"{indent}{name}: {value}" for indent, name, value in lines)
    ),
)
FUZZ = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True
)


def config_or_problems(path: Path | None, *overrides: str) -> Config | list[str]:
    try:
        return load_config(path, overrides)
    except ConfigError as error:
        return error.problems


@FUZZ
@given(DOCUMENTS)
def test_any_text_gives_a_config_or_a_config_error(tmp_path: Path, text: str) -> None:
    path = tmp_path / "fuzz.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    outcome = config_or_problems(path)
    assert isinstance(outcome, Config) or outcome
    if not isinstance(outcome, Config):
        assert all(str(path) in problem or problem.startswith("default") for problem in outcome)


@FUZZ
@given(st.sampled_from(NAMES) | st.text(max_size=10), VALUES)
def test_any_override_gives_a_config_or_a_config_error(name: str, value: str) -> None:
    outcome = config_or_problems(None, f"{name}={value}")
    assert isinstance(outcome, Config) or outcome
