"""The fuzzers start from real requests: their seeds are what the wire's encoders make today."""

from __future__ import annotations

from fuzz import seeds


def test_the_seeds_are_up_to_date() -> None:
    committed = {
        str(path.relative_to(seeds.CORPUS)): path.read_bytes() for path in seeds.CORPUS.rglob("*") if path.is_file()
    }
    assert committed == seeds.seeds(), "run: python core/fuzz/seeds.py"


def test_every_harness_has_seeds() -> None:
    harnesses = {path.stem for path in seeds.CORPUS.parent.glob("*.c")}
    assert {name.split("/")[0] for name in seeds.seeds()} == harnesses
