import csv
import json

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from conftest import draw, refused, run
from mlx_openelm import CacheConfig, OpenELMConfig, generate_tokens
from mlx_openelm.benchmark.bench import bench_cases, check_cases
from mlx_openelm.benchmark.measure import PAPER_PROMPT, Case, Spread, bytes_per_step, measure
from mlx_openelm.benchmark.models import Ours, Peer, Run, random_network
from mlx_openelm.benchmark.report import BenchReport
from mlx_openelm.errors import BenchError, MemoryLimitError
from mlx_openelm.generation import engine
from mlx_openelm.machine.hardware import battery_watts, chip_name, describe, memory_bandwidth, power_meter
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


class TestMeasure:
    def test_figures_by_hand(self):
        network = random_network(SMALL, mx.float32)
        case = Case(prompt_tokens=10, max_tokens=5, batch_size=2)
        ours = Clock("openelm-mlx", [1.0, 2.0, 4.0], [4.0, 2.0, 1.0], 1000)
        theirs = Clock("mlx-lm", [4.0, 4.0, 4.0], [4.0, 4.0, 4.0], 2000)
        found = measure(network, [ours, theirs], case, model="x", bandwidth=1e9)
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
            network, contestants, Case(3, 3), model="x", bandwidth=1e9, rounds=2, on_round=lambda *of: seen.append(of)
        )
        assert seen == [("a", 0), ("b", 0), ("a", 1), ("b", 1), ("a", 2), ("b", 2)]


class TestMachine:
    def test_it_is_described(self):
        found = describe("command")
        assert found["command"] == "command"
        assert found["chip"] == chip_name() != ""
        assert found["versions"]["mlx"]

    def test_memory_gives_something(self, monkeypatch):
        monkeypatch.setattr("mlx_openelm.machine.hardware._LARGE_BYTES", 1 << 22)
        assert 1e8 < memory_bandwidth() < 1e14

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
        results.append(measure(network, contestants, case, model="small", bandwidth=1e9, rounds=1))
    return BenchReport(tuple(results), 1e9, describe("x"))


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


class TestCommand:
    QUICK = ("--prompt-tokens", 8, "-n", 4, "--rounds", 1)

    @pytest.fixture(autouse=True)
    def little_memory_to_copy(self, monkeypatch):
        monkeypatch.setattr("mlx_openelm.machine.hardware._LARGE_BYTES", 1 << 20)

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
        next(bench_cases(tiny_model, [Case(prompt_tokens=10**6, batch_size=1)], name="x", bandwidth=1e9))
