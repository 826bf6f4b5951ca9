"""What `generate` does beyond one prompt: files of prompts, guesses, keys and values kept in other ways."""

import json
import re
import signal
import subprocess
import sys
import time

import pytest

from conftest import refused, run, write_folder
from mlx_openelm import CacheConfig, generate, load
from mlx_openelm.generation.prompt_cache import PromptCache
from mlx_openelm.generation.text import stream_generate

PROMPTS = ["Once upon a time", "the fox", "She said that", "In 1923 the river", "But", "every morning"]


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_model, tokenizer):
    place = tmp_path_factory.mktemp("generate")
    write_folder(place / "base", tiny_model, tokenizer)
    write_folder(place / "other", tiny_model)
    with open(place / "prompts.jsonl", "w") as file:
        file.writelines(json.dumps({"prompt": prompt, "id": number}) + "\n" for number, prompt in enumerate(PROMPTS))
    return place


class TestAFileOfPrompts:
    def test_answers_are_those_of_each_prompt_alone_in_order(self, place, tmp_path):
        command = ["generate", "-m", place / "base", "-i", place / "prompts.jsonl", "-n", 9, "--batch-size", 4]
        status, printed, err = run(*command)
        assert (status, err) == (0, "")
        assert run(*command, "-o", tmp_path / "answers.jsonl")[:2] == (0, "")
        assert (tmp_path / "answers.jsonl").read_text() == printed
        model, tokenizer = load(place / "base")
        for number, line in enumerate(printed.splitlines()):
            answer = json.loads(line)
            assert answer["id"] == number
            assert answer["text"] == generate(model, tokenizer, PROMPTS[number], max_tokens=9)

    def test_an_interrupted_run_goes_on(self, place, tmp_path):
        """With tokens enough to be interrupted among."""
        command = ["generate", "-m", place / "base", "-i", place / "prompts.jsonl", "-n", 60, "--batch-size", 1]
        words = [str(word) for word in (sys.executable, "-m", "mlx_openelm", *command, "-o", tmp_path / "a.jsonl")]
        part = tmp_path / "a.jsonl.part"
        process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
        deadline = time.time() + 60
        while time.time() < deadline and not (part.exists() and part.read_bytes().count(b"\n") >= 2):
            time.sleep(0.001)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
        if process.returncode == 0:
            pytest.skip("it was done before it could be interrupted")
        assert process.returncode == 130
        assert f"run the same command again to resume from {part}" in err
        status, _, err = run(*command, "-o", tmp_path / "a.jsonl")
        assert status == 0
        assert "prompts already answered" in err
        assert run(*command)[1] == (tmp_path / "a.jsonl").read_text()
        assert not part.exists()

    def test_a_finished_run_that_is_repeated_says_so_and_is_no_error(self, place, tmp_path):
        command = ["generate", "-m", place / "base", "-i", place / "prompts.jsonl", "-n", 2, "-o", tmp_path / "a.jsonl"]
        assert run(*command)[::2] == (0, f"openelm-mlx: wrote 6 answers to {tmp_path}/a.jsonl\n")
        before = (tmp_path / "a.jsonl").read_bytes()
        status, out, err = run(*command)
        assert (status, out, err.count("\n")) == (0, "", 1)
        assert "a.jsonl is finished: 6 answers" in err
        assert (tmp_path / "a.jsonl").read_bytes() == before
        assert "already exists" in refused(*command, "--temperature", 0.5)
        assert run(*command, "--force")[0] == 0

    def test_sampled_answers_can_be_repeated(self, place, tmp_path):
        command = ["generate", "-m", place / "base", "-i", place / "prompts.jsonl", "-n", 2, "--temperature", 0.9]
        _, out, err = run(*command)
        seed = re.search(r"the seed was random; --seed (\d+) gives the same answers\n", err)[1]
        texts = [json.loads(line)["text"] for line in out.splitlines()]
        status, out, err = run(*command, "--seed", seed)
        assert (status, err) == (0, "")
        assert [json.loads(line)["text"] for line in out.splitlines()] == texts
        assert run(*command, "-o", tmp_path / "a.jsonl")[0] == 0
        assert "is finished" in run(*command, "-o", tmp_path / "a.jsonl")[2]

    def test_an_interrupted_run_says_which_options_were_others(self, place, tmp_path):
        command = ["generate", "-m", place / "base", "-i", place / "prompts.jsonl", "-o", tmp_path / "a.jsonl"]
        code = "import mlx_openelm.generation.batch as b\nrows = b.generate_batch\n"
        code += "def first(*a, **k):\n    yield next(rows(*a, **k))\n    raise KeyboardInterrupt\n"
        code += "b.generate_batch = first\nfrom mlx_openelm.cli import main\nmain()"
        words = [sys.executable, "-c", code, *map(str, command), "-n", "3", "--kv-bits", "8"]
        assert subprocess.run(words, capture_output=True, timeout=60).returncode == 130
        err = refused(*command, "-n", 4, "--stop", "x", "--chat")
        assert "base model" in err
        err = refused(*command, "-n", 4, "--stop", "x")
        assert "these changed: --max-tokens 3 -> 4, --stop [] -> ['x'], --kv-bits 8 -> none;" in err

    def test_an_answer_is_not_overwritten_unless_told_to(self, place, tmp_path):
        (tmp_path / "a.jsonl").write_text("precious")
        command = ["generate", "-m", place / "base", "-i", place / "prompts.jsonl", "-n", 2, "-o", tmp_path / "a.jsonl"]
        assert "already exists" in refused(*command)
        assert (tmp_path / "a.jsonl").read_text() == "precious"
        assert run(*command, "--force")[0] == 0
        assert len((tmp_path / "a.jsonl").read_text().splitlines()) == 6

    def test_an_option_that_is_refused_leaves_nothing_behind(self, place, tmp_path):
        command = ["generate", "-m", place / "base", "-i", place / "prompts.jsonl", "-n", 2, "-o", tmp_path / "a.jsonl"]
        refused(*command, "--max-kv-size", 50)
        assert list(tmp_path.iterdir()) == []


