"""The folder that is made: what it may replace, where links lead, and ends amid the exchange."""

import itertools
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fiddler.errors import QuantizeError
from tests.quantize.conftest import Quantize
from tests.quantize.test_run import Stop, contents, stop_at


def test_an_old_folder_stays_until_the_new_one_is_whole(run: Quantize, tmp_path: Path) -> None:
    run("w8g64")
    old = contents(tmp_path / "out")
    with pytest.raises(Stop):
        run("w4g32", on_progress=stop_at(23))
    assert contents(tmp_path / "out") == old
    run("w4g32", resume=True)
    assert "w4g32" in (tmp_path / "out" / "config.json").read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_fiddler_did_not_quantise_is_never_replaced(
    run: Quantize, tiny: Path, tmp_path: Path
) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").touch()
    for output in (tiny, tmp_path / "notes", tmp_path / "notes" / "a.txt"):
        with pytest.raises(QuantizeError, match="exists and is no model that fiddler quantised"):
            run(output=output)
    (tmp_path / "empty").mkdir()
    assert run(output=tmp_path / "empty").folder.name == "empty"
    (tmp_path / "other.partial").mkdir()
    (tmp_path / "other.partial" / "a.txt").touch()
    with pytest.raises(QuantizeError, match="is in the way"):
        run(output=tmp_path / "other", resume=True)


@pytest.mark.parametrize("is_there", [False, True])
def test_a_link_stays_and_the_model_goes_where_it_points(
    run: Quantize, tmp_path: Path, is_there: bool
) -> None:
    wanted = contents(run("w4g32", output=tmp_path / "whole").folder)
    real, link = tmp_path / "disk" / "model", tmp_path / "link"
    link.symlink_to(real)
    if is_there:
        run("w8g64", output=real)
    with pytest.raises(Stop):
        run("w4g32", output=link, on_progress=stop_at(20))
    assert run("w4g32", output=link, resume=True).folder == real
    assert link.readlink() == real and contents(link) == wanted
    assert {path.name for path in tmp_path.iterdir()} == {"whole", "disk", "link"}
    assert [path.name for path in real.parent.iterdir()] == ["model"]


def test_what_cannot_be_renamed_is_refused_before(
    run: Quantize, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A link to itself, a disk, or a folder that is mounted from another one of the same disk."""
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(QuantizeError, match="loop is a link that ends nowhere"):
        run(output=tmp_path / "loop")
    with pytest.raises(QuantizeError, match="/ is a mount point"):
        run(output=Path("/"))
    mounted = tmp_path / "my models"
    mounted.mkdir()
    (tmp_path / "mounts").write_text(f"9 1 8:1 /a {tmp_path}/my\\040models rw - ext4 /dev/x rw\n")
    monkeypatch.setattr("fiddler.quantize.place.MOUNTS", tmp_path / "mounts")
    with pytest.raises(QuantizeError, match="my models is a mount point") as caught:
        run(output=mounted)
    assert f"-o {mounted / 'model'}" in caught.value.hint
    assert not list(tmp_path.glob("*.partial"))
    assert run(output=mounted / "model").num_experts == 24


def dies_at(patch: pytest.MonkeyPatch, number: int) -> None:
    """Instead of the folder or file that is renamed or removed as the ``number``-th, a stop."""
    calls = itertools.count(1)

    def dying(act: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **options: Any) -> Any:
            if next(calls) == number:
                raise Stop
            return act(*arguments, **options)

        return counted

    for owner, name in ((Path, "rename"), (Path, "unlink"), (shutil, "rmtree")):
        patch.setattr(owner, name, dying(getattr(owner, name)))


def test_an_end_anywhere_in_the_exchange_is_gone_on_with(
    run: Quantize, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No expert is made twice; once the folder has its name, none is looked at either."""
    folder = tmp_path / "in"
    wanted = contents(run("w4g32", output=folder / "out").folder)
    for number in itertools.count(1):
        run("w8g64", output=folder / "out")
        with monkeypatch.context() as patch:
            dies_at(patch, number)
            try:
                run("w4g32", output=folder / "out")
                break
            except Stop:
                pass
        has_name = not (folder / "out.partial").exists()
        assert has_name == (number > 2)
        seen: list[Any] = []
        options = {"output": folder / "out", "resume": True}
        with monkeypatch.context() as patch:
            patch.setattr("fiddler.quantize.layers.write_shard", lambda *_: pytest.fail("again"))
            made = run("w4g32", **options, on_progress=lambda *told, to=seen: to.append(told))
        assert contents(made.folder) == wanted and made.num_experts == 24
        assert bool(seen) != has_name
        assert [path.name for path in folder.iterdir()] == ["out"]
    assert number > 5


def test_a_run_that_was_as_good_as_done_tells_the_same(
    run: Quantize, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"kind": "w4g32", "calibration": text, "sensitivity": 0.37}
    wanted = run(**options)
    shutil.rmtree(wanted.folder)
    with monkeypatch.context() as patch, pytest.raises(Stop):
        dies_at(patch, 2)  # the first rename is the folder's
        run(**options)
    assert run(**options, resume=True, on_progress=stop_at(1)) == wanted


def test_another_jobs_journal_or_a_cut_file_is_not_taken_for_a_whole_model(
    run: Quantize, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for kind in ("w4g32", "w8g64"):
        with monkeypatch.context() as patch, pytest.raises(Stop):
            dies_at(patch, 2)
            run("w4g32")
        victim = sorted((tmp_path / "out").glob("*.safetensors"))[1]
        os.truncate(victim, 100)
        assert run(kind, resume=True).num_experts == 24
        assert kind in (tmp_path / "out" / "config.json").read_text()
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
        shutil.rmtree(tmp_path / "out")


def test_a_folder_of_the_users_beside_it_is_not_touched(run: Quantize, tmp_path: Path) -> None:
    (tmp_path / "out.replaced").mkdir()
    (tmp_path / "out.replaced" / "mine").touch()
    with pytest.raises(QuantizeError, match=r"out\.replaced exists and is no model"):
        run()
    assert (tmp_path / "out.replaced" / "mine").exists()
