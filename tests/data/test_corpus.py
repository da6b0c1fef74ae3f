import json

import pytest

from jaxherd.core.errors import JaxherdError
from jaxherd.data.corpus import JsonLines, TextFiles, is_heldout, load_corpus, plain_play


@pytest.fixture(scope="module")
def sides():
    return load_corpus("python+shakespeare"), load_corpus("python+shakespeare", split="heldout")


def test_no_file_is_on_both_sides(sides):
    train, heldout = ({(d.source, d.path) for d in side} for side in sides)
    assert train and heldout and not train & heldout
    texts = [{d.text for d in side} for side in sides]
    assert not texts[0] & texts[1]


def test_every_part_is_on_both_sides(sides):
    for side in sides:
        assert {d.source for d in side} == {"python", "topics", "shakespeare"}


def test_held_out_share(sides):
    train, heldout = (side.size_bytes() for side in sides)
    assert 0.02 < heldout / (train + heldout) < 0.08


def test_it_is_real_text(sides):
    play = next(d for side in sides for d in side if d.path == "tragedies/hamlet.md")
    assert play.text.startswith("Hamlet\n\nACT I\n\nSCENE I. Elsinore.")
    assert "[FRANCISCO at his post. Enter to him BERNARDO]" in play.text
    assert "BERNARDO:\nWho's there?" in play.text
    assert "**" not in play.text
    module = next(d for side in sides for d in side if d.path == "argparse.py")
    assert "class ArgumentParser" in module.text


def test_order_and_fingerprint_are_stable(sides):
    again = load_corpus("python+shakespeare", split="heldout")
    assert [d.path for d in again] == [d.path for d in sides[1]]
    assert again.fingerprint() == sides[1].fingerprint() != sides[0].fingerprint()


def test_max_bytes_takes_a_share_of_every_part():
    small = load_corpus("python+shakespeare", max_bytes=2_000_000)
    assert 1_500_000 < small.size_bytes() <= 2_000_000
    assert {d.source for d in small} == {"python", "topics", "shakespeare"}


def test_adding_files_moves_none(tmp_path):
    for n in range(40):
        (tmp_path / f"{n}.txt").write_text(f"text {n}")
    before = {d.path for d in load_corpus(str(tmp_path), heldout_fraction=0.3)}
    (tmp_path / "new.md").write_text("new")
    after = {d.path for d in load_corpus(str(tmp_path), heldout_fraction=0.3)}
    assert before <= after <= before | {"new.md"}


def test_same_text_under_two_names_is_kept_once(tmp_path):
    for n in range(200):
        (tmp_path / f"{n}.txt").write_text("the same" if n % 2 else f"text {n}")
    sides = [
        load_corpus(str(tmp_path), split=s, heldout_fraction=0.5) for s in ("train", "heldout")
    ]
    assert sum(d.text == "the same" for side in sides for d in side) == 1


def test_fraction():
    share = sum(is_heldout("s", f"{n}.py", 0.25) for n in range(4000)) / 4000
    assert 0.22 < share < 0.28


def test_text_files(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "x.txt").write_text("bx")
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "c.py").write_text("c")
    assert [d.text for d in TextFiles(tmp_path).documents()] == ["a", "bx"]
    assert [d.text for d in TextFiles(tmp_path, "*.py").documents()] == ["c"]
    with pytest.raises(JaxherdError, match=r"\*\.rst"):
        TextFiles(tmp_path, "*.rst").documents()


def test_one_file_is_cut_at_blank_lines(tmp_path):
    text = "\n".join(f"Paragraph {n}. " + "word " * 60 + "\n" for n in range(300))
    (tmp_path / "one.txt").write_text(text)
    sides = [
        load_corpus(str(tmp_path / "one.txt"), split=s, heldout_fraction=0.3)
        for s in ("train", "heldout")
    ]
    assert sum(d.text.count("Paragraph") for side in sides for d in side) == 300


def test_json_lines(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"body": f"t{n}"}) for n in range(3)) + "\n")
    assert [d.text for d in JsonLines(path, "body").documents()] == ["t0", "t1", "t2"]
    with pytest.raises(JaxherdError, match="Line 1 .*'text'"):
        JsonLines(path).documents()
    path.write_text('{"text": 3}\n')
    with pytest.raises(JaxherdError, match="no string"):
        JsonLines(path).documents()


@pytest.mark.parametrize(
    "name, options, words",
    [
        ("shakespear", {}, "did you mean 'shakespeare'"),
        ("python", {"split": "hold"}, "Choices: heldout, train"),
        ("python", {"heldout_fraction": 0.0}, "between 0 and 1"),
        ("python", {"max_bytes": 1}, "is empty"),
    ],
)
def test_bad_input(name, options, words):
    with pytest.raises(JaxherdError, match=words):
        load_corpus(name, **options)


def test_plain_play():
    text = "---\nfront: matter\n---\n# T\n\n**A**  \nHo\\--\n_goes\nout_\n\n\n\nsnake_case_ stays\n"
    assert plain_play(text) == "T\n\nA:\nHo--\n[goes\nout]\n\nsnake_case_ stays\n"
