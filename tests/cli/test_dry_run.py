"""--dry-run of every verb that writes: it refuses what the run refuses, in the same words; else it writes nothing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result
from scene import VERBS, make_scene, words_of

OUT = "out"
Mistake = Callable[[Path, str, list[str]], list[str]]  # changes the scene, or the words


@pytest.fixture(scope="session")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything the verbs work on, made once."""
    return make_scene(tmp_path_factory.mktemp("scene"))


def output_exists(root: Path, verb: str, words: list[str]) -> list[str]:
    """A file stands where the output goes."""
    output(words).parent.mkdir(exist_ok=True)
    output(words).write_text("precious")
    return words


def output_is_a_full_folder(root: Path, verb: str, words: list[str]) -> list[str]:
    """A folder with something in it stands where the output goes."""
    output(words).mkdir(parents=True)
    (output(words) / "precious").write_text("precious")
    return words


def output_is_an_input(root: Path, verb: str, words: list[str]) -> list[str]:
    """Even --force does not replace an input."""
    words[words.index("-o") + 1] = str(first(root, verb))
    return [*words, "--force"]


def output_holds_an_input(root: Path, verb: str, words: list[str]) -> list[str]:
    """Nor a folder that an input lies in."""
    words[words.index("-o") + 1] = str(root)
    return [*words, "--force"]


def output_below_a_file(root: Path, verb: str, words: list[str]) -> list[str]:
    """The output's folder is a file."""
    (root / "file").write_text("")
    words[words.index("-o") + 1] = str(root / "file" / output(words).name)
    return words


def output_named_for_another_container(root: Path, verb: str, words: list[str]) -> list[str]:
    """A name that only convert --to gguf writes, or for export-onnx no graph's."""
    words[words.index("-o") + 1] = str(root / "x.gguf")
    return words


def input_missing(root: Path, verb: str, words: list[str]) -> list[str]:
    """Nothing stands where the first input should be."""
    shutil.rmtree(first(root, verb))
    return words


def input_empty(root: Path, verb: str, words: list[str]) -> list[str]:
    """A folder without weights."""
    weights(root, verb).unlink()
    return words


