"""Word statistics of a text.

Reads UTF-8 text from stdin, prints a short summary, and writes words.csv (word, count, per_million, first_at)
into the working directory. The same text always gives the same bytes. Standard library only.
"""

from __future__ import annotations

import csv
import math
import re
import statistics
import sys
from collections import Counter

# A word may hold apostrophes and hyphens (don't, time-sharing), but neither begins nor ends with one.
WORD = re.compile(r"[^\W\d_]+(?:['\u2019-][^\W\d_]+)*")
SENTENCE_END = re.compile(r"[.!?]+[\"'\u201d\u2019)]*\s+|\n\s*\n")


def words_of(text: str) -> list[str]:
    return [word.replace("\u2019", "'").lower() for word in WORD.findall(text)]


def sentence_lengths(text: str) -> list[int]:
    """Lengths in words. Headings and list items end at a blank line, and count as sentences."""
    lengths = (len(WORD.findall(sentence)) for sentence in SENTENCE_END.split(text))
    return [length for length in lengths if length]


def zipf_exponent(counts: Counter[str], ranks: int = 500) -> float:
    """Least-squares slope of log(count) over log(rank): about -1 in natural language (Zipf's law)."""
    ordered = sorted(counts.values(), reverse=True)[:ranks]
    points = [(math.log(rank), math.log(count)) for rank, count in enumerate(ordered, 1)]
    return statistics.linear_regression(*zip(*points, strict=True)).slope


def write_words(path: str, words: list[str], counts: Counter[str]) -> None:
    first_at: dict[str, int] = {}
    for position, word in enumerate(words):
        first_at.setdefault(word, position)
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["word", "count", "per_million", "first_at"])
        for word, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
            writer.writerow([word, count, round(count * 1_000_000 / len(words)), first_at[word]])


def main() -> int:
    text = sys.stdin.buffer.read().decode("utf-8")
    words = words_of(text)
    if len(set(words)) < 2:
        print("job: the text on stdin has fewer than two different words", file=sys.stderr)
        return 1
    counts = Counter(words)
    lengths = sentence_lengths(text)
    once = sum(1 for count in counts.values() if count == 1)
    write_words("words.csv", words, counts)

    most_used = sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:10]
    print(f"characters          {len(text)}")
    print(f"words               {len(words)}")
    print(f"different words     {len(counts)}")
    print(f"used only once      {once} ({100 * once / len(counts):.1f} % of the different words)")
    print(f"longest word        {max(counts, key=lambda word: (len(word), word))}")
    print(f"mean word length    {statistics.fmean(map(len, words)):.2f}")
    print(f"sentences           {len(lengths)}")
    print(f"sentence length     median {statistics.median(lengths):g}, 90th percentile "
          f"{statistics.quantiles(lengths, n=10)[8]:g}, longest {max(lengths)} words")  # fmt: skip
    print(f"Zipf exponent       {zipf_exponent(counts):.3f}")
    print("most used           " + ", ".join(f"{word} {count}" for word, count in most_used))
    return 0


if __name__ == "__main__":
    sys.exit(main())
