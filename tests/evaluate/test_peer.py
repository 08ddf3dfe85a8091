"""llama.cpp's side: its file of random weights, and its process, which is played by a Python that pretends."""

from __future__ import annotations

import shutil
import sys
from collections import namedtuple
from dataclasses import replace

import numpy as np
import pytest

from gossamer.checkpoints.gguf import GGUFFile
from gossamer.errors import ResourceError, UsageError
from gossamer.evaluate import SHAPES, peer, peer_gguf
from gossamer.models.topology import describe

SMALL = replace(
    SHAPES["llama-3-8b"],
    vocab=96,
    hidden=256,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=64,
    ffn=512,
    ropes=SHAPES["llama-3-8b"].ropes[:2],
    windows=(0, 0),
)

# Stands for the module llama_cpp: it has the functions that the worker calls, and does nothing in no time.
PRETENDS = """
import ctypes, types
__version__ = "9.9"
GGML_TYPE_F32, GGML_TYPE_F16, GGML_TYPE_Q8_0 = 0, 1, 8
log = open(__file__ + ".log", "a")
def tell(*what):
    print(*what, file=log, flush=True)
class Params(types.SimpleNamespace):
    pass
def llama_backend_init(): pass
def llama_log_callback(f): return f
def llama_log_set(f, data): pass
def llama_model_default_params(): return Params()
def llama_context_default_params():
    return Params(flash_attn_type=-1, type_k=1, type_v=1, kv_unified=False)
def llama_print_system_info(): return b"PRETENDED = 1 | "
def llama_model_load_from_file(path, params): return None if b"refused" in path else "model"
def llama_model_get_vocab(model): return "vocab"
def llama_vocab_n_tokens(vocab): return 1000
def llama_init_from_model(model, p):
    tell("context", p.n_seq_max, p.n_ctx, p.n_threads)
    return "context"
def llama_get_memory(context): return "memory"
def llama_memory_clear(memory, data): tell("clear")
def llama_batch_init(n, embd, seqs):
    return Params(n_tokens=0, token=[0] * n, pos=[0] * n, n_seq_id=[0] * n, seq_id=[[0] for _ in range(n)],
                  logits=[0] * n)
def llama_batch_free(batch): pass
def llama_decode(context, b):
    tell("decode", b.n_tokens, sorted({s[0] for s in b.seq_id}), b.pos[0], sum(map(bool, b.logits)))
    return int(b.n_tokens == 13)
def llama_get_logits_ith(context, i): return [0.0]
"""


@pytest.fixture
def small_gguf(tmp_path):
    path = tmp_path / "small.gguf"
    peer_gguf.write_random_gguf(SMALL, path)
    return path


@pytest.fixture
def pretended(tmp_path, monkeypatch):
    """Puts the module where the worker finds it; returns the lines that it writes down."""
    (tmp_path / "llama_cpp.py").write_text(PRETENDS)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return lambda: (tmp_path / "llama_cpp.py.log").read_text().splitlines()


def test_random_weights_of_a_shape(small_gguf):
    with GGUFFile(small_gguf) as file:
        assert sum(int(np.prod(t.shape)) for t in file.tensors.values()) == describe(SMALL).parameters
        kinds = {name: t.type for name, t in file.tensors.items()}
        assert kinds["output.weight"] == "Q6_K"
        assert kinds["token_embd.weight"] == kinds["blk.1.ffn_down.weight"] == "Q4_0"
        assert kinds["blk.0.attn_norm.weight"] == kinds["output_norm.weight"] == "F32"
        assert file.tensors["blk.0.attn_k.weight"].shape == (128, 256)
        assert file.metadata["llama.attention.head_count_kv"] == 2
        assert file.metadata["llama.vocab_size"] == 96
        for name in ("blk.0.ffn_up.weight", "blk.1.attn_q.weight"):
            values = file.read(name)
            assert np.isfinite(values).all()
            assert 0.001 < values.std() < 0.1


def test_a_tied_head_whose_rows_are_no_blocks_of_256(tmp_path):
    config = replace(SMALL, hidden=96, heads=3, kv_heads=3, head_dim=32, tied=True)
    peer_gguf.write_random_gguf(config, tmp_path / "tied.gguf")
    with GGUFFile(tmp_path / "tied.gguf") as file:
        assert file.tensors["token_embd.weight"].type == "Q8_0"
        assert "output.weight" not in file.tensors