def test_the_prompt_is_echoed_where_it_is_wanted(place):
    command = ["generate", "-m", place / "base", "-p", f"{'The fox. ' * 20}She said", "-n", 3]
    status, out, err = run(*command)
    assert (status, err) == (0, "")
    assert run(*command, "--echo")[1] == f"{'The fox. ' * 20}She said{out}"
    assert run(*command, "--no-echo")[1] == out


class TestGuesses:
    @pytest.mark.parametrize("options", [["--prompt-lookup", 4], ["--draft-model", "{p}/base"]])
    @pytest.mark.parametrize("sampling", [[], ["--temperature", 0.8, "--seed", 3]])
    def test_the_text_stays_the_same(self, place, options, sampling):
        command = ["generate", "-m", place / "base", "-p", "a a a a a a a", "-n", 60, "--json", *sampling]
        plain = json.loads(run(*command)[1])
        guessed = json.loads(run(*command, *(str(option).format(p=place) for option in options))[1])
        assert guessed["tokens"] == plain["tokens"]
        assert plain["stats"]["acceptance"] is None
        assert guessed["stats"]["drafted_tokens"] >= guessed["stats"]["accepted_tokens"]
        assert guessed["stats"]["drafted_tokens"] > 0 or (sampling and "--draft-model" not in options)


