"""python -m pipeline.export: an export has the model's logits, or is not written."""

import importlib.util
import json

import huggingface_hub
import pytest
import timm
import torch
from accelerate.state import AcceleratorState
from conftest import run_process
from PIL import Image
from stand_in_hub import TOKEN, stand_in_hub

from pipeline import export, predict
from pipeline.inference import export_formats
from pipeline.inference.saved_model import load_saved_model


def exported(capsys, *arguments, status=0):
    """The command's standard output and standard error."""
    AcceleratorState._reset_state(reset_partial_state=True)
    capsys.readouterr()
    assert export.main([*map(str, arguments)]) == status
    return capsys.readouterr()


def logits_of(name, folder):
    """The exported model, read without our code and, for ONNX, without torch."""
    if name == "timm":
        return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    if name == "torchscript":
        return torch.jit.load(folder / "model.pt")
    if name == "torch_export":
        return torch.export.load(folder / "model.pt2").module()
    import onnxruntime

    session = onnxruntime.InferenceSession(folder / "model.onnx")
    return lambda images: torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit.load.* is deprecated")
@pytest.mark.parametrize("name", ["timm", "onnx", "torchscript", "torch_export"])
def test_an_export_gives_the_models_logits_for_any_batch_size(finished_run, capsys, name):
    _, run_dir = finished_run()
    out, _ = exported(capsys, run_dir, "--format", name)
    folder = run_dir / "export" / name
    assert str(folder) in out and "32 images" in out
    saved, theirs = load_saved_model(str(run_dir)), logits_of(name, folder)
    images = torch.randn(7, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for batch in (images, images[:1], images[:4]):
            torch.testing.assert_close(theirs(batch), saved.model(batch), rtol=1e-5, atol=1e-5)
    described = json.loads((folder / "preprocessing.json").read_text())
    shape = json.loads((run_dir / "model" / "config.json").read_text())["pretrained_cfg"]
    for key in ("input_size", "mean", "std", "interpolation", "crop_pct"):
        assert described[key] == shape[key], key
    assert described["labels"] == [str(digit) for digit in range(10)] and described["source_size"] == 8
    check = described["check"]
    assert check["num_images"] == 32 and check["largest_relative_difference"] <= check["tolerance"] <= 1e-4
    assert {path.name for path in (run_dir / "export").iterdir()} == {name}


def test_the_command_offers_every_format():
    assert export.FORMAT_NAMES == tuple(export_formats.FORMATS)


def test_the_timm_folder_is_the_runs_own(finished_run, capsys):
    _, run_dir = finished_run()
    exported(capsys, run_dir, "--format", "timm")
    for name in ("config.json", "model.safetensors", "README.md"):
        assert (run_dir / "export" / "timm" / name).read_bytes() == (run_dir / "model" / name).read_bytes()


def test_the_timm_folder_needs_no_data_and_other_formats_name_images(run_training, capsys, tmp_path):
    folder = tmp_path / "photos"
    for name in ("cat", "dog"):
        (folder / name).mkdir(parents=True)
        for number in range(8):
            Image.effect_noise((9, 9), 90).save(folder / name / f"{number}.png")
    _, run_dir = run_training(dataset=str(folder), image_size=8, num_workers=0, epochs=1, max_train_samples=None)
    kept = folder.rename(tmp_path / "moved")
    out, err = exported(capsys, run_dir)
    assert "32 images" in out and not err and (run_dir / "export" / "timm" / "model.safetensors").is_file()
    exported(capsys, run_dir / "model", "--output", tmp_path / "again")
    out, err = exported(capsys, run_dir, "--format", "torchscript", status=2)
    assert str(folder) in err and "pass images for the check with --images" in err and err.count("\n") == 1
    exported(capsys, run_dir, "--format", "torchscript", "--images", kept)


@pytest.mark.slow
@pytest.mark.parametrize("model_name", ["test_resnet", "test_vit"])
def test_convolutions_and_attention_can_be_exported(tmp_path, capsys, model_name):
    from pipeline.models.timm_folder import save_model

    torch.manual_seed(0)
    size = timm.create_model(model_name).pretrained_cfg["input_size"][-1]
    save_model(
        timm.create_model(model_name, num_classes=3),
        tmp_path / "model",
        label_names=["a", "b", "c"],
        image_size=size,
        in_chans=3,
        mean=[0.5] * 3,
        std=[0.5] * 3,
        interpolation="bilinear",
        crop_pct=1.0,
        readme="",
    )
    Image.effect_noise((50, 40), 90).save(tmp_path / "noise.png")
    where = ["--output", tmp_path / "out", "--images", tmp_path / "noise.png"]
    exported(capsys, tmp_path / "model", *where, "--format", "torch_export")
    images = torch.randn(5, 3, size, size, generator=torch.Generator().manual_seed(0))
    model = load_saved_model(str(tmp_path / "model")).model
    with torch.no_grad():
        torch.testing.assert_close(logits_of("torch_export", tmp_path / "out")(images), model(images))


@pytest.mark.parametrize("name", ["timm", "torchscript"])
def test_an_export_that_differs_is_removed_and_ends_with_status_1(finished_run, capsys, monkeypatch, name):
    _, run_dir = finished_run()
    kind = export_formats.FORMATS[name]

    def read(folder):
        logits = kind.read(folder)
        return lambda images: logits(images) + 1e-3

    monkeypatch.setitem(export_formats.FORMATS, name, export_formats.Format(kind.write, read, kind.tolerance))
    out, err = exported(capsys, run_dir, "--format", name, status=1)
    assert not out and err.startswith(f"error: {name}: ") and "above the tolerance" in err and err.count("\n") == 1
    assert list((run_dir / "export").iterdir()) == []


@pytest.mark.parametrize("wrong", [lambda images: images[:, 0, 0] / 0, lambda images: 1 / 0])
def test_nan_and_a_converter_that_fails_are_failures_too(finished_run, capsys, monkeypatch, wrong):
    _, run_dir = finished_run()
    kind = export_formats.FORMATS["torchscript"]
    monkeypatch.setitem(
        export_formats.FORMATS, "torchscript", export_formats.Format(kind.write, lambda folder: wrong, 1e-5)
    )
    _, err = exported(capsys, run_dir, "--format", "torchscript", status=1)
    assert err.startswith("error: ") and "Nothing was written." in err and list((run_dir / "export").iterdir()) == []


def test_a_missing_package_is_named_with_the_command_that_installs_it(finished_run, capsys, monkeypatch):
    _, run_dir = finished_run()
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if "onnxr" in name else found(name, *more)
    )
    _, err = exported(capsys, run_dir, "--format", "onnx", status=2)
    assert err == "error: --format onnx needs onnxruntime: pip install onnx onnxruntime onnxscript\n"


