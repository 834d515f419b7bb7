"""Nothing runs that should not: no pickle, no code from a Hub, no secret in what a run leaves."""

import ast
import json
import os
import re

import pytest
from conftest import ROOT, flags, run_process

SOURCES = [ROOT / "train.py", *sorted((ROOT / "pipeline").rglob("*.py"))]
FORBIDDEN_IMPORTS = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
FORBIDDEN_CALLS = {
    "torch.load", "torch.save", "yaml.load", "yaml.unsafe_load", "np.load", "numpy.load", "eval", "exec",
    "os.system", "os.popen", "accelerator.save_state", "accelerator.load_state",
}  # fmt: skip
ALLOWED = {
    "parser.py": {"yaml.load"},  # with a loader that is a SafeLoader, see below
    "read_runs.py": {"yaml.load"},  # with the same
    "decoded_cache.py": {"np.load"},  # which unpickles only with allow_pickle
    "fork_server.py": {"exec"},  # as `python -c`, of what the process that started the server sends through its own socket
    "benchmark": {"accelerator.save_state"},  # measured there, in a folder that goes
}
KINDS = {".safetensors", ".json", ".jsonl", ".yaml", ".md", ".png"}


def called(tree):
    return {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}


def imported(tree):
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_source_neither_pickles_nor_runs_what_it_reads(path):
    text = path.read_text()
    tree = ast.parse(text)
    assert not imported(tree) & FORBIDDEN_IMPORTS and not re.search("trust_remote_code|allow_pickle", text)
    assert not called(tree) & FORBIDDEN_CALLS - ALLOWED.get(path.parent.name, set()) - ALLOWED.get(path.name, set())
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            assert not any(word.arg == "shell" for word in node.keywords), "a shell reads what it should not"


def test_settings_are_read_by_a_safe_loader(tmp_path):
    import yaml

    from pipeline.settings.parser import SettingsLoader, read_config

    assert issubclass(SettingsLoader, yaml.SafeLoader)
    calls = [call for path in SOURCES for call in re.findall(r"yaml\.load\([^)]*\)", path.read_text())]
    assert set(calls) == {"yaml.load(text, SettingsLoader)"}
    (tmp_path / "settings.yaml").write_text("project: !!python/object/apply:os.getcwd []")
    with pytest.raises(ValueError, match="could not determine a constructor"):
        read_config(["--config", str(tmp_path / "settings.yaml")])


def test_the_source_is_there_to_be_searched():
    assert len(SOURCES) > 30
    tree = ast.parse("import pickle\ntorch.load(x)")
    assert imported(tree) & FORBIDDEN_IMPORTS and called(tree) & FORBIDDEN_CALLS


@pytest.mark.slow
def test_a_run_leaves_tensors_and_text_only_and_no_secret(tmp_path):
    secrets = {"HF_TOKEN": "hf_unlikelySecretOfTheHub", "WANDB_API_KEY": "0123456789abcdef" * 2 + "01234567"}
    ended = run_process(
        "train.py",
        *flags(output_dir=str(tmp_path), log_with="[tensorboard, wandb]", ema_decay=0.5),
        **secrets,
        WANDB_MODE="offline",
        WANDB_SILENT="true",
    )
    assert ended.returncode == 0, ended.stderr
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    ours = [path for path in files if not {"wandb", "tensorboard"} & set(path.parts)]
    assert {path.suffix for path in ours} - {""} == KINDS and [path.name for path in ours if not path.suffix] == [
        ".lock"
    ]
    for path in ours:
        content = path.read_bytes()
        assert not content.startswith((b"\x80", b"PK")), f"{path} is a pickle or an archive"
        if path.suffix not in (".safetensors", ".png"):
            content.decode()
    told = b"".join(path.read_bytes() for path in files) + (ended.stdout + ended.stderr).encode()
    for name, secret in secrets.items():
        assert secret.encode() not in told, name


def test_a_checkpoint_names_no_file_outside_its_folder(finished_run, tmp_path):
    from pipeline.run_folder.checkpoint import BadCheckpoint, own_sha256, read_facts

    _, run_dir = finished_run()
    newest, *_ = sorted((run_dir / "checkpoints").iterdir())
    facts = json.loads((newest / "state.json").read_text())
    del facts["sha256"]
    facts["files"][os.path.relpath("/etc/hostname", newest)] = {"bytes": 1, "sha256": ""}
    (newest / "state.json").write_text(json.dumps({**facts, "sha256": own_sha256(facts)}))
    with pytest.raises(BadCheckpoint, match="is missing"):
        read_facts(newest)
