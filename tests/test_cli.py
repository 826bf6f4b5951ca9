"""The commands as people run them: text on stdout, one line on stderr and status 2 for a mistake."""

import fcntl
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

from conftest import GOLDEN, refused, run
from mlx_openelm import SamplingConfig, __version__, config_from_dict, convert, generate, load, load_model

PROMPT = "Once upon a time"


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tiny_model, tokenizer):
    from conftest import write_folder

    place = tmp_path_factory.mktemp("cli")
    write_folder(place / "tiny", tiny_model, tokenizer)
    convert(place / "tiny", place / "base", quantize=4)
    write_folder(place / "Tiny-Instruct", tiny_model, tokenizer)
    convert(place / "Tiny-Instruct", place / "chat")
    convert(place / "tiny", place / "bare", tokenizer="none")
    return place


class TestConvert:
    def test_says_what_it_wrote(self, folders, tmp_path):
        status, out, err = run("convert", folders / "tiny", "-o", tmp_path / "out", "--quantize", 4)
        assert (status, err) == (0, "")
        assert re.search(r"parameters in 4-bit affine, [45]\.\d\d bits per weight, .* MiB \(source: .* MiB\)", out)
        assert load(tmp_path / "out")[1] is not None

    def test_json(self, folders, tmp_path):
        status, out, _ = run("convert", folders / "tiny", "-o", tmp_path / "out", "--mode", "mxfp4", "--json")
        values = json.loads(out)
        assert status == 0
        assert values["quantization"] == {"bits": 4, "group_size": 32, "mode": "mxfp4"}
        assert config_from_dict(values["config"]) == load_model(tmp_path / "out").config

    def test_output_is_named_after_the_source(self, folders, tmp_path):
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "mlx_openelm",
                "convert",
                GOLDEN / "tied_gqa2/corenet_checkpoint.pt",
                "--tokenizer",
                "none",
            ],
            cwd=tmp_path,
            capture_output=True,
            check=True,
        )
        assert b"corenet_checkpoint: " in done.stdout
        assert (tmp_path / "corenet_checkpoint" / "config.json").exists()

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            (["{p}/missing.pt"], r"missing\.pt does not exist"),
            (["{p}/missing"], "does not exist"),
            (["nobody/Nothing-1B"], "nobody/Nothing-1B"),
            (["{p}/tiny", "-q", "7"], "got 7"),
            (["{p}/tiny", "-q", "4", "--group-size", "5"], "group_size must be one of .*; got 5"),
            (["{p}/tiny", "-q", "x"], "--quantize must be a whole number; got 'x'"),
            (["{p}/tiny", "--mode", "nf4"], "nf4"),
            (["{p}/tiny", "-o", "{p}/base"], "--force"),
            (["{p}/tiny", "--dtype", "float64"], "float64"),
            (["{p}/tiny", "--config", "7B"], "7B"),
            (["{p}/tiny", "--tokenizer", "{p}/none.model"], r"none\.model"),
            ([], "(?i)source"),
            (["{p}/tiny", "--frobnicate"], "--frobnicate"),
        ],
    )
    def test_mistakes_are_one_line(self, folders, arguments, said):
        before = sorted(folders.rglob("*"))
        assert re.search(said, refused("convert", *[argument.format(p=folders) for argument in arguments]))
        assert sorted(folders.rglob("*")) == before

    def test_a_missing_tokenizer_names_the_ways_out(self, tmp_path):
        message = refused("convert", GOLDEN / "tied_gqa2/corenet_checkpoint.pt", "-o", tmp_path / "out")
        assert "--tokenizer none" in message

    def test_ctrl_c_says_where_it_stopped(self, folders, tmp_path):
        code = (
            "import signal, os, importlib\n"
            "o = importlib.import_module('mlx_openelm.conversion.write.folder'); w = o.write_safetensors\n"
            "def write(file, tensors, metadata, on_written):\n"
            "    def seen(name, nbytes):\n"
            "        on_written(name, nbytes)\n"
            "        if 'layers.1' in name: os.kill(os.getpid(), signal.SIGINT)\n"
            "    w(file, tensors, metadata, seen)\n"
            "o.write_safetensors = write\n"
            "from mlx_openelm.cli import main; main()"
        )
        command = [sys.executable, "-c", code, "convert", folders / "tiny", "-o", tmp_path / "out"]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 130
        assert re.search(
            r"interrupted after transformer.layers.1\S+, .* MiB of .* MiB; nothing was written", done.stderr
        )
        assert list(tmp_path.iterdir()) == []


