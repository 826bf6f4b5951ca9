"""Model cards say where a model comes from: base model, licence, and what the hub needs to show it."""

import json
from dataclasses import replace

import pytest
import yaml
from huggingface_hub import ModelCard

from conftest import SMALL_CONFIG, random_model, write_folder
from mlx_openelm import (
    OpenELMConfig,
    PretrainRecipe,
    Quantization,
    TuneRecipe,
    average,
    convert,
    load,
    merge,
    pretrain,
    tune,
)
from mlx_openelm.conversion.adapters.forms import convert_adapter
from mlx_openelm.conversion.origin import Origin, origin_from_card, origin_of, origin_of_model

REPOSITORY = "someone/OpenELM-small"


def metadata(folder):
    """What the hub reads from the card of a folder."""
    return ModelCard.load(folder / "README.md").data.to_dict()


def card(folder, **values):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump(values)}---\n\n# A model\n")
    return folder


@pytest.fixture(scope="module")
def cached(tmp_path_factory, chat_tokenizer):
    """A model in the hub's cache, with a card like Apple's."""
    folder = tmp_path_factory.mktemp("hub") / f"models--{REPOSITORY.replace('/', '--')}" / "snapshots" / "0123abc"
    write_folder(folder, random_model(replace(SMALL_CONFIG, max_context_length=512)), chat_tokenizer)
    return card(folder, license="apple-amlr", license_link="LICENSE")