class TestKeysAndValues:
    @pytest.mark.parametrize(
        ("options", "config"),
        [
            (["--kv-bits", 4], CacheConfig(bits=4)),
            (["--kv-bits", 8, "--quantized-kv-start", 20], CacheConfig(bits=8, quantize_after=20)),
            (["--max-kv-size", 16], CacheConfig(window=16)),
            (["--max-kv-size", 16, "--kv-sinks", 2], CacheConfig(window=16, sinks=2)),
        ],
    )
    def test_options_reach_the_cache(self, place, options, config):
        _, out, _ = run("generate", "-m", place / "base", "-p", PROMPTS[0], "-n", 40, *options)
        model, tokenizer = load(place / "base")
        chunks = stream_generate(model, tokenizer, PROMPTS[0], max_tokens=40, cache=PromptCache(model, config))
        assert out == "".join(chunk.text for chunk in chunks) + "\n"

    def test_a_file_keeps_them_from_run_to_run(self, place, tmp_path):
        command = ["generate", "-m", place / "base", "-p", PROMPTS[0], "-n", 9, "--json"]
        plain = json.loads(run(*command)[1])
        for reused in (0, plain["stats"]["prompt_tokens"] - 1):
            found = json.loads(run(*command, "--prompt-cache", tmp_path / "kept")[1])
            assert found["stats"]["reused_tokens"] == reused
            assert found["text"] == plain["text"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "a file of prompts with --input"),
        (["-p", "x", "-i", "{p}/prompts.jsonl"], "--prompt and --input are mutually exclusive"),
        (["-p", "x", "-o", "{p}/out"], "--output requires --input"),
        (["-p", "x", "--columns", "prompt=q"], "--columns requires --input"),
        (
            ["-i", "{p}/prompts.jsonl", "--columns", "q"],
            "must be written as prompt=question,completion=answer; got",
        ),
        (["-i", "{p}/nowhere.jsonl"], "nowhere.jsonl"),
        (["-i", "{p}/base/config.json"], "expected one of the fields prompt, messages, instruction and text"),
        (["-i", "{p}/prompts.jsonl", "--batch-size", "0"], "batch_size must be at least 1; got 0"),
        (["-i", "{p}/prompts.jsonl", "-n", "0"], "max_tokens must be at least 1; got 0"),
        (["-i", "{p}/prompts.jsonl", "-o", "{p}", "--force"], "is a folder"),
        (["-p", "x", "--seed", "-1"], "got -1"),
        (["-p", "x", "--seed", "18446744073709551616"], "got 18446744073709551616"),
        (["-p", "x", "--prompt-lookup", "65"], "must be 1 to 64; got 65"),
        (["-i", "{p}/prompts.jsonl", "--max-kv-size", "50"], "requires --batch-size 1"),
        (["-i", "{p}/prompts.jsonl", "--draft-model", "{p}/base"], "--draft-model cannot be used with --input"),
        (["-i", "{p}/prompts.jsonl", "--json"], "--json cannot be used with --input"),
        (["-p", "x", "--draft-model", "{p}/base", "--prompt-lookup", "3"], "mutually exclusive"),
        (["-p", "x", "--draft-model", "{p}/nowhere"], "nowhere"),
        (["-p", "x", "--prompt-lookup", "-1"], "must not be negative"),
        (["-p", "x", "--prompt-lookup", "3", "--max-kv-size", "50"], "cannot be used with --max-kv-size"),
        (["-p", "x", "--prompt-cache", "{p}/no/x"], "the folder {p}/no does not exist"),
        (["-p", "x", "--tokenizer", "none"], "--tokenizer none leaves the tokenizer out"),
        (["-i", "{p}/prompts.jsonl", "-o", "{p}/q.csv"], "a file of JSON lines; name it .jsonl instead of q.csv"),
        (["-i", "{p}/prompts.jsonl", "-o", "{p}/q.jsonl.gz"], "a file of JSON lines"),
        (["-i", "{p}/prompts.jsonl", "--echo"], "--echo cannot be used with --input"),
        (["-p", "x", "--echo", "--json"], "--echo and --json are mutually exclusive"),
        (["-p", "x", "--kv-bits", "5"], "got 5"),
        (["-p", "x", "--kv-bits", "4", "--max-kv-size", "50"], "mutually exclusive"),
        (["-p", "x", "--max-kv-size", "3"], "--max-kv-size must be greater than the 4 --kv-sinks; got 3"),
        (["-p", "x", "--prompt-cache", "{p}/prompts.jsonl"], "not a prompt cache"),
    ],
)
def test_mistakes_are_one_line(place, arguments, said):
    err = refused("generate", "-m", place / "base", *(argument.format(p=place) for argument in arguments))
    assert said.format(p=place) in err