class TestGenerate:
    def test_prints_the_text_alone(self, folders):
        status, out, err = run("generate", "-m", folders / "base", "--prompt", PROMPT, "-n", 12)
        model, tokenizer = load(folders / "base")
        assert (status, err) == (0, "")
        assert out == generate(model, tokenizer, PROMPT, max_tokens=12) + "\n"

    def test_model_from_the_environment(self, folders):
        _, out, _ = run("generate", "-p", PROMPT, "-n", 3, OPENELM_MLX_MODEL=str(folders / "base"))
        assert out == run("generate", "-m", folders / "base", "-p", PROMPT, "-n", 3)[1]

    def test_prompt_from_stdin(self, folders):
        status, out, _ = run("generate", "-m", folders / "base", "-p", "-", "-n", 3, stdin=PROMPT.encode())
        assert (status, out) == (0, run("generate", "-m", folders / "base", "-p", PROMPT, "-n", 3)[1])

    def test_json(self, folders):
        status, out, _ = run("generate", "-m", folders / "base", "-p", PROMPT, "-n", 4, "--json")
        values = json.loads(out)
        assert status == 0
        assert (values["prompt"], values["finish_reason"]) == (PROMPT, "length")
        assert len(values["tokens"]) == len(values["logprobs"]) == 4
        assert values["stats"]["generated_tokens"] == 4
        assert values["stats"]["decode_tokens_per_second"] > 0

    def test_every_sampling_flag_reaches_the_sampler(self, folders):
        flags = ["--temperature", "0.9", "--top-p", "0.8", "--top-k", "20", "--min-p", "0.01", "--seed", "4"]
        flags += ["--repetition-penalty", "1.2", "--repetition-context", "9"]
        _, out, _ = run("generate", "-m", folders / "base", "-p", PROMPT, "-n", 12, *flags)
        sampling = SamplingConfig(0.9, 0.8, 20, 0.01, 1.2, 9, 4)
        model, tokenizer = load(folders / "base")
        assert out == generate(model, tokenizer, PROMPT, max_tokens=12, sampling=sampling) + "\n"

    def test_instruct_models_get_their_template(self, folders):
        flags = ["-n", 8, "--system", "Be brief."]
        _, out, _ = run("generate", "-m", folders / "chat", "-p", "Hello", *flags)
        model, tokenizer = load(folders / "chat")
        messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
        assert out == generate(model, tokenizer, tokenizer.encode_chat(messages), max_tokens=8) + "\n"
        _, raw, _ = run("generate", "-m", folders / "chat", "-p", "Hello", "-n", 8, "--raw")
        assert raw == generate(model, tokenizer, "Hello", max_tokens=8) + "\n"

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            (["-m", "{p}/base", "-p", ""], "prompt is empty"),
            (
                ["-m", "{p}/base", "-p", "x", "--temperature", "-1"],
                "temperature must be 0, or from 1e-05 to 100,000; got -1",
            ),
            (["-m", "{p}/base", "-p", "x", "--top-p", "0"], "top_p must be above 0 and at most 1; got 0"),
            (["-m", "{p}/base", "-p", "x", "-n", "0"], "max_tokens must be at least 1; got 0"),
            (["-m", "{p}/base", "-p", "x", "--dtype", "int4"], "int4"),
            (["-m", "{p}/base", "-p", "x", "--chat"], "base model"),
            (["-m", "{p}/base", "-p", "x", "--system", "y"], "chat template"),
            (["-m", "{p}/bare", "-p", "x"], "has no tokenizer"),
            (["-m", "{p}/missing", "-p", "x"], "does not exist"),
            (["-m", "{p}/base"], "--prompt"),
        ],
    )
    def test_mistakes_are_one_line(self, folders, arguments, said):
        assert said in refused("generate", *[argument.format(p=folders) for argument in arguments])

    def test_invalid_utf8_on_stdin(self, folders):
        assert "not valid UTF-8 at byte 2" in refused("generate", "-m", folders / "base", "-p", "-", stdin=b"ab\xff")

    def test_ctrl_c_keeps_what_was_written(self, folders):
        command = [
            sys.executable,
            "-m",
            "mlx_openelm",
            "generate",
            "-m",
            folders / "chat",
            "-p",
            "x",
            "-n",
            "100000",
            "--raw",
        ]
        process = subprocess.Popen([str(word) for word in command], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        seen = process.stdout.read(200)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
        assert process.returncode == 130
        assert out.endswith(b"\n")
        assert len(seen) == 200
        assert b"Traceback" not in err

    def test_a_reader_that_leaves_is_no_error(self, folders):
        command = f"{sys.executable} -m mlx_openelm generate -m {folders / 'base'} -p x -n 3000 | head -c 5"
        done = subprocess.run(command, shell=True, capture_output=True, timeout=120)
        assert len(done.stdout) == 5
        assert b"Traceback" not in done.stderr


def on_a_terminal(*arguments, typed=(), until=None):
    """What a person sees, with what is typed, one after the other, each time that a prompt or text is there."""
    typed = list(typed)
    main, other = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100", "HF_HUB_OFFLINE": "1"}
    environment["OPENELM_MLX_CHAT_HISTORY"] = "off"
    process = subprocess.Popen(
        [sys.executable, "-m", "mlx_openelm", *map(str, arguments)],
        stdin=other,
        stdout=other,
        stderr=other,
        env=environment,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # so that Ctrl-C reaches it
    )
    os.close(other)
    seen, answered, deadline = b"", 0, time.monotonic() + 60
    while time.monotonic() < deadline:
        if typed and until in seen[answered:]:
            answered = len(seen)
            os.write(main, typed.pop(0))
        if select.select([main], [], [], 0.2)[0]:
            try:
                seen += os.read(main, 65536)
            except OSError:
                break
        elif process.poll() is not None:
            break
    os.close(main)
    assert process.wait(timeout=10) == 0, seen
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", seen.decode()).replace("\r", "")


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
class TestTerminal:
    def test_generate_shows_prompt_text_and_figures(self, folders):
        seen = on_a_terminal("generate", "-m", folders / "base", "-p", PROMPT, "-n", 5)
        assert seen.startswith(PROMPT)
        assert re.search(
            r"\d+ prompt tokens at [\d,.]+/s, 5 generated at [\d,.]+/s, peak memory [\d,.]+ MiB\n",
            seen,
        )

    def test_convert_shows_a_bar(self, folders, tmp_path):
        seen = on_a_terminal("convert", folders / "tiny", "-o", tmp_path / "out")
        assert "bits per weight" in seen

    def test_chat_talks(self, folders):
        typed = [b"Hello\n/reset\nAgain\n/quit\n"]
        seen = on_a_terminal("chat", "-m", folders / "chat", "-n", 4, typed=typed, until=b"> ")
        assert len(re.findall(r"4 generated at ", seen)) == 2
        assert "Chat with chat: type a message, or /help" in seen

    def test_ctrl_c_at_the_prompt_of_a_chat_clears_the_line(self, folders):
        typed = [b"Hel\x03", b"\x03", b"/system\n", b"/quit\n"]
        seen = on_a_terminal("chat", "-m", folders / "chat", "-n", 4, typed=typed, until=b"> ")
        assert "Ctrl-D or /quit ends the chat." in seen
        assert "system message: none" in seen
        assert "interrupted" not in seen


class TestChat:
    def test_lines_from_a_pipe_are_turns(self, folders):
        status, out, err = run("chat", "-m", folders / "chat", "-n", 4, stdin=b"Hello\n\nAgain\n/quit\nnever\n")
        assert (status, err) == (0, "")
        assert out.count("\n") >= 2

    def test_a_line_that_fails_does_not_end_the_conversation(self, folders, tmp_path):
        lines = [b"Hello", b"caf\xe9", b"Again"]
        words = ["chat", "-m", folders / "chat", "-n", 4]
        cache = tmp_path / "cache"
        status, out, err = run(*words, "--prompt-cache", cache, stdin=b"\n".join(lines), LC_ALL="C")
        assert status == 0
        assert err == "openelm-mlx: error: line skipped: not valid UTF-8\n"
        assert out == run(*words, stdin=b"Hello\nAgain")[1]
        assert cache.exists()

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
    def test_whatever_ends_it_the_prompt_cache_is_written(self, folders, tmp_path, number):
        words = [sys.executable, "-m", "mlx_openelm", "chat", "-m", folders / "chat", "-n", "4"]
        process = subprocess.Popen(
            [*words, "--prompt-cache", tmp_path / "cache"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        process.stdin.write(b"Hello\n")
        process.stdin.flush()
        assert process.stdout.readline()
        process.send_signal(number)
        process.communicate(timeout=60)
        assert process.returncode in (0, 128 + number)
        assert os.listdir(tmp_path) == ["cache"]

    def test_base_models_are_refused_with_what_else_to_do(self, folders):
        err = refused("chat", "-m", folders / "base", stdin=b"")
        for words in ("base model", "openelm-tiny-instruct", "--chat-template openelm"):
            assert words in err

    def test_the_built_in_model_chats(self):
        status, out, err = run("chat", "-n", 4, stdin=b"Hello\n")
        assert (status, err) == (0, "")
        assert out.strip()

    def test_a_prompt_cache_in_a_folder_that_does_not_exist_is_refused(self, tmp_path):
        assert f"{tmp_path}/no does not exist" in refused("chat", "--prompt-cache", tmp_path / "no" / "x", stdin=b"")
        assert list(tmp_path.iterdir()) == []


class TestInfoAndDoctor:
    def test_info(self, folders):
        status, out, _ = run("info", folders / "base")
        model = load_model(folders / "base")
        assert status == 0
        for number in (*model.config.num_query_heads, *model.config.ffn_dims):
            assert f" {number:,} " in out

    def test_info_of_a_checkpoint_as_json(self):
        status, out, _ = run("info", GOLDEN / "tied_gqa2/corenet_checkpoint.pt", "--json")
        values = json.loads(out)
        assert status == 0
        assert sum(layer["parameters"] for layer in values["layers"]) < values["parameters"]
        assert values["kv_bytes_per_token"] == sum(layer["kv_bytes_per_token"] for layer in values["layers"])
        assert values["bits_per_weight"] == 32

    def test_doctor(self):
        status, out, _ = run("doctor", "--json")
        values = json.loads(out)
        assert status == 0
        assert values["versions"]["mlx"]
        assert values["float32_matmul_gflops"] > 0
        assert run("doctor")[0] == 0


def test_help_and_nothing(folders):
    assert "convert" in run("--help")[1]
    status, out, err = run()
    assert "convert" in out + err
    assert status == 2
    for command in ("convert", "generate", "chat", "info", "doctor"):
        status, out, _ = run(command, "--help")
        assert status == 0
        assert command == "doctor" or "Example" in out


def test_help_names_no_types_of_python():
    for words in (["--help"], ["models", "--help"], ["convert", "--help"]):
        out = run(*words)[1]
        assert "--verbose" in out
        assert not re.search(r"bool|<str>|list\[", out)


def test_version():
    assert run("--version")[:2] == (0, f"openelm-mlx {__version__}\n")


def test_starting_up_loads_no_heavy_package(folders):
    code = (
        "import sys; sys.argv = ['openelm-mlx', 'generate', '-m', sys.argv[1], '-p', 'x', '-n', '1']\n"
        "from mlx_openelm.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print(sorted({name.split('.')[0] for name in sys.modules}))"
    )
    out = subprocess.run([sys.executable, "-c", code, folders / "base"], capture_output=True, text=True).stdout
    loaded = out.splitlines()[-1]
    for package in ("mlx_lm", "transformers", "torch", "huggingface_hub", "yaml", "tokenizers", "safetensors"):
        assert f"'{package}'" not in loaded


def test_the_links_at_the_root_lead_to_the_command_line_and_the_conversion():
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, root / "cli.py", "--version"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, f"openelm-mlx {__version__}\n")
    assert (root / "convert" / "convert.py").samefile(root / "mlx_openelm" / "conversion" / "convert.py")
