"""A folder to work in, and a repository with two snapshots of a small model in it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from shell import Shell, weights


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    return Shell(tmp_path)


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with one snapshot of a small model folder, to be copied."""
    shell = Shell(tmp_path_factory.mktemp("template"))
    model = shell.folder / "model"
    model.mkdir()
    weights(model / "model.safetensors", scale=1)
    (model / "config.json").write_text("{}")
    (model / "tab\there").write_text("odd name")
    shell("init")
    shell("backup", "model", "--name", "tiny", "--tag", "run=1", "--tag", "odd=a=b")
    return shell.folder


@pytest.fixture
def filled(shell: Shell, template: Path) -> Shell:
    shutil.copytree(template, shell.folder, dirs_exist_ok=True)
    return shell
