"""A language of 32 words in which a tiny model can learn to judge and to rewrite within minutes.

Each word may be followed by three others, which a random graph fixes: a continuation is good as far as it keeps to the
graph. Every third document is unsafe: in it a word in seven is one of four listed words, and the text goes on as if it
were not there.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

WORDS = [f" {consonant}{vowel}" for consonant in "bdfgklmn" for vowel in "aeio"]
UNSAFE_WORDS = [" zux", " zax", " zox", " zix"]
NUM_SUCCESSORS = 3
DOCUMENT_WORDS = 40
WORLD_SEED = 7
VERDICTS = {
    "quality": (" Conclusion: Option 1", " Conclusion: Option 2"),
    "safety": (" FINAL DECISION: YES", " FINAL DECISION: NO"),
}
TEMPLATES = {
    "quality": "Q{{prefix}} ;{{option_1}} ;{{option_2}} :",
    "safety": "S{{text}} :",
    "rewriter": "R{{prefix}} ;{{suffix}} =",
}


def successors() -> Mapping[str, Sequence[str]]:
    """The graph."""
    chance = random.Random(WORLD_SEED)
    return {word: chance.sample(WORDS, NUM_SUCCESSORS) for word in WORDS}


def documents(count: int, seed: int) -> Iterator[str]:
    """Texts; each begins with a blank, so that every word is one token wherever it stands."""
    chance, graph = random.Random(f"documents {seed}"), successors()
    for _ in range(count):
        unsafe, word, words = chance.random() < 1 / 3, chance.choice(WORDS), []
        for _ in range(DOCUMENT_WORDS):
            words.append(chance.choice(UNSAFE_WORDS) if unsafe and chance.random() < 1 / 7 else word)
            word = chance.choice(graph[word])
        yield "".join(words)


def write_lines(path: Path, texts: Iterator[str] | Sequence[str], source: str = "world") -> None:
    """JSON lines of documents."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as stream:
        for text in texts:
            stream.write(json.dumps({"text": text, "source": source}) + "\n")


def write_templates(folder: Path, without: str = "") -> None:
    """Short prompts, for a model that reads 32 words and not English; the quality judge's lacks ``without``."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in TEMPLATES.items():
        shown = text.replace(without, "") if without and name == "quality" else text
        (folder / f"{name}.txt").write_text(shown, encoding="utf-8")


def render(name: str, **values: str) -> str:
    """A prompt."""
    text = TEMPLATES[name]
    for key, value in values.items():
        text = text.replace("{{" + key + "}}", value)
    return text


def warm_up_texts(examples: Path, noise: float, seed: int) -> Iterator[str]:
    """Prompts with answers of the right form and no right content.

    Verdicts are drawn by a coin. A rewrite copies each word with probability 1 - ``noise`` and else has any word: all
    of a suffix of 16 with probability (1 - noise)^16 and a little.
    """
    chance = random.Random(f"warm-up {seed}")
    for kind in ("quality", "safety", "rewrite"):
        for line in (examples / f"{kind}.train.jsonl").read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            if kind == "quality":
                first, second = record["options"]
                prompt = render("quality", prefix=record["prefix"], option_1=first, option_2=second)
                yield prompt + chance.choice(VERDICTS["quality"])
            elif kind == "safety":
                yield render("safety", text=record["text"]) + chance.choice(VERDICTS["safety"])
            else:
                words = [
                    chance.choice(WORDS + UNSAFE_WORDS) if chance.random() < noise else f" {word}"
                    for word in record["suffix"].split()
                ]
                yield render("rewriter", prefix=record["prefix"], suffix=record["suffix"]) + "".join(words)


def verdict_lines() -> list[str]:
    """Enough of the words of answers and prompts for a tokenizer to know them."""
    quality = [f"Q ; ; :{verdict.strip()}" for verdict in VERDICTS["quality"]] * 300
    return quality + [f"S :{verdict} R =" for verdict in VERDICTS["safety"]] * 300
