"""Bad options through the command line: one sentence that says what would be right, exit code 2."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_gguf
from program import refused

# ---------------------------------------------------------------- models that are not there


@pytest.mark.parametrize("verb", [["run", "-p", "hi"], ["eval"], ["bench"], ["demo"]])
def test_a_model_that_is_not_there(tmp_path: Path, verb: list[str]) -> None:
    sentence = refused(verb[0], "nonsense", *verb[1:], cwd=tmp_path)
    assert "the model 'nonsense' is not known; give one of smollm2-135m, gemma3-270m, a .gguf file" in sentence


def test_what_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("notes")
    (tmp_path / "model.bin").write_bytes(b"\x80\x02}q\x00.")
    (tmp_path / "empty.gguf").write_bytes(b"")
    cases = {
        "./no.gguf": "'./no.gguf' does not exist; give a .gguf file or a Hugging Face folder",
        "empty.gguf": "empty.gguf is empty, not a GGUF file; fetch it again",
        "empty": "empty has no config.json; give a Hugging Face folder or a .gguf file",
        "notes.txt": "notes.txt is not a GGUF file; give a .gguf file or a Hugging Face folder",
        "model.bin": "model.bin is a pickle, which can run any code when it is read",
        "some/where": "the hub cannot be reached",
        "": "the model '' is not known",
        "/dev/null": "/dev/null",
    }
    for model, needle in cases.items():
        assert needle in refused("inspect", model, cwd=tmp_path)


# ---------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("arguments", "needle"),
    [
        ([], "VERB; see 'gossamer --help'."),
        (["frobnicate"], "invalid choice: 'frobnicate' (choose from"),
        (["run"], "required: MODEL; see 'gossamer run --help'."),
        (["run", "{tiny}", "--frob"], "unrecognized arguments: --frob; see 'gossamer run --help'."),
        (["run", "{tiny}", "--frob\n\x1b[31m"], r"unrecognized arguments: --frob\n\x1b[31m;"),
        (["run", "{tiny}", "-p"], "expected one argument"),
        (["run", "{tiny}", "-p", ""], "the prompt is empty; give a text with -p or on standard input."),
        (["run", "{tiny}"], "the prompt is empty"),
        (["run", "{tiny}", "-p", "hi", "--threads", "0"], "--threads: '0' is not a whole number of at least 1"),
        (["run", "{tiny}", "-p", "hi", "--threads", "9999"], "--threads 9999 is out of range: choose 1 to 256."),
        (["run", "{tiny}", "-p", "hi", "--threads", "two"], "--threads: 'two' is not a whole number"),
        (["run", "{tiny}", "-p", "hi", "--top-p", "2"], "top-p 2.0 is out of range: it must be above 0 and at most 1."),
        (["run", "{tiny}", "-p", "hi", "--top-p", "nan"], "top-p nan is out of range"),
        (["run", "{tiny}", "-p", "hi", "--top-k", "-1"], "--top-k: '-1' is not a whole number of at least 0"),
        (["run", "{tiny}", "-p", "hi", "--min-p", "1.5"], "min-p 1.5 is out of range: it must be between 0 and 1."),
        (["run", "{tiny}", "-p", "hi", "--temperature", "-1"], "temperature -1.0 is out of range"),
        (["run", "{tiny}", "-p", "hi", "--temperature", "warm"], "--temperature: invalid float value: 'warm'"),
        (["run", "{tiny}", "-p", "hi", "--repeat-penalty", "0"], "repeat-penalty 0.0 is out of range"),
        (["run", "{tiny}", "-p", "hi", "--seed", str(1 << 64)], "seed 18446744073709551616 is out of range"),
        (["run", "{tiny}", "-p", "hi", "--max-tokens", "0"], "--max-tokens: '0' is not a whole number of at least 1"),
        (["run", "{tiny}", "-p", "hi", "--context", "0"], "--context: '0' is not a whole number of at least 1"),
        (["run", "{tiny}", "-p", "hi", "--context", "1025"], "--context 1025 is out of range: this model was made for"),
        (
            ["run", "{tiny}", "-p", "hi", "--context", "9"],
            "the prompt has 20 tokens and the context holds 9; shorten it",
        ),
        (["run", "{tiny}", "-p", "hi", "--kv", "int3"], "keys and values cannot be stored as 'int3'; choose f32, f16"),
        (["run", "{tiny}", "-p", "hi", "--format", ""], "a format expression is empty; write for example 'int4/g32'"),
        (["run", "{tiny}", "-p", "hi", "--raw", "--system", "x"], "--system needs the chat template"),
        (["compress", "{tiny}", "-o", "x"], "a recipe file, or --format EXPR."),
        (["compress", "{tiny}", "--format", "bf16"], "required: -o/--output"),
        (["compress", "{tiny}", "-o", "", "--format", "bf16"], "--output is empty; give the name of the folder"),
        (["compress", "{tiny}", "-o", "x", "--format", "int5/q32"], "'q32' is not a group: write 'row', 'tensor'"),
        (["compress", "{tiny}", "-o", "x", "--format", "itn4/g32"], "did you mean 'int4'?"),
        (["compress", "{tiny}", "-o", "x", "--format", "int4"], "'int4' needs a group, such as int4/g32 or int4/row."),
        (["compress", "{tiny}", "-o", "x", "--format", "int4/g32 @ int8/tok"], "did you mean 'token'?"),
        (["compress", "{tiny}", "-o", "x", "--format", "bf16 @ int8/token"], "integer inputs need an integer weight"),
        (["compress", "{tiny}", "-o", "x", "--format", "bf16", "--keep", "embed"], "--keep 'embed' does not read as"),
        (["compress", "{tiny}", "-o", "x", "--format", "bf16", "--keep", "=f32"], "--keep '=f32' does not read as"),
        (
            ["compress", "{tiny}", "-o", "x", "--format", "bf16", "--keep", "emebd=f32"],
            "'emebd' matches no site; give a",
        ),
        (
            ["compress", "{tiny}", "-o", "x", "--format", "bf16", "--keep", "embed=int9"],
            "'int9' is not a number format",
        ),
        (["compress", "{tiny}", "-o", "/proc/x", "--format", "bf16"], "/proc/x cannot be written: "),
        (["compress", "{tiny}", "-o", "{tiny}/x", "--format", "bf16"], "part of the path is a file and not a folder"),
        (["eval", "{tiny}", "--tokens", "0"], "--tokens: '0' is not a whole number of at least 2"),
        (["eval", "{tiny}", "--window", "1"], "--window: '1' is not a whole number of at least 2"),
        (["eval", "{tiny}", "--window", "1025"], "--window 1025 is too long: {tiny} was made for up to 1024 tokens."),
        (["eval", "{tiny}", "--text", "nothing"], "there is no text 'nothing'; give one of stdlib, boolq, emma"),
        (["eval", "{tiny}", "--text", "."], "is not a file; give one of stdlib"),
        (["eval", "{tiny}", "--text", "latin1.txt"], "latin1.txt is not UTF-8 text: the byte 0xe9 at position 3"),
        (["eval", "{tiny}", "--text", "short.txt"], "the text has 1 tokens, too few to score one; give a longer text."),
        (["eval", "{tiny}", "--score", "most"], "invalid choice: 'most' (choose from"),
        (["eval", "{tiny}", "--against", "nonsense"], "the model 'nonsense' is not known"),
        (["eval", "{tiny}", "--tokens", "64", "--windows", "1"], "--tokens and --windows say the same in two ways"),
        (["eval", "{tiny}", "--windows", "0"], "--windows: '0' is not a whole number of at least 1"),
        (["eval", "{tiny}", "--limit", "5"], "--limit counts the items of tasks; name some with --tasks."),
        (["eval", "{tiny}", "--tasks", "arc"], "--tasks: there is no task 'arc'; choose arc_easy, arc_challenge"),
        (["eval", "{tiny}", "--tasks", "piqa,piqa"], "a task is named twice; name each once."),
        (["eval", "{tiny}", "--noise"], "--noise compares with a base; name it with --against."),
        (["eval", "{tiny}", "--answers"], "--answers compares with a base"),
        (["eval", "{tiny}", "--sites"], "--sites compares with a base"),
        (["eval", "{tiny}", "--against", "{tiny}", "--tasks", "piqa", "--noise"], "--noise is measured on a text"),
        (["compare", "{tiny}"], "required: --recipes; see 'gossamer compare --help'."),
        (["compare", "{tiny}", "--recipes", "int4/g32,,bf16"], "a format expression is empty"),
        (["compare", "{tiny}", "--recipes", "itn4/g32"], "did you mean 'int4'?"),
        (["compare", "{tiny}", "--recipes", "bf16, bf16"], "--recipes names the same thing twice; name each once."),
        (["compare", "{tiny}", "--recipes", "rtn:int9/g32"], "'int9' is not a number format"),
        (["compare", "{tiny}", "--recipes", "mine.yaml"], "the recipe mine.yaml cannot be read: No such file"),
        (["compare", "{tiny}", "--recipes", "bf16", "--keep", "x"], "--keep 'x' does not read as"),
        (["compare", "{tiny}", "--recipes", "bf16", "--inputs", "int8/tok"], "did you mean 'token'?"),
        (["compare", "{tiny}", "--recipes", "bf16", "--text", "nothing"], "there is no text 'nothing'"),
        (["compare", "{tiny}", "--recipes", "bf16", "--window", "2000", "--cache", "."], "--window 2000 is too long"),
        (["compare", "{tiny}", "--recipes", "bf16", "-o", "/proc/x"], "/proc/x cannot be written: "),
        (["report", "{tiny}"], "is no folder; give one that 'gossamer compress' or 'gossamer compare -o' wrote."),
        (["report", "."], "holds neither gossamer.json nor compare.json, so there is nothing to report."),
        (["report", ".", "--results", "latin1.txt"], "latin1.txt, line 1: this is not UTF-8"),
        (["bench"], "give either a MODEL or --shape NAME, and not both."),
        (["bench", "{tiny}", "--shape", "llama-3-8b"], "give either a MODEL or --shape NAME, and not both."),
        (["bench", "--shape", "llama-9"], "the shape 'llama-9' is not known; choose smollm2-135m, llama-3.2-1b"),
        (["bench", "--shape", "llama-3-8b", "--format", ""], "a format expression is empty"),
        (["bench", "{tiny}", "--formats", "int4/g32,"], "a format expression is empty"),
        (["bench", "{tiny}", "--formats", "int4/g32;itn4/g32"], "did you mean 'int4'?"),
        (
            ["bench", "{tiny}", "--batch", "1,x"],
            "--batch '1,x' must list whole numbers from 1 to 64, for example 1,4",
        ),
        (["bench", "{tiny}", "--batch", ""], "--batch '' must list whole numbers"),
        (["bench", "{tiny}", "--batch", "0"], "--batch '0' must list whole numbers"),
        (["bench", "{tiny}", "--batch", "4,4"], "--batch '4,4' names a size twice; name each once."),
        (["bench", "{tiny}", "--prompt", "0"], "--prompt: '0' is not a whole number of at least 1"),
        (["bench", "{tiny}", "--peer", "vllm"], "--peer 'vllm' is not known; choose llama.cpp."),
        (["bench", "{tiny}", "--peer-model", "x"], "--peer-model and --peer-python need --peer llama.cpp."),
        (["bench", "{tiny}", "--peer", "llama.cpp", "--peer-python", "/no/python"], "'/no/python' cannot be started"),
        (["bench", "{tiny}", "--plot", "x.gif"], "--plot x.gif must end in .svg, .png or .pdf."),
        (["bench", "{tiny}", "--plot", "no/x.svg"], "'no/x.svg' cannot be written: its folder does not exist"),
        (["bench", "{tiny}", "--repetitions", "0"], "--repetitions: '0' is not a whole number of at least 1"),
        (["demo", "{tiny}", "--tokens", "1"], "--tokens: '1' is not a whole number of at least 2"),
        (["demo", "{tiny}", "-p", " "], "the prompt is empty; give a question with -p."),
        (["inspect", "{tiny}", "--threads", "2"], "unrecognized arguments: --threads 2"),
    ],
    ids=lambda value: " ".join(value)[:60] if isinstance(value, list) else "",
)
def test_an_option_that_cannot_work(tiny: Path, tmp_path: Path, arguments: list[str], needle: str) -> None:
    (tmp_path / "latin1.txt").write_bytes("café au lait".encode("latin-1"))
    (tmp_path / "short.txt").write_text("a")
    before = sorted(p.name for p in tmp_path.iterdir())
    given = [a.replace("{tiny}", str(tiny)) for a in arguments]
    assert needle.replace("{tiny}", str(tiny)) in refused(*given, cwd=tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_a_prompt_that_is_no_text(tiny: Path) -> None:
    assert "standard input is not UTF-8 (byte 2)" in refused("run", tiny, stdin=b"hi\xff")
    assert "the prompt is not UTF-8 (character 2)" in refused("run", tiny, "-p", "hi\udcff")
    assert "--system is not UTF-8 (character 0)" in refused("run", tiny, "-p", "hi", "--system", "\udcff")


def test_an_instruction_set_that_is_none(tiny: Path) -> None:
    sentence = refused("run", tiny, "-p", "hi", env={"GOSSAMER_ISA": "nonsense"})
    assert (
        "GOSSAMER_ISA is set wrongly: instruction set 'nonsense' is not one this machine runs; it has scalar"
        in sentence
    )


def test_a_base_with_another_vocabulary(tiny: Path, tmp_path: Path, smollm2_gguf: Path) -> None:
    other = tiny_gguf.write(tmp_path / "other.gguf", merges=("o n", "i n", "r e", "a t", "e n"))
    sentence = refused("eval", tiny, "--against", other, "--tokens", "128", "--window", "64")
    assert "tiny.gguf and other.gguf cut the text into different tokens" in sentence
    sentence = refused("eval", tiny, "--against", "smollm2-135m", "--tokens", "128", "--window", "64")
    assert "tiny.gguf predicts 264 tokens and SmolLM2-135M-Instruct.Q4_1.gguf 49152" in sentence
    assert "choose a base model with the same tokenizer" in sentence