@pytest.fixture(scope="module")
def tuned(tmp_path_factory, cached):
    place = tmp_path_factory.mktemp("tuned")
    records = [{"prompt": f"{number} and", "completion": f" {number + 1}."} for number in range(8)]
    (place / "data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (place / "adapter").mkdir()
    (place / "adapter" / "README.md").write_text("my notes")
    recipe = TuneRecipe(model=cached, data=place / "data.jsonl", dtype="float32", rank=2, steps=1)
    tune(recipe, place / "adapter")
    return place


class TestWhatIsWritten:
    def test_a_quantized_model(self, tmp_path, cached):
        convert(cached, tmp_path / "small-4bit", quantize=4, group_size=32)
        assert metadata(tmp_path / "small-4bit") == {
            "library_name": "mlx",
            "pipeline_tag": "text-generation",
            "base_model": REPOSITORY,
            "base_model_relation": "quantized",
            "license": "apple-amlr",
            "license_link": f"https://huggingface.co/{REPOSITORY}/blob/main/LICENSE",
            "tags": ["mlx", "openelm"],
        }

    def test_it_survives_further_conversions_and_averaging(self, tmp_path, cached):
        convert(cached, tmp_path / "once")
        convert(tmp_path / "once", tmp_path / "twice", dtype="float32")
        average([tmp_path / "once", tmp_path / "twice"], tmp_path / "average")
        expected = {"base_model": REPOSITORY, "license": "apple-amlr"}
        for name in ("once", "twice", "average"):
            assert expected.items() <= metadata(tmp_path / name).items(), name

    def test_an_adapter_its_checkpoints_and_its_conversion(self, tuned, tmp_path):
        convert_adapter(tuned / "adapter", tmp_path / "peft", to="peft")
        checkpoint = tuned / "adapter" / "checkpoints" / "step-00000001"
        for folder, library in ((tuned / "adapter", "mlx"), (checkpoint, "mlx"), (tmp_path / "peft", "peft")):
            found = metadata(folder)
            assert found["library_name"] == library
            assert found["base_model"] == REPOSITORY
            assert found["base_model_relation"] == "adapter"
            assert found["license"] == "apple-amlr"
            assert "lora" in found["tags"]

    def test_the_notes_of_a_user_are_kept_beside_the_card(self, tuned):
        assert (tuned / "adapter" / "README-old.md").read_text() == "my notes"

    def test_a_merged_model(self, tuned, cached, tmp_path):
        merge(cached, tuned / "adapter", tmp_path / "merged", quantization=Quantization(4, 32))
        found = metadata(tmp_path / "merged")
        assert (found["base_model"], found["base_model_relation"]) == (REPOSITORY, "finetune")
        assert found["license"] == "apple-amlr"
        text = (tmp_path / "merged" / "README.md").read_text()
        assert "--adapter adapter --output merged --quantize 4" in text
        assert str(tmp_path) not in text

    def test_a_model_trained_from_scratch(self, tmp_path):
        (tmp_path / "story.txt").write_text("\n<|endoftext|>\n".join(f"The fox read {n} books." for n in range(40)))
        recipe = PretrainRecipe(
            model=SMALL_CONFIG,
            data=str(tmp_path / "story.txt"),
            train_tokenizer=300,
            sequence_length=16,
            steps=1,
            batch_size=2,
            warmup_steps=0,
            dtype="float32",
        )
        result = pretrain(recipe, tmp_path / "my-run")
        found = metadata(result.checkpoint)
        assert "base_model" not in found
        assert (found["library_name"], found["pipeline_tag"], found["license"]) == ("mlx", "text-generation", "unknown")
        text = (result.checkpoint / "README.md").read_text()
        assert "set `license` above" in text
        assert "--model my-run" in text
        assert str(tmp_path) not in text
        load(result.checkpoint)


class TestWhereItComesFrom:
    def test_a_model_of_apple_by_name_and_widths(self, tmp_path):
        config = OpenELMConfig.preset("1.1B")
        apple = Origin("apple/OpenELM-1_1B-Instruct", "apple-amlr")
        assert origin_of(tmp_path / "OpenELM-1_1B-Instruct", config) == apple
        assert origin_of(tmp_path / "OpenELM-1_1B-Instruct", OpenELMConfig.preset("270M")) == Origin()
        assert origin_of(tmp_path / "my-1_1B", config) == Origin()

    def test_the_built_in_model_is_not_on_the_hub(self):
        assert origin_of_model("openelm-tiny", SMALL_CONFIG).base_model is None

    def test_a_repository_that_is_not_cached_is_its_own_base(self, monkeypatch):
        monkeypatch.setattr("mlx_openelm.conversion.origin.cached_file", lambda *names: None)
        assert origin_of_model("someone/model", SMALL_CONFIG) == Origin("someone/model")

    def test_the_card_of_a_folder(self, tmp_path):
        folder = card(tmp_path, license="other", license_name="my-terms", base_model=["apple/OpenELM-270M"])
        assert origin_of(folder, SMALL_CONFIG) == Origin("apple/OpenELM-270M", "other", "my-terms")

    def test_a_link_to_a_file_of_an_unknown_repository_is_left_out(self, tmp_path):
        folder = card(tmp_path, license="other", license_link="LICENSE")
        assert origin_of(folder, SMALL_CONFIG) == Origin(license="other")


@pytest.mark.parametrize(
    "text",
    [
        "# No metadata\n",
        "---\nlicense: [a, b]\nbase_model: {a: b}\n---\n",
        "---\nlicense: 'x\n---\n",
        "---\n- mit\n---\n",
        "---\nlicense: 7\nbase_model: ../../etc\n---\n",
        '---\nlicense: "a\\nb"\nbase_model: "a/b\\x1b[31m"\n---\n',
        "---\nlicense: " + "x" * 500 + "\n---\n",
        "---\n" + "[" * 5000 + "\n---\n",
    ],
)
def test_a_damaged_card_is_no_card(tmp_path, text):
    (tmp_path / "README.md").write_text(text)
    assert origin_from_card(tmp_path) == Origin()


def test_a_card_that_leaves_its_folder_is_not_read(tmp_path):
    card(tmp_path / "elsewhere", license="mit")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "README.md").symlink_to(tmp_path / "elsewhere" / "README.md")
    assert origin_from_card(tmp_path / "model") == Origin()
