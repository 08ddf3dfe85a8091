"""Recorded programs: the same bits as running at once, for any number of tokens; what cannot be recorded; processes."""

from __future__ import annotations

import array
import gc
import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from gossamer import ops
from gossamer.formats import encode, parse
from gossamer.formats.dispatch import Runner, linear, make_runner
from gossamer.formats.node import ArraySource

CAPACITY, WIDTH, HEADS, DIM, VOCAB = 24, 48, 3, 16, 40
BLOCKS, BLOCK, SEQUENCES = 6, 32, 3


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = ops.threads()
    yield
    ops.set_threads(before)


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def site(rows: int, cols: int, text: str, seed: int) -> Runner:
    fmt = parse(text)
    return make_runner(encode(fmt.weight, ArraySource(normal(rows, cols, seed=seed))), fmt, normal(rows, seed=seed + 1))


class Small:
    """Every op once, over arrays of ``rows`` tokens; stored keys and values are this object's own."""

    def __init__(self) -> None:
        self.table = site(VOCAB, WIDTH, "int8/g32", 1)
        self.qkv = [site(WIDTH, WIDTH, text, seed) for seed, text in enumerate(("int4/g32", "bf16", "int8/g16"), 3)]
        self.mixed = [site(WIDTH, WIDTH, "int8/g16 @ int8/token", 9), site(WIDTH, WIDTH, "f32 @ f32", 11)]
        self.gain, self.frequencies = normal(WIDTH, seed=13), np.abs(normal(DIM // 2, seed=14))
        self.tables = np.array([[0, 1], [4, 2], [3, 5]], np.int32)
        self.K = np.zeros((BLOCKS, HEADS, DIM, BLOCK), np.float16)
        self.V = np.zeros((BLOCKS, HEADS, BLOCK, DIM), np.float16)

    def arrays(self, rows: int) -> dict[str, np.ndarray]:
        made = {name: np.full((rows, WIDTH), np.nan, np.float32) for name in ("h", "x", "q", "k", "v", "a")}
        made |= {name: np.full((rows, DIM // 2), np.nan, np.float32) for name in ("cos", "sin")}
        made |= {name: np.zeros(rows, np.int32) for name in ("ids", "positions", "sequence")}
        return made

    def __call__(self, b: dict[str, np.ndarray]) -> None:
        q, k, v, a = (b[name].reshape(-1, HEADS, DIM) for name in "qkva")
        ops.embed(self.table.weight, b["ids"], b["h"])
        ops.scale(b["h"], 1.5)
        ops.angles(b["positions"], self.frequencies, b["cos"], b["sin"])
        ops.rmsnorm(b["h"], self.gain, 1e-5, b["x"])
        linear(self.qkv, b["x"], [b["q"], b["k"], b["v"]])
        ops.rmsnorm(b["q"].reshape(-1, DIM), self.gain[:DIM].copy(), 1e-5, b["q"].reshape(-1, DIM))
        ops.rope(q, k, b["cos"], b["sin"])
        where = (b["positions"], b["sequence"], self.tables, self.K, self.V, None, None)
        ops.kv_write(k, v, *where)
        ops.attention(q, *where, a, None, 0.25, 0, 0.0)
        linear(self.mixed, b["a"], [b["x"], b["q"]])
        ops.gated("gelu", b["x"], b["q"], b["x"])
        ops.add(b["h"], b["x"])


def inputs(tokens: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ids, positions and sequences: each sequence's tokens follow each other, from a position of its own on."""
    ids = np.random.default_rng(seed).integers(0, VOCAB, tokens, np.int32)
    sequence = np.sort(np.random.default_rng(seed + 1).integers(0, SEQUENCES, tokens)).astype(np.int32)
    positions = np.concatenate([np.arange(np.sum(sequence == s)) + 5 * s for s in range(SEQUENCES)]).astype(np.int32)
    return ids, positions, sequence


def replayed(small: Small, tokens: int, program: ops.Program, b: dict[str, np.ndarray]) -> np.ndarray:
    small.K[...] = small.V[...] = 0
    b["ids"][:tokens], b["positions"][:tokens], b["sequence"][:tokens] = inputs(tokens)
    program.run(tokens)
    return b["h"][:tokens].copy()


def test_replay_is_bitwise_the_same_as_running_at_once() -> None:
    small = Small()
    b = small.arrays(CAPACITY)
    with ops.record(CAPACITY) as program:
        small(b)
    assert program.capacity == CAPACITY
    assert np.isnan(b["h"]).all()  # nothing ran
    for tokens in (CAPACITY, 1, 2, 17):
        want = small.arrays(tokens)
        want["ids"][:], want["positions"][:], want["sequence"][:] = inputs(tokens)
        small.K[...] = small.V[...] = 0
        ops.set_threads(1)
        small(want)
        assert np.isfinite(want["h"]).all()
        K = small.K.copy()
        for threads in (1, 2, 3):
            ops.set_threads(threads)
            b["h"].fill(np.nan)
            assert np.array_equal(replayed(small, tokens, program, b), want["h"]), (tokens, threads)
            assert np.array_equal(small.K, K)
            assert np.isnan(b["h"][tokens:]).all()


def test_no_tokens_is_no_step() -> None:
    x = np.ones((4, 8), np.float32)
    with ops.record(4) as program:
        ops.scale(x, 2.0)
    assert len(program) == 1
    program.run(0)
    assert np.all(x == 1)


@pytest.mark.parametrize(
    ("wrong", "needle"),
    [
        (lambda b: b["ids"].__setitem__(3, VOCAB), "ids\\[3\\] is 40"),
        (lambda b: b["ids"].__setitem__(1, -1), "ids\\[1\\] is -1"),
        (lambda b: b["positions"].__setitem__(2, 64), "positions"),
        (lambda b: b["positions"].__setitem__(2, -1), "positions"),
        (lambda b: b["sequence"].__setitem__(1, SEQUENCES), "sequence"),
        (lambda b: b["sequence"].__setitem__(1, -1), "sequence"),
    ],
)
def test_wrong_step_inputs_are_refused_before_anything_is_written(wrong: Callable, needle: str) -> None:
    small = Small()
    b = small.arrays(CAPACITY)
    with ops.record(CAPACITY) as program:
        small(b)
    good = replayed(small, 8, program, b)
    b["h"].fill(-7)
    before = {name: x.copy() for name, x in (*b.items(), ("K", small.K), ("V", small.V))}
    wrong(b)
    with pytest.raises(ValueError, match=needle):
        program.run(8)
    for name, x in (*b.items(), ("K", small.K), ("V", small.V)):
        if name not in ("ids", "positions", "sequence"):
            assert np.array_equal(x, before[name], equal_nan=True), name
    program.run(1)  # the wrong token is not in this step
    assert np.array_equal(replayed(small, 8, program, b), good)


def test_wrong_blocks_are_refused() -> None:
    small = Small()
    b = small.arrays(CAPACITY)
    with ops.record(CAPACITY) as program:
        small(b)
    for block in (BLOCKS, -1):
        small.tables[0, 0] = block
        with pytest.raises(ValueError, match=str(block)):
            replayed(small, 8, program, b)


F = np.zeros((4, 8), np.float32)
REFUSED = {
    "too few rows": lambda: ops.add(F[:3].copy(), F[:3].copy()),
    "no rows": lambda: ops.add(F[:0].copy(), F[:0].copy()),
    "not a multiple": lambda: ops.add(np.zeros((6, 8), np.float32), np.zeros((6, 8), np.float32)),
    "shapes": lambda: ops.add(F.copy(), F[:, :4].copy()),
    "sample": lambda: ops.sample(F[0], np.zeros(0, np.int32), 0.0, 0, 1.0, 0.0, 1.0, 0, 0),
    "nll": lambda: ops.nll(F, np.zeros(4, np.int32), np.zeros(4)),
    "divergence": lambda: ops.divergence(F, F, np.zeros(4), np.zeros(4, np.uint8)),
    "decode_rows": lambda: ops.decode_rows(
        site(8, 16, "bf16", 0).weight, np.zeros(1, np.int64), np.zeros((1, 16), "f")
    ),
    "another recording": lambda: ops.record(4).__enter__(),
    "no capacity": lambda: ops.record(0).__enter__(),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_recorded_is_refused_and_ends_the_recording(case: str) -> None:
    x = np.ones((4, 8), np.float32)
    program = None

    def attempt() -> None:
        nonlocal program
        with ops.record(4) as program:
            ops.scale(x, 2.0)
            REFUSED[case]()

    with pytest.raises(ValueError, match=r"\w+ .*\w"):
        attempt()
    with pytest.raises(ValueError, match="recording failed"):
        program.run(4)
    ops.scale(x, 3.0)  # runs at once again
    assert np.all(x == 3)


def test_an_exception_leaves_no_recorder() -> None:
    x = np.ones((4, 8), np.float32)

    def attempt() -> None:
        with ops.record(4):
            ops.scale(x, 2.0)
            raise KeyError

    with pytest.raises(KeyError):
        attempt()
    with ops.record(4) as program:
        ops.scale(x, 5.0)
    program.run(3)
    assert x[:, 0].tolist() == [5, 5, 5, 1]


@pytest.mark.parametrize("tokens", [-1, 5, 1 << 40])
def test_tokens_beyond_the_capacity(tokens: int) -> None:
    x = np.ones((4, 8), np.float32)
    with ops.record(4) as program:
        ops.scale(x, 2.0)
    with pytest.raises(ValueError, match="up to 4 tokens"):
        program.run(tokens)
    assert np.all(x == 1)


def test_a_program_runs_only_when_it_is_finished() -> None:
    x = np.ones((4, 8), np.float32)
    with ops.record(4) as program:
        ops.scale(x, 2.0)
        with pytest.raises(ValueError, match="cannot run while"):
            program.run(1)
    program.run(1)
    with pytest.raises(ValueError, match="recorded once"):
        program.begin()


def test_other_threads_run_at_once_while_one_records() -> None:
    x, y = np.ones((2, 4, 8), np.float32)
    with ops.record(4):
        other = threading.Thread(target=ops.scale, args=(y, 2.0))
        other.start()
        other.join()
        ops.scale(x, 2.0)
    assert np.all(x == 1)
    assert np.all(y == 2)


def test_a_program_keeps_its_arrays() -> None:
    x = np.ones((4, 8), np.float32)
    gone = weakref.ref(x)
    runner = site(8, 8, "f32 @ f32", 0)
    with ops.record(4) as program:
        ops.linear(x, [runner.site], [np.empty((4, 8), np.float32)])
        ops.scale(x, 2.0)
    del runner
    with pytest.raises(ValueError, match="resize"):
        x.resize((400, 8))
    del x
    gc.collect()
    program.run(4)
    kept = gone()
    assert kept is not None
    assert np.all(kept == 2)
    del kept, program
    gc.collect()
    assert gone() is None


def test_memory_that_can_move_is_held() -> None:
    ids = array.array("i", range(4))
    out = np.empty((4, WIDTH), np.float32)
    table = site(VOCAB, WIDTH, "f32 @ f32", 0)
    with ops.record(4) as program:
        ops.embed(table.weight, ids, out)  # type: ignore[arg-type]
    with pytest.raises(BufferError):
        ids.append(7)
    program.run(4)
    assert np.array_equal(out, table.packed.decode()[:4])


# ---------------------------------------------------------------- processes


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("threads", [1, 2])
def test_a_forked_child_replays(threads: int) -> None:
    ops.set_threads(threads)
    small = Small()
    b = small.arrays(CAPACITY)
    with ops.record(CAPACITY) as program:
        small(b)
    want = replayed(small, CAPACITY, program, b)
    children = []
    for _ in range(2):
        child = os.fork()
        if child == 0:
            status = 3
            try:
                status = 0 if np.array_equal(replayed(small, CAPACITY, program, b), want) else 1
            finally:
                os._exit(status)
        children.append(child)
    assert np.array_equal(replayed(small, CAPACITY, program, b), want)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 0]


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_an_idle_team_burns_nothing() -> None:
    spent = run_python(
        "import time, numpy as np\n"
        "from gossamer import ops\n"
        "ops.set_threads(3)\n"
        "x = np.zeros((2000, 100), np.float32)\n"
        "ops.scale(x, 2.0)\n"
        "time.sleep(0.05)\n"
        "before = time.process_time()\n"
        "time.sleep(0.5)\n"
        "print(time.process_time() - before)"
    )
    assert float(spent) < 0.1


def test_threads_that_cannot_be_started_are_an_error() -> None:
    text = run_python(
        "import resource, numpy as np\n"
        "from gossamer import ops\n"
        "x = np.zeros((2000, 100), np.float32)\n"
        "size = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (size + (200 << 20),) * 2)\n"
        "ops.set_threads(256)\n"
        "try: ops.scale(x, 2.0)\n"
        "except RuntimeError as error: print(error)\n"
        "ops.set_threads(2)\n"
        "ops.scale(x, 2.0)\n"
    )
    assert "256 threads" in text
