"""Train a tokenizer of 160 pieces, as many as the checkpoints under `golden/` have rows: for `make demo`."""

import sys
from pathlib import Path

import sentencepiece

TEXT = "once upon a time there was a small fox who lived in an old garden and went down to the river each morning"


def main() -> None:
    folder = Path(sys.argv[1])
    (folder / "text.txt").write_text("\n".join([TEXT, *TEXT.split(), *(TEXT[n:] for n in range(20))]))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text.txt"),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=160,
        model_type="bpe",
        hard_vocab_limit=True,
        minloglevel=2,
    )


if __name__ == "__main__":
    main()
