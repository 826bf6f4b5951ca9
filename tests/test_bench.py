import csv
import io
import json
import sys
from dataclasses import replace

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from conftest import FixedProbe, draw, refused, run
from mlx_openelm import CacheConfig, OpenELMConfig, generate_tokens
from mlx_openelm.benchmark import measure as measure_module
from mlx_openelm.benchmark.bench import bench_cases, check_cases
from mlx_openelm.benchmark.measure import (
    PAPER_PROMPT,
    Case,
    Spread,
    bytes_per_step,
    default_lengths,
    measure,
    weight_bytes_per_step,
)
from mlx_openelm.benchmark.models import Ours, Peer, Run, random_network
from mlx_openelm.benchmark.report import BenchReport
from mlx_openelm.commands import tables
from mlx_openelm.commands.bench import _print_table, _Status
from mlx_openelm.errors import BenchError, MemoryLimitError
from mlx_openelm.generation import engine
from mlx_openelm.machine.hardware import battery_watts, chip_name, describe, power_meter
from mlx_openelm.plot import plot_bench
from mlx_openelm.quantization import Quantization

SMALL = OpenELMConfig.layerwise(2, 128, 64, num_gqa_groups=2, ffn_dim_divisor=64, vocab_size=300)
QUANTIZATIONS = [None, Quantization(4, 64), Quantization(8, 32)]
PROMPTS = [[5, 6, 7], [9] * 20, [11, 12]]


class Clock:
    """A contestant that takes as long as it is told."""

    def __init__(self, name, first, decode, memory=1000):
        self.name = name
        self.runs = iter([(99.0, 99.0), *zip(first, decode, strict=True)])
        self.memory = memory

    def run(self, prompts, max_tokens, cache):
        return Run(*next(self.runs), self.memory, [[1] * max_tokens for _ in prompts])


class TestContestants:
    @pytest.mark.parametrize("quantization", QUANTIZATIONS, ids=str)
    def test_both_write_the_same_on_the_same_weights(self, quantization):
        network = random_network(SMALL, mx.float32, quantization)
        expected = [[step.token for step in generate_tokens(network, prompt, max_tokens=12)] for prompt in PROMPTS]
        for contestant in (Ours(network), Ours(network, compiled=True), Peer(network)):
            assert contestant.run(PROMPTS, 12, CacheConfig()).tokens == expected
            assert contestant.run(PROMPTS[:1], 12, CacheConfig()).tokens == expected[:1]

    @pytest.mark.parametrize("config", [CacheConfig(bits=8), CacheConfig(bits=4), CacheConfig(window=64)])
    def test_keys_and_values_are_kept_as_asked(self, config):
        network = random_network(SMALL, mx.float32)
        for contestant in (Ours(network), Peer(network)):
            run = contestant.run(PROMPTS[:1], 20, config)
            assert len(run.tokens[0]) == 20
            assert run.first_token_seconds > 0 < run.decode_seconds
            assert run.peak_memory_bytes > sum(a.nbytes for _, a in tree_flatten(network.parameters()))

    def test_random_networks_are_quantized_where_it_fits(self):
        network = random_network(SMALL, mx.float16, QUANTIZATIONS[1])
        assert network.transformer.layers[0].attn.qkv_proj.bits == 4
        assert network.transformer.norm.weight.dtype == mx.float16


@pytest.fixture
def cache(monkeypatch):
    """The probe of a cache that holds all that is read for a token."""
    probe = FixedProbe(1e9)
    monkeypatch.setattr(measure_module, "BandwidthProbe", lambda nbytes: probe)
    return probe


