"""The packaged tiny model, the language it speaks, and the script that makes it.

`language.py` generates the sentences and the tokenizer, `make_tiny.py` trains the model on them. The
result lies in `tiny/`: `model/` in Hugging Face layout, and `README.md`, the card.
"""

from pathlib import Path

#: The folder of the packaged tiny model: `model/` and `README.md`.
TINY: Path = Path(__file__).parent / "tiny"