def test_an_earlier_export_is_replaced_and_nothing_else_is(finished_run, capsys, tmp_path):
    _, run_dir = finished_run()
    output = tmp_path / "out"
    exported(capsys, run_dir, "--format", "torchscript", "--output", output)
    exported(capsys, run_dir, "--format", "timm", "--output", output)
    assert "model.pt" not in {path.name for path in output.iterdir()}
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    _, err = exported(capsys, run_dir, "--output", tmp_path / "mine", status=2)
    assert "is not an earlier export" in err and [path.name for path in (tmp_path / "mine").iterdir()] == ["letter.txt"]


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["RUN/model"], "Pass the folder to write with --output"),
        (["RUN/model", "--output", "RUN/out", "--format", "torchscript"], "has no test images for the check"),
        (["RUN", "--images", "RUN/none.png"], "no such file"),
        (["RUN", "--format", "onnx", "--push_to_hub", "me/model"], "Remove --format"),
        (["RUN", "--private"], "--private requires --push_to_hub"),
        (["RUN", "--push_to_hub", "model"], "must be OWNER/NAME"),
        (["RUN", "--push_to_hub", "me/model"], "HF_TOKEN"),
        (["RUN", "--fromat", "onnx"], "Did you mean '--format'"),
        (["RUN", "--format", "onxx"], "Did you mean 'onnx'"),
    ],
)
def test_wrong_arguments_end_in_one_line_and_status_2(finished_run, capsys, monkeypatch, arguments, words):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    _, run_dir = finished_run()
    AcceleratorState._reset_state(reset_partial_state=True)
    capsys.readouterr()
    try:
        status = export.main([word.replace("RUN", str(run_dir)) for word in arguments])
    except SystemExit as exit:
        status = exit.code
    out, err = capsys.readouterr()
    assert status == 2 and not out and err.startswith("error: ") and err.count("\n") == 1 and words in err
    assert not (run_dir / "export").exists()