@pytest.mark.usefixtures("cache")
class TestMeasure:
    def test_figures_by_hand(self):
        network = random_network(SMALL, mx.float32)
        case = Case(prompt_tokens=10, max_tokens=5, batch_size=2)
        ours = Clock("openelm-mlx", [1.0, 2.0, 4.0], [4.0, 2.0, 1.0], 1000)
        theirs = Clock("mlx-lm", [4.0, 4.0, 4.0], [4.0, 4.0, 4.0], 2000)
        found = measure(network, [ours, theirs], case, model="x", memory=FixedProbe(1e9))
        figures = found.figures["openelm-mlx"]
        assert figures.prefill_tokens_per_second == Spread(10.0, 5.0, 20.0)
        assert figures.decode_tokens_per_second == Spread(4.0, 2.0, 8.0)  # 2 rows of 4 tokens behind the first
        assert figures.total_tokens_per_second == Spread(6.0, 6.0, 7.5)
        weights = sum(array.nbytes for _, array in tree_flatten(network.parameters()))
        kept = 12 * sum(2 * heads * 64 * 4 for heads in SMALL.num_kv_heads)
        assert bytes_per_step(SMALL, weights, case, mx.float32) == weights + 2 * kept
        assert found.limit_tokens_per_second == pytest.approx(2 * 1e9 / (weights + 2 * kept))
        assert figures.bandwidth_share == pytest.approx(4.0 / found.limit_tokens_per_second)
        assert found.ratios() == {"prefill": 2, "decode": 2, "total": 1.6, "first_token": 0.5, "peak_memory": 0.5}
        assert found.same_tokens == 1.0

    def test_contestants_take_turns(self):
        network = random_network(SMALL, mx.float32)
        seen = []
        contestants = [Clock("a", [1.0, 1.0], [1.0, 1.0]), Clock("b", [1.0, 1.0], [1.0, 1.0])]
        measure(
            network,
            contestants,
            Case(3, 3),
            model="x",
            memory=FixedProbe(1e9),
            rounds=2,
            on_round=lambda *of: seen.append(of),
        )
        assert seen == [("a", 0), ("b", 0), ("a", 1), ("b", 1), ("a", 2), ("b", 2)]


def measured(decode_seconds, model="small", memory=1e9, config=SMALL, rounds=1):
    """A result of 16 tokens per round, and the bytes for each of them; also the probe."""
    network = random_network(config, mx.float32)
    probe = FixedProbe(memory)
    clock = Clock("openelm-mlx", [1.0] * rounds, [decode_seconds] * rounds)
    return measure(network, [clock], Case(8, 17), model=model, memory=probe, rounds=rounds), probe


class TestLimit:
    def test_memory_and_cache_are_sampled_before_each_run(self, cache):
        _, memory = measured(1.0, rounds=3)
        assert memory.samples == cache.samples == 4  # the warm-up too

    def test_reading_sets_it(self, cache):
        found, _ = measured(1.0, memory=1e9)
        assert found.limit_tokens_per_second == pytest.approx(1e9 / found.bytes_per_step)
        assert found.figures["openelm-mlx"].bandwidth_share == pytest.approx(16 * found.bytes_per_step / 1e9)
        assert (found.fits_in_cache, found.limit_was_raised) == (False, False)

    def test_a_model_in_a_cache_has_the_limit_of_the_cache(self, cache):
        cache.best = 5e9
        found, _ = measured(1.0, memory=1e9)
        assert found.fits_in_cache
        assert found.limit_bytes_per_second == 5e9
        report = BenchReport.of([found], 1e9, describe("x"))
        assert report.bandwidth == 1e9
        size = f"{found.bytes_per_step / 2**20:,.1f} MiB"
        assert report.notes() == [
            f"small, float32: the {size} read for a token fit in a cache; the limit is its 5.0 GB/s"
        ]

    def test_a_model_that_memory_holds_is_not_compared_with_a_cache(self, monkeypatch):
        monkeypatch.setattr(measure_module, "LARGE_BYTES", 1)
        monkeypatch.setattr(measure_module, "BandwidthProbe", None)
        found, _ = measured(1.0)
        assert found.cache_bytes_per_second is None

    def test_decoding_that_exceeds_it_raises_it_for_all_models(self, cache):
        cache.best = 1.0
        slow, _ = measured(100.0, "slow", memory=1e5)
        fast, _ = measured(1.0, "fast", memory=1e5)
        assert fast.reached_bytes_per_second == pytest.approx(16 * fast.bytes_per_step)
        assert fast.limit_was_raised
        assert fast.figures["openelm-mlx"].bandwidth_share == 1.0
        report = BenchReport.of([slow, fast], 1e5, describe("x"))
        assert report.bandwidth == fast.reached_bytes_per_second
        assert [of.figures["openelm-mlx"].bandwidth_share for of in report.results] == pytest.approx([0.01, 1.0])
        (note,) = report.notes()
        assert note.startswith("fast, float32: decoding read faster than the probe, so the limit was raised to ")

    def test_a_cache_that_is_exceeded_says_nothing_about_memory(self, cache):
        cache.best = 2e6
        found, _ = measured(1.0, memory=1e6)
        report = BenchReport.of([found], 1e6, describe("x"))
        assert report.bandwidth == 1e6
        assert report.results[0].limit_bytes_per_second == found.reached_bytes_per_second
        assert len(report.notes()) == 2

    def test_what_a_later_case_shows_of_memory_counts_for_all(self, cache):
        found, _ = measured(1.0, memory=1e9)
        (again,) = BenchReport.of([found], 4e9, describe("x")).results
        assert again.limit_tokens_per_second == pytest.approx(4 * found.limit_tokens_per_second)

    def test_of_an_embedding_that_is_not_the_output_a_token_reads_a_row(self):
        untied = replace(SMALL, share_input_output_layers=False)
        tied = random_network(SMALL, mx.float32)
        assert weight_bytes_per_step(random_network(untied, mx.float32)) == weight_bytes_per_step(tied)


