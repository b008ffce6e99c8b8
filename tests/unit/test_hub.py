"""Data sets as folders: saved, laid out as on the hub, or fetched from it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest

from excise.core.errors import UserError
from excise.data.hub import choose_files
from excise.data.sources import parse_source, read_source, source_files


def texts(spec: str | Path) -> list[str]:
    return [held.row.text for held in read_source(parse_source(str(spec))).rows]


def save_arrow(folder: Path, table: Any, name: str = "data-00000-of-00001.arrow") -> None:
    """Write a folder as `Dataset.save_to_disk` does."""
    folder.mkdir(parents=True, exist_ok=True)
    with pa.OSFile(str(folder / name), "wb") as out, pa.ipc.new_stream(out, table.schema) as w:
        w.write_table(table)
    state = {"_data_files": [{"filename": name}], "_split": "train", "_format_type": None}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text("{}")


def make_layout(folder: Path, names: list[str]) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps({"text": name}) + "\n")


def test_a_folder_laid_out_as_on_the_hub(tmp_path: Path) -> None:
    make_layout(tmp_path, ["data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl",
                           "data/test-00000-of-00001.jsonl", ".cache/x.jsonl"])  # fmt: skip
    (tmp_path / "dataset_infos.json").write_text("{}")
    assert texts(tmp_path) == ["data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl"]
    assert texts(f"{tmp_path}#test") == ["data/test-00000-of-00001.jsonl"]
    places = [h.where for h in read_source(parse_source(str(tmp_path))).rows]
    assert places[1] == f"{tmp_path} train-00001-of-00002.jsonl line 1"
    with pytest.raises(UserError, match="no split 'tset'; did you mean 'test'"):
        texts(f"{tmp_path}#tset")


CARD = """---
license: mit
configs:
- config_name: en
  data_files:
  - split: train
    path: en/*.parquet
  - split: validation
    path: [more/a.parquet, more/b.parquet]
- config_name: es
  data_files: "es/**/*.parquet"