def weights_truncated(root: Path, verb: str, words: list[str]) -> list[str]:
    """Half of a safetensors file."""
    content = weights(root, verb).read_bytes()
    weights(root, verb).write_bytes(content[: len(content) // 2])
    return words


def weights_garbage(root: Path, verb: str, words: list[str]) -> list[str]:
    """No safetensors file at all."""
    weights(root, verb).write_bytes(b"garbage" * 100)
    return words


def weights_of_no_bytes(root: Path, verb: str, words: list[str]) -> list[str]:
    """An empty file."""
    weights(root, verb).write_bytes(b"")
    return words


def config_broken(root: Path, verb: str, words: list[str]) -> list[str]:
    """A config that is no JSON."""
    config(root, verb).write_text("{broken")
    return words


def config_a_list(root: Path, verb: str, words: list[str]) -> list[str]:
    """A config that is JSON, but no object."""
    config(root, verb).write_text("[]")
    return words


def device_unknown(root: Path, verb: str, words: list[str]) -> list[str]:
    """A device that no torch knows."""
    return [*words, "--device", "abacus"]


def option_unknown(root: Path, verb: str, words: list[str]) -> list[str]:
    """An option that no verb has: a usage error."""
    return [*words, "--nonsense"]


def adapter_of_another_model(root: Path, verb: str, words: list[str]) -> list[str]:
    """The adapter's keys match nothing of the base."""
    shutil.rmtree(root / "adapter")
    shutil.copytree(root / "foreign", root / "adapter")
    return words


def adapter_without_weights(root: Path, verb: str, words: list[str]) -> list[str]:
    """The adapter's folder has a config and nothing else."""
    (root / "adapter" / "adapter_model.safetensors").unlink()
    return words


def pattern_matches_nothing(root: Path, verb: str, words: list[str]) -> list[str]:
    """A rank for weights that are not there."""
    return [*words, "--rank", "nothing.*=4"]


def dtype_unknown(root: Path, verb: str, words: list[str]) -> list[str]:
    """A dtype that nothing is stored in."""
    return [*words, "--dtype", "float7"]


GENERAL: tuple[Mistake, ...] = (
    output_exists,
    output_is_a_full_folder,
    output_is_an_input,
    output_holds_an_input,
    output_below_a_file,
    input_missing,
    input_empty,
    weights_truncated,
    weights_garbage,
    weights_of_no_bytes,
    config_broken,
    config_a_list,
    option_unknown,
    output_named_for_another_container,
)
OWN: dict[str, tuple[Mistake, ...]] = {
    "extract": (device_unknown, pattern_matches_nothing, dtype_unknown),
    "merge": (device_unknown, adapter_of_another_model, adapter_without_weights, dtype_unknown),
    "unmerge": (device_unknown, adapter_of_another_model, adapter_without_weights),
    "fold": (device_unknown, adapter_of_another_model, adapter_without_weights),
    "resize": (device_unknown, pattern_matches_nothing, dtype_unknown),
    "combine": (device_unknown, pattern_matches_nothing, dtype_unknown),
    "convert": (device_unknown, adapter_without_weights),
    "convert a container": (device_unknown,),
    "convert to lora": (device_unknown, pattern_matches_nothing),
    "export-onnx": (dtype_unknown,),
}


def output(words: list[str]) -> Path:
    """The output that the words name."""
    return Path(words[words.index("-o") + 1])


def first(root: Path, verb: str) -> Path:
    """The verb's first input: a folder."""
    return root / VERBS[verb].first


def weights(root: Path, verb: str) -> Path:
    """Its file of weights."""
    (found,) = first(root, verb).glob("*.safetensors")
    return found


def config(root: Path, verb: str) -> Path:
    """Its config."""
    return next(
        first(root, verb) / name
        for name in ("adapter_config.json", "config.json")
        if (first(root, verb) / name).exists()
    )


CASES = [(verb, mistake) for verb in VERBS for mistake in (*GENERAL, *OWN.get(verb, ()))]


@pytest.mark.parametrize(("verb", "mistake"), CASES, ids=[f"{verb}-{mistake.__name__}" for verb, mistake in CASES])
def test_whatever_the_run_refuses_the_dry_run_refuses(
    scene: Path, tmp_path: Path, cli: Callable[..., Result], verb: str, mistake: Mistake
) -> None:
    """With the same exit code and words; and --json holds one document in both, the same."""
    root = tmp_path / "scene"
    shutil.copytree(scene, root)
    words = mistake(root, verb, words_of(verb, root, root / VERBS[verb].output))
    before = snapshot(root)
    real, dry = cli(*words), cli(*words, "--dry-run")
    assert real.exit_code not in (0, None), real.stdout
    assert real.exception is None or isinstance(real.exception, SystemExit), real.exception
    assert (dry.exit_code, dry.stderr) == (real.exit_code, real.stderr)
    documents = [json.loads(cli(*words, "--json", *more).stdout) for more in ((), ("--dry-run",))]
    assert documents[0] == documents[1]
    assert {"operation", "error"} == documents[0].keys()
    assert snapshot(root) == before


@pytest.mark.parametrize("verb", VERBS)
def test_a_dry_run_shows_the_plan_and_writes_nothing(
    scene: Path, tmp_path: Path, cli: Callable[..., Result], verb: str
) -> None:
    """As a table, and as one JSON document with inputs, outputs and bytes; the run itself then succeeds."""
    root = tmp_path / "scene"
    shutil.copytree(scene, root)
    words, before = words_of(verb, root, root / VERBS[verb].output), snapshot(root)
    shown, printed = cli(*words, "--dry-run"), cli(*words, "--dry-run", "--json")
    assert shown.exit_code == 0, shown.output
    assert "nothing written" in shown.stdout
    plan = json.loads(printed.stdout)
    assert {"operation", "inputs", "outputs", "bytes_read", "bytes_written", "steps", "notes"} <= plan.keys()
    assert plan["operation"] == words[0]
    assert plan["inputs"]
    assert str(root / VERBS[verb].output) in plan["outputs"]
    assert snapshot(root) == before
    done = cli(*words, "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["operation"] == words[0]
    assert (root / VERBS[verb].output).exists()


def snapshot(root: Path) -> dict[str, bytes | None]:
    """Every file and folder, and what is in it."""
    return {str(path.relative_to(root)): path.read_bytes() if path.is_file() else None for path in root.rglob("*")}