@pytest.mark.parametrize(
    ("context", "prompt_tokens", "max_tokens", "expected"),
    [
        (2048, None, None, (512, 128)),
        (512, None, None, (384, 128)),
        (64, None, None, (48, 16)),
        (4, None, None, (2, 2)),
        (512, 480, None, (480, 32)),
        (512, 512, None, (512, 2)),
        (512, None, 500, (12, 500)),
        (512, None, 512, (1, 512)),
        (512, 1000, 1000, (1000, 1000)),
    ],
)
def test_lengths_that_are_not_given_fit_into_the_context(context, prompt_tokens, max_tokens, expected):
    assert default_lengths(context, prompt_tokens, max_tokens) == expected


class TestMachine:
    def test_it_is_described(self):
        found = describe("command")
        assert found["command"] == "command"
        assert found["chip"] == chip_name() != ""
        assert found["versions"]["mlx"]

    def test_power_is_a_number_or_unknown(self):
        watts = power_meter()()
        assert watts is None or watts >= 0

    @pytest.mark.parametrize(
        ("connected", "milliamperes", "expected"),
        [("No", 2**64 - 1500, 18.0), ("Yes", 2**64 - 1500, None), ("No", 0, 0.0)],
    )
    def test_a_batterys_listing(self, connected, milliamperes, expected):
        text = f'"ExternalConnected" = {connected}\n "InstantAmperage" = {milliamperes}\n "Voltage" = 12000\n'
        assert battery_watts(text) == expected

    def test_a_listing_without_a_battery(self):
        assert battery_watts("") is None


def report():
    network = random_network(SMALL, mx.float32)
    cases = [Case(10, 5), Case(20, 5, 2, CacheConfig(bits=8))]
    results = []
    for case in cases:
        contestants = [Clock("openelm-mlx", [1.0], [4.0]), Clock("mlx-lm", [4.0], [4.0])]
        results.append(measure(network, contestants, case, model="small", memory=FixedProbe(1e9), rounds=1))
    return BenchReport.of(results, 1e9, describe("x"))


class TestReport:
    def test_json_holds_everything(self):
        values = json.loads(report().to_json())
        assert values["results"][0]["ratios"]["prefill"] == 4
        assert values["results"][1]["case"]["cache"]["bits"] == 8
        assert values["machine"]["command"] == "x"

    def test_csv_and_markdown(self):
        lines = list(csv.DictReader(report().to_csv().splitlines()))
        assert [line["who"] for line in lines] == ["openelm-mlx", "mlx-lm"] * 2
        assert float(lines[0]["decode_tokens_per_second"]) == 1.0
        assert lines[2]["cache"] == "8-bit"
        table = report().to_markdown().splitlines()
        assert len({line.count("|") for line in table}) == 1
        assert "ratio | 4.00 | 1.00 | 0.25 | 1.00" in table[4]

    @pytest.mark.parametrize("ending", ["png", "svg"])
    def test_a_picture(self, tmp_path, ending):
        pytest.importorskip("matplotlib")
        draw(plot_bench, report().to_dict(), tmp_path / f"b.{ending}")
        assert (tmp_path / f"b.{ending}").stat().st_size > 1000


def test_the_papers_prompt_is_of_its_length():
    assert len(PAPER_PROMPT) == 36
    assert PAPER_PROMPT[0] == 1


class Terminal(io.StringIO):
    def isatty(self):
        return True