def test_shapes_that_have_no_random_file(tmp_path, monkeypatch):
    with pytest.raises(UsageError, match=r"for the family 'gemma3'.*--peer-model"):
        peer_gguf.write_random_gguf(SHAPES["gemma-3-1b"], tmp_path / "x.gguf")
    with pytest.raises(UsageError, match="rows of 80 weights are not whole blocks of Q4_0"):
        peer_gguf.write_random_gguf(replace(SMALL, ffn=80), tmp_path / "x.gguf")
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**6))
    with pytest.raises(ResourceError, match=r"a file of 4\.\d GB is needed.*TMPDIR"):
        peer_gguf.write_random_gguf(SHAPES["llama-3-8b"], tmp_path / "x.gguf")
    assert list(tmp_path.iterdir()) == []


def test_the_file_is_gone_afterwards():
    with peer_gguf.random_gguf(SMALL, "small") as path:
        assert path.stat().st_size > 100_000
    assert not path.exists()


def test_a_python_without_llama_cpp(small_gguf, tmp_path, monkeypatch):
    (tmp_path / "llama_cpp.py").write_text("raise ImportError('not here')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(UsageError, match=r"needs the module llama_cpp, .* 'make peers', or .* --peer-python"):
        peer.LlamaCpp(small_gguf, python=sys.executable)
    for ask in (peer.check_peer, lambda: peer.quantize(small_gguf, tmp_path / "out.gguf", "Q4_0")):
        with pytest.raises(UsageError, match="'make peers'"):
            ask()
    with pytest.raises(UsageError, match="'/no/python' cannot be started"):
        peer.LlamaCpp(small_gguf, python="/no/python")


def test_too_little_memory(small_gguf, monkeypatch):
    monkeypatch.setattr(peer, "available_memory", lambda: 10)
    with pytest.raises(ResourceError, match=r"llama\.cpp needs about 0\.0 GB for small\.gguf"):
        peer.LlamaCpp(small_gguf)


def test_the_steps_of_the_worker(small_gguf, pretended):
    with peer.LlamaCpp(small_gguf, threads=3) as side:
        assert 0 <= side.prefill(600) < 5
        assert 0 <= side.decode(2, 3) < 5
        about = side.to_json()
    assert pretended() == [
        "context 1 768 3",
        "clear",
        "decode 512 [0] 0 1",
        "decode 88 [0] 512 1",
        "context 2 512 3",
        "clear",
        "decode 16 [0] 0 1",
        "decode 16 [1] 0 1",
        "decode 2 [0, 1] 16 2",
        "decode 2 [0, 1] 17 2",
        "decode 2 [0, 1] 18 2",
    ]
    assert (about["name"], about["version"], about["system"], about["model"]) == (
        "llama.cpp",
        "9.9",
        "PRETENDED = 1",
        "small.gguf",
    )
    assert about["options"] == {
        "n_threads": 3,
        "n_threads_batch": 3,
        "n_batch": 512,
        "n_ubatch": 512,
        "flash_attn": "auto",
        "type_k": "f16",
        "type_v": "f16",
        "kv_unified": False,
    }
    assert 4.5 < about["bits_per_weight"] < 5
    assert side._process.returncode == 0


def test_checking_and_quantizing(small_gguf, pretended, tmp_path):
    peer.check_peer()
    with pytest.raises(UsageError, match=r"llama\.cpp cannot quantize small\.gguf: .*quantize_default_params"):
        peer.quantize(small_gguf, tmp_path / "out.gguf", "Q4_0")
    (tmp_path / "llama_cpp.py").write_text("raise RuntimeError('no such library.')")
    with pytest.raises(UsageError, match=r"cannot load llama_cpp: RuntimeError: no such library\.$"):
        peer.check_peer()


def test_a_worker_that_ends(small_gguf, pretended):
    refused = small_gguf.rename(small_gguf.with_name("refused.gguf"))
    with pytest.raises(UsageError, match=r"llama\.cpp stopped: llama\.cpp cannot load .*refused\.gguf\."):
        peer.LlamaCpp(refused)
    fine = refused.rename(refused.with_name("fine.gguf"))
    with peer.LlamaCpp(fine) as side:
        with pytest.raises(UsageError, match=r"llama\.cpp stopped: llama_decode failed\."):
            side.prefill(13)
        with pytest.raises(UsageError, match="stopped"):
            side.decode(1, 1)