def hub_environment(address, tmp_path):
    home = {"HF_HOME": str(tmp_path / "hub"), "HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0"}
    return {**home, "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_TELEMETRY": "1"}


@pytest.mark.slow
def test_a_model_that_is_pushed_comes_back_from_the_hub(finished_run, tmp_path, capsys):
    """Uploaded by one process, its weights through LFS; downloaded by another, for predict."""
    _, run_dir = finished_run()
    Image.effect_noise((8, 8), 90).save(tmp_path / "noise.png")
    with stand_in_hub() as (address, hub):
        environment = hub_environment(address, tmp_path)
        done = run_process("-m", "pipeline.export", str(run_dir), "--push_to_hub", "me/digits", **environment)
        assert done.returncode == 0, done.stderr
        assert f"{address}/me/digits/commit/1" in done.stdout
        assert hub.private == set()
        files = hub.repos["me/digits"]
        assert files.keys() == {"config.json", "model.safetensors", "README.md"}
        assert files["model.safetensors"] == (run_dir / "model" / "model.safetensors").read_bytes()
        assert files["config.json"] == (run_dir / "model" / "config.json").read_bytes()
        assert list(hub.blobs.values()) == [files["model.safetensors"]]
        card = files["README.md"].decode()
        assert 'create_model("hf-hub:me/digits"' in card and "PATH_OF_THIS_FOLDER" not in card
        assert "pipeline.predict hf-hub:me/digits" in card
        asked = [str(tmp_path / "noise.png"), "--format", "csv"]
        theirs = run_process("-m", "pipeline.predict", "me/digits", *asked, **environment)
        assert theirs.returncode == 0, theirs.stderr
    capsys.readouterr()
    assert predict.main([str(run_dir), *asked]) == 0
    assert theirs.stdout == capsys.readouterr().out and theirs.stdout.count("\n") == 2
    assert TOKEN not in done.stdout + done.stderr + theirs.stdout + theirs.stderr


@pytest.fixture
def hub_here(monkeypatch, tmp_path):
    """Points the Hub's client in this process at a stand-in."""

    def point(address):
        template = f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)

    return point


@pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload:DeprecationWarning")  # huggingface_hub sends bytes so
def test_a_private_model_goes_into_a_private_repository_only(finished_run, hub_here, capsys):
    _, run_dir = finished_run()
    with stand_in_hub() as (address, hub):
        hub_here(address)
        exported(capsys, run_dir, "--push_to_hub", "me/digits", "--private")
        assert hub.private == {"me/digits"} and "model.safetensors" in hub.repos["me/digits"]
        exported(capsys, run_dir, "--push_to_hub", "me/digits", "--private")  # again, into the same one
        hub.private.clear()  # as if somebody had published it
        hub.repos["me/digits"].clear()
        _, err = exported(capsys, run_dir, "--push_to_hub", "me/digits", "--private", status=1)
    assert "It exists and is public" in err and err.count("\n") == 1
    assert hub.repos["me/digits"] == {}


def test_a_hub_that_refuses_ends_with_status_1_and_the_token_is_not_printed(finished_run, hub_here, capsys):
    _, run_dir = finished_run()
    with stand_in_hub(refuses=True) as (address, hub):
        hub_here(address)
        out, err = exported(capsys, run_dir, "--push_to_hub", "me/digits", "--private", status=1)
    assert err.startswith("error: Could not upload to 'me/digits'") and err.count("\n") == 1
    assert TOKEN not in out + err and "403" in err
    assert (run_dir / "export" / "timm" / "model.safetensors").is_file()
    written = [token for method, _, token in hub.seen if method == "POST"]
    assert hub.repos == {} and written == [f"Bearer {TOKEN}"]


def test_a_model_that_the_hub_does_not_have_is_named_in_one_line(hub_here, capsys, tmp_path):
    with stand_in_hub() as (address, hub):
        hub_here(address)
        (tmp_path / "noise.png").write_bytes(b"")
        assert predict.main(["me/nothing", str(tmp_path / "noise.png")]) == 2
    err = capsys.readouterr().err
    assert ("HEAD", "/me/nothing/resolve/main/config.json", f"Bearer {TOKEN}") in hub.seen
    assert "Could not fetch 'hf-hub:me/nothing'" in err and "no folder 'me/nothing'" in err and err.count("\n") == 1