class TestCommand:
    QUICK = ("--prompt-tokens", 8, "-n", 4, "--rounds", 1)

    def test_its_own_defaults_bring_no_warning(self, tiny_folder):
        status, out, err = run("bench", "-m", tiny_folder, "--rounds", 1)
        assert (status, err) == (0, "")
        assert "prompt 192, completion 64" in out  # of a context of 256 tokens

    @pytest.mark.parametrize("width", [40, 60, 80, 120])
    def test_nothing_is_cut_off_at_any_width(self, width, monkeypatch, capsys):
        monkeypatch.setattr(tables, "line_width", lambda: width)
        found = report()
        _print_table(found)
        lines = capsys.readouterr().out.splitlines()
        assert max(map(len, lines)) <= width
        words = {word.rstrip(",") for line in lines for word in line.split()}
        assert {word.rstrip(",") for row in found.rows() for cell in row for word in cell.split()} <= words

    def test_a_terminal_gets_a_sign_before_anything_is_loaded(self, monkeypatch):
        monkeypatch.setattr(sys, "stderr", Terminal())
        monkeypatch.setenv("TERM", "xterm")
        with _Status("loading") as status:
            assert "loading" in sys.stderr.getvalue()
            status.show("270M: warm-up")
            status.stop()
        assert "270M: warm-up" in sys.stderr.getvalue()

    def test_the_built_in_model_against_mlx_lm(self, tmp_path):
        status, out, _ = run("bench", "--against", "mlx-lm", *self.QUICK, "-o", tmp_path / "r.json")
        assert status == 0
        assert "openelm-tiny" in out
        assert "ratio" in out
        assert json.loads((tmp_path / "r.json").read_text())["results"][0]["same_tokens"] == 1.0

    def test_lists_are_combined(self):
        _, out, _ = run(
            "bench", *self.QUICK[2:], "--prompt-tokens", "4,8", "--batch-size", "1,2", "--kv", "full,8", "--csv"
        )
        lines = list(csv.DictReader(out.splitlines()))
        assert [(line["prompt_tokens"], line["batch_size"], line["cache"]) for line in lines] == [
            (length, rows, kind) for length in "48" for rows in "12" for kind in ("full", "8-bit")
        ]

    def test_json(self):
        _, out, _ = run("bench", *self.QUICK, "--json", "--compile")
        values = json.loads(out)["results"][0]
        assert values["case"]["prompt_tokens"] == 8
        assert values["figures"]["openelm-mlx"]["decode_tokens_per_second"]["median"] > 0

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            (["--against", "torch"], "--against must be mlx-lm; got 'torch'"),
            (["--rounds", "0"], "--rounds must be from 1 to 10,000; got 0"),
            (["--json", "--csv"], "mutually exclusive"),
            (["--prompt-tokens", "x"], "numbers of at least 1"),
            (["--tokens", "1"], "numbers of at least 2"),
            (["--tokens", "²"], "numbers of at least 2"),
            (["--paper"], "too small for the prompt of --paper"),
            (["--plot", "x.foo"], "unsupported image format"),
            (["--kv", "5"], "full, 8, 4 or window:N; got '5'"),
            (["--kv", "window:64", "--batch-size", "2"], "requires --batch-size 1"),
            (["--kv", "8", "--batch-size", "2", "--against", "mlx-lm"], "cannot batch with a quantized KV cache"),
            (["--preset", "2B"], "is not a published model"),
            (["--quantize", "4"], "--quantize requires --preset"),
            (["--preset", "270M", "--quantize", "7"], "got 7"),
            (["--preset", "270M", "--adapter", "x"], "--adapter requires --model"),
            (["-m", "nowhere/"], "does not exist"),
        ],
    )
    def test_mistakes_are_one_line(self, arguments, said):
        assert said in refused("bench", *arguments)


@pytest.mark.parametrize(
    ("case", "rounds", "said"),
    [
        (Case(prompt_tokens=10**11), 1, "`prompt_tokens` must be from 1 to"),
        (Case(max_tokens=10**11), 1, "`max_tokens` must be from 1 to"),
        (Case(batch_size=10**11), 1, "`batch_size` must be from 1 to"),
        (Case(prompt_tokens=2048, batch_size=1024), 1, "1,024 prompts of 2,048 tokens are more than"),
        (Case(), 10**9, "`rounds` must be from 1 to"),
        (Case(), 0, "`rounds` must be from 1 to"),
    ],
)
def test_numbers_have_two_bounds(case, rounds, said):
    with pytest.raises(BenchError, match=said):
        check_cases([case], None, rounds)


def test_a_case_that_does_not_fit_into_memory_is_refused(tiny_model, monkeypatch):
    monkeypatch.setattr(engine, "memory_limit_bytes", lambda: 1 << 20)
    with pytest.raises(MemoryLimitError):
        next(bench_cases(tiny_model, [Case(prompt_tokens=10**6, batch_size=1)], name="x", memory=FixedProbe(1e9)))
