"""Every command that writes: killed at any call, started twice at once, and on a full disk.

The commands run as people run them. By default each is killed at a few calls; the slow tests do it as often as the
acceptance of this part asks for, and docs/log.md records when they ran.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from conftest import GOLDEN, SMALL_CONFIG, killed_at, random_model, refused, run, write_folder
from mlx_openelm.errors import OutputError, OutputLockedError
from mlx_openelm.files.manifest import MANIFEST
from mlx_openelm.model.adapters import about_base, save_adapter
from mlx_openelm.model.lora import AdapterConfig, adapter_parameters, add_adapter
from mlx_openelm.training.tune import prepare_tuning, tuning_steps
from mlx_openelm.training.tune_recipe import TuneRecipe

DYING = Path(__file__).with_name("dying.py")
EXISTS = re.compile(r"is writing|already exists|already contains checkpoints|another process wrote")
CONFIG = SMALL_CONFIG
RECIPE = """
model: {num_transformer_layers: 2, model_dim: 32, head_dim: 8, num_gqa_groups: 2, ffn_dim_divisor: 16, vocab_size: 400,
  max_context_length: 32}
data: corpus.txt
tokenizer: small/tokenizer.model
steps: 6
batch_size: 2
sequence_length: 16
learning_rate: 0.01
warmup_steps: 2
dtype: float32
log_every: 1
validate_every: 3
checkpoint_every: 2
keep_checkpoints: 2
validation_rows: 2
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory, tokenizer):
    """Models, adapters, data: what the commands read."""
    place = tmp_path_factory.mktemp("interruption")
    model = random_model(CONFIG)
    write_folder(place / "small", model, tokenizer)
    write_folder(place / "other", random_model(CONFIG, seed=1), tokenizer)
    config = AdapterConfig("lora", rank=2, alpha=4.0)
    add_adapter(model, config, 0)
    (place / "adapter").mkdir()
    save_adapter(place / "adapter", adapter_parameters(model), "lora", config, about_base("small", CONFIG))
    lines = [{"prompt": f"The fox {n % 7} ran", "completion": f" to the river {n % 4}."} for n in range(12)]
    (place / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (place / "prompts.jsonl").write_text("".join(json.dumps({"prompt": line["prompt"]}) + "\n" for line in lines[:5]))
    documents = [f"The fox number {n} went to the river {'and slept ' * (n % 5)}." for n in range(200)]
    (place / "corpus.txt").write_text("\n<|endoftext|>\n".join(documents))
    (place / "recipe.yaml").write_text(RECIPE)
    (place / "vocabulary.yaml").write_text(RECIPE.replace("tokenizer: small/tokenizer.model", "train_tokenizer: 300"))
    return place


@dataclass(frozen=True)
class Writer:
    """A command that writes, `{p}` being what it reads from and `{o}` the folder it writes to."""

    command: str
    before: str = ""  # a command that has to be run first
    resumes: bool = False
    compared: Callable[[str], bool] = field(default=lambda name: name != "README.md")  # what has to be equal to the bit
    appears: str = "out"  # what exists when it is done
    replaces: bool = False

    def words(self, place: Path, output: Path, command: str = "") -> list[str]:
        return [word.format(p=place, o=output) for word in (command or self.command).split()]

    def again(self, output: Path) -> list[str]:
        """What is added to the command to have it done after an interruption."""
        if self.resumes and any((output / "out" / "checkpoints").glob("step-*")):
            return ["--resume"]
        return ["--force"] if self.replaces and (output / self.appears).exists() else []


def weights(name):
    return name.endswith((".safetensors", ".tokens", ".npy", "tokenizer.model"))


_SMALL = "-m {p}/small --dtype float32"
WRITERS = {
    "convert": Writer("convert {p}/small -q 4 --group-size 32 -o {o}/out", replaces=True),
    "convert a .pt file": Writer(
        f"convert {GOLDEN}/tied_gqa2/corenet_checkpoint.pt --config {GOLDEN}/tied_gqa2/config.json --tokenizer none "
        "-o {o}/out",
        replaces=True,
    ),
    "convert --force": Writer(
        "convert {p}/small -q 4 --group-size 32 -o {o}/out --force", before="convert {p}/other -o {o}/out"
    ),
    "convert an adapter": Writer("convert --adapter {p}/adapter --to peft -o {o}/out", replaces=True),
    "merge": Writer("merge -m {p}/small -a {p}/adapter -o {o}/out", replaces=True),
    "average": Writer("average {p}/small {p}/other -o {o}/out", replaces=True),
    "tune": Writer(
        f"tune {_SMALL} -d {{p}}/data.jsonl -o {{o}}/out --steps 6 --rank 2 --checkpoint-every 2 --log-every 1",
        resumes=True,
        compared=weights,
    ),
    "pretrain": Writer("pretrain --config {p}/recipe.yaml -o {o}/out", resumes=True, compared=weights),
    "a vocabulary": Writer("pretrain --config {p}/vocabulary.yaml -o {o}/out", resumes=True, compared=weights),
    "answers": Writer(f"generate {_SMALL} -i {{p}}/prompts.jsonl -o {{o}}/out -n 4 --batch-size 2", replaces=True),
    "answers --force": Writer(
        f"generate {_SMALL} -i {{p}}/prompts.jsonl -o {{o}}/out -n 4 --batch-size 2 --force",
        before=f"generate {_SMALL} -i {{p}}/prompts.jsonl -o {{o}}/out -n 2",
    ),
    "a prompt cache": Writer(f"generate {_SMALL} -p Once -n 4 --prompt-cache {{o}}/out", compared=lambda name: False),
    "a prompt cache again": Writer(
        f"generate {_SMALL} -p Once -n 4 --prompt-cache {{o}}/out",
        before=f"generate {_SMALL} -p Twice -n 9 --prompt-cache {{o}}/out",
        compared=lambda name: False,  # what is reused of the first run gives other roundings
    ),
    "a design": Writer("design --params 270M --save {o}/out", replaces=True),
    "a picture": Writer("design --params 270M --plot {o}/out.png", replaces=True, appears="out.png"),
}
USUAL = ("convert --force", "merge", "tune", "pretrain", "answers", "a prompt cache", "a picture")  # one of each kind
TWICE = ("convert", "tune", "pretrain", "answers", "a prompt cache")


def contents(folder: Path, compared: Callable[[str], bool]) -> dict[str, bytes | None]:
    """Every file, with its bytes where they have to be equal."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            name = str(path.relative_to(folder))
            found[name] = path.read_bytes() if compared(name) and path.name not in ("README.md", MANIFEST) else None
    return found


def unchecked(*words):
    """A command without the look at the free space that `convert` takes beforehand: exit status and stderr."""
    code = "from mlx_openelm.conversion.write import folder; folder._check_disk = lambda *_: None; "
    code += "from mlx_openelm.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=120)
    return done.returncode, done.stderr


def prepared(writer: Writer, place: Path, folder: Path) -> dict[str, bytes | None]:
    """The folder as it is before the command, and what is in it."""
    folder.mkdir()
    if writer.before:
        assert unchecked(*writer.words(place, folder, writer.before))[0] == 0
    return contents(folder, lambda name: True)


@pytest.fixture(scope="module")
def whole(place, tmp_path_factory):
    """What each command leaves that nobody interrupts, and at how many calls it could have been."""
    found: dict[str, tuple[dict[str, bytes | None], int]] = {}

    def of(name: str) -> tuple[dict[str, bytes | None], int]:
        if name not in found:
            writer, folder = WRITERS[name], tmp_path_factory.mktemp("whole") / "o"
            prepared(writer, place, folder)
            done = dying(0, folder, writer.words(place, folder))
            assert done.returncode == 0, done.stderr
            found[name] = contents(folder, writer.compared), int(re.search(r"calls: (\d+)", done.stderr)[1])
        return found[name]

    return of


def dying(at, folder, words):
    return subprocess.run(
        [sys.executable, DYING, str(at), folder, *words],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        timeout=120,
    )


def killed_and_run_again(name, place, tmp_path, whole, kills):
    writer = WRITERS[name]
    expected, calls = whole(name)
    for number in range(kills):
        folder = tmp_path / str(number)
        before = prepared(writer, place, folder)
        at = calls * 2 // 3 if kills == 1 else 1 + number * (calls - 1) // (kills - 1)
        assert dying(at, folder, writer.words(place, folder)).returncode == -9
        after = contents(folder, lambda name: True)
        for path, old in before.items():  # old or new, never neither
            assert path in after, f"{path} is lost by a kill at call {at} of {calls}"
            if old is not None and writer.compared(path) and path in expected:
                assert after[path] in (old, expected[path]), (path, at)
        status, _, err = run(*writer.words(place, folder), *writer.again(folder))
        assert status == 0, (at, err)
        assert contents(folder, writer.compared) == expected, f"killed at call {at} of {calls}"
        shutil.rmtree(folder)


@pytest.mark.parametrize("name", USUAL)
def test_a_killed_command_loses_nothing_and_the_next_one_ends_as_if_nothing_had_happened(name, place, tmp_path, whole):
    killed_and_run_again(name, place, tmp_path, whole, kills=1)


@pytest.mark.slow
@pytest.mark.parametrize("name", WRITERS)
def test_the_same_at_twenty_calls(name, place, tmp_path, whole):
    killed_and_run_again(name, place, tmp_path, whole, kills=20)


def both_at_once(name, place, tmp_path, whole, pairs):
    writer = WRITERS[name]
    expected, _ = whole(name)
    met = 0
    for number in range(pairs):
        folder = tmp_path / str(number)
        prepared(writer, place, folder)
        processes = [
            subprocess.Popen(
                [sys.executable, "-m", "mlx_openelm", *writer.words(place, folder)],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
            for _ in range(2)
        ]
        said = [process.communicate(timeout=120)[1] for process in processes]
        statuses = sorted(process.returncode for process in processes)
        assert statuses in ([0, 2], [0, 0] if name in ("a prompt cache", "answers") else []), said
        for process, err in zip(processes, said, strict=True):
            if process.returncode == 2:
                assert EXISTS.search(err.splitlines()[-1]), err
                assert err.count("error:") == 1
                met += "is writing" in err
        if statuses == [0, 2] or name != "a prompt cache":
            assert contents(folder, writer.compared) == expected
        shutil.rmtree(folder)
    return met


@pytest.mark.parametrize("name", TWICE)
def test_of_two_commands_at_once_one_is_done_and_the_other_says_why_not(name, place, tmp_path, whole):
    both_at_once(name, place, tmp_path, whole, pairs=1)


@pytest.mark.slow
@pytest.mark.parametrize("name", TWICE)
def test_the_same_twenty_times(name, place, tmp_path, whole):
    assert both_at_once(name, place, tmp_path, whole, pairs=20) > 0


@pytest.fixture
def small_disk(tmp_path):
    """A disk of four megabytes; needs the right to mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", disk], capture_output=True, check=False)
    if done.returncode:
        pytest.skip("only root may mount a small disk")
    yield disk
    subprocess.run(["umount", disk], check=True)


@pytest.mark.skipif(sys.platform != "linux", reason="tmpfs is Linux's")
@pytest.mark.parametrize(
    ("name", "free"),
    [
        pytest.param(name, free, marks=[] if free == 8192 and name in USUAL else pytest.mark.slow)
        for name in WRITERS
        for free in (8192, 0, 65_536, 200_000)
    ],
)
def test_on_a_full_disk_the_old_content_stays_and_nothing_is_left_over(name, free, place, tmp_path, small_disk, whole):
    writer = WRITERS[name]
    folder = small_disk / "o"
    before = prepared(writer, place, folder)
    filler = small_disk / "filler"
    with open(filler, "wb", buffering=0) as file:
        while True:
            try:
                file.write(b"x" * 4096)
            except OSError:
                break
        file.truncate(max(0, file.tell() - free))
    status, err = unchecked(*writer.words(place, folder))
    after = contents(folder, lambda name: True)
    expected, _ = whole(name)
    if status == 0:
        assert contents(folder, writer.compared) == expected
        return
    assert status == 2, err
    assert "cannot be written" in err.splitlines()[-1], err
    assert "Traceback" not in err
    for path, old in before.items():
        assert after[path] == old
    left = {path for path in after if path not in before}
    assert all(name in expected or writer.resumes or name == "out.part" for name in left)
    assert not [path for path in left if re.search(r"openelm-mlx-|\.lock$|unfinished", path)], left
    filler.unlink()
    status, err = unchecked(*writer.words(place, folder), *writer.again(folder))
    assert status == 0, err
    assert contents(folder, writer.compared) == expected


class TestForce:
    """--force replaces models and adapters of this package, and nothing else."""

    def test_a_project_with_a_config_stays(self, place, tmp_path):
        (tmp_path / "project" / "src").mkdir(parents=True)
        (tmp_path / "project" / "config.json").write_text("{}")
        (tmp_path / "project" / "src" / "main.py").write_text("code")
        assert "src/main.py" in refused("convert", place / "small", "-o", tmp_path / "project", "--force")
        assert (tmp_path / "project" / "src" / "main.py").read_text() == "code"

    def test_a_source_or_an_adapter_in_the_output_stays(self, place, tmp_path):
        shutil.copytree(place / "small", tmp_path / "parent" / "m")
        (tmp_path / "parent" / "config.json").write_text("{}")
        shutil.copytree(place / "adapter", tmp_path / "pa" / "adapter")
        shutil.copyfile(place / "small" / "config.json", tmp_path / "pa" / "config.json")
        before = contents(tmp_path, lambda name: True)
        refused("convert", tmp_path / "parent" / "m", "-o", tmp_path / "parent", "--force")
        refused("merge", "-m", place / "small", "-a", tmp_path / "pa" / "adapter", "-o", tmp_path / "pa", "--force")
        refused("average", tmp_path / "parent" / "m", place / "other", "-o", tmp_path / "parent" / "m", "--force")
        assert contents(tmp_path, lambda name: True) == before

    @pytest.mark.parametrize(
        "command", ["convert {m} -q 4 --group-size 32", "merge -m {m} -a {p}/adapter", "average {m} {p}/other"]
    )
    def test_a_model_is_not_replaced_by_what_is_made_of_it(self, place, tmp_path, command):
        assert run("convert", place / "small", "-o", tmp_path / "m")[0] == 0
        before = contents(tmp_path, lambda name: True)
        for model in (tmp_path / "m", tmp_path / "m" / ".." / "m"):
            words = command.format(m=model, p=place).split()
            assert "would remove its source" in refused(*words, "-o", tmp_path / "m", "--force")
        assert contents(tmp_path, lambda name: True) == before

    def test_a_model_is_replaced_where_a_link_leads(self, place, tmp_path):
        assert run("convert", place / "small", "-o", tmp_path / "big" / "old")[0] == 0
        (tmp_path / "model").symlink_to("big/old")
        assert run("convert", place / "other", "-o", tmp_path / "model", "--force")[0] == 0
        assert (tmp_path / "model").is_symlink()
        assert sorted(os.listdir(tmp_path)) == ["big", "model"]
        assert os.listdir(tmp_path / "big") == ["old"]

    def test_an_input_is_not_replaced_by_its_answers(self, place, tmp_path):
        shutil.copyfile(place / "prompts.jsonl", tmp_path / "p.jsonl")
        (tmp_path / "link.jsonl").symlink_to("p.jsonl")
        for name in ("p.jsonl", "link.jsonl"):
            words = ["-m", place / "small", "-i", tmp_path / "p.jsonl", "-o", tmp_path / name, "--force"]
            assert "is also an input" in refused("generate", *words)
        assert (tmp_path / "p.jsonl").read_bytes() == (place / "prompts.jsonl").read_bytes()

    def test_one_file_for_two_results_is_refused_at_once(self, tmp_path):
        assert "this process" in refused(
            "design", "--params", "270M", "--save", tmp_path / "x", "--plot", tmp_path / "x"
        )
        assert os.listdir(tmp_path) == []


class TestRunFolder:
    """What a run may overwrite in its folder: only what it wrote itself."""

    @staticmethod
    def tune(place, output, *more):
        words = [
            "-m",
            place / "small",
            "-d",
            place / "data.jsonl",
            "--rank",
            2,
            "--checkpoint-every",
            2,
            "--dtype",
            "float32",
        ]
        return ["tune", *words, "-o", output, *more]

    @pytest.mark.parametrize(
        ("name", "content"),
        [
            ("metrics.jsonl", "my own notes\nline two\n"),
            ("adapters.safetensors", "x"),
            ("checkpoints", "a file"),
            pytest.param("metrics.jsonl", '{"step": 10, "accuracy": 0.9}\n', marks=pytest.mark.slow),
            pytest.param("adapter_config.json", "{}", marks=pytest.mark.slow),
            pytest.param("adapter_model.safetensors", "x", marks=pytest.mark.slow),
            pytest.param("model-00001-of-00002.safetensors", "x", marks=pytest.mark.slow),
            pytest.param("config.json", "{}", marks=pytest.mark.slow),
        ],
    )
    def test_a_fresh_one_leaves_what_is_there(self, place, tmp_path, name, content):
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / name).write_text(content)
        assert name in refused(*self.tune(place, tmp_path / "run", "--steps", 2))
        recipe = place / "recipe.yaml"
        status, _, err = run("pretrain", "--config", recipe, "--steps", 2, "-o", tmp_path / "run")
        assert (status, name in err) == (2, True)
        assert contents(tmp_path, lambda name: True) == {f"run/{name}": content.encode()}

    def test_what_appears_in_the_place_of_the_adapter_stays(self, place, tmp_path, monkeypatch):
        recipe = TuneRecipe(
            model=str(place / "small"), data=str(place / "data.jsonl"), rank=2, steps=2, dtype="float32", log_every=1
        )
        steps = tuning_steps(prepare_tuning(recipe), tmp_path / "run")
        next(steps)
        (tmp_path / "run" / "adapters.safetensors").write_text("mine")
        with pytest.raises(OutputError, match="in the meantime"):
            list(steps)
        assert (tmp_path / "run" / "adapters.safetensors").read_text() == "mine"

    def test_an_adapter_that_was_changed_before_it_is_resumed_gets_another_name(self, place, tmp_path):
        assert run(*self.tune(place, tmp_path / "run", "--steps", 2))[0] == 0
        (tmp_path / "run" / "adapters.safetensors").write_text("mine")
        status, _, err = run(*self.tune(place, tmp_path / "run", "--steps", 4, "--resume"))
        assert status == 0
        assert "moved it to adapters-old.safetensors" in err
        assert (tmp_path / "run" / "adapters-old.safetensors").read_text() == "mine"

    def test_is_one_place_however_it_is_spelled(self, place, tmp_path):
        assert run(*self.tune(place, tmp_path / "home" / "run", "--steps", 2))[0] == 0
        before = contents(tmp_path, lambda name: True)
        for output in ("~/run", f"{tmp_path}/new/../home/run"):
            err = refused(*self.tune(place, output, "--steps", 2, "--seed", 9), HOME=str(tmp_path / "home"))
            assert "already contains checkpoints" in err
        assert contents(tmp_path, lambda name: True) == before

    def test_a_link_to_it_may_be_moved_meanwhile(self, place, tmp_path):
        recipe = TuneRecipe(
            model=str(place / "small"), data=str(place / "data.jsonl"), rank=2, steps=2, dtype="float32", log_every=1
        )
        (tmp_path / "latest").symlink_to("a")
        steps = tuning_steps(prepare_tuning(recipe), tmp_path / "latest")
        next(steps)
        (tmp_path / "latest").unlink()
        (tmp_path / "latest").symlink_to("b")
        list(steps)
        assert sorted(os.listdir(tmp_path)) == ["a", "latest"]
        assert (tmp_path / "a" / "adapters.safetensors").exists()

    def test_a_run_that_nobody_closed_is_not_joined_by_another(self, place, tmp_path):
        recipe = TuneRecipe(
            model=str(place / "small"), data=str(place / "data.jsonl"), rank=2, steps=4, dtype="float32", log_every=1
        )
        first = tuning_steps(prepare_tuning(recipe), tmp_path / "run")
        next(first)
        with pytest.raises(OutputLockedError, match="this process is writing"):
            next(tuning_steps(prepare_tuning(recipe), tmp_path / "run"))
        assert [metrics.step for metrics in first] == [2, 3, 4]

    def test_a_live_one_names_its_process(self, place, tmp_path):
        words = [str(word) for word in self.tune(place, tmp_path / "run", "--steps", 100_000, "--log-every", 1)]
        process = subprocess.Popen([sys.executable, "-m", "mlx_openelm", *words], stderr=subprocess.PIPE, text=True)
        while "step 3 of" not in process.stderr.readline():
            pass
        for more in ([], ["--resume"]):
            assert f"process {process.pid} is writing" in refused(*self.tune(place, tmp_path / "run", *more))
        process.terminate()
        process.communicate(timeout=60)
        assert process.returncode == 130

    def test_a_pipe_in_the_place_of_the_metrics_is_refused(self, place, tmp_path):
        assert run(*self.tune(place, tmp_path / "run", "--steps", 2))[0] == 0
        (tmp_path / "run" / "metrics.jsonl").unlink()
        os.mkfifo(tmp_path / "run" / "metrics.jsonl")
        status, _, err = run(*self.tune(place, tmp_path / "run", "--steps", 4, "--resume"))
        assert status == 2
        assert "not a regular file" in err

    def test_begins_again_after_it_was_killed_before_a_checkpoint(self, place, tmp_path):
        folder = tmp_path / "run"
        words = self.tune(place, folder, "--log-every", 1, "--checkpoint-every", 100_000)
        killed_at([sys.executable, "-m", "mlx_openelm", *map(str, words), "--steps", "99999"], 3)
        assert (folder / "metrics.jsonl").exists()
        assert not (folder / "checkpoints").exists()
        assert run(*words, "--steps", 4)[0] == 0
        steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert steps == [1, 2, 3, 4]
        assert not [path for path in folder.rglob(".*") if path.name != MANIFEST]

    def test_a_run_is_not_begun_over_an_adapter(self, place, tmp_path):
        shutil.copytree(place / "adapter", tmp_path / "a")
        words = ["tune", "-m", place / "small", "-d", place / "data.jsonl", "--steps", 1, "-o", tmp_path / "a"]
        assert "of a model or an adapter" in refused(*words)
        assert contents(tmp_path / "a", lambda name: True) == contents(place / "adapter", lambda name: True)
