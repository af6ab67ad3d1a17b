from __future__ import annotations

import json
from pathlib import Path

import pytest

from mimicbrush.errors import InputError
from mimicbrush.pipelines.editing.requests import Edit, collect_edits, number_outputs

LINE = {"source": "s.png", "mask": "m.png", "reference": "r.png"}


def write_list(folder: Path, *lines: object) -> Path:
    path = folder / "list.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


def test_a_line_says_all_there_is_to_say(tmp_path: Path) -> None:
    full = LINE | {"output": "sub/o.png", "seed": 5, "keep_shape": True, "reference_crop": [1, 2, 3, 4]}
    edits = collect_edits(write_list(tmp_path, LINE, "", full), tmp_path / "out", seed=9)
    paths = {name: tmp_path / value for name, value in LINE.items()}
    assert edits == [
        Edit(**paths, output=tmp_path / "out" / "s_edited.png", seed=9),
        Edit(**paths, output=tmp_path / "out/sub/o.png", seed=5, keep_shape=True, reference_crop=(1, 2, 3, 4)),
    ]
    assert collect_edits(write_list(tmp_path, LINE), tmp_path, keep_shape=True)[0].keep_shape
    several = {"source": "s.png", "mask_box": [1, 2, 3, 4], "reference": ["r.png", "t.png"]}
    (edit,) = collect_edits(write_list(tmp_path, several), tmp_path)
    assert (edit.mask, edit.mask_box, edit.references) == (None, (1, 2, 3, 4), (tmp_path / "r.png", tmp_path / "t.png"))
    assert edit.inputs == [tmp_path / name for name in ("s.png", "r.png", "t.png")]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not valid JSON"),
        pytest.param('{"source":' * 100_000, "is nested too deeply", id="deep"),
        ("[1]", "expected an object"),
        (LINE | {"sed": 1}, r"unknown key 'sed'; known: source, mask.*\. Did you mean 'seed'\?"),
        ({"source": "s.png", "mask": "m.png"}, "'reference' is missing"),
        (LINE | {"mask": 3}, "'mask' must be a path, got 3"),
        (LINE | {"mask": "../m.png"}, "leads outside of"),
        (LINE | {"output": "../o.png"}, "leads outside of"),
        (LINE | {"seed": True}, "'seed': expected a whole number"),
        (LINE | {"seed": -1}, "'seed': expected a whole number"),
        (LINE | {"keep_shape": 1}, "'keep_shape' must be true or false"),
        (LINE | {"reference_crop": [1, 2, 3]}, "'reference_crop' must be"),
        (LINE | {"reference_crop": [1, 2, 3, 4.5]}, "'reference_crop' must be"),
        (LINE | {"mask_box": [1, 2, 3, 4]}, "takes either a mask or a box .mask_box., got both"),
        ({"source": "s.png", "reference": "r.png", "mask_box": [1]}, "'mask_box' must be four whole numbers"),
        (LINE | {"reference": []}, "'reference' must be a path, got None"),
        (LINE | {"reference": ["r.png", 3]}, "'reference' must be a path, got 3"),
        (LINE | {"reference": ["r.png", "../t.png"]}, "leads outside of"),
        (LINE | {"reference": ["r.png"] * 5}, "an edit takes 1 to 4 references, got 5"),
        (LINE | {"reference": ["r.png", "t.png"], "reference_crop": [1, 2, 3, 4]}, "works only with one reference"),
    ],
)
def test_what_is_wrong_with_a_line_is_said_with_its_number(line: object, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=rf"list\.jsonl, line 3: .*{message}"):
        collect_edits(write_list(tmp_path, LINE, "", line), tmp_path / "out")


def test_a_list_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="lists no edits"):
        collect_edits(write_list(tmp_path, ""), tmp_path)
    for text in (json.dumps([LINE]), "\n" + json.dumps([LINE, LINE], indent=1)):
        (tmp_path / "list.jsonl").write_text(text)
        with pytest.raises(InputError, match=r"is a JSON array; expected JSON lines: one object \{"):
            collect_edits(tmp_path / "list.jsonl", tmp_path)
    (tmp_path / "list.jsonl").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(InputError, match="cannot be read as a list"):
        collect_edits(tmp_path / "list.jsonl", tmp_path)
    with pytest.raises(InputError, match="no such folder or list"):
        collect_edits(tmp_path / "absent", tmp_path)


def test_no_output_twice_and_none_that_is_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"two edits have the same output .*s_edited\.png"):
        collect_edits(write_list(tmp_path, LINE, LINE | {"seed": 2}), tmp_path)
    with pytest.raises(InputError, match="is also one of the images to read"):
        collect_edits(write_list(tmp_path, LINE | {"output": "r.png"}), tmp_path)
    taken = LINE | {"reference": "o_1.png", "output": "o.png"}
    assert collect_edits(write_list(tmp_path, taken), tmp_path)
    with pytest.raises(InputError, match=r"the output .*o_1\.png is also one of the images to read"):
        collect_edits(write_list(tmp_path, taken), tmp_path, num_images=2)


def test_the_benchmarks_layout(tmp_path: Path) -> None:
    for track in ("PartComp/CrossInstance", "TextureTrans/WithinInstance"):
        folder = tmp_path / "bench" / track
        folder.mkdir(parents=True)
        for number in ("001", "002"):
            for part in ("source", "source_mask", "reference"):
                (folder / f"{number}_{part}.png").touch()
    edits = collect_edits(tmp_path / "bench", tmp_path / "out")
    assert [edit.output.relative_to(tmp_path / "out").as_posix() for edit in edits] == [
        f"{track}/{number}_result.png"
        for track in ("PartComp/CrossInstance", "TextureTrans/WithinInstance")
        for number in ("001", "002")
    ]
    assert [edit.keep_shape for edit in edits] == [False, False, True, True]
    assert all(edit.mask.is_file() and edit.reference.is_file() and edit.seed == 1 for edit in edits)
    # One track alone, wherever the command is called from; and the user's word counts.
    alone = collect_edits(tmp_path / "bench/TextureTrans/WithinInstance", tmp_path / "out")
    assert [edit.output.name for edit in alone] == ["001_result.png", "002_result.png"]
    assert all(edit.keep_shape for edit in alone)
    assert not any(edit.keep_shape for edit in collect_edits(tmp_path / "bench", tmp_path, keep_shape=False))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"contains no NNN_source\.png"):
        collect_edits(tmp_path / "empty", tmp_path)


def test_numbers_of_several_images() -> None:
    assert number_outputs(Path("a/b.png"), 1) == [Path("a/b.png")]
    assert number_outputs(Path("a/b.c.png"), 2) == [Path("a/b.c_0.png"), Path("a/b.c_1.png")]