---
# Card
"""
NAMES = ["en/0.parquet", "en/deep/1.parquet", "es/0.parquet", "es/x/1.parquet", "more/a.parquet",
         "more/b.parquet", "more/c.parquet", "README.md"]  # fmt: skip


@pytest.mark.parametrize(
    ("config", "split", "expected"),
    [
        ("en", "", ["en/0.parquet"]),
        ("en", "validation", ["more/a.parquet", "more/b.parquet"]),
        ("es", "", ["es/0.parquet", "es/x/1.parquet"]),
    ],
)
def test_the_card_names_configurations(config: str, split: str, expected: list[str]) -> None:
    assert choose_files(NAMES, CARD, config=config, split=split, where="d") == expected


@pytest.mark.parametrize(
    ("names", "card", "config", "split", "message"),
    [
        (NAMES, CARD, "", "", "several configurations; add :NAME; known: en, es"),
        (NAMES, CARD, "fr", "", "no configuration 'fr'"),
        (NAMES, CARD, "en", "test", "no split 'test'"),
        (["x.parquet"], CARD, "es", "", r"no file es/\*\*/\*\.parquet, which its card names"),
        (["a.xml"], "", "", "", "holds no file that is read here"),
        (["en/a.jsonl", "es/a.jsonl"], "", "", "", r"several configurations \(en, es\)"),
        (["test.jsonl", "validation.jsonl"], "", "", "", "several splits; add #NAME"),
    ],
)
def test_files_that_cannot_be_chosen(
    names: list[str], card: str, config: str, split: str, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        choose_files(names, card, config=config, split=split, where="d")


@pytest.mark.parametrize("card", ["", "---\nconfigs: {\n---\n", "---\n- a\n---\n", "no head"])
def test_without_configs_paths_decide(card: str) -> None:
    names = ["en/train.jsonl", "en/dev.jsonl", "es/train.jsonl", "en/train.txt"]
    assert choose_files(names, card, config="en", split="", where="d") == ["en/train.jsonl"]
    assert choose_files(names, card, config="en", split="validation", where="d") == ["en/dev.jsonl"]
    assert choose_files(["a.jsonl", "b.jsonl"], card, config="", split="", where="d") == [
        "a.jsonl", "b.jsonl"
    ]  # fmt: skip


def test_saved_dictionaries_selections_and_damage(tmp_path: Path) -> None:
    table = pa.Table.from_pylist([{"text": "t"}])
    for split in ("train", "test"):
        save_arrow(tmp_path / "d" / split, table)
    (tmp_path / "d" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    assert texts(tmp_path / "d") == texts(f"{tmp_path / 'd'}#test") == ["t"]
    state = tmp_path / "d" / "test" / "state.json"
    state.write_text('{"_data_files": [{"filename": "gone.arrow"}]}')
    with pytest.raises(UserError, match=r"gone\.arrow is missing, which .*state\.json names"):
        texts(f"{tmp_path / 'd'}#test")
    state.write_text('{"_data_files": [{"filename": "../x.arrow"}]}')
    with pytest.raises(UserError, match="is missing"):
        texts(f"{tmp_path / 'd'}#test")
    state.write_text('{"_indices_files": [{"filename": "i.arrow"}]}')
    with pytest.raises(UserError, match="flatten_indices"):
        texts(f"{tmp_path / 'd'}#test")
    state.write_text("{")
    with pytest.raises(UserError, match=r"state\.json is not valid JSON"):
        texts(f"{tmp_path / 'd'}#test")


COMMIT = "0123456789abcdef0123456789abcdef01234567"


def fill_cache(cache: Path, files: dict[str, str]) -> None:
    """Put a data set into a Hugging Face cache, as a download leaves it."""
    repo = cache / "datasets--org--name"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(COMMIT)
    for name, text in files.items():
        path = repo / "snapshots" / COMMIT / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Switch to offline mode with an empty cache; returns the cache."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_hub_id_comes_from_the_cache_when_offline(offline: Path) -> None:
    fill_cache(offline, {"train.jsonl": '{"text": "a"}\n', "test.jsonl": '{"text": "b"}\n'})
    assert texts("org/name") == ["a"]
    assert texts("org/name#test") == texts(f"org/name@{COMMIT}#test") == ["b"]
    with pytest.raises(UserError, match="no split 'dev'"):
        texts("org/name#dev")
    assert source_files(parse_source("org/name"))[0].name == "train.jsonl"


def test_a_part_of_a_data_set_in_the_cache_is_not_taken_for_all(offline: Path) -> None:
    fill_cache(offline, {"test.jsonl": '{"text": "b"}\n', "big/train-00001-of-00003.jsonl": "x"})
    with pytest.raises(UserError, match="holds 1 of 3 shards"):
        texts("org/name#train")
    (offline / "datasets--org--name" / "snapshots" / COMMIT / "big").rename(offline / "gone")
    with pytest.raises(UserError, match="only 'test' of org/name is in the local cache; add #test"):
        texts("org/name")
    assert texts("org/name#test") == ["b"]


@pytest.mark.parametrize("spec", ["org/other", "org/name@v2"])
def test_what_is_not_in_the_cache_is_said(spec: str, offline: Path) -> None:
    fill_cache(offline, {"train.jsonl": '{"text": "a"}\n'})
    with pytest.raises(UserError, match=r"there is no file or folder org/.*hub cannot be reached"):
        texts(spec)


def test_files_of_one_split_are_fetched_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub as hub

    files = {"README.md": CARD, "en/0.jsonl": '{"text": "hello"}\n', "es/0.jsonl": "x"}
    card = CARD.replace("parquet", "jsonl")
    asked = []

    class Api:
        def list_repo_files(self, name: str, *, revision: str, repo_type: str) -> list[str]:
            assert (name, revision, repo_type) == ("org/name", "v1", "dataset")
            return list(files)

    def download(name: str, file: str, *, revision: str, repo_type: str) -> str:
        assert (name, revision, repo_type) == ("org/name", "v1", "dataset")
        asked.append(file)
        path = tmp_path / file.replace("/", "_")
        path.write_text(card if file == "README.md" else files[file])
        return str(path)

    monkeypatch.setattr(hub, "HfApi", Api)
    monkeypatch.setattr(hub, "hf_hub_download", download)
    assert texts("org/name:en@v1") == ["hello"]
    assert asked == ["README.md", "en/0.jsonl"]


def test_other_formats_go_through_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub as hub

    class Api:
        def list_repo_files(self, name: str, **how: Any) -> list[str]:
            return ["train.xml"]

    monkeypatch.setattr(hub, "HfApi", Api)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"install `excise\[hub\]`"):
        texts("org/name")
    save_arrow(tmp_path, pa.Table.from_pylist([{"text": "from xml"}]), "c.arrow")
    asked = []

    def load_dataset(name: str, config: str | None, *, revision: str | None) -> Any:
        asked.append((name, config, revision))
        return {"train": SimpleNamespace(cache_files=[{"filename": str(tmp_path / "c.arrow")}])}

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert texts("org/name:c@v1") == ["from xml"]
    assert asked == [("org/name", "c", "v1")]

    def fails(name: str, config: str | None, *, revision: str | None) -> Any:
        raise ValueError("BuilderConfig 'c' not found.\nmore")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=fails))
    with pytest.raises(UserError, match=r"cannot be read by `datasets`: BuilderConfig 'c' not"):
        texts("org/name:c@v1")
