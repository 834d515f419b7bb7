"""The model card of a run: what differs from the defaults, apart from what the run has chosen itself."""


def section(card: str, heading: str) -> list[str]:
    """The list below a heading."""
    lines = card.partition(f"## {heading}\n")[2].partition("\n## ")[0].splitlines()
    return [line.removeprefix("- ") for line in lines if line.startswith("- ")]


def test_settings_that_the_run_has_filled_in_are_listed_apart(finished_run):
    _, run_dir = finished_run()
    card = (run_dir / "model" / "README.md").read_text()
    changed = ["val_fraction: 0.2", "max_train_samples: 100", "model_name: simple_mlp", "lr: 0.05"]
    assert section(card, "Settings that differ from the defaults") == changed
    chosen = ["freeze_batchnorm: False", "epochs: 2", "batch_size: 16", "mixed_precision: no", "channels_last: False"]
    assert section(card, "Settings that a run chooses unless they are set") == chosen
